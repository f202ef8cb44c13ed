"""Windows of a long text, for tasks that describe how models use context."""

from __future__ import annotations

from typing import ClassVar

from transformers import PreTrainedTokenizerBase

from longspan.core.tokens import bos_id
from longspan.tasks.base import Sample, Task, check_fits
from longspan.tasks.text import GOLDEN, SHORTEST, TEXT_SOURCES, ReadsText

POINTS = 64
"""Distances at which a curve over distance is reported."""


class TextWindows(ReadsText, Task):
    """Base of tasks on windows of `text`, with ends evenly spread over it."""

    source: ClassVar[str] = TEXT_SOURCES
    default_count: ClassVar[int] = 4
    rates: ClassVar[bool] = False

    def samples(self, tokenizer: PreTrainedTokenizerBase, length: int, count: int, seed: int) -> list[Sample]:
        """Windows of exactly `length` tokens, BOS included.

        Where they end does not depend on their length.
        Raises `SpecError` for too short a length, or too short a text.
        """
        self.require(length >= SHORTEST, f"a length of at least {SHORTEST} tokens is needed, not {length:,}")
        text, begin = self.ring(tokenizer), bos_id(tokenizer)
        before = [] if begin is None else [begin]
        samples = []
        for number in range(count):
            end = int((0.5 + seed / 7 + number * GOLDEN) % 1 * len(text.ids))
            start = end - (length - len(before))
            ids = before + text.take(start, length - len(before), self.name)
            meta = text.describe() | {"start": start % len(text.ids), "end": end}
            samples.append(Sample(f"end-{number}", ids, meta))
        return check_fits(samples, length)
