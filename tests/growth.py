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


class Written(TorchDispatchMode):
    """Bytes that operators write in what runs within it: views write none, and operators in place what they change."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        results = out if isinstance(out, tuple) else (out,)
        if func is torch.ops.aten.index_put_.default:
            self.total += args[2].numel() * args[2].itemsize
        elif len(results) == len(func._schema.returns):
            for x, said in zip(results, func._schema.returns, strict=True):
                is_view = said.alias_info is not None and not said.alias_info.is_write
                if isinstance(x, torch.Tensor) and not is_view:
                    self.total += x.numel() * x.itemsize
        return out


def growth(run: Callable[[int], None], length: int) -> tuple[float, float]:
    """How much more is allocated, and how much larger the largest result is, at twice the length."""
    counts = []
    for tokens in (length, 2 * length):
        with Allocated() as counted:
            run(tokens)
        counts.append(counted)
    return counts[1].total / counts[0].total, counts[1].largest / counts[0].largest


def backward_growth(forward: Callable[[int], torch.Tensor], length: int) -> float:
    """How much more the backward pass of `forward`'s sum writes at twice the length."""
    written = []
    for tokens in (length, 2 * length):
        out = forward(tokens)
        with Written() as counted:
            out.sum().backward()
        written.append(counted.total)
    return written[1] / written[0]
