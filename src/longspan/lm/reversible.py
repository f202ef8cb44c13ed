"""Reversible residual layers (Reformer, section 3): activations that are not kept but computed back.

Two streams, both as wide as the model, begin as the embeddings. Each branch f, attention or feed-forward network with its
norm, reads one and is added to the other, in turn:

    (a, b) -> (b, a + f(b)),    back: (b, c) -> (c - f(b), b)

Two such steps are equation (9), Y1 = X1 + Attention(X2), Y2 = X2 + FeedForward(Y1). The backward pass has the last
activations and works its way back, running every branch once more with the random numbers, the precision and the decisions
(`engine/recorded_choices.py`) of the first time. So memory is that of one branch, whatever the depth, and time about a third
more. The model reads the mean of both streams: so it has as many parameters as the usual one, as the paper says of its own
(the authors' encoder-decoder takes the mean as well; their language model sets the streams side by side).
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
    """Both streams (B, T, hidden) after all branches, from x (B, T, hidden) in both, with nothing kept in between.

    parameters: all that the branches have and that a gradient shall reach. inputs: what every branch is given by name; a
    gradient reaches the tensors among them too, unless they are inside of something else. A branch runs twice, with gradients
    switched on, and must not change what it is given.
    """
    names = [name for name, value in inputs.items() if isinstance(value, Tensor) and value.requires_grad]
    trained = [p for p in parameters if p.requires_grad]
    work = _Work(branches, inputs, names, trained)
    return _Reversible.apply(work, x, *(inputs[name] for name in names), *trained)


@dataclass(frozen=True)
class _Work:
    branches: Sequence[Branch]
    inputs: dict[str, Any]
    names: list[str]
    """Of the inputs that get a gradient."""
    parameters: list[Tensor]


class _Reversible(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, work: _Work, x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        ctx.work, ctx.circumstances, ctx.decisions = work, [], []
        decided: list[Tensor] = []
        a = b = x
        for branch in work.branches:
            circumstances = _Circumstances(x)
            stream = b.detach().requires_grad_()
            with torch.enable_grad(), circumstances.precision(), keeping() as kept:  # as in the second run
                change = branch(stream, **work.inputs)
            a, b = b, a + change.detach()
            ctx.circumstances.append(circumstances)
            ctx.decisions.append(len(kept))
            decided += kept
        ctx.save_for_backward(a, b, *decided)
        return a, b

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *pulls: Tensor) -> tuple[Tensor | None, ...]:
        work: _Work = ctx.work
        a, b, *decided = ctx.saved_tensors
        pull_a, pull_b = pulls
        inputs = dict(work.inputs)
        for name in work.names:  # cut off from what made them, whose turn comes later
            inputs[name] = inputs[name].detach().requires_grad_()
        wanted = [inputs[name] for name in work.names] + work.parameters
        sums: list[Tensor | None] = [None] * len(wanted)
        for branch, circumstances, count in reversed(
            list(zip(work.branches, ctx.circumstances, ctx.decisions, strict=True))
        ):
            own, decided = decided[len(decided) - count :], decided[: len(decided) - count]
            stream = a.detach().requires_grad_()
            with torch.enable_grad(), circumstances.again(), repeating(own):
                change = branch(stream, **inputs)
            pull, *more = torch.autograd.grad(change, [stream, *wanted], pull_b.to(change.dtype), allow_unused=True)
            sums = [_sum(old, new) for old, new in zip(sums, more, strict=True)]
            a, b = b - change.detach(), a
            pull_a, pull_b = pull_b, pull_a + pull
        return None, pull_a + pull_b, *sums


class _Circumstances:
    """What a branch's result depends on besides its inputs: random numbers and mixed precision."""

    def __init__(self, x: Tensor):
        self.cpu = torch.get_rng_state()
        self.device = x.device.type
        self.devices, self.states = get_device_states(x)
        kinds = {"cpu", self.device}
        self.autocast = {kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds}

    @contextmanager
    def precision(self) -> Iterator[None]:
        """Mixed precision as it was, without its cache, which would keep the cast weights of all layers."""
        with ExitStack() as stack:
            for kind, (enabled, dtype) in self.autocast.items():
                stack.enter_context(torch.autocast(kind, enabled=enabled, dtype=dtype, cache_enabled=False))
            yield

    @contextmanager
    def again(self) -> Iterator[None]:
        """The random numbers as well, and afterwards those that there were."""
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
