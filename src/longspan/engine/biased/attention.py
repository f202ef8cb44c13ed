"""Attention with a bias by distance, forward and backward, without a matrix of scores.

`reference` is the formula in plain torch, in blocks of queries: it is the definition, and runs on a CPU. On CUDA Triton
kernels run it, as two operators registered with torch: torch.compile sees calls with known shapes, not kernels.
Distance d is query position minus key position; the queries are the last Tq of the Tk keys.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from longspan.engine import kernels
from longspan.engine.biased.bias import Bias
from longspan.engine.core import expand_heads, reference_mix
from longspan.engine.kernels import LONG, MOST_PAIRS, contiguous_rows, result_shapes, strided
from longspan.util.device import on_device
from longspan.util.errors import SpecError

LOG2E = 1.4426950408889634
MOST_SCORES = 2**24
"""Scores that the reference holds at once."""
PAD = 256
"""Numbers past either end of a table that a kernel's tile of at most 128 × 128 may read."""


def biased_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Bias,
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    starts: Tensor | None = None,
) -> Tensor:
    """softmax(scale · q kᵀ + bias) v: query (B, H, Tq, D), key and value (B, H_kv, Tk, D) → (B, H, Tq, D).

    With `window`, a query sees 0 ≤ d < window. starts (B,) says where each row's tokens begin: earlier keys are not seen,
    earlier queries get zeros. Raises `SpecError` for shapes and settings that do not go together."""
    _check(query, key, value, bias, scale, causal, window, starts)
    if not serves(query, key, bias) or value.shape != key.shape or value.dtype != key.dtype:
        return reference(query, key, value, bias, scale=scale, causal=causal, window=window, starts=starts)
    bias = bias.clipped()
    starts = None if starts is None else starts.to(torch.int32).contiguous()
    settings = (bias.kind, bias.offset, scale, causal, window)
    return _Biased.apply(query, key, value, bias.a, bias.b, starts, *settings)[0]


