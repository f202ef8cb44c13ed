"""Window attention: a query sees the last `size` tokens, 0 <= i - j < size, and in an encoder as many after it.

With `sinks` it also sees the first tokens of the text. On a trained model, without training, it is Su's strong baseline: with a
window of the training length neither distances nor numbers of keys are new, so perplexity stays constant at any length. Through
the layers information reaches (size - 1)·layers + 1 tokens: the result is that of a banded mask in every layer, not of reading
the last `size` tokens alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from longspan.core.facts import ModelFacts
from longspan.engine.blocks.tables import Blocks, band
from longspan.engine.call import AttentionShape
from longspan.lm.base import Pattern
from longspan.lm.configuration import LongspanConfig
from longspan.positions.scheme import PositionEncoding
from longspan.positions.spans import Span
from longspan.util.errors import NotSupported


@dataclass(frozen=True)
class Window(Span, Pattern):
    """Attention to the last `size` tokens, by default a trained model's window.

    `sinks`: first tokens that all see, in longspan models.
    """

    size: int | None = None
    sinks: int = 0

    name = "window"
    title = "Window (on trained models Su's strong baseline)"
    also = ("sliding-window", "swa")
    paper = "Su 2023, kexue.fm/archives/9431"
    seam = "attention"
    works_on = "pretrained, from scratch"
    runs_zero_key = True

    def __post_init__(self) -> None:
        self.require(self.size is None or self.size >= 1, f"size must be at least 1 token, not {self.size}")
        self.require(0 <= self.sinks <= 2**16, f"sinks must be from 0 to 65,536, not {self.sinks:,}")

    def check(self, facts: ModelFacts) -> None:
        super().check(facts)
        if self.sinks:
            raise NotSupported(
                f"{self.spec}: in a long text sinks are at distances that {facts.architecture} was not trained with; use "
                f"streaming:sinks={self.sinks},window={self.size or facts.window}, which keeps them near"
            )

    def resolve(self, facts: ModelFacts, length: int | None) -> Self:
        return replace(self, size=self.size or facts.window)

    def first(self, positions: Tensor) -> Tensor:
        assert self.size is not None
        return positions - self.size + 1

    def least(self, size: int) -> int:
        return size

    def build(self, config: LongspanConfig, layer: int, encoding: PositionEncoding, *, causal: bool) -> nn.Module:
        self.require(self.size is not None, "a model is built with a size, such as window:size=256")
        return super().build(config, layer, encoding, causal=causal)

    def mask(self, queries: Tensor, keys: Tensor, shape: AttentionShape) -> Tensor:
        assert self.size is not None
        distance = queries[:, None, :, None] - keys[:, None, None, :]
        near = distance.abs() < self.size
        return near | (keys < self.sinks)[:, None, None, :] if self.sinks else near

    def ranges(self, start: int, end: int, shape: AttentionShape) -> list[tuple[int, int]]:
        assert self.size is not None
        low, high = max(0, start - self.size + 1), min(shape.length, end if shape.causal else end + self.size - 1)
        if low <= self.sinks:
            return [(0, max(high, min(self.sinks, shape.length)))]
        return [(0, self.sinks), (low, high)] if self.sinks else [(low, high)]

    def blocks(self, shape: AttentionShape, size: int, device: torch.device) -> Blocks:
        assert self.size is not None
        lengths, window = (shape.length, shape.length), min(self.size, shape.length)
        return band(lengths, window=window, sinks=self.sinks, causal=shape.causal, size=size, device=device)

    def sinks_and_window(self) -> tuple[int, int]:
        assert self.size is not None
        return self.sinks, self.size
