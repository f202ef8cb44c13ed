"""KERPLE: a trained bias per head that falls with the distance, from conditionally positive definite kernels (Chi 2022).

    log    -r1 · log(1 + r2 · |i - j|)
    power  -r1 · |i - j|^r2, 0 < r2 ≤ 2; r2 = 1 is ALiBi with trained slopes

Each head has one r1 and r2, shared by all layers. The paper adds the bias before the division by sqrt(d), its code after it;
`scale` selects one, by default `after`, with which the published figures were computed. Parameters are drawn as in the code: r1
and the power's r2 uniformly from (0, 2), the logarithm's r2 from (0, 1), and they are never below 0.01. The code clamps
parameters in place after every step; here the clamp is part of the function, with a straight-through gradient, so that a
parameter at its bound can leave it again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from longspan.engine.biased.bias import Bias
from longspan.positions.scheme import PositionEncoding, Scheme, Shape

LEAST = 0.01
"""The lower bound of r1 and r2."""


class KerpleEncoding(PositionEncoding):
    """KERPLE's r1 and r2, each (H,); factor: on the bias."""

    def __init__(self, heads: int, kind: Literal["log", "power"], factor: float):
        super().__init__()
        self.kind, self.factor = kind, factor
        self.r1 = nn.Parameter(torch.empty(heads))
        self.r2 = nn.Parameter(torch.empty(heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.r1, 0, 2)
        nn.init.uniform_(self.r2, 0, 1 if self.kind == "log" else 2)

    def parameters_within_bounds(self) -> tuple[Tensor, Tensor]:
        """(r1 · factor, r2), each (H,) float32, clamped to their bounds."""
        most = math.inf if self.kind == "log" else 2.0
        return _bounded(self.r1, LEAST, math.inf) * self.factor, _bounded(self.r2, LEAST, most)

    def distance_bias(self, past: int, ahead: int, device: torch.device) -> Bias:
        return Bias(self.kind, *self.parameters_within_bounds())

    def bias(self, distance: Tensor) -> Tensor:
        return self.distance_bias(0, 0, distance.device).values(distance, torch.float32)


def _bounded(x: Tensor, least: float, most: float) -> Tensor:
    x = x.float()
    return x + (x.clamp(least, most) - x).detach()


@dataclass(frozen=True)
class Kerple(Scheme):
    """A trained bias by distance.

    `kind`: the kernel; `scale=before` adds it before the division by sqrt(d), as in the paper.
    """

    kind: Literal["log", "power"] = "log"
    scale: Literal["after", "before"] = "after"

    name = "kerple"
    title = "KERPLE: kernelised relative positions"
    also = ("kernelized-relative-positions",)
    near = ("fire",)
    paper = "Chi 2022, arXiv 2205.09921"

    def build(self, shape: Shape) -> PositionEncoding:
        return KerpleEncoding(shape.heads, self.kind, shape.head_dim**-0.5 if self.scale == "before" else 1.0)
