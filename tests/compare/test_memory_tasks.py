"""The tasks of memory in whole comparisons: every one of them in a cell, beside the plain model, with score and cost."""

from __future__ import annotations

from pathlib import Path

import pytest

import tiny as tiny_model
from longspan.compare import Run, compare
from longspan.compare.report.pages import html

TASKS = {
    "copy": 1 / 8,
    "reverse": 1 / 8,
    "memorize": 1 / 6,
    "detect": 1 / 6,
    "reasoning": 1 / 6,
    "stream-eval": None,
    "stream-qa": None,
    "lookup:questions=2": None,
    "instructions": None,
    "instructions:score=exact": None,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder, noise = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("noise") / "noise.txt"
    noise.write_text("Nothing happens here.\n" * 300)
    tasks = [f"{t}:text={noise}" if chance == 1 / 6 else t for t, chance in TASKS.items()]
    model, out = tiny_model.folder(folder, window=1300), tmp_path_factory.mktemp("runs") / "run"
    methods = ["none", "streaming:sinks=4,window=60"]
    return compare(model, methods=methods, tasks=tasks, lengths=[1300], out=out, samples=2, progress=False)


def test_every_cell_is_done(run: Run) -> None:
    cells = run.cells()
    assert len(cells) == 2 * len(TASKS)
    for cell in cells:
        assert (cell["status"], cell["n"]) == ("ok", 2), cell
        assert not any(s["failed"] for s in cell["samples"])
        assert cell["interval"][0] <= cell["score"] <= cell["interval"][1]
        assert cell["cost"]["prefill_s"] > 0
        assert cell["first_prompt"]["head"].startswith("<s>")
        assert not cell["first_prompt"]["head"].startswith("<s><s>")


def test_a_bounded_cache_is_smaller_in_every_task(run: Run) -> None:
    sizes = {(c["task_spec"], c["method"].split(":")[0]): c["cost"]["cache_bytes"] for c in run.cells()}
    for (task, method), size in sizes.items():
        if method == "streaming" and not task.startswith("instructions"):  # those are about as short as the cache
            assert size < sizes[task, "none"] / 2, task


def test_untrained_scores_are_low_and_chance_is_told(run: Run) -> None:
    for cell in run.cells():
        chance = next(c for t, c in TASKS.items() if cell["task_spec"].startswith(t))
        if cell["task_spec"] == "instructions":
            assert 4 < cell["score"] < 7  # nats; a guess among all tokens is ln 264
        if chance is not None:
            assert all(s["detail"]["chance"] == pytest.approx(chance) for s in cell["samples"])


def test_a_stream_is_one_reading_of_all_its_turns(run: Run) -> None:
    for cell in run.cells():
        if cell["task_spec"].startswith("stream"):
            assert cell["cost"]["prefill_repeats"] == 2
            answers = sum(5 * s["detail"]["questions"] for s in cell["samples"])
            read = sum(s["detail"]["stream_tokens"] for s in cell["samples"]) / 2
            assert read - answers < cell["cost"]["prefill_tokens"] < read


def test_the_report_is_written(run: Run, tmp_path: Path) -> None:
    page = html(run.manifest, run.cells(), tmp_path / "report.html").read_text("utf-8")
    assert "StreamEval, rebuilt" in page
    assert "Dictionary look-up" in page
