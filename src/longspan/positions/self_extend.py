"""Self-Extend: true distances to near keys and distances of groups to far keys, without training (Jin 2024).

With neighbour window W and group size G, a key at distance i - j < W has its true distance, and a farther one has
floor(i/G) - floor(j/G) + W - floor(W/G). Distances stay below L for inputs of up to (L - W + floor(W/G))·G tokens, which is the
paper's (L - W)·G + W where G divides W.
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


@dataclass(frozen=True)
class SelfExtend(NearFar):
    """Grouped distances beyond a window.

    `group`: G, `window`: W, in tokens; both follow from a target length.
    """

    group: int | None = None
    window: int | None = None

    name = "self-extend"
    title = "Self-Extend (LongLM)"
    also = ("longlm",)
    near = ("dual-chunk-attention", "chunkllama")
    paper = "Jin 2024, arXiv 2401.01325"

    def __post_init__(self) -> None:
        self.require(self.group is None or self.group >= 1, f"group must be at least 1, not {self.group}")
        self.require(self.window is None or self.window >= 1, f"window must be at least 1 token, not {self.window}")

    def resolve(self, facts: ModelFacts, length: int | None) -> Self:
        """The method with W and G filled in.

        W is a quarter of the model's window (1,024 of Llama-2's 4,096), at most 1,024. G is the smallest power of two that keeps
        the distances of the target length within two thirds of the window (the authors' rule of thumb). Raises `SpecError`
        without a group and a target length.
        """
        window = self.window or min(1024, max(1, facts.window // 4))
        if self.group is not None:
            return replace(self, window=window)
        if length is None:
            raise SpecError("self-extend needs group=… or a target length, for example self-extend:group=8,window=1024")
        room = max(1.0, facts.window * 2 / 3 - window)
        group = 1 if length <= facts.window else 2 ** math.ceil(math.log2(max(1.0, (length - window) / room)))
        return replace(self, group=group, window=window)

    def reach(self, facts: ModelFacts) -> int | None:
        assert self.group is not None and self.window is not None
        return (facts.window - self.window + self.window // self.group) * self.group

    def neutral_length(self) -> int:
        return 2**31 if self.group == 1 else (self.window or 0) + 1  # at a distance of W both forms are W

    def far(self, positions: Tensor, *, query: bool) -> Tensor:
        """floor(p/G) for keys, floor(p/G) + W - floor(W/G) for queries."""
        assert self.group is not None and self.window is not None
        grouped = torch.div(positions, self.group, rounding_mode="floor")
        return grouped + self.window - self.window // self.group if query else grouped
