"""ALiBi: every score loses a little for each token of distance, at a fixed slope for each head; nothing is learned.

score = q·k / sqrt(d) - m_h · |i - j|, with slopes 2^(-8h/H) for a power-of-two number of heads H. For other numbers the
authors' code takes the slopes of the power of two below, then every other one of the power of two above.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from longspan.engine.biased.bias import Bias
from longspan.positions.scheme import PositionEncoding, Scheme, Shape


def slopes(heads: int, device: torch.device | str = "cpu") -> Tensor:
    """The slope of each head, (H,) float32 (Press 2022, §3, and the authors' code for numbers that are no power of two)."""
    below = 1 << (heads.bit_length() - 1)
    first = torch.arange(1, below + 1, device=device) / below
    between = torch.arange(1, 2 * below, 2, device=device) / (2 * below)
    return 2.0 ** (-8 * torch.cat((first, between))[:heads])


class ALiBiEncoding(PositionEncoding):
    def __init__(self, heads: int):
        super().__init__()
        self.heads = heads

    def distance_bias(self, past: int, ahead: int, device: torch.device) -> Bias:
        return Bias("linear", slopes(self.heads, device))

    def bias(self, distance: Tensor) -> Tensor:
        return self.distance_bias(0, 0, distance.device).values(distance, torch.float32)


@dataclass(frozen=True)
class ALiBi(Scheme):
    """In an encoder the slope runs both ways, which the paper leaves open."""

    name = "alibi"
    title = "ALiBi: attention with linear biases"
    also = ("linear-biases",)
    paper = "Press 2022, arXiv 2108.12409"

    def build(self, shape: Shape) -> PositionEncoding:
        return ALiBiEncoding(shape.heads)
