"""The record of one forward of a decoder under a method, which holds all state of that forward.

A hook before the decoder creates it and passes it as a keyword argument, which decoder layers pass on to their attention and
gradient checkpointing keeps for the recomputation. So forwards in several threads, nested or interleaved forwards and recomputed
layers do not share state. Where an architecture's layers drop keyword arguments (StableLM) the record is an attribute of
`position_ids`, which all layers pass on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from longspan.hf.compat import FORWARD

T = TypeVar("T")


class Forward:
    """One forward of a decoder.

    position_ids: (B or 1, T), of its tokens, where the caller passed them; start: the number of tokens in the cache before it;
    causal: no query sees later keys, which is certain unless the caller prepared masks.
    """

    def __init__(self, position_ids: Tensor | None = None, start: int = 0, *, causal: bool = True):
        self.position_ids, self._start, self.causal = position_ids, start, causal
        self._shared: dict[str, Any] = {}
        self._state: dict[int, Any] = {}

    def positions(self, queries: Tensor) -> Tensor:
        """Positions (B or 1, Tq) of the queries (B, H, Tq, D): those that the caller passed, or those that follow the cache."""
        if self.position_ids is not None:
            return self.position_ids
        return torch.arange(self._start, self._start + queries.shape[2], device=queries.device)[None]

    def once(self, name: str, compute: Callable[[], T]) -> T:
        """`compute()`, called by the first layer and shared by the others under `name`."""
        if name not in self._shared:
            self._shared[name] = compute()
        return self._shared[name]

    def part(self, positions: Tensor) -> Forward:
        """The record of a forward of some of the batch's texts, at `positions` (B, T), with the same state of methods."""
        part = Forward(positions, self._start, causal=self.causal)
        part._state = self._state
        return part

    def keep(self, owner: object, state: Any) -> None:
        """Stores `state` of this forward for `owner`, the method's object on this model."""
        self._state[id(owner)] = state

    def state(self, owner: object) -> Any:
        """What `owner` stored with `keep`. Raises `KeyError` where that is nothing."""
        return self._state[id(owner)]


def counts_on(positions: Tensor, real: Tensor) -> bool:
    """Whether positions (B or 1, T) rise by one at each real token of a row; real (B, T) is False for padding."""
    gaps = positions - real.cumsum(1)
    high, low = gaps.masked_fill(~real, -(2**31)).amax(-1), gaps.masked_fill(~real, 2**31).amin(-1)
    return not bool((high > low).any())


def forward_of(arguments: dict[str, Any]) -> Forward:
    """The record among a decoder's keyword arguments."""
    return arguments[FORWARD]


def tag(positions: Tensor, forward: Forward) -> Tensor:
    """A view of `positions` that carries the record as an attribute."""
    tagged = positions.view_as(positions)
    setattr(tagged, FORWARD, forward)
    return tagged


def handed(kwargs: dict[str, Any], positions: Tensor | None) -> Forward | None:
    """The record that reached an attention function, removed from its keyword arguments; None where a layer dropped it."""
    forward = kwargs.pop(FORWARD, None)
    return getattr(positions, FORWARD, None) if forward is None else forward
