"""A query sees the last `recent` tokens and every `step`-th token of the text."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from longspan.attention.trained import OnTrained
from longspan.core.facts import ModelFacts
from longspan.engine.call import AttentionShape


@dataclass(frozen=True)
class Template(OnTrained):
    """`recent` and `step` in tokens."""

    recent: int = 256
    step: int = 16

    name: ClassVar[str] = "template"
    title: ClassVar[str] = "A window and every so many tokens"
    paper: ClassVar[str] = "Author year, arXiv number"
    cost: ClassVar[str] = "time n²/step, cache n"
    examples: ClassVar[tuple[str, ...]] = ("template:recent=6,step=9", "template:recent=64")

    def __post_init__(self) -> None:
        self.require(self.recent >= 1 and self.step >= 1, "recent and step must be at least 1 token")

    def mask(self, queries: Tensor, keys: Tensor, shape: AttentionShape) -> Tensor:
        distance = queries[:, None, :, None] - keys[:, None, None, :]
        return (distance.abs() < self.recent) | (keys % self.step == 0)[:, None, None, :]

    def neutral_length(self) -> int:
        return self.recent

    def keys_seen(self, facts: ModelFacts, length: int) -> int:
        return min(length, self.recent + length // self.step)
