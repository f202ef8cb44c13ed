"""Growth of a time or a size with the length: the exponent of a power law and its 95 % interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

FEWEST = 4
"""Fewest lengths for an exponent: three leave one degree of freedom, and an interval of ±12.7 standard errors."""
WIDEST = 0.25
"""Half-width of the interval above which no exponent is reported: it would not separate n from n log n or n²."""
_STUDENT = (4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160)
"""97.5 % points of Student's distribution for 2, 3, … degrees of freedom; the last serves all above it, slightly too wide."""
UNTOLD = f"needs {FEWEST} lengths, and an interval of at most ±{WIDEST}"


class Point(NamedTuple):
    """A value measured at a length in tokens."""

    length: int
    value: float


@dataclass(frozen=True)
class Growth:
    """The exponent e of value ~ length^e with its 95 % interval, fitted over `lengths` lengths."""

    exponent: float
    low: float
    high: float
    lengths: int

    def __str__(self) -> str:
        return f"{self.exponent:.2f} [{self.low:.2f}–{self.high:.2f}]".replace("-", "−")


def growth(points: Sequence[Point]) -> Growth | None:
    """The exponent fitted over the longer half of the lengths, at least `FEWEST` of them.

    None where there are fewer, or where values scatter so much that the interval is wider than `WIDEST` to either side. The
    interval is Student's for the slope, so it covers scatter from length to length.
    """
    points = sorted(points)[-max(FEWEST, -(-len(points) // 2)) :]
    if len(points) < FEWEST or points[0].length == points[-1].length:
        return None
    x, y = np.log([p.length for p in points]), np.log([p.value for p in points])
    freedom = len(points) - 2
    slope, offset = np.polyfit(x, y, 1)
    error = np.sqrt(((y - slope * x - offset) ** 2).sum() / freedom / ((x - x.mean()) ** 2).sum())
    half = float(_STUDENT[min(freedom - 2, len(_STUDENT) - 1)] * error)
    return Growth(float(slope), float(slope) - half, float(slope) + half, len(points)) if half <= WIDEST else None


def growth_of(rows: Sequence[dict[str, Any]], name: str, what: str) -> Growth | None:
    """The growth of the value `what` in the rows named `name`, as `bench attention` stores them; None as for `growth`."""
    return growth([Point(r["length"], r[what]) for r in rows if r["name"] == name and r.get(what)])
