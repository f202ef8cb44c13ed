"""Whole comparisons on a tiny model: what is stored, what runs again, and what happens when something breaks."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from compare_tiny import TinyHit, TinyLoss, TinyTooLong, TinyTrouble

import tiny as tiny_model
from longspan.compare import Run, compare
from longspan.compare.running import runner, worker
from longspan.compare.running.screen import result_line
from longspan.compare.storing import CELLS, LOGS, Store
from longspan.util import environment
from longspan.util.errors import LongspanError

HERE = Path(__file__).parent


def quality(run: Run) -> list[tuple]:
    return [(r["key"], r["status"], r["score"], r["interval"], r["difference_interval"]) for r in run.table()]


def trouble(model: Path, out: Path, **settings) -> dict:
    """The only record of a comparison whose only task is in trouble."""
    more = {k: settings.pop(k) for k in ("timeout", "progress") if k in settings}
    run = compare(model, methods=["none"], tasks=[TinyTrouble(**settings)], lengths=[128], out=out, samples=2, **more)
    (record,) = run.cells()
    return record


@pytest.fixture(scope="module")
def first(tiny, tmp_path_factory) -> Run:
    out = tmp_path_factory.mktemp("runs") / "first"
    return compare(tiny, methods=["ntk"], tasks=[TinyLoss(), TinyHit()], lengths=[256, 512], out=out, samples=3)


def test_every_cell_is_there_with_score_interval_and_cost(first):
    assert first.missing() == []
    records = first.cells()
    assert len(records) == 2 * 2 * 3
    for record in records:
        assert record["status"] == "ok"
        low, high = record["interval"]
        assert low <= record["score"] <= high
        assert len(record["samples"]) == record["n"] == 3
        spent = record["cost"]
        assert spent["prefill_tokens"] == record["length"]
        assert 0 < spent["prefill_s"] < spent["wall_s"]
        assert spent["peak_prefill_bytes"] > spent["weights_bytes"] > 0
        assert (spent["decode_s_per_token"] is None) == (record["task"] == "tinyloss")
        assert record["first_prompt"]["tokens"] == record["length"]
        assert record["first_prompt"]["head"]
        assert record["versions"]["torch"]
        assert record["finished"].endswith("+00:00")
    assert [r["cost"]["cache_bytes"] for r in records if r["task"] == "tinyloss"][:2] == [128 * 512, 256 * 512]


def test_the_table_sets_methods_beside_the_bare_model_on_the_same_samples(first):
    rows = first.table()
    bare = {(r["task"], r["length"]): r for r in rows if r["method"] == "none"}
    others = [r for r in rows if r["method"] != "none"]
    assert len(others) == 6
    for row in others:
        base = bare[row["task"], row["length"]]
        assert row["pairs"] == 3
        assert row["difference"] == pytest.approx(row["score"] - base["score"])
        low, high = row["difference_interval"]
        assert low <= row["difference"] <= high
    assert any(r["difference"] != 0 for r in others)


def test_the_manifest_says_what_ran_and_where(first):
    manifest = first.manifest
    assert manifest["lengths"] == [128, 256, 512]
    assert [m["asked"] for m in manifest["methods"]] == ["none", "ntk"]
    assert manifest["environment"]["cores"] >= 1
    assert manifest["tasks"]["tinyloss"]["worst"] == pytest.approx(math.log(264))
    assert manifest["facts"]["window"] == 128


def test_a_second_run_measures_nothing_again_and_another_request_only_what_is_new(first, tiny):
    before = (first.folder / CELLS).read_bytes()
    same = {"tasks": [TinyLoss(), TinyHit()], "lengths": [256, 512], "out": first.folder, "samples": 3}
    again = compare(tiny, methods=["ntk"], **same)
    assert (first.folder / CELLS).read_bytes() == before
    assert quality(again) == quality(first)
    more = compare(tiny, methods=["none"], **same | {"lengths": [512, 200]})
    assert (first.folder / CELLS).read_bytes().startswith(before)
    assert len(more.cells()) == 6
    assert len(more.cells(all=True)) == 12 + 2
    back = compare(tiny, methods=["ntk"], **same)
    assert quality(back) == quality(first)


def test_the_same_request_elsewhere_gives_the_same_figures(first, tiny, tmp_path):
    same = {"tasks": [TinyLoss(), TinyHit()], "lengths": [256, 512], "samples": 3}
    assert quality(compare(tiny, methods=["ntk"], out=tmp_path / "again", **same)) == quality(first)


def test_a_folder_is_a_run_of_one_model(first, tmp_path):
    other = tiny_model.folder(tmp_path / "other", window=64)
    with pytest.raises(LongspanError, match="name a new folder"):
        compare(other, methods=["none"], tasks=[TinyLoss()], lengths=[128], out=first.folder)
    assert Run(first.folder).manifest["native_length"] == 128


def test_what_cannot_be_done_is_refused_before_a_folder_is_made(tiny, tmp_path):
    good = {"methods": ["ntk"], "tasks": [TinyLoss()], "lengths": [256], "out": tmp_path / "run"}
    for wrong in ({"methods": ["nkt"]}, {"tasks": ["nope"]}, {"lengths": ["long"]}, {"timeout": 0}, {"methods": 3}):
        with pytest.raises(LongspanError):
            compare(tiny, **good | wrong)
    with pytest.raises(LongspanError):
        compare(tmp_path / "no model", **good)
    with pytest.raises(LongspanError, match="workers load it"):
        compare(object(), **good)
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_being_written_is_refused(tiny, tmp_path):
    with Store(tmp_path / "run"), pytest.raises(LongspanError, match="another comparison"):
        compare(tiny, methods=["none"], tasks=[TinyLoss()], lengths=[128], out=tmp_path / "run")


@pytest.mark.parametrize(
    ("kind", "status", "error"),
    [
        ("raise", "failed", "ValueError: this cell is broken"),
        ("allocate", "out_of_memory", "DefaultCPUAllocator"),
        ("cuda", "out_of_memory", "CUDA out of memory"),
        ("kill", "out_of_memory", "killed, most likely by the kernel for memory"),
        ("abort", "failed", "SIGABRT"),
        ("exit", "failed", "code 3"),
    ],
)
def test_what_breaks_in_a_worker_is_a_record(tiny, tmp_path, kind, status, error):
    record = trouble(tiny, tmp_path / "run", kind=kind)
    assert record["status"] == status
    assert error in record["error"]
    assert "\n" not in record["error"]
    assert record["score"] is None
    row = Run(tmp_path / "run").table()[0]
    assert row["status"] == status
    if kind in ("raise", "abort"):
        (log,) = (tmp_path / "run" / LOGS).iterdir()
        assert "compare_tiny.py" in log.read_text()  # the traceback


def test_failed_cells_run_again_and_cells_out_of_memory_do_not(tiny, tmp_path):
    for kind, tries in (("raise", 2), ("cuda", 1)):
        mark = tmp_path / f"mark-{kind}"
        for _ in range(2):
            trouble(tiny, tmp_path / kind, kind=kind, mark=str(mark))
        assert len(mark.read_text().split()) == tries


def test_out_of_memory_is_tried_again_on_a_larger_machine(tiny, tmp_path, monkeypatch):
    mark = tmp_path / "mark"
    trouble(tiny, tmp_path / "run", kind="cuda", mark=str(mark))
    small = environment.machine
    monkeypatch.setattr(environment, "machine", lambda d: small(d) | {"device_memory": 2 * small(d)["device_memory"]})
    trouble(tiny, tmp_path / "run", kind="cuda", mark=str(mark))
    assert len(mark.read_text().split()) == 2


def test_one_broken_cell_does_not_stop_the_others(tiny, tmp_path):
    tasks = [TinyTrouble(kind="raise"), TinyTrouble(kind="kill"), TinyHit()]
    run = compare(tiny, methods=["none"], tasks=tasks, lengths=[128], out=tmp_path / "run", samples=1)
    assert [r["status"] for r in run.table()] == ["failed", "out_of_memory", "ok"]
    assert [c["task_spec"] for c in run.missing()] == [TinyTrouble(kind="raise").spec]


def test_a_score_that_is_not_finite_is_a_failed_sample(tiny, tmp_path):
    record = trouble(tiny, tmp_path / "run", kind="nan")
    assert record["status"] == "ok"
    assert record["score"] == 0.0  # the worst, over both samples
    assert [(s["score"], s["failed"], s["detail"]) for s in record["samples"]] == [(None, True, {"odd": None})] * 2
    json.loads((tmp_path / "run" / CELLS).read_text(), parse_constant=pytest.fail)


def test_a_cell_that_takes_too_long_is_ended(tiny, tmp_path):
    mark = tmp_path / "mark"
    record = trouble(tiny, tmp_path / "run", kind="sleep", mark=str(mark), timeout=10)
    assert record["status"] == "failed"
    assert "timeout of 10 s" in record["error"]
    assert not alive(int(mark.read_text()))


def test_a_sample_longer_than_its_length_is_no_silent_cut(tiny, tmp_path):
    run = compare(tiny, methods=["none"], tasks=[TinyTooLong()], lengths=[128], out=tmp_path / "run", samples=1)
    assert "129 tokens for a length of 128" in run.cells()[0]["error"]


def test_what_will_run_is_said_first_and_each_cell_has_a_line(tiny, tmp_path, capfd):
    compare(tiny, methods=["ntk:factor=4"], tasks=[TinyLoss()], lengths=[256], out=tmp_path / "run", samples=2)
    out, err = capfd.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert any("2 methods × 1 tasks × 2 lengths = 4 cells, 0 of them finished" in x for x in lines)
    assert any(x.startswith("forecast: about ") and "memory" in x for x in lines)
    assert any("128 (native)" in x for x in lines)
    assert sum(x.startswith("ntk:factor=4  tinyloss  256  score ") for x in lines) == 1
    compare(tiny, methods=["none"], tasks=[TinyLoss()], lengths=[128], out=tmp_path / "q", samples=1, progress=False)
    assert capfd.readouterr() == ("", "")


def test_a_line_says_what_a_cell_gave_and_cost():
    record = {
        "method": "none",
        "task_spec": "ppl",
        "length": 8192,
        "status": "ok",
        "score": 3.1234,
        "interval": [3.05, 3.201],
        "n": 2,
        "samples": [{"failed": False}, {"failed": True}],
        "cost": {"wall_s": 31.24, "peak_prefill_bytes": 1.4e9, "peak_decode_bytes": None},
    }
    line = "none  ppl  8,192  nll 3.12  [3.05, 3.2]  31.2 s  1.4 GB  1 of 2 samples failed"
    assert result_line(record, "nll") == line
    full = record | {"status": "out_of_memory", "error": "CUDA out of memory"}
    assert result_line(full, "nll") == "none  ppl  8,192  out of memory: CUDA out of memory"


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def children(pid: int) -> set[int]:
    """All processes below `pid`."""
    found, waiting = set(), [pid]
    while waiting:
        one = waiting.pop()
        for task in Path(f"/proc/{one}/task").glob("*/children"):
            new = {int(x) for x in task.read_text().split()} - found
            found |= new
            waiting += new
    return found


def wait_for(condition, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return bool(condition())


def start_sleeper(tiny: Path, tmp_path: Path) -> tuple[subprocess.Popen, set[int]]:
    """A comparison whose worker sleeps, in a process group of its own; and all processes below it."""
    mark = tmp_path / "mark"
    code = (
        f"import signal, sys; sys.path.insert(0, {str(HERE)!r})\n"
        # A shell's background jobs, and all below them, begin with Ctrl-C ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from compare_tiny import *; from longspan.compare import compare\n"
        f"tasks = [TinyHit(), TinyTrouble(kind='sleep', mark={str(mark)!r})]\n"
        f"compare({str(tiny)!r}, methods=['none'], tasks=tasks, lengths=[128], out={str(tmp_path / 'run')!r})\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert wait_for(lambda: mark.exists() and mark.read_text().strip(), 300), parent.stderr.read()
    below = children(parent.pid)
    assert int(mark.read_text()) in below
    return parent, below


@pytest.mark.slow
def test_nothing_is_left_when_the_parent_is_killed(tiny, tmp_path):
    parent, below = start_sleeper(tiny, tmp_path)
    parent.kill()
    parent.wait()
    assert wait_for(lambda: not any(map(alive, below)), 10)
    parent.stderr.close()
    assert [c["task"] for c in Run(tmp_path / "run").cells()] == ["tinyhit"]


@pytest.mark.slow
def test_ctrl_c_ends_the_worker_and_says_how_to_go_on(tiny, tmp_path):
    parent, below = start_sleeper(tiny, tmp_path)
    os.killpg(parent.pid, signal.SIGINT)  # as a terminal does: to all of them
    _, err = parent.communicate(timeout=30)
    assert wait_for(lambda: not any(map(alive, below)), 10)
    assert "stopped: 1 of 2 cells are in" in err
    assert "the same command goes on from there" in err
    assert err.rstrip().endswith("KeyboardInterrupt")


SCRIPT = """
import sys
sys.path.insert(0, {here!r})
from compare_tiny import TinyHit
from longspan.compare import compare
{definition}
{guard}compare({model!r}, methods=[{method}], tasks=[TinyHit()], lengths=[128], out={out!r}, samples=1)
"""
OWN = """
from dataclasses import dataclass
from longspan.core.method import Method
@dataclass(frozen=True)
class Mine(Method):
    name = "mine"
    def attach(self, site):
        site.model.lm_head.weight.data.mul_(-1)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("definition", "method", "guard", "works"),
    [
        (OWN, "Mine()", "if __name__ == '__main__': ", True),
        (OWN, "Mine()", "", False),
        (
            "from longspan.plugins import include; include([{folder!r} + '/own.py'])",
            "'mine'",
            "",
            True,
        ),  # needs no guard
    ],
)
def test_scripts(tiny, tmp_path, definition, method, guard, works):
    script, out = tmp_path / "script.py", tmp_path / "run"
    (tmp_path / "own.py").write_text(OWN)
    filled = {"definition": definition.format(folder=str(tmp_path)), "method": method, "guard": guard}
    script.write_text(SCRIPT.format(here=str(HERE), model=str(tiny), out=str(out), **filled))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=400)
    if works:
        assert done.returncode == 0, done.stderr
        assert [r["status"] for r in Run(out).table()] == ["ok", "ok"]
    else:
        assert 'under `if __name__ == "__main__":`' in done.stderr
        assert all(c["method"] == "none" for c in Run(out).cells())


