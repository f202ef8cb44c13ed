"""One optimiser step, for the benchmarks that time training."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def finish(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """Runs the backward pass, clips the gradient's norm to 1, takes a step, and waits for the device."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if loss.device.type == "cuda":
        torch.cuda.synchronize()
