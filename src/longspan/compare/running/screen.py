"""Progress of a comparison: bars with the time left, a line per finished cell.

All of it goes to standard error, so that standard output stays free for results.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from longspan.compare.planning.cells import Cell
from longspan.util.units import duration, size


def result_line(record: dict[str, Any], metric: str) -> str:
    """One line about a cell: score with interval, time, peak memory, failed samples.

    For a cell without a result, how it ended.
    """
    head = f"{record['method']}  {record['task_spec']}  {record['length']:,}  "
    if record["status"] != "ok":
        status = "out of memory" if record["status"] == "out_of_memory" else "failed"
        return f"{head}{status}: {record['error']}"
    low, high = record["interval"]
    cost = record["cost"]
    peak = max(cost["peak_prefill_bytes"] or 0, cost["peak_decode_bytes"] or 0)
    failed = sum(s["failed"] for s in record["samples"])
    return (
        f"{head}{metric} {record['score']:.3g}  [{low:.3g}, {high:.3g}]  {duration(cost['wall_s'])}"
        + (f"  {size(peak)}" if peak else "")
        + (f"  {failed} of {record['n']} samples failed" if failed else "")
    )


class Screen:
    """Shows the cells of a run as they finish.

    `work`: each cell's estimated time in seconds, by key.
    """

    def __init__(self, enabled: bool, cells: Sequence[Cell], work: dict[str, float]):
        self.console = Console(stderr=True, quiet=not enabled, highlight=False, soft_wrap=True)
        self._total, self._done = len(cells), 0
        self._work, self._left = work, sum(work.values())
        self._spent = self._estimated = 0.0
        self._bars: Progress | None = None
        self._cells = self._samples = TaskID(0)
        self._started = time.perf_counter()

    def say(self, text: str) -> None:
        """Prints one line without markup, above the bars where there are any."""
        (self._bars.console if self._bars else self.console).print(text, markup=False)

    def __enter__(self) -> Screen:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars:
            self._bars.stop()
            self._bars = None

    def start(self, cell: Cell) -> None:
        """Shows that a cell begins; the first one starts the bars, on a terminal."""
        self._started = time.perf_counter()
        if self._bars is None and self.console.is_terminal and not self.console.quiet:
            columns = (TextColumn("{task.description}", markup=False), BarColumn(20), TextColumn("{task.fields[note]}"))
            self._bars = Progress(*columns, TimeElapsedColumn(), console=self.console, transient=True)
            self._cells = self._bars.add_task("cells", total=self._total, note="")
            self._samples = self._bars.add_task("", total=None, note="")
            self._bars.start()
        if self._bars:
            name = f"{cell.spec}  {cell.task.spec}  {cell.length:,}"
            self._bars.update(self._cells, completed=self._done, note=self._forecast())
            self._bars.reset(self._samples, total=None, description=name, note="loading the model")

    def sample(self, done: int, of: int, tokens: int) -> None:
        """Shows how many of the current cell's samples are finished, and their tokens."""
        if self._bars:
            note = f"{done}/{of} samples" + (f", {tokens:,} tokens" if tokens else "")
            self._bars.update(self._samples, completed=done, total=of, note=note)
            self._bars.update(self._cells, note=self._forecast())

    def finish(self, cell: Cell, record: dict[str, Any]) -> None:
        """Prints the line of a cell that ended, and corrects the forecast."""
        # the worker's own time, without the fork server's start; a worker that failed has reported none
        self._spent += record["cost"].get("wall_s") or time.perf_counter() - self._started
        self._estimated += self._work[cell.key]
        self._left -= self._work[cell.key]
        self._done += 1
        self.say(result_line(record, cell.task.metric.partition(" (")[0]))

    def _forecast(self) -> str:
        """The time left: the estimate of what is left, corrected by how the estimates of finished cells came out."""
        ratio = self._spent / self._estimated if self._estimated else 1.0
        left = self._left * ratio - (time.perf_counter() - self._started)
        return f"{self._done}/{self._total}, about {duration(max(1, round(left)))} left"
