"""Default lengths of a run: as far as memory and half an hour allow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from longspan.compare.planning import cost
from longspan.core.facts import ModelFacts

PATIENCE = 30 * 60.0
"""Seconds that such a run may take, roughly."""
START = 2.0
"""Seconds that a cell takes beside its samples, roughly: a process, the model, the method."""


@dataclass(frozen=True)
class Choice:
    """Lengths in tokens, the most samples of a cell (None: no limit), and why."""

    lengths: list[int]
    most_samples: int | None
    why: str


def choose_lengths(
    facts: ModelFacts,
    methods: int,
    counts: Sequence[int],
    dtype: torch.dtype,
    memory: int,
    speed: float,
    keep_counts: bool = False,
) -> Choice:
    """Doubled lengths from the native window on, within memory and half an hour.

    methods: how many rows. counts: each task's number of samples. memory: bytes, of which one input may take 80 %.
    speed: floating point operations a second. The native window and its double are kept in any case; where even these
    take longer, samples are made fewer, unless `keep_counts`.
    """

    def total(lengths: list[int], most: int | None = None) -> float:
        work = sum(min(n, most or n) for n in counts)
        return methods * sum(len(counts) * START + work * cost.prefill_flops(facts, x) / speed for x in lengths)

    lengths, why = [facts.window], "the next one does not fit into memory"
    while cost.memory_needed(facts, 2 * lengths[-1], dtype) <= 0.8 * memory:
        if len(lengths) > 1 and total([*lengths, 2 * lengths[-1]]) > PATIENCE:
            why = "with the next one the run would take more than half an hour"
            break
        lengths.append(2 * lengths[-1])
    most = None
    if total(lengths) > PATIENCE and max(counts) > 2 and not keep_counts:
        most = next((n for n in range(max(counts) - 1, 2, -1) if total(lengths, n) <= PATIENCE), 2)
        why += f"; at most {most} samples a cell, as the run would take long with more"
    if total(lengths, most) > PATIENCE:
        why += "; name fewer methods, or lengths, for a shorter run"
    return Choice(lengths, most, why)
