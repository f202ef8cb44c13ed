"""What position schemes do before any training, drawn: `python reproductions/position_curves.py --out docs/images`.

Four panels: the product of two sinusoidal positions by distance, the biases by distance, the entropy of attention with and
without log-n over more and more keys, and which distances PoSE's samples hold.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from longspan.core.method import parse
from longspan.positions.absolute import sinusoid
from longspan.positions.pose import PoSE, sampler
from longspan.positions.scheme import PositionEncoding, Shape
from longspan.util.drawing import COLOURS, DASHES, save_png

FAR = 2 ** np.arange(0, 14.01, 0.25)
"""Distances drawn, 1 to 16,384 tokens."""


def product_of_sinusoids(distances: torch.Tensor, width: int = 512, base: float = 10_000.0) -> torch.Tensor:
    """p_m · p_n over its value at distance 0: (2/d) Σ cos((m - n) θ_i), by the scheme's own embeddings."""
    here = sinusoid(torch.zeros(1, dtype=torch.long), width, base)
    return (sinusoid(distances, width, base) @ here.mT)[..., 0] / (width / 2)


def logarithmic_law(distances: torch.Tensor, base: float = 10_000.0) -> torch.Tensor:
    """What the product is about, between 1 and `base`: 1 - (ln n + γ) / ln base."""
    return 1 - (distances.double().log() + 0.5772156649) / math.log(base)


def bias(spec: str, distances: torch.Tensor, heads: int = 8) -> torch.Tensor:
    """Mean over heads of what a score gets; learned ones as they are drawn by seed 0."""
    torch.manual_seed(0)
    scheme: Any = parse(spec).methods[0]
    place: PositionEncoding = scheme.build(Shape(8, 512, heads, 64, 512, True))
    return place.bias(distances).mean(0).detach()


def entropies(keys: int, base: int = 512, rows: int = 64) -> tuple[float, float]:
    """Entropy (nats) of softmax over unrelated keys with scores of deviation 3: plain, and multiplied by log n / log base."""
    scores = 3 * torch.randn(rows, keys, dtype=torch.float64, generator=torch.Generator().manual_seed(keys))
    found = []
    for factor in (1.0, math.log(keys) / math.log(base)):
        weights = (scores * factor).log_softmax(-1)
        found.append(float(-(weights.exp() * weights).sum(-1).mean()))
    return found[0], found[1]


def coverage(window: int = 2048, target: int = 16384, samples: int = 4000) -> np.ndarray:
    """For each distance below `target`, the share of PoSE's samples that hold a pair of tokens so far apart."""
    pose, covered = PoSE(window, target), np.zeros(target)
    for index in range(samples):
        draw = pose.draw(sampler(0, 0, index), 5 * window)
        first, second, jump = draw.starts[1], window - draw.starts[1], draw.biases[1]
        held = np.zeros(target, dtype=bool)
        held[: max(first, second)] = True  # within a chunk
        held[jump + 1 : jump + window] = True  # across the jump: from neighbours to the two ends
        covered += held
    return covered / samples


def draw(out: Path) -> dict[str, Any]:
    """Writes `positions.png`; returns the figures that it shows."""
    far = torch.tensor(FAR.round()).long().unique()
    keys = [512 * 2**i for i in range(9)]
    spread = [entropies(n) for n in keys]
    lines: list[tuple[str, list[tuple[str, Any, Any]]]] = [
        (
            "Product of two sinusoidal positions",
            [
                ("base 10,000", far, product_of_sinusoids(far)),
                ("base 1,000", far, product_of_sinusoids(far, base=1000.0)),
                ("1 - (ln n + γ) / ln 10,000", far[far < 10_000], logarithmic_law(far[far < 10_000])),
            ],
        ),
        (
            "Mean bias over 8 heads",
            [(spec, far, bias(spec, far)) for spec in ("alibi", "kerple", "kerple:kind=power", "sandwich")],
        ),
        (
            "Entropy of attention (nats)",
            [(name, keys, [s[i] for s in spread]) for i, name in enumerate(("plain", "log-n"))],
        ),
        ("Share of PoSE's samples that hold a distance", [("2,048 of 16,384", np.arange(1, 16384), coverage()[1:])]),
    ]

    def panel(axes: Any, title: str, curves: list[tuple[str, Any, Any]]) -> None:
        for number, (name, x, y) in enumerate(curves):
            axes.plot(x, y, color=COLOURS[number], linestyle=DASHES[number], label=name)
        axes.set_xscale("log", base=2)
        axes.set_title(title)
        axes.set_xlabel("keys" if "Entropy" in title else "distance (tokens)")
        if title.startswith("Mean"):
            axes.set_ylim(-40, 2)
        axes.legend(fontsize=7, frameon=False)

    out.mkdir(parents=True, exist_ok=True)
    save_png([lambda axes, t=t, c=c: panel(axes, t, c) for t, c in lines], (16.0, 3.4), out / "positions.png")
    return {"keys": keys, "entropy_plain": [s[0] for s in spread], "entropy_logn": [s[1] for s in spread]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    print(json.dumps(draw(parser.parse_args().out), indent=1))
