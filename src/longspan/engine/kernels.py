"""Kernels in Triton. What launches one imports its file at that moment, so that nothing else asks for Triton."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os

import torch

INSTALLED = importlib.util.find_spec("triton") is not None


@functools.cache
def _broken() -> str | None:
    """What importing Triton fails with, or None."""
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
        return "the device is no CUDA device"
    if not INSTALLED:
        return "Triton is not installed"
    # Nothing can be imported while torch.compile traces, and what it makes for CUDA is Triton's as well.
    return None if torch.compiler.is_compiling() else _broken()
