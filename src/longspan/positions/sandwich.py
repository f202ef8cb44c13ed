"""Sandwich: the product of two sinusoidal position embeddings as a bias by distance (Chi 2023).

bias_h = (sum over k = 1 … D/2 of cos((i - j) · 10000^(-2k/D)) - D/2) / (8h/H), h = 1 … H. It is the term of position with
position in sinusoidal attention; the divisor makes it flatter from head to head. It falls roughly as the logarithm of the
distance and has no parameters. D is the width of the sinusoid, not of the model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from longspan.positions.scheme import PositionEncoding, Scheme, Shape


class SandwichEncoding(PositionEncoding):
    """Sandwich in one model, without parameters."""

    def __init__(self, heads: int, width: int):
        super().__init__()
        self.heads, self.width = heads, width

    def bias(self, distance: Tensor) -> Tensor:
        values, index = distance.unique(return_inverse=True)  # few values for many pairs, and each is a long sum
        i = torch.arange(1, self.width // 2 + 1, device=distance.device, dtype=torch.float64)
        angles = values.double()[:, None] * 10_000.0 ** (-2 * i / self.width)
        decay = angles.cos().sum(-1) - self.width / 2
        flatness = 8 * torch.arange(1, self.heads + 1, device=distance.device, dtype=torch.float64) / self.heads
        return (decay / flatness[:, None]).float()[:, index]


@dataclass(frozen=True)
class Sandwich(Scheme):
    """A bias by distance without parameters. `width`: D, channels of the sinusoid."""

    width: int = 128

    name = "sandwich"
    title = "Sandwich: the place-to-place part of sinusoidal attention"
    paper = "Chi 2023, arXiv 2212.10356"

    def __post_init__(self) -> None:
        self.require(self.width >= 2 and self.width % 2 == 0, f"width must be even and at least 2, not {self.width}")

    def build(self, shape: Shape) -> PositionEncoding:
        return SandwichEncoding(shape.heads, self.width)
