"""Dilated attention (LongNet) in Triton kernels, forward and backward: one launch per pattern.

Pattern (size, step) cuts the text into segments of `size` tokens, of each of which head h takes every `step`-th from number
h mod `step` on, as queries, keys and values alike. All patterns make one softmax, in which a key of m patterns counts m times.
A launch goes through the keys of one pattern and adds them to what the launches before have left, in float32; the pattern that
takes all tokens comes last and writes the result. The gradient needs the common log-sum-exp only, in any order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longspan.engine.kernels import INTERPRETED, contiguous_rows, result_shapes, strided, strides
from longspan.engine.window.window_sinks import refusal as refusal
from longspan.util.device import on_device
from longspan.util.errors import SpecError

TILES = {  # BM, BN, warps, stages, for heads of up to 64 and for larger ones
    "forward": ((128, 64, 4, 3), (64, 64, 4, 3)),
    "queries": ((64, 64, 4, 3), (64, 32, 4, 3)),
    "keys": ((64, 128, 8, 3), (32, 64, 4, 3)),
}
"""Fixed, since a launch that adds to what lies there cannot be tried twice: for larger heads those that were the fastest on an
H200 at 32,768 and 131,072 tokens, for smaller ones those that windows were fastest with."""
TILE = 64
"""Queries and keys of a tile of the forward for larger heads."""


def dilated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    patterns: Sequence[tuple[int, int]],
    *,
    causal: bool,
    scale: float,
    ends: Tensor | None = None,
    zero_key: bool = False,
) -> Tensor:
    """query (B, H, T, D), key and value (B, H_kv, T, D) → (B, H, T, D), for what `refusal` does not refuse.

    patterns: (size, step), the first with step 1. ends (B,): how many tokens each row has, the rest get zeros. zero_key: a key
    and a value of zeros are in every query's softmax. Raises `SpecError` for what does not go together."""
    text = query.shape[2]
    if key.shape != value.shape or key.shape[2] != text or query.shape[1] % key.shape[1] or not scale > 0 or not text:
        raise SpecError(f"query {tuple(query.shape)} and key {tuple(key.shape)} at scale {scale} cannot meet")
    if not patterns or patterns[0][1] != 1 or any(not 1 <= step <= size for size, step in patterns):
        raise SpecError(f"patterns are (size, step) with 1 ≤ step ≤ size, the first of step 1, not {list(patterns)}")
    numbers = [n for size, step in (*patterns[1:], patterns[0]) for n in (min(size, max(text, step)), step)]
    ends = None if ends is None else ends.to(torch.int32).contiguous()
    return _Dilated.apply(query, key, value, ends, numbers, causal, zero_key, scale)[0]


