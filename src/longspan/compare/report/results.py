"""A run's records by method, task and length, for advice, table and figures.

Neither torch nor transformers is imported: a report takes a second, also on a machine without them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longspan.compare import statistics as stats
from longspan.util.drawing import BARE
from longspan.util.errors import LongspanError

COSTS = ("prefill_s", "decode_s_per_token", "peak_prefill_bytes", "peak_decode_bytes", "cache_bytes")
STATUS = {"ok": "finished", "out_of_memory": "out of memory", "failed": "failed", "missing": "not run"}
EFFECTIVE_WINDOW = (
    f"largest distance, in tokens from the key to the end of the prompt, such that at it and at every shorter one that was tried "
    f"at least {stats.FOUND:.0%} of the trials find the key, 0 where already the shortest fails (Chen 2023)".replace(
        "%", " %"
    )
)
"""The definition of `Results.effective_window`, for readers."""
_OUTCOMES = ("found", "answer", "key", "reason")
"""Keys of a sample's detail that are outcomes, and not settings even where all samples agree."""

Record = dict[str, Any]


@dataclass(frozen=True)
class TaskFacts:
    """A task as the manifest describes it.

    `worst` is the score of a failed sample, in the task's metric.
    """

    spec: str
    name: str
    title: str
    metric: str
    higher_is_better: bool
    worst: float
    version: int
    measures: str
    source: str
    rates: bool = True
    """False for a task that only describes a model; True in runs stored before such tasks existed."""

    @property
    def scale(self) -> stats.Scale:
        """The direction of the score, and the score of a failed sample."""
        return stats.Scale(self.higher_is_better, self.worst)

    @property
    def label(self) -> str:
        """The spec, followed by `loss` where less is better."""
        return self.spec if self.higher_is_better else f"{self.spec} loss"

    @property
    def axis(self) -> str:
        """The metric with its direction, for the axis of a figure."""
        if not self.rates:
            return self.metric
        return f"{self.metric}, {'higher' if self.higher_is_better else 'lower'} is better"

    def gain(self, value: float) -> float:
        """A score, or a difference of scores, negated where less is better."""
        return value if self.higher_is_better else -value

    def number(self, value: float | None, signed: bool = False) -> str:
        """A score as text: two decimals, three for a loss, a dash for None."""
        if value is None:
            return "–"
        digits = 2 if self.higher_is_better else 3
        value = round(value, digits) + 0.0  # no negative zero
        return f"{value:{'+' if signed else ''}.{digits}f}".replace("-", "−")


