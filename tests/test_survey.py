"""The survey's table: its rows, its page, and that what it says is here is here."""

from __future__ import annotations

from pathlib import Path

import pytest

import survey
from longspan.bench import contenders as bench_contenders
from longspan.bench.attention import AttentionBench, Row
from longspan.core.method import catalogue
from longspan.lm.base import Attention
from survey import CLASSES, DENSE, OTHERS, SURVEY, UNKNOWN, here_otherwise, measured, page

PAGE = Path(__file__).parents[1] / "docs" / "survey.md"


def test_page_and_data_agree() -> None:
    assert PAGE.read_text() == page(measured()) + "\n", "python tools/survey.py > docs/survey.md"


def test_rows() -> None:
    assert len(SURVEY) == 33 == len({entry.model for entry in SURVEY})
    for entry in SURVEY + OTHERS:
        assert set(entry.classes) <= set(CLASSES) and 2017 <= entry.year <= 2023 and entry.complexity
        assert (entry.method is None) == (entry.grows is None)
    assert all(entry.classes for entry in SURVEY) and all(entry.method for entry in OTHERS)
    assert {c for entry in SURVEY for c in entry.classes} == set(CLASSES)
    assert sum(entry.decodes for entry in SURVEY) == 25


def test_what_is_here() -> None:
    """Every attention of ours is in one of the tables, and none that is not."""
    ours = {n for n, c in catalogue().items() if issubclass(c, Attention) and c.__module__.startswith("longspan.")}
    named = {entry.method for entry in SURVEY + here_otherwise() if entry.method}
    assert ours == named


def test_a_method_without_a_paper_has_no_year(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue()["longnet"], "paper", "this page")
    monkeypatch.setattr(survey, "OTHERS", tuple(entry for entry in OTHERS if entry.method != "longnet"))
    assert f"| {catalogue()['longnet'].title} |  | {catalogue()['longnet'].cost} |" in page({})


def test_measured_exponents(tmp_path: Path) -> None:
    """Of what the bench itself writes."""
    stored = tmp_path / "attention.json"
    assert measured(stored) == {}
    times = {
        "dense SDPA": 2,
        "full, layer": 1.9,
        "longnet": 1,
        "window:size=1024": 1,
        "window:size=1024, FlexAttention": 3,
    }
    rows = [
        Row(name, "attention", "causal", n, forward_s=1e-9 * n**exponent)
        for name, exponent in times.items()
        for n in (1024, 2048, 4096, 16384)
    ]
    AttentionBench({}, [*rows, Row("local", "attention", "causal", 1024, forward_s=1e-3)]).write(stored)
    found = measured(stored)
    assert found["full"].exponent == pytest.approx(2) and found["window"].exponent == pytest.approx(1)
    assert "local" not in found
    made = page(found)
    assert "| LongNet | 2023 | N | yes | FP | `longnet` | 1 | 1.00 [1.00–1.00] |" in made
    assert "| Full attention | 2017 | N² | yes |  | `full` | 2 | 2.00 [2.00–2.00] |" in made
    assert f"| `local` | 1 | {UNKNOWN} |" in made and "| Luna | 2021 | k·N | yes | M |  |  |  |" in made
    assert DENSE == bench_contenders.DENSE


def test_stored_exponents_are_near_the_promised() -> None:
    """Of a stored run on a GPU; short texts, where time is level, and log N move them a little."""
    if not (found := measured()):
        pytest.skip("no bench of attentions is stored in reproductions/speed")
    promised = {entry.method: entry.grows for entry in SURVEY + OTHERS if entry.method}
    off = {name: (promised[name], str(f)) for name, f in found.items() if abs(f.exponent - promised[name]) > 0.3}
    assert not off
