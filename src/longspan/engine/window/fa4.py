"""Windows, with or without sinks, on FlashAttention 4 (`flash-attn-4`), for Hopper and newer GPUs.

It compiles itself at run time and is imported when it is first asked for. Its backward adds to the queries' gradients in any
order, unless torch is asked for deterministic algorithms. Sinks are added to its windows by Triton kernels. It would take them
as blocks of keys with a rule for their pairs as well: on an H200, 16 heads of 128, 32,768 tokens and a window of 1,024, that
took 0.71 ms forward and 3.12 ms back, where our kernels alone took 0.76 and 2.48.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from longspan.engine.window import window_sinks
from longspan.engine.window.sink_correction import with_sinks
from longspan.util.device import on_device
from longspan.util.errors import NotSupported

OLDEST = (9, 0)
"""Compute capability of the oldest GPUs that it is used on; older ones have FlashAttention 2's speed from it."""
INSTALL = "pip install --pre 'flash-attn-4[cu13]'"


@cache
def installed() -> bool:
    """Whether there is such a package with what compiles it.

    FlashAttention 2 has the same name and no `cute` in it.
    """
    try:
        return all(importlib.util.find_spec(name) is not None for name in ("flash_attn.cute", "cutlass.cute"))
    except ModuleNotFoundError:
        return False


@cache
def _function() -> Callable:
    return importlib.import_module("flash_attn.cute").flash_attn_func


def refusal(query: Tensor, key: Tensor, value: Tensor, *, sinks: int = 0) -> str | None:
    """Why it cannot answer, or None."""
    if not query.is_cuda:
        return "the device is not a CUDA device"
    if not installed():
        return f"FlashAttention 4 is not installed ({INSTALL})"
    if torch.cuda.get_device_capability(query.device) < OLDEST:
        return "it is for GPUs of compute capability 9.0 and newer"
    width = query.shape[-1]
    if query.dtype not in (torch.bfloat16, torch.float16) or width % 8 or not 8 <= width <= 128:
        return f"it runs heads of 8 to 128 in steps of 8 in 16 bits, not of {width} in {query.dtype}"
    if key.shape != value.shape or not query.dtype == key.dtype == value.dtype or key.shape[-1] != width:
        return "queries, keys and values differ in width or dtype"
    if torch.compiler.is_compiling():
        return "torch.compile cannot look into it"
    return window_sinks.refusal(query, key, value) if sinks else None


def attention(query: Tensor, key: Tensor, value: Tensor, *, window: int, sinks: int = 0, scale: float) -> Tensor:
    """query (B, H, Tq, D), key and value (B, H_kv, Tk, D) → (B, H, Tq, D), for what `refusal` does not refuse. The queries
    are the last Tq of the Tk keys; each sees `window` keys back, its own among them, and the first `sinks`."""
    settings = {
        "softmax_scale": scale,
        "causal": True,
        "window_size": (window - 1, 0),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "return_lse": sinks > 0,
    }

    def near(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        with on_device(query.device):  # whose stream and architecture it asks for
            out, lse = _function()(*(x.transpose(1, 2) for x in tensors), **settings)
        if sinks and out.requires_grad and not lse.requires_grad:
            raise NotSupported(
                f"this FlashAttention 4 gives log-sum-exps no gradient, which sinks need: {INSTALL} --upgrade"
            )
        return out.transpose(1, 2), lse

    if sinks:
        return with_sinks(near, query, key, value, window=window, sinks=sinks, scale=scale)
    return near(query, key, value)[0]