@pytest.mark.slow
def test_a_worker_starts_without_the_fork_server_too(tiny, tmp_path, monkeypatch):
    real = multiprocessing.get_context
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: real("spawn"))
    monkeypatch.setattr(runner.sys, "platform", "darwin")
    run = compare(tiny, methods=["none"], tasks=[TinyHit()], lengths=[128], out=tmp_path / "run", samples=1)
    assert [r["status"] for r in run.table()] == ["ok"]


def test_a_fork_server_that_has_touched_cuda_is_noticed(monkeypatch):
    def poisoned():
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess. To use CUDA, use the 'spawn' start method")

    monkeypatch.setattr(worker.torch.cuda, "init", poisoned)
    assert worker.cuda_is_broken("cuda:0")
    assert not worker.cuda_is_broken("cpu")
    receive, send = multiprocessing.Pipe(duplex=False)
    send.send(("hello", True))
    workers = runner.Workers.__new__(runner.Workers)
    assert workers.listen(None, receive, None, None) is None


@pytest.mark.slow
def test_the_fork_server_imports_everything_without_touching_cuda():
    code = (
        "import importlib, torch; from longspan.compare.running.runner import modules_to_preload\n"
        "def touched(*a, **k): raise SystemExit('CUDA was touched')\n"
        "for name in ('is_available', 'device_count', 'current_device', 'init'): setattr(torch.cuda, name, touched)\n"
        "for name in modules_to_preload('llama'): importlib.import_module(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr


@pytest.mark.cuda
def test_a_comparison_on_cuda(tiny, tmp_path):
    same = {"methods": ["ntk"], "tasks": [TinyLoss(), TinyHit()], "lengths": [256], "samples": 3, "device": "cuda"}
    run = compare(tiny, out=tmp_path / "run", dtype="float32", **same)
    assert [r["status"] for r in run.table()] == ["ok"] * 8
    spent = run.cells()[0]["cost"]
    assert spent["peak_prefill_bytes"] > spent["weights_bytes"] > 0
    assert spent["peak_prefill_bytes"] < 100 * 10**6  # the allocator's peak, not the process
    assert run.manifest["environment"]["cuda"]
    assert quality(compare(tiny, out=tmp_path / "again", dtype="float32", **same)) == quality(run)
