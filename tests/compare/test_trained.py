"""Models that were trained from the one compared, as rows beside methods: measured as saved, with what training took."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
from compare_tiny import TinyLoss
from rich.console import Console

import longspan as ls
from longspan.compare import Run, compare
from longspan.compare.planning.trained import is_folder, training_cost
from longspan.compare.report import pages as report
from longspan.util.errors import LongspanError, NotSupported

COST = {"seconds": 90.0, "tokens": 1_000_000, "steps": 50, "peak_bytes": 3_000_000_000}


@pytest.fixture(scope="module")
def training(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `longspan train` leaves: other weights, a method in the configuration, the cost."""
    folder = tmp_path_factory.mktemp("training") / "run"
    model, tokenizer = ls.load(tiny, method="ntk:factor=4")
    model.get_input_embeddings().weight.data.mul_(1.5)
    ls.remove(model)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "result.json").write_text(json.dumps(COST | {"loss": 1.0}))
    return folder


@pytest.fixture(scope="module")
def run(tiny: Path, training: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("runs") / "first"
    return compare(
        tiny, methods=["ntk", training], tasks=[TinyLoss()], lengths=[256], out=out, samples=2, progress=False
    )


def test_a_row_beside_the_others_on_the_same_samples(run: Run, tiny: Path, training: Path, tmp_path: Path) -> None:
    rows = run.table()
    assert len({r["method"] for r in rows}) == 3 and str(training) in {r["method"] for r in rows}
    by_name = {r["method"]: r for r in rows if r["length"] == 256}
    ours = by_name[str(training)]
    assert ours["status"] == "ok" and ours["score"] != by_name["none"]["score"]
    assert ours["difference_interval"] is not None
    alone = compare(
        training / "model", methods=["none"], tasks=[TinyLoss()], lengths=[256], out=tmp_path / "alone", samples=2
    )
    assert ours["score"] == next(r["score"] for r in alone.table() if r["length"] == 256)
    keys = [c["key"] for c in run.cells()]
    assert len(set(keys)) == len(keys)


def test_the_table_says_what_training_took(run: Run, training: Path) -> None:
    data = report.table_json(run.manifest, run.cells())
    assert next(r["training"] for r in data["rows"] if r["method"] == str(training)) == COST
    assert all(r["training"] is None for r in data["rows"] if r["method"] != str(training))
    console = Console(file=io.StringIO(), width=400)
    report.terminal(run.manifest, run.cells(), console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "training" in text and "1.5" in text
    page = report.render(run.manifest, run.cells())
    assert "training<br>min" in page and any(f">{x}<" in page for x in ("1.5", "1.50"))


def test_it_goes_on_and_runs_nothing_twice(run: Run, tiny: Path, training: Path) -> None:
    before = (run.folder / "cells.jsonl").read_bytes()
    compare(
        tiny, methods=["ntk", training], tasks=[TinyLoss()], lengths=[256], out=run.folder, samples=2, progress=False
    )
    assert (run.folder / "cells.jsonl").read_bytes() == before


def test_other_tokens_are_refused(tiny: Path, training: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(training / "model", other)
    made = json.loads((other / "tokenizer.json").read_text())
    made["normalizer"] = {"type": "Lowercase"}
    (other / "tokenizer.json").write_text(json.dumps(made))
    with pytest.raises(NotSupported, match="other tokens"):
        compare(tiny, methods=[str(other)], tasks=[TinyLoss()], lengths=[256], out=tmp_path / "out")


def test_folders(training: Path, tmp_path: Path) -> None:
    assert (
        is_folder(training) and is_folder(str(training / "model")) and not is_folder("ntk") and not is_folder(tmp_path)
    )
    assert training_cost(training) == training_cost(training / "model") == COST
    with pytest.raises(LongspanError, match="not a folder of a model"):
        compare(training / "model", methods=[tmp_path], out=tmp_path / "out")
    with pytest.raises(LongspanError, match="runs/nosuch is not a folder of a model"):
        compare(training / "model", methods=["runs/nosuch"], out=tmp_path / "out")
