"""One model in several hands: threads, a forward in the midst of another, layers that run again after another forward."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

T = TypeVar("T")
THREADS = 4


def at_once(call: Callable[[int], T]) -> list[T]:
    """call(0), call(1), … each in a thread of its own, which take turns as often as Python lets them."""
    start = threading.Barrier(THREADS)

    def run(number: int) -> T:
        start.wait()
        return call(number)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            return list(pool.map(run, range(THREADS)))
    finally:
        sys.setswitchinterval(interval)


def assert_threads_get_what_each_gets_alone(call: Callable[[int], Tensor]) -> None:
    alone = [call(number) for number in range(THREADS)]
    assert not all(a.shape == alone[0].shape and torch.equal(a, alone[0]) for a in alone[1:]), "nothing would be seen"
    for got, wanted in zip(at_once(call), alone, strict=True):
        torch.testing.assert_close(got, wanted)


def in_the_midst(module: nn.Module, outer: Callable[[], T], inner: Callable[[], object]) -> T:
    """outer(), with inner() when `module` is first done."""
    waiting = [inner]

    def interrupt(*call: object) -> None:
        if waiting:
            waiting.pop()()

    handle = module.register_forward_hook(interrupt)
    try:
        return outer()
    finally:
        handle.remove()
        assert not waiting, "the module did not run"


def gradients(model: PreTrainedModel, losses: Sequence[Callable[[], Tensor]]) -> dict[str, Tensor]:
    """Of all losses together, which are all there before the first goes backward."""
    model.zero_grad()
    torch.manual_seed(0)
    sum(loss() * (number + 1) for number, loss in enumerate(losses)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_checkpoints_change_no_gradient(model: PreTrainedModel, *losses: Callable[[], Tensor]) -> None:
    """Layers that run again in the backward pass, when other forwards have been."""
    state = copy.deepcopy(model.state_dict())  # what is drawn anew in training is drawn from here both times
    wanted = gradients(model, losses)
    model.load_state_dict(state)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        got = gradients(model, losses)
    finally:
        model.gradient_checkpointing_disable()
    assert got.keys() == wanted.keys() and any(g.abs().sum() > 0 for g in wanted.values())
    for name, grad in wanted.items():
        torch.testing.assert_close(got[name], grad, msg=lambda said, name=name: f"{name}: {said}")
