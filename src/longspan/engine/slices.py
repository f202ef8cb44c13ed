"""Slices of one long tensor whose gradients are summed in one shared buffer.

Autograd gives every slice `x[:, :, a:b]` a gradient as long as x, zeros around what the slice received, and adds these up:
a loop over n blocks writes n · length numbers in its backward pass, and its cost grows with the square of the length. Here
the slices of one tensor share a buffer. It travels along the chain of slices from the last to the first, each adds what it
received in its place, and what a slice costs is its own size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx


class Slices:
    """`Slices(x)[index]` is `x[index]`, with gradients that cost what the slices hold and not what x does.

    For a loop that takes many slices of one x in one forward pass; the last one's gradient comes first. index: slices and whole
    numbers, or with whole slices tensors of whole numbers, where what is taken twice is summed twice. Sums are in float32 or
    wider: a key that many blocks see, such as a sink, receives as many summands.
    """

    def __init__(self, x: Tensor):
        self.x = x
        self._sum: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return self.x.shape

    @property
    def device(self) -> torch.device:
        return self.x.device

    def __getitem__(self, index: Any) -> Tensor:
        if not (torch.is_grad_enabled() and self.x.requires_grad):
            return self.x[index]
        if self._sum is None:
            self._sum = _Sum.apply(self.x)
        piece, self._sum = _Slice.apply(self._sum, self.x.detach(), index)
        return piece


class _Sum(torch.autograd.Function):
    """What stands for x in the graph: a tensor of its shape without memory of its own, whose gradient is the buffer."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return torch.zeros((), dtype=wide, device=x.device).expand(x.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, total: Tensor) -> Tensor:
        return total.to(ctx.dtype)


class _Slice(torch.autograd.Function):
    """One slice, and what stands for x in the slices after it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(total: Tensor, x: Tensor, index: Any) -> tuple[Tensor, Tensor]:
        return x[index], total.view_as(total)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Tensor, Tensor, Any], output: tuple[Tensor, Tensor]) -> None:
        total, _, index = inputs
        ctx.index = index if isinstance(index, tuple) else (index,)  # type: ignore[attr-defined]
        ctx.shape, ctx.dtype = total.shape, total.dtype  # type: ignore[attr-defined]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, total: Tensor | None) -> tuple[Tensor | None, None, None]:
        if grad is None:
            return total, None, None
        if total is None:
            total = grad.new_zeros(ctx.shape, dtype=ctx.dtype)
        elif torch.is_grad_enabled():  # for a second derivative the graph keeps what came in
            total = total.clone()
        if not any(isinstance(i, Tensor) for i in ctx.index):
            total[ctx.index].add_(grad)
        else:
            assert all(isinstance(i, Tensor) or i == slice(None) for i in ctx.index), "beside tensors slices are whole"
            places = [i if isinstance(i, Tensor) else None for i in ctx.index]
            torch.ops.aten.index_put_(total, places, grad.to(total.dtype), True)
        return total, None, None
