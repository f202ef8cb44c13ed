"""TUPE: places meet places in projections of their own, words meet words, and neither meets the other.

score = (x_i W_Q)(x_j W_K)ᵀ / sqrt(2d) + (p_i U_Q)(p_j U_K)ᵀ / sqrt(2d), with learned places p (normalised before they are
projected, as in the authors' code), U of each head shared by all layers, so that the second term is computed once. TUPE-R adds
T5's buckets. `cls` unties the first token: its row gets one learned number for each head, and its column another (§3.2),
drawn as in the formula, as free parameters; the code makes them of two more places instead.

A table of places ends with the table: TUPE does not read past its training length.
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
        places = F.layer_norm(self.places.float(), self.places.shape[-1:])
        query, key = (
            F.linear(places, weight.float()).view(-1, self.heads, self.head_dim) for weight in (self.query, self.key)
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
    """`relative` adds T5's buckets (TUPE-R); `cls` unties the first token, by default in an encoder."""

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
