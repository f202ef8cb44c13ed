"""Where kernels are launched: on the device that their tensors are on, which need not be the current one."""

from __future__ import annotations

import contextlib

import torch


def on_device(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Within it `device` is the current one, as Triton's launches, new CUDA streams and events, and captures of graphs want it.
    Nothing on other kinds of devices, nor while torch.compile traces: what it compiles does this by itself."""
    if device.type != "cuda" or torch.compiler.is_compiling():
        return contextlib.nullcontext()
    return torch.cuda.device(device)
