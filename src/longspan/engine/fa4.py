"""Windows through FlashAttention 4 (Dao-AILab's `flash-attn-4`), where it is installed: Hopper and newer GPUs.

It compiles itself at run time and is imported when it is first asked for. Its backward adds to the queries' gradients in any
order, unless torch is asked for deterministic algorithms. It knows no first keys beside the window.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

OLDEST = (9, 0)
"""Compute capability of the oldest GPUs that it is used on; older ones have FlashAttention 2's speed from it."""
INSTALL = "pip install --pre 'flash-attn-4[cu13]'"


@cache
def installed() -> bool:
    """Whether there is such a package with what compiles it. FlashAttention 2 has the same name and no `cute` in it."""
    try:
        return all(importlib.util.find_spec(name) is not None for name in ("flash_attn.cute", "cutlass"))
    except ModuleNotFoundError:
        return False


@cache
def _function() -> Callable:
    return importlib.import_module("flash_attn.cute").flash_attn_func


def refusal(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Why it cannot answer, or None."""
    if not query.is_cuda:
        return "the device is no CUDA device"
    if not installed():
        return f"FlashAttention 4 is not installed ({INSTALL})"
    if torch.cuda.get_device_capability(query.device) < OLDEST:
        return "it is for GPUs of compute capability 9.0 and newer"
    width = query.shape[-1]
    if query.dtype not in (torch.bfloat16, torch.float16) or width % 8 or not 8 <= width <= 128:
        return f"it runs heads of 8 to 128 in steps of 8 in 16 bits, not of {width} in {query.dtype}"
    if key.shape != value.shape or not query.dtype == key.dtype == value.dtype or key.shape[-1] != width:
        return "queries, keys and values differ in width or dtype"
    return "torch.compile cannot look into it" if torch.compiler.is_compiling() else None


def attention(query: Tensor, key: Tensor, value: Tensor, *, window: int, scale: float) -> Tensor:
    """query (B, H, Tq, D), key and value (B, H_kv, Tk, D) → (B, H, Tq, D), for what `refusal` does not refuse. The queries
    are the last Tq of the Tk keys; each sees `window` keys back, its own among them."""
    parts = (x.transpose(1, 2) for x in (query, key, value))
    out, _ = _function()(
        *parts,
        softmax_scale=scale,
        causal=True,
        window_size=(window - 1, 0),
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return out.transpose(1, 2)
