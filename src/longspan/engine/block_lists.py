"""Attention of blocks of tokens to blocks of tokens that lists name (BigBird), in kernels of our own for CUDA.

Every block of queries has a list of the blocks of keys that it sees, whole and each once; the same turned round serves the
gradient of the keys. Lists may be of any length, so blocks that see everything are lists like others. Nothing is gathered, and
there is no limit to the number of shapes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longspan.engine import window_sinks
from longspan.engine.biased import _on, _rows_whole, _strides
from longspan.errors import SpecError

try:
    from longspan.engine.kernels import block_lists as kernels
    from longspan.engine.kernels.biased import INTERPRETED
except ImportError:  # no Triton
    kernels = None  # type: ignore[assignment]
    INTERPRETED = False

SIZES = (16, 32, 64, 128)
"""Tokens of a block that the kernels know."""


@dataclass(frozen=True, eq=False)
class Lists:
    """order (H, blocks): the blocks, those with the longest lists first. starts (H · blocks + 1): where in `index` the list of
    each block of each head begins, and where the last one ends. index: all lists. All int32."""

    order: Tensor
    starts: Tensor
    index: Tensor


@dataclass(frozen=True, eq=False)
class BlockLists:
    """Which of the `count` blocks of `block` tokens see which: by the block that sees, and by the one that is seen."""

    block: int
    count: int
    seeing: Lists
    seen: Lists


def block_lists(head: Tensor, row: Tensor, column: Tensor, heads: int, count: int, block: int) -> BlockLists:
    """From pairs, each once: on `head`, block `row` of queries sees block `column` of keys; int64, all of one length. Every block
    sees one at least."""
    return BlockLists(block, count, _lists(head, row, column, heads, count), _lists(head, column, row, heads, count))


def _lists(head: Tensor, row: Tensor, column: Tensor, heads: int, count: int) -> Lists:
    key = (head * count + row) * count + column
    order = key.argsort()
    sizes = torch.bincount(head * count + row, minlength=heads * count)
    starts = torch.cat((sizes.new_zeros(1), sizes.cumsum(0))).int()
    longest = sizes.view(heads, count).argsort(dim=1, descending=True, stable=True)
    return Lists(longest.int(), starts, column[order].int())


def refusal(query: Tensor, key: Tensor, value: Tensor, block: int) -> str | None:
    """Why the kernels cannot answer, or None."""
    if block not in SIZES:
        return f"it runs blocks of {', '.join(map(str, SIZES))} tokens, not of {block}"
    return window_sinks.refusal(query, key, value)


def listed_attention(query: Tensor, key: Tensor, value: Tensor, lists: BlockLists, scale: float) -> Tensor:
    """query (B, H, T, D), key and value (B, H_kv, T, D) → (B, H, T, D), for what `refusal` does not refuse. The last block of
    a text may be short. Raises `SpecError` for lists of another length."""
    heads, tokens = query.shape[1:3]
    if key.shape[2] != tokens or -(-tokens // lists.block) != lists.count or lists.seeing.order.shape[0] != heads:
        raise SpecError(
            f"lists of {lists.count} blocks of {lists.block} for {lists.seeing.order.shape[0]} heads do not fit {heads} heads of "
            f"{tokens} queries and {key.shape[2]} keys"
        )
    tables = [getattr(x, name) for x in (lists.seeing, lists.seen) for name in ("order", "starts", "index")]
    return _Listed.apply(query, key, value, *tables, lists.block, scale)[0]


def _choices(query: Tensor, key: Tensor, block: int, *, accumulators: int = 1) -> dict[str, Any]:
    """accumulators: how many results (BLOCK, WIDTH) a program carries; two wide ones take the registers of 8 warps."""
    return {
        "GROUP": query.shape[1] // key.shape[1],
        "WIDTH": query.shape[-1],
        "BLOCK": block,
        "PRECISION": "ieee",  # float32 inputs are multiplied as such
        "num_warps": 8 if block == 128 or block * query.shape[-1] * accumulators > 2**13 else 4,
        "num_stages": 1 if query.element_size() == 4 else 2 if query.shape[-1] * block > 2**13 else 3,
    }


@torch.library.custom_op("longspan::listed_forward", mutates_args=())
def _forward(
    query: Tensor, key: Tensor, value: Tensor, order: Tensor, starts: Tensor, index: Tensor, block: int, scale: float
) -> tuple[Tensor, Tensor]:
    """The output, and each row's log-sum-exp to base 2 (B, H, T)."""
    query, key, value = _rows_whole(query, key, value)
    batch, heads, tokens, _ = query.shape
    out, lse = torch.empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)
    count = order.shape[1]
    with _on(query.device):
        kernels.forward[(count, batch * heads)](
            *(query, key, value, out, lse, order, starts, index, heads, tokens, count, scale),
            *_strides(query, key, value, out),
            **_choices(query, key, block),
        )
    return out, lse


@torch.library.custom_op("longspan::listed_backward", mutates_args=())
def _backward(
    d_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    order: Tensor,
    starts: Tensor,
    index: Tensor,
    key_order: Tensor,
    key_starts: Tensor,
    key_index: Tensor,
    block: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Derivatives by query, key and value."""
    query, key, value, d_out = _rows_whole(query, key, value, d_out)
    batch, heads, tokens, _ = query.shape
    dq, dk, dv = (torch.empty_like(x) for x in (query, key, value))
    delta = (out.float() * d_out.float()).sum(-1)
    count = order.shape[1]
    sizes = heads, tokens, count, scale
    with _on(query.device):
        kernels.backward_queries[(count, batch * heads)](
            *(query, key, value, d_out, dq, lse, delta, order, starts, index, *sizes),
            *_strides(query, key, value, d_out, dq),
            **_choices(query, key, block),
        )
        kernels.backward_keys[(count, batch * key.shape[1])](
            *(query, key, value, d_out, dk, dv, lse, delta, key_order, key_starts, key_index, *sizes),
            *_strides(query, key, value, d_out, dk, dv),
            **_choices(query, key, block, accumulators=2),
        )
    return dq, dk, dv


@_forward.register_fake
def _(query: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(_rows_whole(query)[0]), query.new_empty(query.shape[:3], dtype=torch.float32)


@_backward.register_fake
def _(d_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(x) for x in _rows_whole(query, key, value))
    return dq, dk, dv


class _Listed(torch.autograd.Function):
    """The two operators as one function with a derivative, which torch.func knows too."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        query, key, value, order, starts, index, _, _, _, block, scale = inputs
        return torch.ops.longspan.listed_forward(query, key, value, order, starts, index, block, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        query, key, value, *tables, ctx.block, ctx.scale = inputs
        ctx.save_for_backward(query, key, value, *output, *tables)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple:
        grads = torch.ops.longspan.listed_backward(d_out, *ctx.saved_tensors, ctx.block, ctx.scale)
        return (*grads, *[None] * 8)