def serves(query: Tensor, key: Tensor, bias: Bias) -> bool:
    """Whether the kernels can answer: 16-bit or float32 on CUDA, heads of 32, 64 or 128."""
    width = query.shape[-1]
    return (
        kernels.refusal(query.device) is None
        and query.dtype == key.dtype
        and query.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and key.shape[-1] == width
        and width in (32, 64, 128)
        and query.shape[2] > 0
        and query.shape[0] * query.shape[1] <= MOST_PAIRS
        and (bias.kind != "table" or bias.clipped().a.shape[1] > 1)  # type: ignore[union-attr]
    )


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Bias,
    scale: float,
    causal: bool,
    window: int | None,
    starts: Tensor | None,
) -> None:
    heads = query.shape[1]
    if heads % key.shape[1] or key.shape[:3] != value.shape[:3] or query.shape[0] != key.shape[0]:
        raise SpecError(
            f"query {tuple(query.shape)} does not go with key {tuple(key.shape)}, value {tuple(value.shape)}"
        )
    if query.shape[2] > key.shape[2]:
        raise SpecError(f"{query.shape[2]} queries are more than {key.shape[2]} keys: the queries are the last of them")
    if any(x is not None and x.shape[0] != heads for x in (bias.a, bias.b)):
        raise SpecError(f"bias {bias.kind}: one line for each of {heads} heads is needed")
    if not scale > 0:
        raise SpecError(f"scale must be above 0, not {scale}")
    if window is not None and (window < 1 or not causal):
        raise SpecError("a window is at least 1 token and looks back: it needs causal=True")
    if starts is not None and starts.shape != query.shape[:1]:
        raise SpecError(f"starts must hold one index for each of {query.shape[0]} rows, not {tuple(starts.shape)}")


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Bias,
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    starts: Tensor | None = None,
) -> Tensor:
    """`biased_attention` by its formula, in float32, in float64 where the inputs are.

    At most MOST_SCORES scores are held at once, in the backward too, which computes them again.
    """
    _check(query, key, value, bias, scale, causal, window, starts)
    queries, keys = query.shape[2], key.shape[2]
    rows = max(1, MOST_SCORES // max(1, query.shape[0] * query.shape[1] * keys))
    settings = (bias, scale, causal, window, starts)
    if rows >= queries:
        return _rows(query, key, value, keys - queries, *settings)
    parts = [
        checkpoint(
            _rows,
            part,
            key,
            value,
            keys - queries + at * rows,
            *settings,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for at, part in enumerate(query.split(rows, dim=2))
    ]
    return torch.cat(parts, dim=2)


def _rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position: int,
    bias: Bias,
    scale: float,
    causal: bool,
    window: int | None,
    starts: Tensor | None,
) -> Tensor:
    """The queries whose first is at `position`."""
    last = position + query.shape[2]
    seen = slice(0 if window is None else max(0, position - window + 1), last if causal else key.shape[2])
    places = torch.arange(position, last, device=query.device)[:, None]
    columns = torch.arange(seen.start, seen.stop, device=query.device)
    distance = places - columns
    mask = (distance >= 0) if causal else torch.ones_like(distance, dtype=torch.bool)
    if window is not None:
        mask = mask & (distance < window)
    mask = mask[None, None]
    if starts is not None:
        first = starts[:, None, None, None]
        mask = mask & (columns >= first) & (places >= first)
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    key, value = (expand_heads(x[:, :, seen].to(wide), query.shape[1]) for x in (key, value))
    scores = query.to(wide) @ key.mT * scale + bias.values(distance, wide)
    return reference_mix(scores, value, mask).to(query.dtype)


class _Layout(NamedTuple):
    """Where a head's numbers lie: distance d at `zero - d` of `span`; those past `nearest` and `farthest` are all alike."""

    kind: str
    span: int
    zero: int
    nearest: int
    farthest: int


def _layout(kind: str, a: Tensor | None, offset: int, queries: int, keys: int, causal: bool, window: int) -> _Layout:
    if kind == "linear":
        return _Layout(kind, 0, 0, 0, 0)
    if kind == "table" and a is not None:
        nearest, farthest = -offset, a.shape[1] - 1 - offset
        return _Layout(kind, a.shape[1] + 2 * PAD, farthest + PAD, nearest, farthest)
    most = min(window, keys) if window else keys
    span = most + (0 if causal else queries) + 1 + 2 * PAD
    return _Layout("none" if kind == "none" else "curve", span, most + PAD, -(2**30), 2**30)


def _numbers(
    layout: _Layout, kind: str, parameters: tuple[Tensor, Tensor], offset: int, heads: int, unit: bool = False
) -> tuple[Tensor, Tensor]:
    """Each head's number for each distance and, with `unit`, a curve's derivative by b: (H, span) float32, H · Tk numbers."""
    a, b = parameters
    if layout.kind in ("none", "linear"):
        return a, a
    from longspan.engine.biased.kernels.forward import fill

    numbers = torch.empty(heads, layout.span, dtype=torch.float32, device=a.device)
    slopes = torch.empty_like(numbers) if unit and layout.kind == "curve" else numbers
    fill[(-(-layout.span // 1024), heads)](
        *(a, numbers, slopes, a, b, a.shape[-1], offset),
        *(layout.span, layout.zero, layout.nearest, layout.farthest),
        KIND=kind,
        UNIT=unit,
    )
    return numbers, slopes


def _parameters(a: Tensor | None, b: Tensor | None, spare: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float32; where there is none, `spare`, which is not read."""
    wide = [spare if x is None else x.float().contiguous() for x in (a, b)]
    return wide[0], wide[1]


def _arguments(
    layout: _Layout,
    query: Tensor,
    key: Tensor,
    scale: float,
    causal: bool,
    window: int | None,
    lse: Tensor,
    numbers: Tensor,
    starts: Tensor | None,
) -> dict[str, Any]:
    """What all kernels take by name beside the tensors that have strides: sizes, tables, and what they are compiled for."""
    return {
        "lse": lse,
        "table": numbers,
        "starts": lse if starts is None else starts,
        "heads": query.shape[1],
        "queries": query.shape[2],
        "keys": key.shape[2],
        "window": window or 0,
        "span": layout.span,
        "zero": layout.zero,
        "nearest": layout.nearest,
        "farthest": layout.farthest,
        "scale": scale,
        "CAUSAL": causal,
        "WINDOW": window is not None,
        "STARTS": starts is not None,
        "GROUP": query.shape[1] // key.shape[1],
        "WIDTH": query.shape[-1],
        "PRECISION": "ieee",  # float32 inputs are multiplied as such
    }


@torch.library.custom_op("longspan::biased_forward", mutates_args=())
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    starts: Tensor | None,
    kind: str,
    offset: int,
    scale: float,
    causal: bool,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """The output, and each row's log-sum-exp to base 2 (B, H, Tq)."""
    from longspan.engine.biased.kernels.forward import forward

    query, key, value = contiguous_rows(query, key, value)
    (batch, heads, queries, _), keys = query.shape, key.shape[2]
    out, lse = torch.empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)
    layout = _layout(kind, a, offset, queries, keys, causal, window or 0)
    with on_device(query.device):
        numbers, _ = _numbers(layout, kind, _parameters(a, b, lse), offset, heads)
        forward[lambda config: (-(-queries // config["BM"]), batch * heads)](
            **strided(query=query, key=key, value=value, out=out),
            **_arguments(layout, query, key, scale, causal, window, lse, numbers, starts),
            KIND=layout.kind,
            bucket=int(queries >= LONG),
        )
    return out, lse


@torch.library.custom_op("longspan::biased_backward", mutates_args=())
def _backward(
    d_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    starts: Tensor | None,
    kind: str,
    offset: int,
    scale: float,
    causal: bool,
    window: int | None,
    learn: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Derivatives by query, key, value, a and b; the last two are empty unless `learn`."""
    from longspan.engine.biased.kernels.backward import backward_keys, backward_queries

    query, key, value, out, d_out = contiguous_rows(query, key, value, out, d_out)
    (batch, heads, queries, _), (_, kv_heads, keys, _) = query.shape, key.shape
    layout = _layout(kind, a, offset, queries, keys, causal, window or 0)
    grad = {"none": "none", "linear": "linear", "curve": "curve", "table": "ends"}[layout.kind] if learn else "none"
    dq, dk, dv, delta = (torch.empty_like(x) for x in (query, key, value, lse))
    a32, b32 = _parameters(a, b, lse)
    factor = {"linear": LOG2E, "log": -1.0, "power": -LOG2E}.get(kind)
    factors = a32 if factor is None else a32 * factor
    sums = lse.new_empty(2, batch, heads, -(-keys // 16) if learn else 0)
    inputs, long = strided(query=query, key=key, value=value, d_out=d_out), int(queries >= LONG)
    with on_device(query.device):
        numbers, slopes = _numbers(layout, kind, (a32, b32), offset, heads, unit=kind != "table")
        shared = _arguments(layout, query, key, scale, causal, window, lse, numbers, starts) | {"delta": delta}
        tuned = {"factors": factors, "KIND": layout.kind, "bucket": long}
        backward_queries[lambda config: (-(-queries // config["BM"]), batch * heads)](
            **inputs, **strided(out=out, d_query=dq), **shared, **tuned
        )
        backward_keys[lambda config: (-(-keys // config["BN"]), batch * kv_heads)](
            **inputs, **strided(d_key=dk, d_value=dv), **shared, **tuned, slopes=slopes, sums=sums, GRAD=grad
        )
        da, db = _learned(kind, a32, sums.sum((1, 3))) if learn else (lse.new_empty(0), lse.new_empty(0))
        if learn and kind == "table":
            from longspan.engine.biased.kernels.table import backward_table

            side = 32 if query.dtype == torch.float32 else 64
            backward_table[(-(-queries // side), batch * heads)](
                **inputs, **shared, d_table=da, size=a32.shape[1], S=side
            )
    return dq, dk, dv, da, db


def _learned(kind: str, a32: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """The derivatives by a and b, float32, from the two sums of each head; a table's without what lies between its ends."""
    first, second = sums
    if kind == "table":
        table = torch.zeros_like(a32)
        table[:, 0], table[:, -1] = second, first
        return table, first.new_empty(0)
    if kind == "linear":
        return -first, first.new_empty(0)
    return -first / (LOG2E if kind == "log" else 1.0), -a32 * second


_forward.register_fake(result_shapes)


@_backward.register_fake
def _(d_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, *rest: Any) -> tuple:
    a, b, *_, learn = rest
    empty = [lse.new_empty(x.shape if learn and x is not None else 0) for x in (a, b)]
    return (*(torch.empty_like(contiguous_rows(x)[0]) for x in (query, key, value)), *empty)


class _Biased(torch.autograd.Function):
    """The two operators as one function with a derivative.

    A registration with the operator itself would do for autograd and torch.compile, but torch.func goes through a
    Function with `setup_context` only.
    """

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        return torch.ops.longspan.biased_forward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        query, key, value, a, b, starts, *ctx.settings = inputs
        ctx.save_for_backward(query, key, value, *output, a, b, starts)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple:
        saved = ctx.saved_tensors
        needed = ctx.needs_input_grad[3:5]
        *d_inputs, da, db = torch.ops.longspan.biased_backward(d_out, *saved, *ctx.settings, any(needed))
        learned = [d.to(x.dtype) if need else None for d, x, need in zip((da, db), saved[5:7], needed, strict=True)]
        return (*d_inputs, *learned, *([None] * 6))
