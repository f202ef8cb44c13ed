"""What a computation allocates, counted and not timed: growth with the length shows in it on any machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Allocated(TorchDispatchMode):
    """Elements of all results of operators, and of the largest, in what runs within it, backward too."""

    def __init__(self) -> None:
        super().__init__()
        self.total, self.largest = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple) else (out,):
            if isinstance(x, torch.Tensor):
                self.total += x.untyped_storage().nbytes()
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        return out


def growth(run: Callable[[int], None], length: int) -> tuple[float, float]:
    """How much more is allocated, and how much larger the largest result is, at twice the length."""
    counts = []
    for tokens in (length, 2 * length):
        with Allocated() as counted:
            run(tokens)
        counts.append(counted)
    return counts[1].total / counts[0].total, counts[1].largest / counts[0].largest