class Results:
    """The results of a run.

    `target` is the longest length, in tokens, at which any cell finished.
    """

    def __init__(self, manifest: dict[str, Any], cells: Sequence[Record]):
        """Raises `LongspanError` where no cell has finished."""
        self.manifest = manifest
        self.model = str(manifest["model"])
        self.native = int(manifest["native_length"])
        self.methods = [str(m["spec"]) for m in manifest["methods"]]
        self.tasks = [_task(facts) for facts in manifest["tasks"].values()]
        self.lengths = sorted(int(n) for n in manifest["lengths"])
        self._cells = {(c["method"], c["task_spec"], c["length"]): c for c in cells}
        self._differences: dict[tuple[str, str, str, int], stats.Estimate] = {}
        self._estimates: dict[tuple[str, str, int], stats.Estimate] = {}
        finished = [c["length"] for c in self.cells() if c["status"] == "ok"]
        if not finished:
            raise LongspanError(_nothing(self.cells()))
        self.target = max(finished)

    def up_to(self, length: int) -> Results:
        """The run up to `length` tokens; raises `LongspanError` where no cell finished up to it."""
        manifest = {**self.manifest, "lengths": [n for n in self.lengths if n <= length]}
        return Results(manifest, [c for c in self._cells.values() if c["length"] <= length])

    @property
    def name(self) -> str:
        """The model's name; of a path its last part, or `run/model` of a training."""
        path = Path(self.model)
        if not path.is_absolute() and not self.model.startswith("."):
            return self.model
        return "/".join(path.parts[-2:]) if path.name == "model" else path.name

    def cells(self) -> list[Record]:
        """The records of all cells that ran, ordered by task, length and method."""
        found = (self.cell(m, t, n) for t in self.tasks for n in self.lengths for m in self.methods)
        return [c for c in found if c is not None]

    def cell(self, method: str, task: TaskFacts, length: int) -> Record | None:
        """The record of a cell, however it ended; None where it has not run."""
        return self._cells.get((method, task.spec, length))

    def ok(self, method: str, task: TaskFacts, length: int) -> Record | None:
        """The record of a cell that finished; None for others."""
        record = self.cell(method, task, length)
        return record if record and record["status"] == "ok" else None

    def status(self, method: str, task: TaskFacts, length: int) -> str:
        """The status of a cell, a key of `STATUS`."""
        record = self.cell(method, task, length)
        return record["status"] if record else "missing"

    def score(self, method: str, task: TaskFacts, length: int) -> float | None:
        """The score of a cell that finished; None for others."""
        record = self.ok(method, task, length)
        return record["score"] if record else None

    def estimate(self, method: str, task: TaskFacts, length: int) -> stats.Estimate:
        """The score with its interval; without figures where the cell did not finish.

        It is computed from the stored samples, since older versions stored intervals that ignore overlaps of windows.
        """
        key = (method, task.spec, length)
        if key not in self._estimates:
            record = self.ok(method, task, length)
            nothing = stats.Estimate(None, None, 0)
            self._estimates[key] = stats.score(record["samples"], task.scale, length) if record else nothing
        return self._estimates[key]

    def effective_window(self, method: str, task: TaskFacts, length: int) -> int | None:
        """Tokens, as `EFFECTIVE_WINDOW` defines.

        None where the cell did not finish, or the task hides no key.
        """
        record = self.ok(method, task, length)
        trials = distances(record) if record else []
        return stats.effective_window(trials) if trials else None

    def effective_window_words(self, task: TaskFacts) -> str:
        """The definition of the effective window, and the number of trials behind the figures."""
        cells = [d for c in self.cells() if c["task_spec"] == task.spec and (d := distances(c))]
        places = max((len({round(depth, 6) for depth, *_ in d}) for d in cells), default=1)
        trials = max(map(len, cells), default=0) // places
        number = f"{places:,} distance{'s' * (places != 1)}, {trials:,} trial{'s' * (trials != 1)} at each"
        return f"{EFFECTIVE_WINDOW}; {number}"

    def overlaps(self, task: TaskFacts) -> dict[int, tuple[int, float]]:
        """Lengths at which windows overlap, with their number and effective number.

        Of the method with the most samples.
        """
        found = {}
        for length in self.lengths:
            estimate = max((self.estimate(m, task, length) for m in self.methods), key=lambda e: e.n)
            if estimate.overlapping:
                found[length] = estimate.n, estimate.independent
        return found

    def difference(self, method: str, other: str, task: TaskFacts, length: int) -> stats.Estimate:
        """The paired difference, `method` minus `other`; without figures where one did not finish."""
        key = (method, other, task.spec, length)
        if key not in self._differences:
            a, b = self.ok(method, task, length), self.ok(other, task, length)
            change = stats.Estimate(None, None, 0)
            if a is not None and b is not None and method != other:
                change = stats.difference(a["samples"], b["samples"], task.scale, length)
            self._differences[key] = change
        return self._differences[key]

    def worse(self, method: str, other: str, task: TaskFacts, length: int) -> bool:
        """True where the whole interval of the paired difference says `method` is worse."""
        interval = self.difference(method, other, task, length).interval
        return interval is not None and max(map(task.gain, interval)) < 0

    def best(self, task: TaskFacts, length: int, among: Sequence[str] | None = None) -> str | None:
        """The method with the best score, the first of equal ones; None without scores."""
        scored = [m for m in among or self.methods if self.score(m, task, length) is not None]
        return max(scored, key=lambda m: task.gain(self.score(m, task, length) or 0.0), default=None)

    @functools.cached_property
    def cost_task(self) -> TaskFacts:
        """The task whose cells at the target length provide the costs of all methods.

        The first that decodes tokens, else the first that finished; one task, since tasks differ in what they read.
        """
        finished = [t for t in self.tasks if any(self.ok(m, t, self.target) for m in self.methods)]
        decoding = (t for t in finished if any(self._decodes(m, t) for m in self.methods))
        return next(decoding, finished[0])

    def _decodes(self, method: str, task: TaskFacts) -> bool:
        record = self.ok(method, task, self.target)
        return bool(record and record["cost"].get("decode_s_per_token"))

    def cost(self, method: str) -> dict[str, float | None]:
        """Seconds and bytes at the target length, by the names in `COSTS`.

        None where not measured.
        """
        record = self.ok(method, self.cost_task, self.target)
        return {name: (record["cost"].get(name) if record else None) for name in COSTS}

    @functools.cached_property
    def trainings(self) -> dict[str, dict[str, Any]]:
        """The cost of training of each row that is a trained model, by spec.

        Keys: `seconds`, `tokens`, `steps`, `peak_bytes`.
        """
        return {str(m["spec"]): m["training"] for m in self.manifest["methods"] if m.get("training")}

    def peak(self, method: str) -> float | None:
        """Peak memory in bytes at the target length, of prefill and decoding."""
        cost = self.cost(method)
        peaks = [p for p in (cost["peak_prefill_bytes"], cost["peak_decode_bytes"]) if p]
        return max(peaks, default=None)

    def full_cache(self) -> float | None:
        """Bytes of the bare model's KV cache at the target length, measured or computed."""
        measured = self.cost(BARE)["cache_bytes"]
        per_token = self.manifest.get("card", {}).get("cache_bytes_per_token")
        return measured or (per_token * self.target if per_token else None)

    def protocol(self, task: TaskFacts) -> dict[str, str]:
        """The settings of a task: entries of detail that all samples share."""
        details = [s["detail"] or {} for c in self.cells() if c["task_spec"] == task.spec for s in c["samples"]]
        same = dict(details[0]) if details else {}
        for detail in details:
            same = {k: v for k, v in same.items() if k in detail and detail[k] == v}
        return {k: str(v) for k, v in same.items() if isinstance(v, str | int) and k not in _OUTCOMES}

    def protocol_line(self, task: TaskFacts, length: int) -> str:
        """One line about a task's figures: spec, version, number of samples, seed, protocol and source."""
        most = max((c["n"] for m in self.methods if (c := self.ok(m, task, length))), default=0)
        settings = self.protocol(task)
        number = f"{most:,} {'sample' if most == 1 else 'samples'} a cell"
        if overlap := self.overlaps(task).get(length):
            number += f", which overlap and count as {overlap[1]:.1f}"
        parts = [f"{task.spec}, version {task.version}", number]
        parts += [
            f"seed {self.manifest['seed']}",
            *(f"{k} {settings[k]}" for k in ("protocol", "template") if k in settings),
        ]
        parts += [f"mean of {settings['mean_of']}"] if "mean_of" in settings else []
        return "; ".join([*parts, task.source] if task.source else parts) + "."

    @functools.cached_property
    def labels(self) -> dict[str, str]:
        """A short name for each method: without settings, or else the whole spec."""
        bare = {m: " + ".join(part.partition(":")[0].strip() for part in m.split("+")) for m in self.methods}
        names = list(bare.values())
        labels = {m: _shorten(bare[m] if names.count(bare[m]) == 1 else m) for m in self.methods}
        return labels | {BARE: "plain model"}


