"""The survey's table: its rows, its page, and that what it says is here is here."""

from __future__ import annotations

import json
from pathlib import Path

from longspan.attention.base import Attention
from longspan.method import catalogue
from longspan.survey import CLASSES, OTHERS, SURVEY, UNKNOWN, measured, page

PAGE = Path(__file__).parents[1] / "docs" / "survey.md"
TO_COME = {"bigbird", "flash", "gau", "linear", "linformer", "longformer", "lsh", "performer", "s4", "s4d"}


def test_page_and_data_agree() -> None:
    assert PAGE.read_text() == page(measured()) + "\n", "python -m longspan.survey > docs/survey.md"


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
    named = {entry.method for entry in SURVEY + OTHERS if entry.method}
    assert ours <= named
    assert named - ours <= TO_COME


def test_measured_exponents(tmp_path: Path) -> None:
    stored = tmp_path / "attention.json"
    assert measured(stored) == {}
    stored.write_text(json.dumps({"what": "attention", "exponents": {"longnet": 1.0234, "full": 1.97}}))
    made = page(measured(stored))
    assert "| LongNet | 2023 | N | yes | FP | `longnet` | 1 | 1.02 |" in made
    assert "| Full attention | 2017 | N² | yes |  | `full` | 2 | 1.97 |" in made
    assert f"| `local` | 1 | {UNKNOWN} |" in made and "| Luna | 2021 | k·N | yes | M |  |  |  |" in made
