"""Performer's random features (Choromanski 2021, figures 2 and 4): how near is their attention to softmax attention?

    python reproductions/performer_error.py --out reproductions/performer_error

One head of 64 channels, 2,048 tokens, queries and keys drawn normal with three standard deviations; the error of the output,
relative to softmax attention's, by the number of features, orthogonal and independent, each the mean of 8 draws. Beside it the
error of giving every token the same weight, which a useful approximation must beat. Half a minute on a CPU. What is judged: four
times the features halve the error at the smallest deviation, orthogonal features are no worse, and 256 features (the default)
beat equal weights at each deviation.
"""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import asdict
from pathlib import Path

import torch

from longspan.attention.random_features import Errors, draw_errors, errors


def judge(curves: list[Errors]) -> dict[str, bool]:
    least = min(curve.std for curve in curves)
    near = {curve.orthogonal: curve for curve in curves if curve.std == least}
    ratios = [after / before for before, after in itertools.pairwise(near[True].mean)]
    said = {f"std {least:g}: four times the features halve the error": all(0.35 < ratio < 0.65 for ratio in ratios)}
    pairs = zip(near[True].mean, near[False].mean, strict=True)
    said[f"std {least:g}: orthogonal features are no worse"] = all(ours <= other for ours, other in pairs)
    for curve in (c for c in curves if c.orthogonal and 256 in c.features):
        beats = curve.mean[curve.features.index(256)] < curve.equal_weights
        said[f"std {curve.std:g}: 256 features beat equal weights"] = beats
    return said


def main(arguments: list[str] | None = None) -> dict[str, bool]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--draws", type=int, default=8)
    options = parser.parse_args(arguments)
    sizes = {"length": options.length, "draws": options.draws}
    curves = [errors(std=std, orthogonal=o, **sizes) for std in (0.25, 0.5, 1.0) for o in (True, False)]
    said = judge(curves)
    options.out.mkdir(parents=True, exist_ok=True)
    record = {"torch": torch.__version__, **sizes, "curves": [asdict(curve) for curve in curves], "judged": said}
    (options.out / "errors.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    draw_errors(curves, options.out / "errors.png")
    for curve in curves:
        kind = "orthogonal" if curve.orthogonal else "independent"
        points = "  ".join(f"{n}: {mean:.3f}" for n, mean in zip(curve.features, curve.mean, strict=True))
        print(f"std {curve.std:g}, {kind:12s} {points}  equal weights: {curve.equal_weights:.3f}")
    for claim, holds in said.items():
        print(f"{'holds' if holds else 'does not hold'}: {claim}")
    return said


if __name__ == "__main__":
    main()
