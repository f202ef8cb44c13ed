"""A run on disk: its manifest `run.json`, and `cells.jsonl`, one finished cell a line.

The cell file is only ever appended to. A line is written by one `os.write`, flushed to disk before the next cell starts,
and contains its own checksum, so a kill at any moment loses at most the cell that was running: a torn last line is cut off
when the run is next opened, and kept in `cells.jsonl.torn`. One process at a time writes to a run; the lock is the
kernel's, so it ends with the process however that ends.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

from longspan.compare import statistics as stats
from longspan.util.errors import LongspanError
from longspan.util.files import sync_folder, write_atomically

MANIFEST = "run.json"
CELLS = "cells.jsonl"
TORN = "cells.jsonl.torn"
LOCK = "lock"
LOGS = "logs"

Record = dict[str, Any]


def canonical(value: Any) -> str:
    """The canonical JSON text of a value: keys sorted, no spaces, ASCII.

    Raises `ValueError` for a float that is not finite.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: Any) -> str:
    """sha256, in hex, of the canonical JSON of `value`."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def clean(value: Any) -> Any:
    """A value as plain JSON data.

    Tensors and arrays become numbers or lists, floats that are not finite become None.

    Raises `TypeError` for what JSON cannot express.
    """
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): clean(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [clean(v) for v in (sorted(value) if isinstance(value, set | frozenset) else value)]
    if value is None or isinstance(value, str | int):
        return value
    raise TypeError(
        f"a result contains a {type(value).__name__}, which a run cannot store; return numbers, texts, lists and dicts"
    )


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a run.

    Raises `LongspanError` where `folder` is not a run, or its manifest is damaged.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise LongspanError(
            f"{folder} is not a run: there is no {MANIFEST} in it. `longspan compare` makes one"
        ) from None
    except (OSError, ValueError) as error:
        raise LongspanError(f"{path} cannot be read ({error}); the cells beside it are unharmed") from error
    if not (isinstance(manifest, dict) and isinstance(manifest.get("cells"), list)):
        raise LongspanError(f"{path} is not what a comparison writes, or is damaged; the cells beside it are unharmed")
    return manifest


def read_cells(folder: Path) -> tuple[list[Record], list[str]]:
    """Every intact record in order, and a message for each damaged line."""
    path = folder / CELLS
    content = path.read_bytes() if path.exists() else b""
    records, problems = [], []
    for number, line in enumerate(content.removesuffix(b"\n").split(b"\n") if content else [], start=1):
        record = _read_line(line)
        if record is None:
            problems.append(f"{path}, line {number}: damaged, so its cell counts as not run")
        else:
            records.append(record)
    return records, problems


def is_finished(record: Record | None, memory: int | None) -> bool:
    """True where a cell succeeded, or ran out of memory on such a device.

    memory: of the device, in bytes, compared within 2 %, since two starts of one machine can differ a little.
    """
    if record is None or record["status"] == "failed":
        return False
    if record["status"] == "ok":
        return True
    before = record.get("device_memory")
    return memory is None or before is None or abs(memory - before) <= 0.02 * before


class Store:
    """The cells of a run, opened for writing.

    A context manager that holds the run's lock until it is closed.
    """

    def __init__(self, folder: str | Path):
        """Creates the folder where there is none, takes the lock, and cuts off a torn last line.

        Raises `LongspanError` where the folder contains something else, or another process is writing to the run.
        """
        self.folder = Path(folder)
        _make_folder(self.folder)
        self._lock = _take_lock(self.folder)
        try:
            self.repaired = _repair(self.folder / CELLS)
            records, self.problems = read_cells(self.folder)
            self.records: dict[str, Record] = {r["key"]: r for r in records}
            self._file = os.open(self.folder / CELLS, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            sync_folder(self.folder)
        except BaseException:
            os.close(self._lock)
            raise

    def append(self, record: Record) -> bool:
        """Writes a finished cell and flushes it to disk.

        False, and nothing is written, where it already succeeded.
        Raises `LongspanError` where the disk does not take it.
        """
        known = self.records.get(record["key"])
        if known is not None and known["status"] == "ok":
            return False
        line = _write_line(record)
        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            size_before = os.fstat(self._file).st_size
            if os.write(self._file, line) != len(line):
                os.ftruncate(self._file, size_before)
                raise OSError("the disk took only a part of a line")
            os.fsync(self._file)
        except OSError as error:
            raise LongspanError(
                f"{self.folder / CELLS} cannot be written ({error.strerror or error}); the cells in it are whole"
            ) from error
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)
        self.records[record["key"]] = record
        return True

    def write_manifest(self, manifest: dict[str, Any]) -> None:
        """Writes `run.json`, atomically."""
        write_atomically(self.folder / MANIFEST, json.dumps(clean(manifest), indent=1, allow_nan=False) + "\n")

    def close(self) -> None:
        """Closes the cell file and releases the lock."""
        os.close(self._file)
        os.close(self._lock)

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Run:
    """A run on disk, opened for reading, which is possible while it is being written."""

    def __init__(self, folder: str | Path):
        """Raises `LongspanError` where `folder` is not a run."""
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        records, self.problems = read_cells(self.folder)
        self._latest: dict[str, Record] = {r["key"]: r for r in records}

    def cells(self, *, all: bool = False) -> list[Record]:
        """The latest record of each planned cell that has one, in the plan's order.

        all: of every cell in the folder, those of earlier requests, other settings and other versions included, which no
        table mixes with the planned ones.
        """
        if all:
            return list(self._latest.values())
        return [self._latest[c["key"]] for c in self.manifest["cells"] if c["key"] in self._latest]

    def missing(self) -> list[dict[str, Any]]:
        """The planned cells, as in the manifest, that the same command would run.

        Those without a result, and failed ones.
        """
        memory = self.manifest["environment"]["device_memory"]
        return [c for c in self.manifest["cells"] if not is_finished(self._latest.get(c["key"]), memory)]

    def table(self) -> list[dict[str, Any]]:
        """One row for each planned cell: score, difference to the bare model, and cost.

        Keys: `key`, `method`, `asked`, `task`, `task_spec`, `length`; `status` (`missing` where it has not run) and
        `error`; `score`, `interval`, `n` samples, `independent` ones among them, `failed` ones; `difference` to the bare
        model on `pairs` of the same samples, `difference_interval`; `cost`. Missing figures are None.
        """
        planned = self.manifest["cells"]
        bare = {(c["task_spec"], c["length"]): c["key"] for c in planned if c["method"] == "none"}
        return [self._row(c, self._latest.get(bare[c["task_spec"], c["length"]])) for c in planned]

    def _row(self, cell: dict[str, Any], baseline: Record | None) -> dict[str, Any]:
        record = self._latest.get(cell["key"], {})
        samples = record.get("samples") or []
        row = {k: cell[k] for k in ("key", "method", "asked", "task", "task_spec", "length")}
        row |= {"status": record.get("status", "missing"), "failed": sum(s["failed"] for s in samples)}
        row |= {k: record.get(k) for k in ("error", "score", "interval", "n")}
        task = self.manifest["tasks"][cell["task_spec"]]
        scale = stats.Scale(task["higher_is_better"], task["worst"])
        estimate = stats.score(samples, scale, cell["length"])
        row["interval"] = list(estimate.interval) if estimate.interval else None
        row["independent"] = estimate.independent
        to_compare = baseline is not None and cell["method"] != "none" and samples
        change = (
            stats.difference(samples, baseline["samples"], scale, cell["length"]) if to_compare and baseline else None
        )
        row["difference"] = change.value if change else None
        row["difference_interval"] = list(change.interval) if change and change.interval else None
        row["pairs"] = change.n if change else 0
        row["cost"] = record.get("cost") or {}
        return row


def _write_line(record: Record) -> bytes:
    return (canonical(record | {"check": digest(record)}) + "\n").encode()


def _read_line(line: bytes) -> Record | None:
    """The record of a line, or None where its checksum does not match."""
    try:
        record = json.loads(line)
        check = record.pop("check")
    except (ValueError, AttributeError, KeyError, TypeError):
        return None
    return record if isinstance(record.get("key"), str) and digest(record) == check else None


def _repair(path: Path) -> str | None:
    """Moves a damaged last line into `cells.jsonl.torn`; returns a message where there was one."""
    content = path.read_bytes() if path.exists() else b""
    body = content.removesuffix(b"\n")
    start = body.rfind(b"\n") + 1
    if not content or (_read_line(body[start:]) is not None and content.endswith(b"\n")):
        return None
    if _read_line(body[start:]) is not None:  # only its line end is missing
        with open(path, "ab") as file:
            file.write(b"\n")
        return None
    with open(path.with_name(TORN), "ab") as torn:
        torn.write(body[start:] + b"\n")
    os.truncate(path, start)
    return f"{path}: the last line was torn, most likely by a kill; it is now in {TORN}, and its cell runs again"


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        inside = {p.name for p in folder.iterdir()}
    except OSError as error:
        raise LongspanError(f"{folder} cannot be the folder of a run: {error.strerror or error}") from error
    if inside - {LOCK} and not inside & {MANIFEST, CELLS}:
        raise LongspanError(f"{folder} is not a run and is not empty ({min(inside)} is in it); name a new folder")


def _take_lock(folder: Path) -> int:
    """The file descriptor of the run's lock, a kernel lock that ends with its process."""
    lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        holder = os.read(lock, 64).decode(errors="replace").strip()
        os.close(lock)
        who = f" (process {holder})" if holder else ""
        raise LongspanError(
            f"another comparison{who} is writing to {folder}; wait until it ends, or name another folder"
        ) from None
    os.ftruncate(lock, 0)
    os.pwrite(lock, str(os.getpid()).encode(), 0)
    return lock
