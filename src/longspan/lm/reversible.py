"""Reversible residual layers (Kitaev 2020, Reformer, section 3): activations are recomputed in the backward pass.

Two streams, both as wide as the model, begin as the embeddings. Each branch f, attention or feed-forward network with its
norm, reads one stream and is added to the other, in turn:

    (a, b) -> (b, a + f(b)),    back: (b, c) -> (c - f(b), b)

Two such steps are equation (9), Y1 = X1 + Attention(X2), Y2 = X2 + FeedForward(Y1). The backward pass starts from the last
activations and runs every branch once more, with the random numbers, the precision and the recorded choices
(`engine/recorded_choices.py`) of the forward. So memory is that of one branch, at any depth, and time grows by about a third. The
model's output is the mean of both streams, so it has as many parameters as without (the authors' encoder-decoder takes the mean
too; their language model concatenates the streams).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import get_device_states, set_device_states

from longspan.engine.recorded_choices import keeping, repeating

Branch = Callable[..., Tensor]
"""branch(stream, **inputs): what is added to the other stream, of the same shape."""


def reversible(
    branches: Sequence[Branch], x: Tensor, parameters: Sequence[Tensor], inputs: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Both streams (B, T, hidden) after all branches, from x (B, T, hidden) in both, without activations in memory.

    parameters: of all branches, which get gradients. inputs: the keyword arguments of every branch; tensors among them get
    gradients too, unless they are within another object. A branch runs twice, with gradients enabled, and must not change its
    inputs.
    """
    names = [name for name, value in inputs.items() if isinstance(value, Tensor) and value.requires_grad]
    trained = [p for p in parameters if p.requires_grad]
    run = _Run(branches, inputs, names, trained)
    return _Reversible.apply(run, x, *(inputs[name] for name in names), *trained)


@dataclass(frozen=True)
class _Run:
    """The arguments of `reversible`, for its backward pass."""

    branches: Sequence[Branch]
    inputs: dict[str, Any]
    names: list[str]
    """The inputs that get a gradient."""
    parameters: list[Tensor]


class _Reversible(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: _Run, x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        ctx.run, ctx.contexts, ctx.counts = run, [], []
        choices: list[Tensor] = []
        a = b = x
        for branch in run.branches:
            context = _RandomAndPrecision(x)
            stream = b.detach().requires_grad_()
            with torch.enable_grad(), context.precision(), keeping() as recorded:  # as in the second run
                change = branch(stream, **run.inputs)
            a, b = b, a + change.detach()
            ctx.contexts.append(context)
            ctx.counts.append(len(recorded))
            choices += recorded
        ctx.save_for_backward(a, b, *choices)
        return a, b

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        run: _Run = ctx.run
        a, b, *choices = ctx.saved_tensors
        grad_a, grad_b = gradients
        inputs = dict(run.inputs)
        for name in run.names:  # detached: autograd goes on behind them after this
            inputs[name] = inputs[name].detach().requires_grad_()
        leaves = [inputs[name] for name in run.names] + run.parameters
        sums: list[Tensor | None] = [None] * len(leaves)
        for branch, context, count in reversed(list(zip(run.branches, ctx.contexts, ctx.counts, strict=True))):
            first = len(choices) - count
            recorded, choices = choices[first:], choices[:first]
            stream = a.detach().requires_grad_()
            with torch.enable_grad(), context.again(), repeating(recorded):
                change = branch(stream, **inputs)
            grad, *more = torch.autograd.grad(change, [stream, *leaves], grad_b.to(change.dtype), allow_unused=True)
            sums = [_sum(old, new) for old, new in zip(sums, more, strict=True)]
            a, b = b - change.detach(), a
            grad_a, grad_b = grad_b, grad_a + grad
        return None, grad_a + grad_b, *sums


class _RandomAndPrecision:
    """The random state and the autocast settings under which a branch ran."""

    def __init__(self, x: Tensor):
        self.cpu = torch.get_rng_state()
        self.device = x.device.type
        self.devices, self.states = get_device_states(x)
        kinds = {"cpu", self.device}
        self.autocast = {kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds}

    @contextmanager
    def precision(self) -> Iterator[None]:
        """A context with the same autocast settings, without the cache, which would keep the cast weights of all layers."""
        with ExitStack() as stack:
            for kind, (enabled, dtype) in self.autocast.items():
                stack.enter_context(torch.autocast(kind, enabled=enabled, dtype=dtype, cache_enabled=False))
            yield

    @contextmanager
    def again(self) -> Iterator[None]:
        """A context with the same autocast settings and random numbers, after which the random state is as before."""
        kind = self.device if self.devices else "cuda"
        with self.precision(), torch.random.fork_rng(devices=self.devices, device_type=kind):
            torch.set_rng_state(self.cpu)
            if self.devices:
                set_device_states(self.devices, self.states, device_type=kind)
            yield


def _sum(old: Tensor | None, new: Tensor | None) -> Tensor | None:
    if old is None or new is None:
        return new if old is None else old
    return old + new
