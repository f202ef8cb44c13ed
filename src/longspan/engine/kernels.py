"""Whether Triton kernels can run here, and their arguments by name.

Kernels themselves are imported when they are launched.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

INSTALLED = importlib.util.find_spec("triton") is not None
MOST_PAIRS = 2**16 - 1
"""Rows times heads of one launch: what CUDA allows in a grid's second dimension."""
LONG = 4096
"""Queries from which block sizes are tuned anew: short inputs want other ones."""


class Strides(NamedTuple):
    """Elements between neighbours in the batch, heads and tokens of (B, H, T, D); the last dimension is contiguous."""

    batch: int
    head: int
    row: int


def strides(x: Tensor) -> Strides:
    """The strides of x (B, H, T, D) for a kernel."""
    return Strides(*x.stride()[:3])


def strided(**tensors: Tensor) -> dict[str, Any]:
    """Arguments of a launch: each tensor under its name, and its strides under `NAME_strides`."""
    return tensors | {f"{name}_strides": strides(x) for name, x in tensors.items()}


def contiguous_rows(*tensors: Tensor) -> list[Tensor]:
    """The tensors, copied where the last dimension is not contiguous, as kernels read it."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def result_shapes(query: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """What a forward operator returns, without its values: the output and each row's log-sum-exp (B, H, Tq), float32."""
    return torch.empty_like(contiguous_rows(query)[0]), query.new_empty(query.shape[:3], dtype=torch.float32)


def gradient_shapes(d_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """What a backward operator returns, without its values: derivatives by query, key and value."""
    return tuple(torch.empty_like(x) for x in contiguous_rows(query, key, value))


@functools.cache
def _broken() -> str | None:
    """Why Triton cannot be imported, or None."""
    try:
        importlib.import_module("triton")
    except Exception as error:  # a broken installation may raise anything
        return f"Triton cannot be imported: {error}"
    return None


def _interpreted() -> bool:
    if not (INSTALLED and os.environ.get("TRITON_INTERPRET")) or _broken():
        return False
    return bool(importlib.import_module("triton").knobs.runtime.interpret)


INTERPRETED = _interpreted()
"""Whether kernels run as plain Python, on any device: TRITON_INTERPRET=1, which Triton reads when a kernel is defined."""


def refusal(device: torch.device) -> str | None:
    """Why no kernel can run on tensors of `device`, or None."""
    if device.type != "cuda" and not INTERPRETED:
        return "the device is not a CUDA device"
    if not INSTALLED:
        return "Triton is not installed"
    # Nothing can be imported while torch.compile traces, and its own code for CUDA needs Triton as well.
    return None if torch.compiler.is_compiling() else _broken()
