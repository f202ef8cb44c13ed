"""Position schemes that every study of length compares with: sinusoidal, learned, RoPE, and no positions (NoPE).

Learned positions end with their table. Sinusoidal positions and RoPE have no limit, but the model was not trained past its
window. Without positions only the causal mask tells the order of tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from longspan.positions.scheme import PositionEncoding, Scheme, Shape


def sinusoid(positions: Tensor, width: int, base: float = 10_000.0) -> Tensor:
    """(*positions, width) in float32: sin and cos of position / base^(2i/width), interleaved (Vaswani 2017, §3.5)."""
    rates = base ** (-torch.arange(0, width, 2, device=positions.device, dtype=torch.float64) / width)
    angles = positions.double()[..., None] * rates
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2).float()


class SinusoidalEncoding(PositionEncoding):
    """Scaled embeddings plus a sinusoid of their positions."""

    def __init__(self, base: float):
        super().__init__()
        self.base = base

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        return x * math.sqrt(x.shape[-1]) + sinusoid(positions, x.shape[-1], self.base).to(x.dtype)


@dataclass(frozen=True)
class Sinusoidal(Scheme):
    """Sines and cosines of positions, added to embeddings times the square root of their width (Vaswani 2017, §3.5)."""

    base: float = 10_000.0

    name = "sinusoidal"
    title = "Sinusoidal positions"
    also = ("sinusoids",)
    paper = "Vaswani 2017, arXiv 1706.03762"

    def __post_init__(self) -> None:
        self.require(self.base > 1, f"base must be above 1, not {self.base}")

    def build(self, shape: Shape) -> PositionEncoding:
        self.require(shape.hidden % 2 == 0, f"the hidden size must be even, not {shape.hidden}")
        return SinusoidalEncoding(self.base)


class LearnedEncoding(PositionEncoding):
    """Embeddings plus a trained row for each of `size` positions."""

    def __init__(self, size: int, hidden: int):
        super().__init__()
        self.reach = size
        self.table = nn.Parameter(torch.empty(size, hidden))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.table, std=0.02)

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        return x + self.table[positions]


@dataclass(frozen=True)
class Learned(Scheme):
    """A trained table of `size` positions, by default the training length; longer inputs are refused."""

    size: int | None = None

    name = "learned"
    title = "Learned absolute positions"
    also = ("learned-positions",)
    paper = "Gehring 2017, arXiv 1705.03122"

    def __post_init__(self) -> None:
        self.require(self.size is None or self.size >= 1, f"size must be at least 1, not {self.size}")

    def build(self, shape: Shape) -> PositionEncoding:
        return LearnedEncoding(self.size or shape.window, shape.hidden)


@dataclass(frozen=True)
class NoPositions(Scheme):
    """No positions: a causal model tells the order of tokens by its mask (Kazemnejad 2023)."""

    name = "nope"
    title = "NoPE: no positions at all"
    also = ("no-positions",)
    paper = "Kazemnejad 2023, arXiv 2305.19466"

    def build(self, shape: Shape) -> PositionEncoding:
        self.require(
            shape.causal or shape.ordered,
            "without positions an encoder cannot tell the order of tokens; use rope or t5",
        )
        return PositionEncoding()


@dataclass(frozen=True)
class RoPE(Scheme):
    """Rotary positions (Su 2021).

    `theta`: the base of the wavelengths; `share`: the share of a head's channels that rotate.
    """

    theta: float = 10_000.0
    share: float = 1.0

    name = "rope"
    title = "RoPE: rotary positions"
    also = ("rotary", "roformer")
    paper = "Su 2021, arXiv 2104.09864"

    def __post_init__(self) -> None:
        self.require(self.theta > 1, f"theta must be above 1, not {self.theta}")
        self.require(0 < self.share <= 1, f"share must be above 0 and at most 1, not {self.share}")

    def build(self, shape: Shape) -> PositionEncoding:
        width = shape.head_dim * self.share
        self.require(
            width == int(width) and width % 2 == 0,
            f"share={self.share} of {shape.head_dim} channels is not an even number of channels; use another share",
        )
        return PositionEncoding()

    def rope_parameters(self) -> dict[str, Any]:
        share = {} if self.share == 1 else {"partial_rotary_factor": self.share}
        return {"rope_type": "default", "rope_theta": self.theta, **share}
