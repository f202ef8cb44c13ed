"""Causal attention over a window and sinks, forward and backward, in Triton kernels for CUDA.

A query at position p sees key k where p - window < k <= p or k < sinks, k <= p. The queries are the last Tq of the Tk keys, so
that keys of a rolling cache, sinks before the window, will do. Two operators registered with torch run the kernels:
torch.compile sees calls with known shapes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longspan.engine import kernels
from longspan.engine.kernels import (
    INTERPRETED,
    LONG,
    MOST_PAIRS,
    contiguous_rows,
    gradient_shapes,
    result_shapes,
    strided,
    strides,
)
from longspan.util.device import on_device
from longspan.util.errors import SpecError

MOST_PARTS = 128
"""Parts of a text whose gradients to the sinks are added up apart."""
LEAST_PART = 1024
"""Queries of such a part."""


def refusal(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Why the kernels cannot answer, or None."""
    if reason := kernels.refusal(query.device):
        return reason
    width, dtypes = query.shape[-1], (torch.bfloat16, torch.float16, torch.float32)
    if query.dtype not in dtypes or width not in (32, 64, 128):
        return f"it runs heads of 32, 64 or 128 in 16 bits or float32, not of {width} in {query.dtype}"
    if key.shape != value.shape or not query.dtype == key.dtype == value.dtype or key.shape[-1] != width:
        return "queries, keys and values differ in width or dtype"
    if query.shape[0] * query.shape[1] > MOST_PAIRS:
        return f"it runs up to {MOST_PAIRS:,} rows times heads in one launch"
    return None


def attention(
    query: Tensor, key: Tensor, value: Tensor, *, window: int, sinks: int, scale: float, zero_key: bool = False
) -> Tensor:
    """query (B, H, Tq, D), key and value (B, H_kv, Tk, D) → (B, H, Tq, D), for what `refusal` does not refuse. zero_key: a key
    and a value of zeros are in every query's softmax."""
    if window < 1 or sinks < 0 or not scale > 0 or not 0 < query.shape[2] <= key.shape[2]:
        raise SpecError(
            f"window {window}, sinks {sinks}, scale {scale} on {query.shape[2]} queries and {key.shape[2]} keys cannot be"
        )
    keys = key.shape[2]
    return _Windowed.apply(query, key, value, min(window, keys), min(sinks, keys), zero_key, scale)[0]


def arguments(query: Tensor, key: Tensor, window: int, sinks: int, scale: float) -> dict[str, Any]:
    """What all kernels for windows take by name: sizes, and what they are compiled for."""
    return {
        "heads": query.shape[1],
        "queries": query.shape[2],
        "keys": key.shape[2],
        "window": window,
        "sinks": sinks,
        "scale": scale,
        "GROUP": query.shape[1] // key.shape[1],
        "WIDTH": query.shape[-1],
        "SINK": 0 if sinks == 0 else 16 if sinks <= 16 else 32,
        "PRECISION": "ieee",  # float32 inputs are multiplied as such
    }


