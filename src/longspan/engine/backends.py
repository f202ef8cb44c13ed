"""Which backend computes attention under a pattern; all give the same result.

    fa4      FlashAttention 4, for a window with sinks          CUDA, Hopper and newer, where it is installed
    kernel   our own kernels for a window with sinks            CUDA
    flex     FlexAttention over the pattern's blocks            CUDA
    masks    SDPA, a block of queries at a time under its mask  anywhere

The first that can run a call runs it. `use_backend` requires one by name: what it cannot run then raises `NotSupported`.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from longspan.engine.blocks.tables import Blocks, block_size, bucket
from longspan.engine.call import AttentionCall, AttentionShape, Pattern
from longspan.engine.compiling import LIMIT_OF_ITS_OWN, compiled
from longspan.engine.masks import masked_attention, rolled_attention
from longspan.engine.window import fa4, window_sinks
from longspan.util.errors import NotSupported, SpecError

BACKENDS = ("fa4", "kernel", "flex", "masks")
MOST_SHAPES = 32
"""Shapes that FlexAttention compiles in one process, of some seconds each; further ones go through masks. Texts of about one
length have one (`bucket`). torch's own limit is set four times as high, for what `_compiled_for` does not tell apart."""
_LIMIT_OF_ITS_OWN = LIMIT_OF_ITS_OWN

_requested: ContextVar[str | None] = ContextVar("_requested", default=None)
_shapes: set[tuple] = set()


@dataclass(frozen=True)
class Choice:
    """A backend, one of BACKENDS, and what keeps the call from the faster ones: empty for the fastest."""

    backend: str
    why: str = ""


def choose(pattern: Pattern, call: AttentionCall, shape: AttentionShape) -> Choice:
    """The backend for a text's attention to itself, and why.

    Raises `NotSupported` where `use_backend` requires one that cannot run the call."""
    requested = _requested.get()
    reasons: list[str] = []
    for backend in (requested,) if requested else BACKENDS:
        reason = _REFUSALS[backend](pattern, call, shape)
        if reason is None:
            return Choice(backend, "requested" if requested else "; ".join(reasons))
        reasons.append(f"{backend}: {reason}")
    raise NotSupported(
        f"attention={pattern.spec} cannot run on this backend: {'; '.join(reasons)}. The backend masks runs every call"
    )


@contextlib.contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Runs all attention under a pattern on one backend: `fa4`, `kernel`, `flex` or `masks`.

    Raises `SpecError` for any other name; a call that the backend cannot run raises `NotSupported`."""
    if backend not in BACKENDS:
        raise SpecError(f"{backend!r} is not a backend of attention; use {', '.join(BACKENDS[:-1])} or {BACKENDS[-1]}")
    token = _requested.set(backend)
    try:
        yield
    finally:
        _requested.reset(token)


def through(way: str) -> contextlib.AbstractContextManager[None]:
    """The earlier name of `use_backend`, until version 0.3."""
    warnings.warn("engine.backends.through is now use_backend", DeprecationWarning, stacklevel=2)
    return use_backend(way)


def run(pattern: Pattern, call: AttentionCall, shape: AttentionShape) -> Tensor:
    """Attention of a text to itself, rows aligned at their first real token: (B, H, T, D)."""
    backend = choose(pattern, call, shape).backend
    if backend == "flex":
        return _flex(pattern, call, shape)
    if backend == "masks":
        return masked_attention(pattern, call, shape)
    if backend == "fa4":
        return _windowed(pattern, call, shape, fa4.attention)
    return _windowed(pattern, call, shape, window_sinks.attention, zero_key=call.zero_key)


def run_rolled(pattern: Pattern, call: AttentionCall, shape: AttentionShape) -> Tensor:
    """Attention of a text's last tokens over the keys that a rolling cache still holds: (B, H, Tq, D)."""
    new, windowed = call.query.shape[2], pattern.sinks_and_window()
    if windowed is None or new == 1 or call.padding is not None or shape.length - new < windowed[0]:
        return rolled_attention(pattern, call, shape)
    # Without padding the sinks are the first keys and the others the last in order, as the kernel takes them.
    if _requested.get() in (None, "kernel") and _kernel_refusal(pattern, call, shape) is None:
        return _windowed(pattern, call, shape, window_sinks.attention, zero_key=call.zero_key)
    return rolled_attention(pattern, call, shape)


def _windowed(
    pattern: Pattern, call: AttentionCall, shape: AttentionShape, attention: Callable[..., Tensor], **more: bool
) -> Tensor:
    sinks, window = pattern.sinks_and_window() or (0, shape.length)
    return attention(call.query, call.key, call.value, window=window, sinks=sinks, scale=call.scale, **more)


def _fa4_refusal(pattern: Pattern, call: AttentionCall, shape: AttentionShape) -> str | None:
    windowed = pattern.sinks_and_window()
    if not shape.causal or windowed is None:
        return "it runs only windows that look back"
    return _unlike_plain(call) or fa4.refusal(call.query, call.key, call.value, sinks=windowed[0])