def failed_samples(record: Record | None) -> int:
    """The number of failed samples of a cell; 0 for None."""
    return sum(bool(s["failed"]) for s in record["samples"]) if record else 0


def curve(record: Record) -> tuple[list[float | None], int] | None:
    """Mean loss in equal stretches of positions, and the tokens that they cover.

    A stretch without tokens has the loss None. None where the task does not record the loss by position.
    """
    found = [d for s in record["samples"] if (d := s["detail"] or {}).get("nll_by_position")]
    if not found:
        return None
    sums, counts = [0.0] * len(found[0]["nll_by_position"]), [0] * len(found[0]["nll_by_position"])
    for detail in found:
        for i, (mean, n) in enumerate(zip(detail["nll_by_position"], detail["tokens_by_position"], strict=True)):
            sums[i] += n * (mean or 0.0)
            counts[i] += n
    means = [total / n if n else None for total, n in zip(sums, counts, strict=True)]
    return means, int(found[0].get("window") or record["length"])


def depths(record: Record) -> list[tuple[float, bool]]:
    """(depth from 0 to 1, found) of each sample with a key at a depth.

    A failed sample counts as not found.
    """
    found = [(s["detail"] or {}, s["failed"]) for s in record["samples"]]
    return [(float(d["depth"]), bool(d.get("found")) and not failed) for d, failed in found if "depth" in d]