def visited(text: int, heads: int, size: int, step: int, *, causal: bool) -> int:
    """Pairs in the tiles of TILE that the pattern (size, step) goes through in a text, of all heads."""
    pairs = 0
    for head in range(heads):
        for room, segments in ((min(size, text), text // size or 1), (text % size if text > size else 0, 1)):
            tiles = -(-max(room - head % step, 0) // (step * TILE))
            pairs += segments * TILE**2 * (tiles * (tiles + 1) // 2 if causal else tiles**2)
    return pairs


def _pairs(numbers: list[int]) -> list[tuple[int, int]]:
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def _far(step: int, tensors: tuple[Tensor, ...], choices: dict[str, Any]) -> bool:
    """Whether rows of one tile lie 2³¹ numbers apart or more: what counts them is 64 bits wide only then."""
    return step * max(choices["BM"], choices["BN"]) * max(strides(x).row for x in tensors) >= 2**31


def _choices(kind: str, query: Tensor, key: Tensor, ends: Tensor | None, causal: bool) -> dict[str, Any]:
    narrow, wide = TILES[kind]
    rows, columns, warps, stages = wide if query.shape[-1] > 64 else narrow
    if query.element_size() == 4:
        rows, columns, warps, stages = 32, 32, 4, 1
    if INTERPRETED:
        rows, columns = 32, 16
    return {
        "GROUP": query.shape[1] // key.shape[1],
        "WIDTH": query.shape[-1],
        "CAUSAL": causal,
        "ENDS": ends is not None,
        "PRECISION": "ieee",  # float32 inputs are multiplied as such
        "heads": query.shape[1],
        "text": query.shape[2],
        "BM": rows,
        "BN": columns,
        "num_warps": warps,
        "num_stages": stages,
    }


def _grid(query: Tensor, size: int, step: int, tile: int) -> tuple[int, tuple[int, int]]:
    """Tiles of a segment, and the programs of a launch."""
    batch, heads, text, _ = query.shape
    taken = -(-min(size, text) // step)
    blocks = -(-taken // tile)
    return blocks, (blocks * -(-text // size), batch * heads)


@torch.library.custom_op("longspan::dilated_forward", mutates_args=())
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ends: Tensor | None,
    patterns: list[int],
    causal: bool,
    zero_key: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The output, and each row's log-sum-exp to base 2 (B, H, T)."""
    from longspan.engine.dilated.kernels import forward

    query, key, value = contiguous_rows(query, key, value)
    out = torch.empty_like(query)
    lse = query.new_full(query.shape[:3], 0.0 if zero_key else float("-inf"), dtype=torch.float32)
    sums = lse
    if zero_key or len(patterns) > 2:
        make = query.new_zeros if zero_key else query.new_empty
        sums = make(query.shape, dtype=torch.float32)
    choices = _choices("forward", query, key, ends, causal)
    pairs, tensors = _pairs(patterns), (query, key, value, out)
    shared = strided(query=query, key=key, value=value, out=out)
    shared |= {"sums": sums, "lse": lse, "ends": lse if ends is None else ends, "scale": scale}
    with on_device(query.device):
        for number, (size, step) in enumerate(pairs):
            blocks, grid = _grid(query, size, step, choices["BM"])
            forward[grid](
                **shared,
                **choices,
                size=size,
                step=step,
                blocks=blocks,
                LAST=number == len(pairs) - 1,
                FAR=_far(step, tensors, choices),
            )
    return out, lse


@torch.library.custom_op("longspan::dilated_backward", mutates_args=())
def _backward(
    d_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    ends: Tensor | None,
    patterns: list[int],
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Derivatives by query, key and value."""
    from longspan.engine.dilated.kernels import backward_keys, backward_queries

    query, key, value, d_out = contiguous_rows(query, key, value, d_out)
    delta = (out.float() * d_out.float()).sum(-1)
    dq, dk, dv = (query.new_zeros(query.shape, dtype=torch.float32) for _ in range(3))
    shared = strided(query=query, key=key, value=value, d_out=d_out)
    shared |= {"lse": lse, "delta": delta, "ends": lse if ends is None else ends, "scale": scale}
    for_queries, for_keys = (_choices(kind, query, key, ends, causal) for kind in ("queries", "keys"))
    launches = (
        (backward_queries, for_queries, for_queries["BM"], {"sums": dq}),
        (backward_keys, for_keys, for_keys["BN"], {"d_key": dk, "d_value": dv}),
    )
    with on_device(query.device):
        for size, step in _pairs(patterns):
            for kernel, choices, tile, results in launches:
                blocks, grid = _grid(query, size, step, tile)
                far = _far(step, (query, key, value, d_out), choices)
                kernel[grid](**shared, **choices, **results, size=size, step=step, blocks=blocks, FAR=far)
    dk, dv = (x.unflatten(1, (key.shape[1], -1)).sum(2) for x in (dk, dv))
    return dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype)


_forward.register_fake(result_shapes)


@_backward.register_fake
def _(d_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(x.new_empty(x.shape) for x in (query, key, value))  # type: ignore[return-value]


class _Dilated(torch.autograd.Function):
    """The two operators as one function with a derivative, which torch.func knows too."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        return torch.ops.longspan.dilated_forward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        query, key, value, ends, ctx.patterns, ctx.causal, _, ctx.scale = inputs
        ctx.save_for_backward(query, key, value, *output, ends)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple:
        settings = ctx.patterns, ctx.causal, ctx.scale
        grads = torch.ops.longspan.dilated_backward(d_out, *ctx.saved_tensors, *settings)
        return (*grads, None, None, None, None, None)
