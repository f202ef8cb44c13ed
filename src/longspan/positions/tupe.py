"""TUPE: scores of tokens plus scores of positions, each with projections of its own, and no mixed terms (Ke 2021).

score = (x_i W_Q)(x_j W_K)ᵀ / sqrt(2d) + (p_i U_Q)(p_j U_K)ᵀ / sqrt(2d), with trained positions p, normalised before they are
projected, as in the authors' code. All layers share U, so the second term is computed once. TUPE-R adds T5's buckets. `cls`
unties the first token (§3.2): its row has one trained number per head, its column another. They are free parameters, as in the
formula; the code computes them from two more positions.

The table of positions ends with the training length, and longer inputs are refused.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longspan.engine.core import distances
from longspan.positions.scheme import PositionEncoding, Scheme, Shape
from longspan.positions.t5_bias import T5Encoding


class TupeEncoding(PositionEncoding):
    """TUPE's table of positions and their projections; relative: TUPE-R's buckets; cls: whether the first token is untied."""

    score_scale = 2**-0.5

    def __init__(self, shape: Shape, relative: T5Encoding | None, cls: bool):
        super().__init__()
        self.reach, self.heads, self.head_dim = shape.window, shape.heads, shape.head_dim
        self.places = nn.Parameter(torch.empty(shape.window, shape.hidden))
        self.query = nn.Parameter(torch.empty(shape.heads * shape.head_dim, shape.hidden))
        self.key = nn.Parameter(torch.empty(shape.heads * shape.head_dim, shape.hidden))
        self.relative = relative
        self.cls = nn.Parameter(torch.empty(2, shape.heads)) if cls else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight in (self.places, self.query, self.key):
            nn.init.normal_(weight, std=0.02)
        if self.cls is not None:
            nn.init.zeros_(self.cls)

    def pair_bias(self, q_positions: Tensor, k_positions: Tensor) -> Tensor:
        positions = F.layer_norm(self.places.float(), self.places.shape[-1:])
        query, key = (
            F.linear(positions, weight.float()).view(-1, self.heads, self.head_dim) for weight in (self.query, self.key)
        )
        products = torch.einsum("bqhd,bkhd->bhqk", query[q_positions], key[k_positions])
        bias = products * (2 * self.head_dim) ** -0.5
        if self.relative is not None:
            bias = bias + self.relative.bias(distances(q_positions, k_positions)).transpose(0, 1)
        if self.cls is not None:
            to_others, to_cls = self.cls.float()[:, None, :, None, None]
            bias = torch.where((k_positions == 0)[:, None, None, :], to_cls, bias)
            bias = torch.where((q_positions == 0)[:, None, :, None], to_others, bias)
        return bias


@dataclass(frozen=True)
class Tupe(Scheme):
    """Untied scores of positions.

    `relative` adds T5's buckets (TUPE-R); `cls` unties the first token, by default in encoders.
    """

    relative: bool = False
    cls: bool | None = None

    name = "tupe"
    title = "TUPE: untied positional encoding"
    also = ("untied-positional-encoding",)
    paper = "Ke 2021, arXiv 2006.15595"

    def build(self, shape: Shape) -> PositionEncoding:
        cls = not shape.causal if self.cls is None else self.cls
        relative = T5Encoding(shape.heads, 32, 128, shape.causal) if self.relative else None
        return TupeEncoding(shape, relative, cls)