def distances(record: Record) -> list[tuple[float, int, bool]]:
    """(depth, distance, found) of each sample with a key's position.

    Depths are from 0 to 1, distances in tokens from the key to the prompt's end.

    Computed from token positions, since `k` of older runs was a share of the nominal length.
    """
    found = [(s["detail"] or {}, s["failed"]) for s in record["samples"]]
    return [
        (float(d["depth"]), int(d["prompt_tokens"]) - int(d["needle_token"]), bool(d.get("found")) and not failed)
        for d, failed in found
        if "depth" in d and "prompt_tokens" in d and "needle_token" in d
    ]


def shares_right(record: Record) -> tuple[list[float], list[int]] | None:
    """Right answers and questions in equal stretches of a stream, over a cell's samples.

    None where the task is not a stream.
    """
    found = [d for s in record["samples"] if "stream_tokens" in (d := s["detail"] or {}) and "right_by_position" in d]
    if not found:
        return None
    questions = [sum(n) for n in zip(*(d["asked_by_position"] for d in found), strict=True)]
    hits = [
        [n * (share or 0.0) for share, n in zip(d["right_by_position"], d["asked_by_position"], strict=True)]
        for d in found
    ]
    return [sum(h) for h in zip(*hits, strict=True)], questions


def pareto(points: dict[str, tuple[float, float]], task: TaskFacts) -> list[str]:
    """The Pareto front of points (cost, score), as names in order of cost."""
    front: list[str] = []
    for name in sorted(points, key=lambda n: (points[n][0], -task.gain(points[n][1]))):
        if not front or task.gain(points[name][1]) > task.gain(points[front[-1]][1]):
            front.append(name)
    return front


def by_reason(left_out: dict[str, str]) -> dict[str, str]:
    """Reasons by name, with the names of one reason joined by commas."""
    names: dict[str, list[str]] = {}
    for name, reason in left_out.items():
        names.setdefault(reason, []).append(name)
    return {", ".join(those): reason for reason, those in names.items()}


def _task(facts: dict[str, Any]) -> TaskFacts:
    return TaskFacts(**{name: facts[name] for name in TaskFacts.__dataclass_fields__ if name in facts})


def _shorten(text: str, most: int = 30) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _nothing(cells: Sequence[Record]) -> str:
    message = "this run has no finished cell yet, so there is nothing to report; run `longspan compare` on it"
    ended = [c for c in cells if c["status"] != "ok"]
    if not ended:
        return message
    first = ended[0]
    return (
        f"{message} again with shorter lengths or on a larger machine. All {len(ended)} cells that ran ended without a "
        f"result; the first: {first['method']} {first['task_spec']} at {first['length']:,} tokens, "
        f"{STATUS[first['status']]}: {first['error']}"
    )
