"""The cell file survives kills, doubles and damage; a run has one writer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from longspan.compare.storing import CELLS, MANIFEST, TORN, Run, Store, clean, digest, is_finished
from longspan.util.errors import LongspanError
from longspan.util.files import write_atomically


def record(key: str, status: str = "ok", **more) -> dict:
    return {"key": key, "status": status, "score": 1.5, "error": None, **more}


def fill(folder, *records) -> None:
    with Store(folder) as store:
        for one in records:
            assert store.append(one)


def test_what_was_appended_is_there_again(tmp_path):
    first = record("a", score=0.1 + 0.2, samples=[{"id": "ü\u2028", "score": 1e-300}])
    fill(tmp_path / "run", first, record("b"))
    with Store(tmp_path / "run") as store:
        assert store.records == {"a": first, "b": record("b")}
        assert store.problems == []
        assert store.repaired is None


def test_a_finished_cell_is_not_written_twice(tmp_path):
    with Store(tmp_path) as store:
        assert store.append(record("a", score=1.0))
        assert not store.append(record("a", score=2.0))
        assert store.records["a"]["score"] == 1.0
    assert len((tmp_path / CELLS).read_text().splitlines()) == 1


def test_a_failed_cell_is_replaced_by_its_next_try(tmp_path):
    fill(tmp_path, record("a", "failed"), record("b"), record("a"))
    with Store(tmp_path) as store:
        assert store.records["a"]["status"] == "ok"


def test_a_tail_torn_at_any_byte_loses_only_the_last_cell(tmp_path):
    fill(tmp_path / "whole", record("a"), record("b"), record("c"))
    content = (tmp_path / "whole" / CELLS).read_bytes()
    start = content[:-1].rindex(b"\n") + 1
    for end in range(start, len(content)):
        folder = tmp_path / str(end)
        folder.mkdir()
        (folder / CELLS).write_bytes(content[:end])
        with Store(folder) as store:
            whole = end == len(content) - 1  # only the line end is missing
            assert set(store.records) == ({"a", "b", "c"} if whole else {"a", "b"})
            assert (store.repaired is not None) == (start < end < len(content) - 1)
            store.append(record("d"))
        with Store(folder) as store:
            assert "d" in store.records
            assert store.problems == []
        if start < end and not whole:
            assert (folder / TORN).read_bytes() == content[start:end] + b"\n"


def test_a_last_line_with_a_wrong_checksum_is_cut_off(tmp_path):
    fill(tmp_path, record("a"), record("b"))
    path = tmp_path / CELLS
    path.write_bytes(path.read_bytes()[:-10] + b'0000000"}\n')
    with Store(tmp_path) as store:
        assert set(store.records) == {"a"}
        assert store.repaired is not None
    assert path.read_bytes().count(b"\n") == 1


def test_a_damaged_line_in_the_middle_is_named_and_the_rest_is_read(tmp_path):
    fill(tmp_path, record("a"), record("b", score=1.5), record("c"))
    path = tmp_path / CELLS
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1].replace(b'"score":1.5', b'"score":9.5') + lines[2])
    with Store(tmp_path) as store:
        assert set(store.records) == {"a", "c"}
        assert len(store.problems) == 1
        assert "line 2" in store.problems[0]


def test_no_float_that_is_not_finite_reaches_the_file(tmp_path):
    with Store(tmp_path) as store:
        with pytest.raises(ValueError):
            store.append(record("a", score=float("nan")))
        assert store.records == {}
    assert (tmp_path / CELLS).read_bytes() == b""
    values = {"a": float("inf"), 1: (torch.tensor([1.0, float("nan")]), {2, 1}), "b": torch.tensor(3)}
    assert clean(values) == {"a": None, "1": [[1.0, None], [1, 2]], "b": 3}
    with pytest.raises(TypeError, match="object"):
        clean({"a": object()})


def test_a_disk_that_takes_half_a_line_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    with Store(tmp_path) as store:
        store.append(record("a"))
        before = (tmp_path / CELLS).read_bytes()
        real = os.write
        monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[: len(data) // 2]))
        with pytest.raises(LongspanError, match="only a part"):
            store.append(record("b"))
        assert (tmp_path / CELLS).read_bytes() == before
        assert "b" not in store.records


def test_a_run_has_one_writer(tmp_path):
    with Store(tmp_path), pytest.raises(LongspanError, match=f"process {os.getpid()}"):
        Store(tmp_path)
    Store(tmp_path).close()


def test_the_lock_of_a_dead_process_is_no_obstacle(tmp_path):
    code = (
        f"from longspan.compare.storing import Store; s = Store({str(tmp_path)!r}); print('held', flush=True); input()"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(LongspanError, match=f"process {holder.pid}"):
        Store(tmp_path)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    Store(tmp_path).close()


def test_a_folder_with_other_things_in_it_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(LongspanError, match=r"thesis\.tex"):
        Store(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["thesis.tex"]
    with pytest.raises(LongspanError, match="cannot be the folder of a run"):
        Store(tmp_path / "thesis.tex")


def test_a_manifest_is_replaced_whole(tmp_path, monkeypatch):
    write_atomically(tmp_path / MANIFEST, "old")
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError("power cut")))
    with pytest.raises(OSError):
        write_atomically(tmp_path / MANIFEST, "new")
    assert (tmp_path / MANIFEST).read_text() == "old"


def test_what_counts_as_finished():
    assert not is_finished(None, 100)
    assert is_finished(record("a"), 100)
    assert not is_finished(record("a", "failed"), 100)
    small = record("a", "out_of_memory", device_memory=1000)
    assert is_finished(small, 1010)
    assert not is_finished(small, 2000)


def manifest(*cells) -> dict:
    return {
        "cells": [{"key": k, "method": m, "asked": m, "task": "t", "task_spec": "t", "length": n} for k, m, n in cells],
        "tasks": {"t": {"higher_is_better": False, "worst": 9.0}},
        "environment": {"device_memory": 1000},
    }


def test_a_run_is_read_by_its_plan(tmp_path):
    def sampled(key, *scores):
        samples = [{"id": str(i), "score": s, "failed": s is None, "detail": {}} for i, s in enumerate(scores)]
        return record(key, samples=samples, score=1.0, interval=[0, 2], n=len(scores), cost={"wall_s": 1})

    with Store(tmp_path) as store:
        cells = [("k0", "none", 8), ("k1", "ntk", 8), ("k2", "none", 16), ("k3", "ntk", 16), ("k4", "pi", 16)]
        store.write_manifest(manifest(*cells))
        store.append(sampled("k0", 1.0, 2.0))
        store.append(sampled("old", 5.0))
        store.append(record("k3", "failed", samples=[], error="broken"))
        store.append(record("k2", "out_of_memory", samples=[], error="full", device_memory=1000))
        store.append(sampled("k1", 3.0, None))
    run = Run(tmp_path)
    assert [c["key"] for c in run.cells()] == ["k0", "k1", "k2", "k3"]
    assert {c["key"] for c in run.cells(all=True)} == {"k0", "k1", "k2", "k3", "old"}
    assert [c["key"] for c in run.missing()] == ["k3", "k4"]
    rows = {r["key"]: r for r in run.table()}
    assert [r["status"] for r in rows.values()] == ["ok", "ok", "out_of_memory", "failed", "missing"]
    assert rows["k1"]["difference"] == pytest.approx(((3 - 1) + (9 - 2)) / 2)  # what failed counts as the worst
    assert rows["k1"]["pairs"] == 2
    assert rows["k1"]["failed"] == 1
    assert rows["k0"]["difference"] is None
    assert rows["k4"]["cost"] == {}
    assert rows["k3"]["error"] == "broken"


def test_a_folder_that_is_no_run_is_said_to_be_none(tmp_path):
    with pytest.raises(LongspanError, match="not a run"):
        Run(tmp_path)
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(LongspanError, match="cannot be read"):
        Run(tmp_path)


def test_a_reader_leaves_a_torn_tail_alone(tmp_path):
    with Store(tmp_path) as store:
        store.write_manifest(manifest(("a", "none", 8)))
        store.append(record("a"))
    with open(tmp_path / CELLS, "ab") as file:
        file.write(b'{"key":"b"')
    before = (tmp_path / CELLS).read_bytes()
    run = Run(tmp_path)
    assert len(run.cells()) == 1
    assert "line 2" in run.problems[0]
    assert (tmp_path / CELLS).read_bytes() == before


def test_the_digest_does_not_depend_on_the_order_of_keys():
    assert digest({"a": 1, "b": [1.0, None]}) == digest(json.loads('{"b": [1.0, null], "a": 1}'))
    assert digest({"a": 1}) != digest({"a": 2})
