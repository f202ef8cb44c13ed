"""ALiBi: a bias on scores that falls linearly with the distance, with a fixed slope per head (Press 2022, §3).

score = q·k / sqrt(d) - m_h · |i - j|, with slopes m_h = 2^(-8h/H), h = 1 … H, where H is a power of two. For other numbers of
heads the authors' code takes the slopes of the power of two below, then every other slope of the power of two above.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from longspan.engine.biased.bias import Bias
from longspan.positions.scheme import PositionEncoding, Scheme, Shape


def slopes(heads: int, device: torch.device | str = "cpu") -> Tensor:
    """The slope of each head, (H,) float32.

    By Press 2022, §3, and by the authors' code where H is not a power of two.
    """
    below = 1 << (heads.bit_length() - 1)
    first = torch.arange(1, below + 1, device=device) / below
    between = torch.arange(1, 2 * below, 2, device=device) / (2 * below)
    return 2.0 ** (-8 * torch.cat((first, between))[:heads])


class ALiBiEncoding(PositionEncoding):
    """ALiBi in one model, without parameters."""

    def __init__(self, heads: int):
        super().__init__()
        self.heads = heads

    def distance_bias(self, past: int, ahead: int, device: torch.device) -> Bias:
        return Bias("linear", slopes(self.heads, device))

    def bias(self, distance: Tensor) -> Tensor:
        return self.distance_bias(0, 0, distance.device).values(distance, torch.float32)


@dataclass(frozen=True)
class ALiBi(Scheme):
    """A linear bias by distance.

    In an encoder it falls in both directions, which the paper leaves open.
    """

    name = "alibi"
    title = "ALiBi: attention with linear biases"
    also = ("linear-biases",)
    paper = "Press 2022, arXiv 2108.12409"

    def build(self, shape: Shape) -> PositionEncoding:
        return ALiBiEncoding(shape.heads)