def described(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether keys and values can be read through tensor descriptors, and are the faster for it."""
    if query.shape[-1] != 128 or query.element_size() != 2:
        return False
    if not INTERPRETED and torch.cuda.get_device_capability(query.device) < (9, 0):
        return False
    steps = [x.element_size() * n for x in (key, value) for n in strides(x)]
    return all(n > 0 and n % 16 == 0 for n in (*steps, key.data_ptr(), value.data_ptr()))


def _forward_described(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    window: int,
    sinks: int,
    zero_key: bool,
    scale: float,
) -> None:
    """Writes `out` and `lse`.

    Tiles are those that were the fastest on an H200 at 32,768 tokens and a window of 1,024: 12 % less time than
    `kernels.forward`. Sinks want a mask on every tile.
    """
    from triton.tools.tensor_descriptor import TensorDescriptor

    from longspan.engine.window.kernels.forward_tma import forward

    batch, heads, queries, width = query.shape
    rows, columns = (32, 16) if INTERPRETED else (128, 64)
    tiles = [TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, columns, width]) for x in (key, value)]
    forward[(-(-queries // rows) * batch * heads,)](
        **strided(query=query, key=key, value=value, out=out),
        **arguments(query, key, window, sinks, scale),
        keys_described=tiles[0],
        values_described=tiles[1],
        lse=lse,
        pairs=batch * heads,
        ZERO=zero_key,
        ALWAYS=sinks > 0,
        BM=rows,
        BN=columns,
        **({} if INTERPRETED else {"num_warps": 8, "num_stages": 2, "maxnreg": 128}),
    )


def _bucket(queries: int, window: int) -> int:
    """For block sizes: short and long inputs, narrow and wide windows want other ones."""
    return 16 * int(queries >= LONG) + min(window.bit_length(), 15)


@torch.library.custom_op("longspan::windowed_forward", mutates_args=())
def _forward(
    query: Tensor, key: Tensor, value: Tensor, window: int, sinks: int, zero_key: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """The output, and each row's log-sum-exp to base 2 (B, H, Tq)."""
    query, key, value = contiguous_rows(query, key, value)
    batch, heads, queries, _ = query.shape
    out, lse = torch.empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)
    with on_device(query.device):
        if described(query, key, value):
            _forward_described(query, key, value, out, lse, window, sinks, zero_key, scale)
            return out, lse
        from longspan.engine.window.kernels.forward import forward

        forward[lambda config: (-(-queries // config["BM"]), batch * heads)](
            **strided(query=query, key=key, value=value, out=out),
            **arguments(query, key, window, sinks, scale),
            lse=lse,
            bucket=_bucket(queries, window),
            ZERO=zero_key,
        )
    return out, lse


@torch.library.custom_op("longspan::windowed_backward", mutates_args=())
def _backward(
    d_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    window: int,
    sinks: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Derivatives by query, key and value."""
    from longspan.engine.window.kernels.backward import backward_keys, backward_queries

    query, key, value, out, d_out = contiguous_rows(query, key, value, out, d_out)
    (batch, heads, queries, _), (_, kv_heads, keys, _) = query.shape, key.shape
    dq, dk, dv, delta = (torch.empty_like(x) for x in (query, key, value, lse))
    shared = strided(query=query, key=key, value=value, d_out=d_out) | {"lse": lse, "delta": delta}
    shared |= arguments(query, key, window, sinks, scale)
    bucket = _bucket(queries, window)
    with on_device(query.device):
        backward_queries[lambda config: (-(-queries // config["BM"]), batch * heads)](
            **shared, **strided(out=out, d_query=dq), bucket=bucket
        )
        far = far_gradients(query, key, shared) if sinks else lse
        backward_keys[lambda config: (-(-keys // config["BN"]), batch * kv_heads)](
            **shared, **strided(d_key=dk, d_value=dv), far=far, bucket=bucket
        )
    return dq, dk, dv


def far_gradients(query: Tensor, key: Tensor, shared: dict[str, Any]) -> Tensor:
    """What queries give to sinks that they are far from, (2, B, H_kv, sinks, D) float32, for keys without the scale.

    shared: the arguments that all backward kernels take."""
    from longspan.engine.window.kernels.backward import backward_sinks

    (batch, heads, queries, width), sinks, rows = query.shape, shared["sinks"], 32 if query.element_size() == 4 else 64
    part = max(LEAST_PART, -(-queries // (MOST_PARTS * rows)) * rows)
    sums = query.new_empty((2, -(-queries // part), batch, heads, sinks, width), dtype=torch.float32)
    grid = (sums.shape[1], batch * heads, -(-sinks // shared["SINK"]))
    backward_sinks[grid](**shared, sums=sums, part=part, BM=rows)
    return sums.sum(1).unflatten(2, (key.shape[1], -1)).sum(3)


_forward.register_fake(result_shapes)
_backward.register_fake(gradient_shapes)


class _Windowed(torch.autograd.Function):
    """The two operators as one function with a derivative, which torch.func knows too."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        return torch.ops.longspan.windowed_forward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        query, key, value, *windows, _, scale = inputs
        ctx.settings = *windows, scale  # a key of zeros only shows in the log-sum-exp
        ctx.save_for_backward(query, key, value, *output)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple:
        return (*torch.ops.longspan.windowed_backward(d_out, *ctx.saved_tensors, *ctx.settings), None, None, None, None)
