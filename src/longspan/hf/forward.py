"""The record of one forward of a decoder under a method: whatever belongs to that forward and to no other.

A hook before the decoder makes it and hands it along as a keyword argument, which decoder layers pass on to their attention and
which gradient checkpointing keeps for the recomputation. So threads that share a model, interleaved forwards, models within
models and layers that are computed again never meet each other's state. An architecture whose layers drop keyword arguments
(StableLM) gets it as an attribute of `position_ids`, which they all hand on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from longspan.hf.compat import FORWARD

T = TypeVar("T")


class Forward:
    """One forward of a decoder. given: the positions (B or 1, T) of its tokens, where they were given; start: tokens in the
    cache before it; causal: whether it is known that no query sees later keys, as it is unless masks were made around the
    decoder."""

    def __init__(self, given: Tensor | None = None, start: int = 0, *, causal: bool = True):
        self.given, self._start, self.causal = given, start, causal
        self._made: dict[str, Any] = {}
        self._state: dict[int, Any] = {}

    def positions(self, queries: Tensor) -> Tensor:
        """Positions (B or 1, Tq) of the queries (B, H, Tq, D): those that the caller gave, or the ones that follow the cache."""
        if self.given is not None:
            return self.given
        return torch.arange(self._start, self._start + queries.shape[2], device=queries.device)[None]

    def once(self, name: str, make: Callable[[], T]) -> T:
        """`make()`, computed by the first layer that asks and shared by the others."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    def part(self, positions: Tensor) -> Forward:
        """The record of a part of the batch's texts, read by themselves at `positions` (B, T)."""
        part = Forward(positions, self._start, causal=self.causal)
        part._state = self._state
        return part

    def keep(self, owner: object, state: Any) -> None:
        """Stores what `owner`, the method's object on this model, knows of this forward."""
        self._state[id(owner)] = state

    def state(self, owner: object) -> Any:
        """What `owner` has stored with `keep`."""
        return self._state[id(owner)]


def counts_on(positions: Tensor, real: Tensor) -> bool:
    """Whether positions (B or 1, T) count each row's tokens, those that are `real` (B, T), one by one."""
    apart = positions - real.cumsum(1)
    high, low = apart.masked_fill(~real, -(2**31)).amax(-1), apart.masked_fill(~real, 2**31).amin(-1)
    return not bool((high > low).any())


def forward_of(arguments: dict[str, Any]) -> Forward:
    """The record among a decoder's keyword arguments."""
    return arguments[FORWARD]


def tag(positions: Tensor, forward: Forward) -> Tensor:
    """`positions`, as a tensor that carries the record along."""
    tagged = positions.view_as(positions)
    setattr(tagged, FORWARD, forward)
    return tagged


def handed(kwargs: dict[str, Any], positions: Tensor | None) -> Forward | None:
    """The record that reached an attention function, taken out of its keyword arguments; None where it was lost on the way."""
    forward = kwargs.pop(FORWARD, None)
    return getattr(positions, FORWARD, None) if forward is None else forward
