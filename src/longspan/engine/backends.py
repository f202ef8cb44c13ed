"""Which way attention under a pattern goes, of those that give the same, and why.

    fa4      FlashAttention 4, for a window with sinks          CUDA, Hopper and newer, where it is installed
    kernel   our own kernels for a window with sinks            CUDA
    flex     FlexAttention over the pattern's blocks            CUDA
    masks    SDPA, a block of queries at a time under its mask  anywhere

The first that can run a call runs it. `through` asks for one by name, and what that one cannot run is then refused.
"""

from __future__ import annotations

import contextlib
import functools
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
length have one (`bucket`). torch's own limit is set four times as high, for what `_shape` does not tell apart."""
_LIMIT_OF_ITS_OWN = LIMIT_OF_ITS_OWN

_asked: ContextVar[str | None] = ContextVar("_asked", default=None)
_shapes: set[tuple] = set()


@dataclass(frozen=True)
class Route:
    """`way` is one of WAYS; `why` says what keeps the faster ones from it, empty where it is the fastest."""

    way: str
    why: str = ""


def choose(pattern: Pattern, call: AttentionCall, grid: AttentionShape) -> Route:
    """How a text's attention on itself runs. Raises `NotSupported` where `through` asks for a way that cannot run it."""
    asked = _asked.get()
    reasons: list[str] = []
    for way in (asked,) if asked else BACKENDS:
        reason = _REFUSALS[way](pattern, call, grid)
        if reason is None:
            return Route(way, "asked for" if asked else "; ".join(reasons))
        reasons.append(f"{way}: {reason}")
    raise NotSupported(f"attention={pattern.spec} cannot go this way: {'; '.join(reasons)}. The way masks always works")


@contextlib.contextmanager
def through(way: str) -> Iterator[None]:
    """Sends all attention under a pattern one way: `fa4`, `kernel`, `flex` or `masks`."""
    if way not in BACKENDS:
        raise SpecError(f"attention goes through {', '.join(BACKENDS)}, not {way!r}")
    token = _asked.set(way)
    try:
        yield
    finally:
        _asked.reset(token)


def run(pattern: Pattern, call: AttentionCall, grid: AttentionShape) -> Tensor:
    """Attention of all tokens of a text on themselves, (B, H, T, D), rows aligned at their first real token."""
    way = choose(pattern, call, grid).way
    if way == "flex":
        return _flex(pattern, call, grid)
    if way == "masks":
        return masked_attention(pattern, call, grid)
    if way == "fa4":
        return _windowed(pattern, call, grid, fa4.attention)
    return _windowed(pattern, call, grid, window_sinks.attention, zero_key=call.zero_key)


def run_rolled(pattern: Pattern, call: AttentionCall, grid: AttentionShape) -> Tensor:
    """The last tokens of a text on themselves and on what a rolling cache still has, (B, H, Tq, D)."""
    new, kept = call.query.shape[2], pattern.sinks_and_window()
    if kept is None or new == 1 or call.padding is not None or grid.length - new < kept[0]:
        return rolled_attention(pattern, call, grid)
    # Without padding the sinks are the first keys and the others the last in order, as the kernel takes them.
    if _asked.get() in (None, "kernel") and _kernel_refusal(pattern, call, grid) is None:
        return _windowed(pattern, call, grid, window_sinks.attention, zero_key=call.zero_key)
    return rolled_attention(pattern, call, grid)


def _windowed(
    pattern: Pattern, call: AttentionCall, grid: AttentionShape, attention: Callable[..., Tensor], **more: bool
) -> Tensor:
    sinks, window = pattern.sinks_and_window() or (0, grid.length)
    return attention(call.query, call.key, call.value, window=window, sinks=sinks, scale=call.scale, **more)


def _fa4_refusal(pattern: Pattern, call: AttentionCall, grid: AttentionShape) -> str | None:
    kept = pattern.sinks_and_window()
    if not grid.causal or kept is None:
        return "it is asked for windows that look back"
    return _unlike_plain(call) or fa4.refusal(call.query, call.key, call.value, sinks=kept[0])


