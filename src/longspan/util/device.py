"""The device that kernels are launched on: that of their tensors, which need not be the current one."""

from __future__ import annotations

import contextlib

import torch


def on_device(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """A context in which `device` is the current CUDA device.

    Triton's launches, new CUDA streams and events, and graph captures need it. The context does nothing on other devices, nor
    while torch.compile traces, whose code selects the device by itself.
    """
    if device.type != "cuda" or torch.compiler.is_compiling():
        return contextlib.nullcontext()
    return torch.cuda.device(device)
