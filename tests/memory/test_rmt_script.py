"""The reproduction of RMT's memory: what it reads, right answers, the lengths it goes through, what it concludes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

import scripts
import tiny
from longspan.memory.rmt import RMT, around
from longspan.tasks import base
from longspan.tasks.base import parse_task


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """The script, whose own task is in the catalogue no longer than these tests run."""
    made = scripts.load("rmt_memorize")
    yield made
    del sys.modules[made.__name__], base.Task.registry[made.Varied.name]


def test_answers_are_judged_as_in_one_pass(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces on one cache, several rows, answers of different lengths; against each row by itself."""
    model = around(tiny.model(256), RMT(tokens=2, segment=100)).eval()
    tokenizer, task = tiny.tokenizer(), parse_task("memorize")
    samples = task.samples(tokenizer, 230, 6, 0)
    ids = torch.tensor([s.tokens for s in samples])
    answers = [task.answer(tokenizer, s) for s in samples]
    assert len({len(a) for a in answers}) > 1
    with torch.no_grad():
        for row in range(0, 6, 2):  # what the model says by itself is right
            read, answers[row] = ids[row : row + 1], []
            for _ in range(2 + row):
                answers[row].append(int(model(read, use_cache=False).logits[0, -1].argmax()))
                read = torch.cat((read, torch.tensor([answers[row][-1:]])), dim=1)
    monkeypatch.setattr(script, "AT_ONCE", 1)
    assert script.said(model, ids, answers) == [row % 2 == 0 for row in range(6)]


def test_texts_of_a_stage_are_of_all_its_lengths(script: ModuleType) -> None:
    tokenizer, task = tiny.tokenizer(), parse_task("memorize-varied:segment=120")
    samples = task.samples(tokenizer, 480, 40, 0)
    sizes = [-(-len(s.tokens) // 120) for s in samples]
    assert set(sizes) == {1, 2, 3, 4} and sizes[::2] == [4] * 20
    longest = max(len(task.answer(tokenizer, s)) for s in samples)
    assert {len(s.tokens) + longest for s in samples} == {120, 240, 360, 480}
    assert all(task.answer(tokenizer, s) for s in samples)


def test_lengths_go_far_enough(script: ModuleType) -> None:
    options = script.arguments().parse_args(["--out", "x", "--segment", "100", "--longest", "1m"])
    made = script.lengths(4, options)
    assert made[0] == 200 and made[-1] == 2**20 // 100 * 100 and 64 * 400 in made and made == sorted(made)


def found(length: int, right: float, alone: float = 0.17, peak: int = 100) -> dict[str, Any]:
    return {
        "length": length,
        "right": {"value": right},
        "last_segment_alone": {"value": alone, "interval": (alone - 0.1, alone + 0.1)},
        "peak_bytes": peak,
    }


def test_claims(script: ModuleType) -> None:
    good = [
        found(200, 1.0),
        found(400, 1.0),
        found(128 * 100, 0.97),
        found(64 * 400, 0.95),
        found(2**20, 0.91, peak=105),
    ]
    assert all(script.claims(good, 4, 100).values())
    for place, wrong, which in (
        (0, found(200, 0.9), "two segments are solved"),
        (2, found(128 * 100, 0.8), "64 times two segments"),
        (3, found(64 * 400, 0.8), "64 times the longest of training"),
        (4, found(2**20, 0.5), "at the longest length"),
        (4, found(2**20, 1.0, alone=0.9), "alone"),
        (4, found(2**20, 1.0, peak=200), "level"),
    ):
        said = script.claims([*good[:place], wrong, *good[place + 1 :]], 4, 100)
        assert [claim for claim, holds in said.items() if not holds] == [c for c in said if which in c]
