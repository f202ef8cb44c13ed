"""Refuses every subgradient at a tie, so that what relies on one shows it under any version of torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class _Undefined(torch.autograd.Function):
    """The identity, of which no gradient may be asked where `ties` says so."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ties: Tensor) -> Tensor:
        ctx.save_for_backward(ties)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (ties,) = ctx.saved_tensors
        assert not bool((ties & (gradient != 0)).any()), "a gradient goes through a tie"
        return gradient, None


class UndefinedAtTies(TorchFunctionMode):
    """Within it no gradient passes clamp, relu, abs and the extremes of tensors where two branches meet."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, x = getattr(func, "__name__", "").removesuffix("_"), args[0] if args else None
        if not isinstance(x, Tensor) or not (x.requires_grad and torch.is_grad_enabled()):
            return func(*args, **kwargs)
        rest = (*args[1:], *kwargs.values())
        if name in _EXTREMES and not any(isinstance(r, Tensor) for r in rest):
            dims = next((r for r in rest if not isinstance(r, bool)), tuple(range(x.ndim)))
            equal = x.detach() == _EXTREMES[name](x.detach(), dims, keepdim=True)
            return func(_Undefined.apply(x, equal & (equal.sum(dims, keepdim=True) > 1)), *args[1:], **kwargs)
        bounds = [0] if name in ("relu", "abs") else [r for r in rest if r is not None] if name in _BOUNDED else []
        ties = torch.zeros((), dtype=torch.bool)
        for bound in bounds:
            ties = ties | (x.detach() == bound)
        return _Undefined.apply(func(*args, **kwargs), ties) if bounds else func(*args, **kwargs)


_EXTREMES: dict[str, Callable[..., Tensor]] = dict.fromkeys(("max", "amax"), torch.amax) | dict.fromkeys(
    ("min", "amin"), torch.amin
)
_BOUNDED = ("clamp", "clip", "clamp_min", "clamp_max", "max", "min", "maximum", "minimum")