def _kernel_refusal(pattern: Pattern, call: AttentionCall, grid: AttentionShape) -> str | None:
    if not grid.causal or pattern.sinks_and_window() is None:
        return "it knows windows that look back, with or without sinks"
    return _unlike_plain(replace(call, zero_key=False)) or window_sinks.refusal(call.query, call.key, call.value)


def _flex_refusal(pattern: Pattern, call: AttentionCall, grid: AttentionShape) -> str | None:
    query = call.query
    if reason := _unlike_plain(call):
        return reason
    if not query.is_cuda:
        if _asked.get() != "flex":
            return "the device is no CUDA device"
        return "FlexAttention has no backward on a CPU" if _learns(call) else None
    if query.dtype not in (torch.bfloat16, torch.float16, torch.float32) or query.shape[-1] not in (
        16,
        32,
        64,
        128,
        256,
    ):
        return f"it runs heads of 16 to 256 in 16 bits or float32, not of {query.shape[-1]} in {query.dtype}"
    blocks = _blocks(pattern, call, grid)
    if blocks is None:
        return "the pattern has no blocks"
    if _shape(pattern, call, grid, blocks) not in _shapes and len(_shapes) >= MOST_SHAPES:
        return f"it has compiled {MOST_SHAPES} shapes in this process; engine.routes.forget_compiled() makes room"
    return None


def _blocks(pattern: Pattern, call: AttentionCall, grid: AttentionShape) -> Blocks | None:
    """Which blocks see which, in the text filled up to its bucket."""
    length = bucket(grid.length)
    blocks = pattern.blocks(grid, block_size(length, backward=_learns(call)), call.query.device)
    return None if blocks is None else blocks.padded(length)


def _shape(pattern: Pattern, call: AttentionCall, grid: AttentionShape, blocks: Blocks) -> tuple:
    """What FlexAttention compiles anew for: not the length within its bucket, nor the window's."""
    cut = call.padding is not None and not grid.causal
    rows, heads, _, width = call.query.shape
    given = rows, heads, call.key.shape[1], width, call.query.dtype, call.query.device
    filled = blocks.lengths[0] > grid.length  # which makes tensors of other strides
    return (
        pattern.name,
        grid.causal,
        cut,
        filled,
        blocks.size,
        blocks.lengths,
        blocks.index.shape,
        *given,
        _learns(call),
    )


def _unlike_plain(call: AttentionCall) -> str | None:
    if call.bias is not None or call.query_scores is not None:
        return "the position scheme takes part in the scores"
    if call.zero_key:
        return "a zero sink takes part in the softmax"
    if call.always_visible is not None:
        return "a text names global tokens of its own"
    return "attention has dropout" if call.dropout else None


_REFUSALS: dict[str, Callable[[Pattern, AttentionCall, AttentionShape], str | None]] = {
    "fa4": _fa4_refusal,
    "kernel": _kernel_refusal,
    "flex": _flex_refusal,
    "masks": lambda pattern, call, grid: None,
}


def _learns(call: AttentionCall) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in (call.query, call.key, call.value))


def _flex(pattern: Pattern, call: AttentionCall, grid: AttentionShape) -> Tensor:
    blocks = _blocks(pattern, call, grid)
    if blocks is None:
        raise NotSupported(f"attention={pattern.spec} has no blocks for FlexAttention; use the way masks")
    _shapes.add(_shape(pattern, call, grid, blocks))
    missing = blocks.lengths[0] - grid.length
    heads = (F.pad(x, (0, 0, 0, missing)) if missing else x for x in (call.query, call.key, call.value))
    if call.padding is not None and not grid.causal:  # on the right by now, which no query that looks back can see
        blocks = blocks.within(call.padding.sum(-1))
    grouped = call.key.shape[1] != call.query.shape[1]
    mask = blocks.mask(backward=_learns(call))
    out = _runner(call.query.device)(*heads, block_mask=mask, scale=call.scale, enable_gqa=grouped)
    return out[:, :, : grid.length]


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
