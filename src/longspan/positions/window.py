"""A window at inference: every token sees the last `size` tokens, 0 <= i - j < size; nothing is trained.

Su's strong baseline. With as many tokens as the model was trained on, neither an unknown distance nor an unknown number of
keys is met, so perplexity stays level at any length. Through the layers information travels further, (size - 1)·layers + 1
tokens: the result is that of a banded mask in every layer, not of reading the last `size` tokens alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

from torch import Tensor

from longspan.facts import ModelFacts
from longspan.positions.spans import Span


@dataclass(frozen=True)
class Window(Span):
    """`size` in tokens; left out, it is the model's window."""

    size: int | None = None

    name: ClassVar[str] = "window"
    title: ClassVar[str] = "Window at inference (Su's strong baseline)"
    paper: ClassVar[str] = "Su 2023, kexue.fm/archives/9431"

    def __post_init__(self) -> None:
        self.require(self.size is None or self.size >= 1, f"size must be at least 1 token, not {self.size}")

    def resolve(self, facts: ModelFacts, length: int | None) -> Self:
        return replace(self, size=self.size or facts.window)

    def first(self, positions: Tensor) -> Tensor:
        assert self.size is not None
        return positions - self.size + 1

    def least(self, size: int) -> int:
        return size
