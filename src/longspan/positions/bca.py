"""Blockwise causal attention: a query sees its own block of `size`/2 tokens and the block before (Sun 2023).

With h = size/2 the query at position i sees the keys from (floor(i / h) - 1)·h to i, between h + 1 and size of them. Blocks are
counted by position, so one forward, chunks and decoding see the same keys. (The authors' code slides a window of `size` while
decoding, which shows a new token other keys than the prompt's tokens had.) The paper uses it with xPos, at inference alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from longspan.core.facts import ModelFacts
from longspan.positions.spans import Span


@dataclass(frozen=True)
class BlockwiseCausal(Span):
    """`size`: two blocks, an even number of tokens, by default the model's window."""

    size: int | None = None

    name = "bca"
    title = "Blockwise causal attention"
    also = ("blockwise-causal-attention",)
    paper = "Sun 2023, arXiv 2212.10554"

    def __post_init__(self) -> None:
        self.require(
            self.size is None or (self.size >= 2 and self.size % 2 == 0),
            f"size must be an even number of tokens, two blocks, not {self.size}",
        )

    def resolve(self, facts: ModelFacts, length: int | None) -> Self:
        return replace(self, size=self.size or max(2, facts.window - facts.window % 2))

    def first(self, positions: Tensor) -> Tensor:
        assert self.size is not None
        block = self.size // 2
        return (torch.div(positions, block, rounding_mode="floor") - 1) * block

    def least(self, size: int) -> int:
        return size // 2 + 1
