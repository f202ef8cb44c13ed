"""Transformer-XL's relative positions: a score of each query with the distance, besides that with the key.

    A_ij = ((q_i + u) · k_j + (q_i + v) · W_R R_(i-j)) / sqrt(D)        (Dai 2019, §3.3)

R is the sinusoid of the distance, sines before cosines. u and v are one vector per head, shared by all layers; every layer has
its own W_R. Nothing is added to embeddings, so hidden states can be used again at another distance: `memory="transformer-xl"`
needs that, and works with any relative scheme.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from longspan.positions.scheme import PositionEncoding, Scheme, Shape


class XLEncoding(PositionEncoding):
    """u, v and W_R of all layers; clamp: the largest distance in tokens, or None."""

    def __init__(self, shape: Shape, clamp: int | None):
        super().__init__()
        self.clamp = clamp
        self.content = nn.Parameter(torch.empty(shape.heads, shape.head_dim))
        self.position = nn.Parameter(torch.empty(shape.heads, shape.head_dim))
        self.projection = nn.Parameter(torch.empty(shape.layers, shape.heads, shape.head_dim, shape.hidden))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.02)

    def rotate_qk(self, query: Tensor, key: Tensor, q_positions: Tensor, k_positions: Tensor) -> tuple[Tensor, Tensor]:
        return query + self.content[:, None].to(query.dtype), key

    def query_scores(self, query: Tensor, distance: Tensor, layer: int) -> Tensor:
        weights = self.projection[layer].float()
        clamped = distance if self.clamp is None else distance.clamp(max=self.clamp)
        keys = torch.einsum("nd,hwd->hwn", halves(clamped, weights.shape[-1]), weights)
        return (query.float() + self.position[:, None].float()) @ keys


def halves(distance: Tensor, width: int, base: float = 10_000.0) -> Tensor:
    """(N, width) float32: sines and then cosines of distance / base^(2i/width), for distances (N,)."""
    rates = base ** (-torch.arange(0, width, 2, device=distance.device, dtype=torch.float64) / width)
    angles = distance.double()[:, None] * rates
    return torch.cat((angles.sin(), angles.cos()), dim=-1).float()


@dataclass(frozen=True)
class XL(Scheme):
    """Scores by distance.

    `clamp`: distances above it, in tokens, count as it; the paper evaluates past the training length so.
    """

    clamp: int | None = None

    name = "xl"
    title = "Transformer-XL's relative positions"
    also = ("transformer-xl-positions",)
    paper = "Dai 2019, arXiv 1901.02860"

    def __post_init__(self) -> None:
        self.require(self.clamp is None or self.clamp >= 1, f"clamp must be at least 1 token, not {self.clamp}")

    def build(self, shape: Shape) -> PositionEncoding:
        self.require(shape.causal, "it scores keys before the query alone; use rope or t5 in an encoder")
        self.require(shape.hidden % 2 == 0, f"the hidden size must be even, not {shape.hidden}")
        return XLEncoding(shape, self.clamp)
