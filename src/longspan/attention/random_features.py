"""Random features of the softmax kernel, and the error of attention by them (FAVOR+, Choromanski 2021).

    φ(x) = m^{-1/2} e^{W x̃ - |x̃|²/2},   x̃ = x · sqrt(scale),   E φ(q)·φ(k) = e^{scale q·k}          (Lemma 1)

The rows of W are normal vectors, orthogonal in blocks of D (section 2.4). The estimate is unbiased and positive, but its variance
grows like e^{|q̃ + k̃|²}: attention by features is close to softmax attention only for small queries and keys. `errors` measures
this, with the error of equal weights for all tokens, which a useful approximation must beat.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from longspan.engine.linear.attention import Kernel, bidirectional

RELU_FLOOR = 1e-3
"""Added to the features of the generalised ReLU kernel, as the authors' code does."""


@dataclass(frozen=True)
class Draw:
    """How W is drawn: `features` rows, orthogonal or not, with the norms of normal vectors (chi) or all sqrt(D) (sqrt)."""

    features: int = 256
    orthogonal: bool = True
    norms: Literal["chi", "sqrt"] = "chi"

    def matrix(self, width: int, *seeds: int) -> Tensor:
        """W (features, width) float32, on the CPU; the same for the same seeds."""
        seed = int(np.random.SeedSequence(seeds).generate_state(1, np.uint64)[0] >> np.uint64(1))
        source = torch.Generator(device="cpu").manual_seed(seed)

        def normal(rows: int) -> Tensor:
            return torch.randn(rows, width, generator=source, dtype=torch.float64, device="cpu")

        if self.orthogonal:
            blocks = [_directions(normal(width)) for _ in range(-(-self.features // width))]
            directions = torch.cat(blocks)[: self.features]
        else:
            directions = nn.functional.normalize(normal(self.features), dim=-1)
        norms = normal(self.features).norm(dim=-1, keepdim=True) if self.norms == "chi" else math.sqrt(width)
        return (directions * norms).float()


def _directions(normal: Tensor) -> Tensor:
    """A uniformly random orthogonal matrix from a normal one: QR with a positive diagonal is unique."""
    q, r = torch.linalg.qr(normal)
    return q * r.diagonal().sign()


class RandomFeatures(nn.Module):
    """W (features, width) as a buffer, which is saved with the model.

    redraw: a new W is drawn after that many calls of `count`, one per training forward; 0 for never. The number of calls is saved
    too, so that a resumed run continues with the same draws.
    """

    projection: Tensor
    steps: Tensor

    def __init__(
        self, draw: Draw, width: int, *seeds: int, kernel: Literal["softmax", "relu"] = "softmax", redraw: int = 0
    ):
        super().__init__()
        self.draw, self.width, self.seeds, self.kind, self.redraw = draw, width, seeds, kernel, redraw
        self.register_buffer("projection", torch.empty(draw.features, width))
        if redraw:
            self.register_buffer("steps", torch.empty((), dtype=torch.long))
        self.draw_weights()

    def draw_weights(self) -> None:
        """Draws the first W, before any step."""
        self.projection.copy_(self.draw.matrix(self.width, *self.seeds, 0))
        if self.redraw:
            self.steps.zero_()

    def forward(self, x: Tensor, *, scale: float, projection: Tensor | None = None) -> Tensor:
        """Features (…, m) of x (…, D): their logarithms for the softmax kernel, themselves for the ReLU kernel.

        scale: the factor on scores; projection: a W other than the last.
        """
        x = x * math.sqrt(scale)
        projected = x @ (self.projection if projection is None else projection).to(x.dtype).mT
        if self.kind == "relu":
            return (
                projected.masked_fill(projected <= 0, 0) + RELU_FLOOR
            )  # relu, with a slope of 0 at 0 in every version
        return projected - x.square().sum(-1, keepdim=True) / 2 - math.log(self.draw.features) / 2

    def kernel(self, scale: float, projection: Tensor | None = None) -> Kernel:
        """The features as a kernel, with the last W or `projection`, also where they are recomputed after another draw."""
        projection = self.projection if projection is None else projection
        return Kernel(partial(self, scale=scale, projection=projection), logarithms=self.kind == "softmax")

    @torch.compiler.disable
    def count(self) -> Tensor:
        """Begins another training step and returns its W."""
        number, step = divmod(int(self.steps), self.redraw)
        if number and not step:
            new = self.draw.matrix(self.width, *self.seeds, number)
            self.projection = new.to(self.projection)  # a new tensor: a backward may still need the old one
        self.steps += 1
        return self.projection


@dataclass(frozen=True)
class Errors:
    """Relative errors |approximation - exact| / |exact| of attention's output over all tokens.

    mean and standard_error: over draws of W, for each number of `features`; equal_weights: the error of equal weights for all
    tokens.
    """

    std: float
    width: int
    length: int
    orthogonal: bool
    features: tuple[int, ...]
    mean: tuple[float, ...]
    standard_error: tuple[float, ...]
    equal_weights: float


def errors(
    features: Sequence[int] = (16, 64, 256, 1024),
    *,
    std: float,
    width: int = 64,
    length: int = 2048,
    draws: int = 8,
    orthogonal: bool = True,
    seed: int = 0,
) -> Errors:
    """The errors of self-attention of `length` tokens by random features, in one head of `width` channels.

    Queries and keys are normal with standard deviation `std` in every channel, values with 1.
    """
    source = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(1, 1, length, width, generator=source) for _ in range(3))
    query, key, scale = query * std, key * std, width**-0.5
    exact = nn.functional.scaled_dot_product_attention(query, key, value)

    def error(approximation: Tensor) -> float:
        return float((approximation - exact).norm() / exact.norm())

    means, spreads = [], []
    for count in features:
        found = []
        for number in range(draws):
            random = RandomFeatures(Draw(count, orthogonal), width, seed, number)
            found.append(error(bidirectional(query, key, value, random.kernel(scale))))
        means.append(statistics.fmean(found))
        spreads.append(statistics.stdev(found) / math.sqrt(draws) if draws > 1 else math.nan)
    equal = error(value.mean(2, keepdim=True).expand_as(exact))
    return Errors(std, width, length, orthogonal, tuple(features), tuple(means), tuple(spreads), equal)


def draw_errors(curves: Sequence[Errors], path: Path) -> None:
    """Writes a PNG of error against the number of features, with the error of equal weights as a dashed line."""
    from longspan.util.drawing import save_png, styles  # matplotlib, which takes a second

    looks = styles([str(n) for n in range(len(curves))])

    def paint(axes: Any) -> None:
        for n, curve in enumerate(curves):
            look = looks[str(n)]
            label = f"std {curve.std:g}, {'orthogonal' if curve.orthogonal else 'independent'}"
            axes.errorbar(
                curve.features,
                curve.mean,
                curve.standard_error,
                color=look.colour,
                marker=look.marker,
                ms=3,
                label=label,
            )
            axes.axhline(curve.equal_weights, color=look.colour, linestyle="--", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("random features")
        axes.set_ylabel("relative error of the output")
        axes.set_title("Attention by random features (dashed: equal weights for all tokens)")
        axes.legend(fontsize=7, frameon=False)

    save_png([paint], (6, 4), path)