def _kernel_refusal(pattern: Pattern, call: AttentionCall, shape: AttentionShape) -> str | None:
    if not shape.causal or pattern.sinks_and_window() is None:
        return "it runs only windows that look back, with or without sinks"
    return _unlike_plain(replace(call, zero_key=False)) or window_sinks.refusal(call.query, call.key, call.value)


def _flex_refusal(pattern: Pattern, call: AttentionCall, shape: AttentionShape) -> str | None:
    query = call.query
    if reason := _unlike_plain(call):
        return reason
    if not query.is_cuda:
        if _requested.get() != "flex":
            return "the device is not a CUDA device"
        return "FlexAttention has no backward on a CPU" if _learns(call) else None
    widths, dtypes = (16, 32, 64, 128, 256), (torch.bfloat16, torch.float16, torch.float32)
    if query.dtype not in dtypes or query.shape[-1] not in widths:
        return f"it runs heads of 16 to 256 in 16 bits or float32, not of {query.shape[-1]} in {query.dtype}"
    blocks = _blocks(pattern, call, shape)
    if blocks is None:
        return "the pattern has no blocks"
    if _compiled_for(pattern, call, shape, blocks) not in _shapes and len(_shapes) >= MOST_SHAPES:
        return f"it has compiled {MOST_SHAPES} shapes in this process; engine.backends.forget_compiled() makes room"
    return None


def _blocks(pattern: Pattern, call: AttentionCall, shape: AttentionShape) -> Blocks | None:
    """Which blocks see which, in the text filled up to its bucket."""
    length = bucket(shape.length)
    blocks = pattern.blocks(shape, block_size(length, backward=_learns(call)), call.query.device)
    return None if blocks is None else blocks.padded(length)


def _compiled_for(pattern: Pattern, call: AttentionCall, shape: AttentionShape, blocks: Blocks) -> tuple:
    """What FlexAttention compiles anew for: not the length within its bucket, nor the window's."""
    cut = call.padding is not None and not shape.causal
    rows, heads, _, width = call.query.shape
    sizes = rows, heads, call.key.shape[1], width, call.query.dtype, call.query.device
    filled = blocks.lengths[0] > shape.length  # which makes tensors of other strides
    return (
        pattern.name,
        shape.causal,
        cut,
        filled,
        blocks.size,
        blocks.lengths,
        blocks.index.shape,
        *sizes,
        _learns(call),
    )


def _unlike_plain(call: AttentionCall) -> str | None:
    if call.bias is not None or call.query_scores is not None:
        return "the position scheme changes the scores"
    if call.zero_key:
        return "a zero sink is in the softmax"
    if call.always_visible is not None:
        return "some tokens are seen by all, named by the text"
    return "attention has dropout" if call.dropout else None


_REFUSALS: dict[str, Callable[[Pattern, AttentionCall, AttentionShape], str | None]] = {
    "fa4": _fa4_refusal,
    "kernel": _kernel_refusal,
    "flex": _flex_refusal,
    "masks": lambda pattern, call, shape: None,
}


def _learns(call: AttentionCall) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in (call.query, call.key, call.value))


def _flex(pattern: Pattern, call: AttentionCall, shape: AttentionShape) -> Tensor:
    blocks = _blocks(pattern, call, shape)
    if blocks is None:
        raise NotSupported(f"attention={pattern.spec} has no blocks for FlexAttention; use the backend masks")
    _shapes.add(_compiled_for(pattern, call, shape, blocks))
    missing = blocks.lengths[0] - shape.length
    heads = (F.pad(x, (0, 0, 0, missing)) if missing else x for x in (call.query, call.key, call.value))
    if call.padding is not None and not shape.causal:  # on the right by now, which no query that looks back can see
        blocks = blocks.within(call.padding.sum(-1))
    grouped = call.key.shape[1] != call.query.shape[1]
    mask = blocks.mask(backward=_learns(call))
    out = _runner(call.query.device)(*heads, block_mask=mask, scale=call.scale, enable_gqa=grouped)
    return out[:, :, : shape.length]


def _runner(device: torch.device) -> Callable[..., Tensor]:
    return _compiled() if device.type == "cuda" else _over_blocks


def _over_blocks(query: Tensor, key: Tensor, value: Tensor, **settings: Any) -> Any:
    return flex_attention(query, key, value, **settings)


@functools.lru_cache(maxsize=1)
def _compiled(backend: str | Callable = "inductor") -> Callable[..., Tensor]:
    return compiled(_over_blocks, 4 * MOST_SHAPES, backend, _LIMIT_OF_ITS_OWN)


def forget_compiled() -> None:
    """Drops what was compiled in this process, so that as many shapes again may be."""
    _shapes.clear()
    _compiled.cache_clear()
    torch.compiler.reset()


def dense_first(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Within it SDPA asks cuDNN before FlashAttention on Hopper GPUs, where it is the faster for full attention."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return contextlib.nullcontext()
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(order, set_priority=True)
