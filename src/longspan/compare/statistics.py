"""Scores and paired differences to the baseline, with their 95 % intervals.

A failed sample counts as the worst score and stays in the denominator. The interval of a score is:

- of a share (every sample is right or wrong, more is better): Wilson's interval; of the difference of two shares on the
  same samples: Newcombe's interval for paired shares (1998, method 10), which has a width even where all samples agree;
- of a mean of many samples: the bootstrap over samples, 2,000 resamples with a fixed seed;
- of overlapping windows of one text: the same, with as many draws in a resample as there are `independent` windows,
  since reading a text twice adds no information;
- of a mean of few long windows with their loss by position (`nll_by_position`, perplexity): too few windows to resample,
  so positions are resampled. The buckets of all windows are split into eight strata by position, and buckets are resampled
  within each stratum: the trend over positions stays fixed and only the scatter around it widens the interval. It
  describes the precision on these texts; the variation among texts needs more windows.

A difference is computed sample by sample (or bucket by bucket), so that the difficulty of a sample cancels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

RESAMPLES = 2000
FEW_WINDOWS = 10
STRATA = 8
FOUND = 0.2
"""Share of the trials at a distance that must find the key, for the effective window to reach that distance."""
_Z = 1.959963984540054  # the 97.5 % point of the normal distribution

Interval = tuple[float, float]


@dataclass(frozen=True)
class Estimate:
    """A score, or a difference of scores, with its 95 % interval, over `n` samples.

    independent: the effective number of samples, below `n` where windows overlap. Both figures are None without samples.
    """

    value: float | None
    interval: Interval | None
    n: int
    independent: float = 0.0

    @property
    def overlapping(self) -> bool:
        """True where windows overlap so much that they count as at least 0.05 samples fewer."""
        return self.independent < self.n - 0.05


@dataclass(frozen=True)
class Scale:
    """The direction of a task's score, and the score of a failed sample."""

    higher_is_better: bool
    worst: float


def score(samples: Sequence[dict[str, Any]], scale: Scale, length: int | None = None) -> Estimate:
    """The mean score of a cell's samples, with its 95 % interval.

    samples: records with `score`, `failed` and `detail`. length: of a sample, in tokens; None where samples cannot overlap.
    """
    if not samples:
        return Estimate(None, None, 0)
    values, effective = _values(samples, scale), independent(samples, length)
    if _is_share(values, scale):
        return Estimate(float(values.mean()), wilson(float(values.sum()), len(values)), len(values), effective)
    curves = _curves(samples)
    if curves is not None and effective < FEW_WINDOWS:
        low, high = _bootstrap_positions(*curves, effective / len(values))
    else:
        low, high = bootstrap(values, effective)
    mean = float(values.mean())
    return Estimate(mean, (min(low, mean), max(high, mean)), len(values), effective)


def difference(
    samples: Sequence[dict[str, Any]], baseline: Sequence[dict[str, Any]], scale: Scale, length: int | None = None
) -> Estimate:
    """The mean paired difference to the baseline, with its interval.

    Score minus the baseline's score, over samples with the same id.
    """
    others = {s["id"]: s for s in baseline}
    paired = [s for s in samples if s["id"] in others]
    theirs = [others[s["id"]] for s in paired]
    if not paired:
        return Estimate(None, None, 0)
    a, b = _values(paired, scale), _values(theirs, scale)
    mean, effective = float((a - b).mean()), independent(paired, length)
    if _is_share(np.concatenate([a, b]), scale):
        return Estimate(mean, newcombe(a, b), len(paired), effective)
    curves, other_curves = _curves(paired), _curves(theirs)
    if curves is not None and other_curves is not None and effective < FEW_WINDOWS:
        low, high = _bootstrap_positions(curves[0] - other_curves[0], curves[1], effective / len(paired))
    else:
        low, high = bootstrap(a - b, effective)
    return Estimate(mean, (min(low, mean), max(high, mean)), len(paired), effective)


def independent(samples: Sequence[dict[str, Any]], length: int | None) -> float:
    """The effective number of samples (Kish): how many disjoint windows contain as much information.

    With c(t) the number of windows that contain token t of the text, (Σ c)² / Σ c² tokens, in windows of `length`: the
    number of samples where none overlap, and at most the text's tokens divided by `length`. A window's detail has its
    `start` in a text that is read as a ring of `text_tokens` tokens; samples without these are all independent.
    """
    details = [s["detail"] or {} for s in samples]
    if length is None or not all("start" in d and "text_tokens" in d for d in details):
        return float(len(samples))
    changes: dict[int, int] = {}
    for detail in details:
        total = int(detail["text_tokens"])
        start, rest = int(detail["start"]) % total, min(length, total)
        while rest:  # a window continues at the beginning of the text
            end = min(start + rest, total)
            changes[start] = changes.get(start, 0) + 1
            changes[end] = changes.get(end, 0) - 1
            start, rest = 0, rest - (end - start)
    places = sorted(changes)
    covers, sizes = np.cumsum([changes[p] for p in places])[:-1], np.diff(places)
    covered = float((covers * sizes).sum())
    return covered / float((covers**2 * sizes).sum()) * len(samples)


