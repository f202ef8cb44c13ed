"""ReRoPE and Leaky ReRoPE: RoPE with distances that are bounded or compressed beyond a window, without training (Su 2023).

    i - j                        for i - j < w
    w                            otherwise, in ReRoPE
    w + (i - j - w) / k          otherwise, in Leaky ReRoPE

Su's w is a quarter to a half of the training length. k = 1 is plain RoPE, and k → ∞ is ReRoPE. As positions for plain rotation:
a far query is at w (leaky: w + (i - w)/k), a far key at 0 (leaky: j/k).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from longspan.core.facts import ModelFacts
from longspan.positions.near_far import NearFar
from longspan.util.errors import SpecError

_SOURCE = "Su 2023, kexue.fm/archives/9708; github.com/bojone/rerope"


@dataclass(frozen=True)
class ReRoPE(NearFar):
    """Distances of at most `window` = w tokens, by default a quarter of the model's window (1,024 of Llama-2's 4,096)."""

    window: int | None = None

    name = "rerope"
    title = "ReRoPE: distances end at the window"
    also = ("rectified-rope",)
    paper = _SOURCE

    def __post_init__(self) -> None:
        self.require(self.window is None or self.window >= 1, f"window must be at least 1 token, not {self.window}")

    def resolve(self, facts: ModelFacts, length: int | None) -> Self:
        return replace(self, window=self.window or max(1, facts.window // 4))

    def reach(self, facts: ModelFacts) -> int | None:
        return None

    def neutral_length(self) -> int:
        return (self.window or 0) + 1  # a distance of w is w in both forms

    def far(self, positions: Tensor, *, query: bool) -> Tensor:
        """w for queries and 0 for keys, at every position."""
        return torch.full_like(positions, (self.window or 0) if query else 0)


@dataclass(frozen=True)
class LeakyReRoPE(NearFar):
    """Distances that grow by 1/k beyond the window.

    `window`: w in tokens, by default a quarter of the model's window; `factor`: k, by default the smallest that keeps
    the distances of the target length within the model's window.
    """

    window: int | None = None
    factor: float | None = None

    name = "leaky-rerope"
    title = "Leaky ReRoPE: distances grow slowly past the window"
    paper = _SOURCE

    def __post_init__(self) -> None:
        self.require(self.window is None or self.window >= 1, f"window must be at least 1 token, not {self.window}")
        self.require(
            self.factor is None or 1 <= self.factor <= 2**20, f"factor must be from 1 to 1m, not {self.factor}"
        )

    def resolve(self, facts: ModelFacts, length: int | None) -> Self:
        window = self.window or max(1, facts.window // 4)
        if self.factor is not None:
            return replace(self, window=window)
        if length is None:
            raise SpecError(
                "leaky-rerope needs factor=… or a target length, for example leaky-rerope:factor=8,window=1024"
            )
        room = max(1, facts.window - 1 - window)
        return replace(self, window=window, factor=max(1.0, math.ceil((length - 1 - window) / room * 100) / 100))

    def reach(self, facts: ModelFacts) -> int | None:
        assert self.factor is not None and self.window is not None
        return self.window + int((facts.window - 1 - self.window) * self.factor + 1e-6) + 1

    def training_reach(self, facts: ModelFacts) -> int | None:
        return int(facts.window * (self.factor or 1))

    def neutral_length(self) -> int:
        return 2**31 if self.factor == 1 else (self.window or 0) + 1  # a distance of w is w in both forms

    def far(self, positions: Tensor, *, query: bool) -> Tensor:
        """w + (i - w)/k for queries, j/k for keys."""
        assert self.factor is not None and self.window is not None
        moved = self.window * (1 - 1 / self.factor) if query else 0.0
        return positions.float() / self.factor + moved
