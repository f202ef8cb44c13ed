"""Models that know every answer of a sample, but those that a test takes from them, and what all tasks with answers must keep."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from typing import Any

import torch
from tasks_tiny import FakeMeter, KnownModel

from longspan.tasks.base import Outcome, Sample, Task


def whole(task: Task, tokenizer: Any, sample: Sample) -> list[int]:
    """A sample with its last answer."""
    return [*sample.tokens, *task.answer(tokenizer, sample)]


def places(task: Task, tokenizer: Any, sample: Sample) -> list[int]:
    """Where every token of every answer stands."""
    end = len(sample.tokens)
    spans = [*task.answered(sample), (end, end + len(task.answer(tokenizer, sample)))]
    return [at for start, stop in spans for at in range(start, stop)]


def oracle(ids: list[int], wrong: Collection[int] = (), vocabulary: int = 258) -> KnownModel:
    """Says the next of `ids`, and another token in the places `wrong`."""

    def rule(context: int) -> torch.Tensor:
        logits = torch.zeros(vocabulary)
        right = ids[context] if context < len(ids) else 1
        logits[(right + 7) % vocabulary if context in wrong else right] = 9.0
        return logits

    return KnownModel(rule, vocabulary)


def run(task: Task, tokenizer: Any, sample: Sample, wrong: Collection[int] = ()) -> tuple[Outcome, FakeMeter]:
    """The outcome of an oracle, which is JSON-able, and what was metered."""
    meter = FakeMeter()
    outcome = task.run(oracle(whole(task, tokenizer, sample), wrong), tokenizer, sample, meter)  # type: ignore[arg-type]
    json.dumps(outcome.detail, allow_nan=False)
    return outcome, meter


def broken(task: Task, tokenizer: Any, sample: Sample) -> Outcome:
    """The outcome of a model whose logits are not numbers."""
    model = KnownModel(lambda context: torch.full((258,), float("nan")), 258)
    return task.run(model, tokenizer, sample, FakeMeter())  # type: ignore[arg-type]


def digest(task: Task, tokenizer: Any, sample: Sample) -> str:
    """What a golden test compares."""
    return hashlib.sha256(str(whole(task, tokenizer, sample)).encode()).hexdigest()[:16]


def check_samples(task: Task, tokenizer: Any, length: int, count: int = 3) -> list[Sample]:
    """The samples of a cell, with what holds for every task: they fit with their answers, begin with one BOS, have different
    names, and are the same when they are drawn again; another seed gives others."""
    samples = task.samples(tokenizer, length, count, 0)
    assert len(samples) == count
    assert len({s.id for s in samples}) == count
    for sample in samples:
        assert task.answer(tokenizer, sample)
        assert len(whole(task, tokenizer, sample)) <= length
        assert sample.tokens[0] == 0
        assert 0 not in sample.tokens[1:]
    assert task.samples(tokenizer, length, count, 0) == samples
    assert task.samples(tokenizer, length, count, 1) != samples
    return samples
