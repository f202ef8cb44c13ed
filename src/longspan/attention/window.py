"""A window: every token sees the last `size` tokens, 0 <= i - j < size; in an encoder as many after it as well.

On a trained model, where nothing is trained, it is Su's strong baseline. With as many tokens as the model was trained on,
neither an unknown distance nor an unknown number of keys is met, so perplexity stays level at any length. Through the
layers information travels further, (size - 1)·layers + 1 tokens: the result is that of a banded mask in every layer, not of
reading the last `size` tokens alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

from torch import Tensor, nn

from longspan.attention.base import Grid, Pattern
from longspan.facts import ModelFacts
from longspan.positions.scheme import Place
from longspan.positions.spans import Span

if TYPE_CHECKING:
    from longspan.lm.configuration import LongspanConfig


@dataclass(frozen=True)
class Window(Span, Pattern):
    """`size` in tokens; left out, it is a trained model's window."""

    size: int | None = None

    name: ClassVar[str] = "window"
    title: ClassVar[str] = "Window (on trained models Su's strong baseline)"
    paper: ClassVar[str] = "Su 2023, kexue.fm/archives/9431"
    seam: ClassVar[Any] = "attention"
    works_on: ClassVar[str] = "pretrained, from scratch"

    def __post_init__(self) -> None:
        self.require(self.size is None or self.size >= 1, f"size must be at least 1 token, not {self.size}")

    def resolve(self, facts: ModelFacts, length: int | None) -> Self:
        return replace(self, size=self.size or facts.window)

    def first(self, positions: Tensor) -> Tensor:
        assert self.size is not None
        return positions - self.size + 1

    def least(self, size: int) -> int:
        return size

    def build(self, config: LongspanConfig, layer: int, place: Place, *, causal: bool) -> nn.Module:
        self.require(self.size is not None, "say how many tokens it sees, such as window:size=256")
        return super().build(config, layer, place, causal=causal)

    def visible(self, queries: Tensor, keys: Tensor, grid: Grid) -> Tensor:
        assert self.size is not None
        distance = queries[:, None, :, None] - keys[:, None, None, :]
        return distance.abs() < self.size

    def ranges(self, start: int, end: int, grid: Grid) -> list[tuple[int, int]]:
        assert self.size is not None
        return [(max(0, start - self.size + 1), min(grid.length, end if grid.causal else end + self.size - 1))]
