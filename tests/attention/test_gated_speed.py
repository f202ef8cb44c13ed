"""`benchmarks/gated.py`: models of equal size, whole steps, a row for each."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gated.py"


def test_rows(tmp_path: Path) -> None:
    script, out = runpy.run_path(str(SCRIPT)), tmp_path / "gated.json"
    rows = script["main"](["--shape", "tiny", "-l", "64", "--seconds", "0", "--out", str(out)])
    assert [row["attention"] for row in rows] == ["full", "gau", "flash"]
    assert all(row["tokens_per_s"] > 0 and row["batch"] == 4 for row in rows)
    assert json.loads(out.read_text())["rows"] == rows


def test_models_are_of_one_size() -> None:
    script = runpy.run_path(str(SCRIPT))
    with torch.device("meta"):
        sizes = [script["build"](name, script["SHAPES"]["110m"], 512).num_parameters() for name in script["NAMES"]]
    assert sizes == pytest.approx([sizes[0]] * 3, rel=0.03)