def effective_window(trials: Iterable[tuple[float, int, bool]]) -> int:
    """The effective window: the largest distance, in tokens, up to which keys are found.

    At every depth up to it at least a share `FOUND` of the trials finds the key.

    PI's k_max (Chen 2023, arXiv 2306.15595). trials: (depth, distance in tokens from the key to the end, found) each. Keys
    differ in tokens, so the trials at one depth may differ in distance by a few; the shortest represents them. 0 where the
    shortest distance fails.
    """
    places: dict[float, list[tuple[int, bool]]] = {}
    for depth, distance, hit in trials:
        places.setdefault(round(depth, 6), []).append((distance, hit))
    reached = 0
    for distance, hits in sorted((min(k for k, _ in place), [hit for _, hit in place]) for place in places.values()):
        if sum(hits) < FOUND * len(hits):
            break
        reached = distance
    return reached


def wilson(hits: float, n: int) -> Interval:
    """Wilson's 95 % interval of the share of `hits` in `n` trials."""
    p = hits / n
    centre = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
    return max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))


def newcombe(a: np.ndarray, b: np.ndarray) -> Interval:
    """Newcombe's 95 % interval of the paired difference of two shares (1998, method 10).

    a, b: (n,), 1 for a right sample and 0 for a wrong one, of the same samples.
    """
    n, p, q = len(a), float(a.mean()), float(b.mean())
    (low_p, high_p), (low_q, high_q) = wilson(a.sum(), n), wilson(b.sum(), n)
    both, neither = float((a * b).sum()), float(((1 - a) * (1 - b)).sum())
    only_a, only_b = float((a * (1 - b)).sum()), float(((1 - a) * b).sum())
    spread = math.sqrt((both + only_a) * (only_b + neither) * (both + only_b) * (only_a + neither))
    agreement = both * neither - only_a * only_b
    if agreement > n / 2:
        agreement -= n / 2
    elif agreement > 0:
        agreement = 0.0
    phi = agreement / spread if spread else 0.0

    def reach(x: float, y: float) -> float:
        return math.sqrt(max(0.0, x**2 - 2 * phi * x * y + y**2))

    return max(-1.0, p - q - reach(p - low_p, high_q - q)), min(1.0, p - q + reach(high_p - p, q - low_q))


def bootstrap(values: np.ndarray, effective: float | None = None, seed: int = 0) -> Interval:
    """Percentile interval of the mean of `values` (n,), from 2,000 resamples.

    effective: the number of independent values, and of draws in a resample (None: all). The interval of a single value is
    that value.
    """
    size = len(values) if effective is None else max(1, round(effective))
    draws = np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, size))
    low, high = np.percentile(values[draws].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def _bootstrap_positions(means: np.ndarray, counts: np.ndarray, share: float, seed: int = 0) -> Interval:
    """Interval of the mean over all tokens of `means` (windows, buckets), weighted by `counts` of the same shape.

    Buckets are resampled within strata of neighbouring positions, over all windows together; `share` of them, the
    independent ones, are drawn.
    """
    generator = np.random.default_rng(seed)
    total = np.zeros(RESAMPLES)
    for part_means, part_counts in zip(
        np.array_split(means, STRATA, axis=1), np.array_split(counts, STRATA, axis=1), strict=True
    ):
        values, weights = part_means[part_counts > 0], part_counts[part_counts > 0]
        if not len(values):
            continue
        draws = generator.integers(len(values), size=(RESAMPLES, max(1, round(share * len(values)))))
        drawn = (values[draws] * weights[draws]).sum(axis=1) / weights[draws].sum(axis=1)
        total += drawn * weights.sum() / counts.sum()
    low, high = np.percentile(total, [2.5, 97.5])
    return float(low), float(high)


def _values(samples: Sequence[dict[str, Any]], scale: Scale) -> np.ndarray:
    return np.array([scale.worst if s["failed"] or s["score"] is None else s["score"] for s in samples], dtype=float)


def _is_share(values: np.ndarray, scale: Scale) -> bool:
    return scale.higher_is_better and bool(np.isin(values, (0.0, 1.0)).all())


def _curves(samples: Sequence[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray] | None:
    """Loss and token counts by position, each (windows, buckets).

    None unless every sample has them, in one shape.
    """
    details = [s["detail"] or {} for s in samples]
    if any(s["failed"] for s in samples) or not all(d.get("nll_by_position") for d in details):
        return None
    losses = [d["nll_by_position"] for d in details]
    counts = [d.get("tokens_by_position") or [1] * len(d["nll_by_position"]) for d in details]
    if len({len(row) for row in losses + counts}) != 1:
        return None
    means = np.array([[0.0 if v is None else v for v in row] for row in losses], dtype=float)
    weights = np.array(counts, dtype=float)
    weights[np.array([[v is None for v in row] for row in losses])] = 0
    return (means, weights) if weights.sum() else None
