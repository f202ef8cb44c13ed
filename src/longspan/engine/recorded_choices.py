"""Records a layer's discrete choices, so that recomputation in the backward pass repeats them.

Recomputed inputs may differ in their last bits. A number changes as little, but a choice made from it, such as a token's
hash bucket, may flip, and the gradients would be those of another function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_recorded: ContextVar[list[Tensor] | None] = ContextVar("recorded", default=None)
_again: ContextVar[Iterator[Tensor] | None] = ContextVar("again", default=None)


def decided(make: Callable[[], Tensor]) -> Tensor:
    """What `make` decides, or what it decided in the run that is repeated.

    Nothing is differentiated through it.
    """
    again, recorded = _again.get(), _recorded.get()
    if again is not None:
        return next(again)
    choice = make()
    if recorded is not None:
        recorded.append(choice)
    return choice


@contextmanager
def keeping() -> Iterator[list[Tensor]]:
    """The decisions of the block, in their order."""
    recorded: list[Tensor] = []
    token = _recorded.set(recorded)
    try:
        yield recorded
    finally:
        _recorded.reset(token)


@contextmanager
def repeating(recorded: list[Tensor]) -> Iterator[None]:
    """The block decides what was decided before."""
    token = _again.set(iter(recorded))
    try:
        yield
    finally:
        _again.reset(token)
