"""Attention of blocks to the blocks in their lists (BigBird), in Triton kernels for CUDA.

Every block of queries has a list of the blocks of keys that it sees, whole and each once; the transposed lists serve the
gradient of the keys. Lists may be of any length: those of blocks that see everything are cut into parts. Nothing is
gathered, and there is no limit to the number of shapes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longspan.engine.kernels import contiguous_rows
from longspan.engine.window import window_sinks
from longspan.util.device import on_device
from longspan.util.errors import SpecError

SIZES = (16, 32, 64, 128)
"""Tokens of a block that the kernels know."""
LONGEST = 32
"""Entries of a list that one program goes through."""


@dataclass(frozen=True, eq=False)
class Lists:
    """starts (H · blocks + 1): where in `index` the list of each block of each head begins, and where the last one ends. index:
    all lists. work (N, 4): a block, which part of its list, of how many, and the slot for what it comes to, -1 where the list is
    whole; the longest first, alike for all heads. owners (M, 3): each block whose list has parts, its first slot, how many. All
    int32."""

    work: Tensor
    starts: Tensor
    index: Tensor
    owners: Tensor

    @property
    def tables(self) -> list[Tensor]:
        return [self.work, self.starts, self.index, self.owners]


@dataclass(frozen=True, eq=False)
class BlockLists:
    """Which of the `count` blocks of `block` tokens see which: by the block that sees, and by the one that is seen."""

    block: int
    count: int
    seeing: Lists
    seen: Lists

    @property
    def heads(self) -> int:
        return (len(self.seeing.starts) - 1) // self.count

    def visited(self) -> int:
        """Pairs in the blocks of all heads."""
        return len(self.seeing.index) * self.block**2


def block_lists(head: Tensor, row: Tensor, column: Tensor, heads: int, count: int, block: int) -> BlockLists:
    """From pairs, each once: on `head`, block `row` of queries sees block `column` of keys; int64, all of one length. Every block
    sees one at least."""
    return BlockLists(block, count, _lists(head, row, column, heads, count), _lists(head, column, row, heads, count))


def _lists(head: Tensor, row: Tensor, column: Tensor, heads: int, count: int) -> Lists:
    key = (head * count + row) * count + column
    order = key.argsort()
    sizes = torch.bincount(head * count + row, minlength=heads * count)
    starts = torch.cat((sizes.new_zeros(1), sizes.cumsum(0))).int()
    work, owners = _work(sizes.view(heads, count).amax(0))
    return Lists(work, starts, column[order].int(), owners)


def _work(sizes: Tensor) -> tuple[Tensor, Tensor]:
    """`work` and `owners` for lists of at most sizes (blocks,) entries."""
    parts = (sizes + LONGEST - 1) // LONGEST
    block = torch.repeat_interleave(parts)
    of = parts[block]
    part = torch.arange(len(block), device=sizes.device) - (parts.cumsum(0) - parts)[block]
    slot = torch.where(of > 1, (of > 1).cumsum(0) - 1, -1)
    longest = (-(-sizes[block] // of)).argsort(descending=True, stable=True)
    work = torch.stack((block, part, of, slot), dim=1)[longest].int()
    first = (of > 1) & (part == 0)
    return work, torch.stack((block, slot, of), dim=1)[first].int()


def refusal(query: Tensor, key: Tensor, value: Tensor, block: int) -> str | None:
    """Why the kernels cannot answer, or None."""
    if block not in SIZES:
        return f"it runs blocks of {', '.join(map(str, SIZES))} tokens, not of {block}"
    return window_sinks.refusal(query, key, value)


def listed_attention(query: Tensor, key: Tensor, value: Tensor, lists: BlockLists, scale: float) -> Tensor:
    """query (B, H, T, D), key and value (B, H_kv, T, D) → (B, H, T, D), for what `refusal` does not refuse. The last block of
    a text may be short. Raises `SpecError` for lists of another length."""
    heads, tokens = query.shape[1:3]
    if key.shape[2] != tokens or -(-tokens // lists.block) != lists.count or lists.heads != heads:
        raise SpecError(
            f"lists of {lists.count} blocks of {lists.block} for {lists.heads} heads do not fit {heads} heads of "
            f"{tokens} queries and {key.shape[2]} keys"
        )
    return _Listed.apply(query, key, value, *lists.seeing.tables, *lists.seen.tables, lists.block, scale)[0]


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


def _room(like: Tensor, work: Tensor, starts: Tensor, owners: Tensor, heads: int, block: int, width: int) -> Tensor:
    """For what the parts of long lists come to, (B, H of `like`, slots, block, width) float32. There is a slot for every piece of
    work but those on whole lists."""
    count = (len(starts) - 1) // heads
    slots = len(work) - (count - len(owners))
    return like.new_empty((*like.shape[:2], slots, block, width), dtype=torch.float32)


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


@torch.library.custom_op("longspan::listed_forward", mutates_args=())
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    work: Tensor,
    starts: Tensor,
    index: Tensor,
    owners: Tensor,
    block: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The output, and each row's log-sum-exp to base 2 (B, H, T)."""
    from longspan.engine.blocks.kernels import forward, join_forward

    query, key, value = contiguous_rows(query, key, value)
    batch, heads, tokens, width = query.shape
    out, lse = torch.empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)
    part_out, part_lse = (_room(query, work, starts, owners, heads, block, n) for n in (width, 1))
    count, slots = (len(starts) - 1) // heads, part_out.shape[2]
    choices = _choices(query, key, block)
    with on_device(query.device):
        forward[(len(work), batch * heads)](
            *(query, key, value, out, lse, part_out, part_lse, work, starts, index, heads, tokens, count, slots, scale),
            *_strides(query, key, value, out),
            **choices,
        )
        if len(owners):
            join_forward[(len(owners), batch * heads)](
                *(part_out, part_lse, out, lse, owners, heads, tokens, slots), *_strides(out), WIDTH=width, BLOCK=block
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
    work: Tensor,
    starts: Tensor,
    index: Tensor,
    owners: Tensor,
    key_work: Tensor,
    key_starts: Tensor,
    key_index: Tensor,
    key_owners: Tensor,
    block: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Derivatives by query, key and value."""
    from longspan.engine.blocks.kernels import backward_keys, backward_queries, join_gradients

    query, key, value, d_out = contiguous_rows(query, key, value, d_out)
    (batch, heads, tokens, width), kv_heads = query.shape, key.shape[1]
    dq, dk, dv = (torch.empty_like(x) for x in (query, key, value))
    delta = (out.float() * d_out.float()).sum(-1)
    part_query = _room(query, work, starts, owners, heads, block, width)
    part_key, part_value = (_room(key, key_work, key_starts, key_owners, heads, block, width) for _ in range(2))
    count = (len(starts) - 1) // heads
    with on_device(query.device):
        backward_queries[(len(work), batch * heads)](
            *(query, key, value, d_out, dq, part_query, lse, delta, work, starts, index),
            *(heads, tokens, count, part_query.shape[2], scale),
            *_strides(query, key, value, d_out, dq),
            **_choices(query, key, block),
        )
        backward_keys[(len(key_work), batch * kv_heads)](
            *(query, key, value, d_out, dk, dv, part_key, part_value, lse, delta, key_work, key_starts, key_index),
            *(heads, tokens, count, part_key.shape[2], scale),
            *_strides(query, key, value, d_out, dk, dv),
            **_choices(query, key, block, accumulators=2),
        )
        for sums, gradient, of in ((part_query, dq, owners), (part_key, dk, key_owners), (part_value, dv, key_owners)):
            if len(of):
                join_gradients[(len(of), batch * gradient.shape[1])](
                    *(sums, gradient, of, gradient.shape[1], tokens, sums.shape[2]),
                    *_strides(gradient),
                    WIDTH=width,
                    BLOCK=block,
                )
    return dq, dk, dv


@_forward.register_fake
def _(query: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(contiguous_rows(query)[0]), query.new_empty(query.shape[:3], dtype=torch.float32)


@_backward.register_fake
def _(d_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(x) for x in contiguous_rows(query, key, value))
    return dq, dk, dv


class _Listed(torch.autograd.Function):
    """The two operators as one function with a derivative, which torch.func knows too."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        return torch.ops.longspan.listed_forward(*inputs[:7], *inputs[-2:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        query, key, value, *tables, ctx.block, ctx.scale = inputs
        ctx.save_for_backward(query, key, value, *output, *tables)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple:
        grads = torch.ops.longspan.listed_backward(d_out, *ctx.saved_tensors, ctx.block, ctx.scale)
        return (*grads, *[None] * 10)
