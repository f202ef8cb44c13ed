"""Adds sinks to windowed attention that another library computes, forward and backward.

Attention over a window and sinks is the window's, and that over the sinks that a query is past the window of, weighed by their
log-sum-exps. Sinks are few: it costs little more than reading and writing each tensor once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longspan.engine.kernels import INTERPRETED, contiguous_rows, strided
from longspan.engine.window.window_sinks import arguments, far_gradients
from longspan.util.device import on_device

Near = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(query, key, value) → the result over the window (B, H, Tq, D) and its log-sum-exp to base e (B, H, Tq), in float32, both of
which take derivatives."""
ROWS = 16 if INTERPRETED else 64
"""Queries of a program."""


def with_sinks(
    near: Near, query: Tensor, key: Tensor, value: Tensor, *, window: int, sinks: int, scale: float
) -> Tensor:
    """query (B, H, Tq, D), key and value (B, H_kv, Tk, D) → (B, H, Tq, D), for what `window_sinks.refusal` does not refuse. The
    queries are the last Tq of the Tk keys; each sees what `near` shows it, which is `window` keys back, and the first `sinks`."""
    settings = window, min(sinks, key.shape[2]), scale
    if not (torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))):
        query, key, value = (x.detach() for x in (query, key, value))
        near_out, near_lse = near(query, key, value)
        return _join(query, key, value, near_out, near_lse, *settings)[0]
    handed: list[tuple[Tensor, ...]] = []
    inside = _Enter.apply(query, key, value, handed, *settings)
    return _Join.apply(*inside, *near(*inside), handed, *settings)


class _Enter(torch.autograd.Function):
    """The identity in the forward; in the backward the last to run, so that the window's gradients are changed in
    place instead of added to. `handed` is where `_Join` leaves what that takes."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        handed: list[tuple[Tensor, ...]],
        window: int,
        sinks: int,
        scale: float,
    ) -> tuple[Tensor, ...]:
        ctx.handed, ctx.settings = handed, (window, sinks, scale)
        return tuple(x.view_as(x) for x in (query, key, value))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *d_inputs: Tensor) -> tuple:
        grads = contiguous_rows(*d_inputs)
        query, key, value, d_out, lse, delta = ctx.handed.pop()
        _add(grads, query, key, value, d_out, lse, delta, *ctx.settings)
        return (*grads, None, None, None, None)


class _Join(torch.autograd.Function):
    """The derivatives by query, key and value are left to `_Enter`."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        near: Tensor,
        near_lse: Tensor,
        handed: list[tuple[Tensor, ...]],
        window: int,
        sinks: int,
        scale: float,
    ) -> Tensor:
        ctx.handed = handed
        out, lse = _join(query, key, value, near, near_lse, window, sinks, scale)
        ctx.save_for_backward(query, key, value, near, near_lse, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple:
        query, key, value, near, near_lse, out, lse = ctx.saved_tensors
        d_near, d_near_lse, delta = _split(near, near_lse, out, lse, d_out)
        ctx.handed[:] = [(query, key, value, d_out, lse, delta)]
        return None, None, None, d_near, d_near_lse, None, None, None, None


def _join(
    query: Tensor, key: Tensor, value: Tensor, near: Tensor, near_lse: Tensor, window: int, sinks: int, scale: float
) -> tuple[Tensor, Tensor]:
    """The output, and each row's log-sum-exp to base 2 (B, H, Tq)."""
    from longspan.engine.window.kernels.sink_correction import join

    query, key, value, near = contiguous_rows(query, key, value, near)
    batch, heads, queries, _ = query.shape
    out, lse = torch.empty_like(near), near_lse.new_empty(near_lse.shape)
    with on_device(query.device):
        join[(-(-queries // ROWS), batch * heads)](
            **strided(query=query, key=key, value=value, near=near, out=out),
            **arguments(query, key, window, sinks, scale),
            near_lse=near_lse.contiguous(),
            lse=lse,
            BM=ROWS,
        )
    return out, lse


def _split(near: Tensor, near_lse: Tensor, out: Tensor, lse: Tensor, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Derivatives by `near` and `near_lse`, and each row's sum of out · d_out."""
    from longspan.engine.window.kernels.sink_correction import split

    near, out, d_out = contiguous_rows(near, out, d_out)
    (batch, heads, queries, width) = near.shape
    d_near, d_near_lse, delta = torch.empty_like(near), torch.empty_like(lse), torch.empty_like(lse)
    with on_device(near.device):
        split[(-(-queries // ROWS), batch * heads)](
            **strided(near=near, out=out, d_out=d_out, d_near=d_near),
            near_lse=near_lse.contiguous(),
            lse=lse,
            d_near_lse=d_near_lse,
            delta=delta,
            heads=heads,
            queries=queries,
            WIDTH=width,
            BM=ROWS,
        )
    return d_near, d_near_lse, delta


def _add(
    grads: list[Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    d_out: Tensor,
    lse: Tensor,
    delta: Tensor,
    window: int,
    sinks: int,
    scale: float,
) -> None:
    """Adds to the derivatives by query, key and value what comes through the sinks."""
    from longspan.engine.window.kernels.sink_correction import add_queries

    d_query, d_key, d_value = grads
    query, key, value, d_out = contiguous_rows(query, key, value, d_out)
    batch, heads, queries, _ = query.shape
    shared = strided(query=query, key=key, value=value, d_out=d_out) | {"lse": lse, "delta": delta}
    shared |= arguments(query, key, window, sinks, scale)
    with on_device(query.device):
        add_queries[(-(-queries // ROWS), batch * heads)](**shared, **strided(d_query=d_query), BM=ROWS)
        keys_far, values_far = far_gradients(query, key, shared)
    d_key[:, :, :sinks] += (keys_far * scale).to(d_key.dtype)
    d_value[:, :, :sinks] += values_far.to(d_value.dtype)
