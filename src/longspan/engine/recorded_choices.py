"""What a layer decided while it ran, kept so that a second run of it decides alike.

A layer that is run again in the backward pass may get inputs that differ in their last bits. A number changes by as little;
a decision made of it, such as which bucket a token falls into, may turn over, and the gradients would be another function's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_kept: ContextVar[list[Tensor] | None] = ContextVar("kept", default=None)
_again: ContextVar[Iterator[Tensor] | None] = ContextVar("again", default=None)


def decided(make: Callable[[], Tensor]) -> Tensor:
    """What `make` decides, or what it decided in the run that is repeated. Nothing is differentiated through it."""
    again, kept = _again.get(), _kept.get()
    if again is not None:
        return next(again)
    made = make()
    if kept is not None:
        kept.append(made)
    return made


@contextmanager
def keeping() -> Iterator[list[Tensor]]:
    """The decisions of the block, in their order."""
    kept: list[Tensor] = []
    token = _kept.set(kept)
    try:
        yield kept
    finally:
        _kept.reset(token)


@contextmanager
def repeating(kept: list[Tensor]) -> Iterator[None]:
    """The block decides what was decided before."""
    token = _again.set(iter(kept))
    try:
        yield
    finally:
        _again.reset(token)
