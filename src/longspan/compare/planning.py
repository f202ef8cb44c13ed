"""What will be measured: methods × tasks × lengths as cells, each known by the content that decides its result.

The native length and the bare model are always among the cells, so that every figure has its reference beside it.
Methods are resolved once, for the longest length that was asked for, since a static method is deployed with one
setting; that setting is then measured at every length. A cell's key is a hash of everything that its result depends
on: the same key means the same measurement, and any change of weights, settings, samples, code or versions means
another key.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longspan import models
from longspan.compare import cost, trained
from longspan.compare.statistics import Scale
from longspan.compare.store import digest
from longspan.core.facts import ModelFacts
from longspan.core.method import Combination, Method, NoMethod, catalogue, combination
from longspan.tasks.base import Task, parse_task
from longspan.util import environment
from longspan.util.errors import LongspanError, NotSupported, SpecError
from longspan.util.units import read_size

PATIENCE = 30 * 60.0
"""Seconds that a run may take, roughly, where the user named no lengths."""
START = 2.0
"""Seconds that a cell takes beside its samples, roughly: a process, the model, the method."""
DEFAULT_TASKS = ("ppl", "passkey")
SOURCES = ("core", "engine", "hf", "positions", "lm", "attention", "memory", "prompts", "reading", "tasks")
_FILES = ("apply.py", "models.py", "meter.py", "compare/worker.py", "compare/statistics.py", "util/textfiles.py")

MethodLike = str | Path | Method | Combination | Iterable[str | Method]
"""A method, or as text also the folder of a model that was trained from the one that is compared."""


@dataclass(frozen=True)
class Chosen:
    """A method as the user asked for it, and with every setting filled in; or a model that was trained from the one that is
    compared, in the folder `trained`, of which `asked` is the name and `saved` are the methods that it was saved with."""

    asked: str
    method: Combination
    trained: str | None = None
    facts: ModelFacts | None = None
    saved: tuple[Method, ...] = ()

    @property
    def spec(self) -> str:
        return self.method.spec if self.trained is None else self.asked


@dataclass(frozen=True)
class Cell:
    """The unit of work, of storage and of resume. `dtype` and `device` are torch's names, `processor` is the device's
    own, without which times mean nothing; `samples` is how many are drawn. `trained` is the folder of a model that is measured
    in place of `model`, as it was saved."""

    model: str
    fingerprint: str
    asked: str
    method: Combination
    task: Task
    length: int
    samples: int
    seed: int
    dtype: str
    device: str
    processor: str
    trained: str | None = None
    saved: tuple[Method, ...] = ()
    """The methods that the model in `trained` was saved with."""

    @property
    def spec(self) -> str:
        """What its row is called."""
        return self.method.spec if self.trained is None else self.asked

    @property
    def parts(self) -> list[Method | Task]:
        """The methods and the task of the cell, whose own files decide its result."""
        return [*self.method.methods, *self.saved, self.task]

    @functools.cached_property
    def key(self) -> str:
        """sha256, in hex, of everything that the result depends on. Python's version is part of it as generated texts
        come from its standard library."""
        versions = environment.versions()
        versions["python"] = ".".join(versions["python"].split(".")[:2])
        return digest(
            {
                "fingerprint": self.fingerprint,
                "method": "as it was saved" if self.trained else self.method.spec,
                "task": self.task.spec,
                "task_version": self.task.version,
                "data": self.task.data_digest(),
                "samples": [self.samples, self.seed],
                "length": self.length,
                "dtype": self.dtype,
                "device": [self.device, self.processor],
                "versions": versions,
                "code": code_digest(),
                "own_code": [source_digest(type(part)) for part in self.parts],
            }
        )

    def describe(self) -> dict[str, Any]:
        """The cell as data, as the manifest and every record carry it."""
        return {
            "key": self.key,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "method": self.spec,
            "asked": self.asked,
            "task": self.task.name,
            "task_spec": self.task.spec,
            "task_version": self.task.version,
            "length": self.length,
            "seed": self.seed,
        }


def as_list(value: Any, kinds: tuple[type, ...]) -> list[Any] | None:
    """A single value of `kinds` as a list of one, any other iterable as a list, and None where nothing is named. Raises
    `SpecError` for anything else."""
    if value is None or isinstance(value, kinds):
        return None if value is None else [value]
    if not isinstance(value, Iterable):
        raise SpecError(f"a list was expected, not {type(value).__name__}")
    return list(value) or None


def read_lengths(lengths: Iterable[int | str], facts: ModelFacts) -> list[int]:
    """Lengths in tokens, ascending, without doubles, with the native length among them. Raises `SpecError`."""
    sizes = {facts.window}
    for length in lengths:
        size = read_size(str(length))
        if size < 1 or isinstance(length, bool):
            raise SpecError(f"a length must be at least 1 token, not {length}")
        sizes.add(size)
    return sorted(sizes)


def read_tasks(tasks: Iterable[str | Task] | None) -> list[Task]:
    """Tasks without doubles; the default ones where none are named. Raises `SpecError`."""
    read = [parse_task(t) for t in tasks or DEFAULT_TASKS]
    for task in read:
        check_importable(type(task))
    return list({task.spec: task for task in read}.values())


def read_methods(
    methods: Iterable[MethodLike] | None, facts: ModelFacts, longest: int, model: str
) -> tuple[list[Chosen], dict[str, str]]:
    """The methods with the settings for `longest` tokens, the bare model first and none twice; and, by name, why a
    method of the catalogue was left out where the user named none. A method that was asked for and cannot be had
    raises `LongspanError`."""
    if methods is None:
        chosen, left_out = _whole_catalogue(facts, longest)
    else:
        chosen = [_chosen(m, facts, longest, model) for m in methods]
        left_out = {}
    bare = Chosen(NoMethod.name, combination(NoMethod.name))
    unique: dict[str, Chosen] = {}
    for one in (bare, *chosen):
        unique.setdefault(one.spec, one)
        for method in (*one.method.methods, *one.saved):
            check_importable(type(method))
    return list(unique.values()), left_out


def _chosen(asked: MethodLike, facts: ModelFacts, longest: int, model: str) -> Chosen:
    if trained.is_folder(asked):
        folder, trained_facts, saved = trained.trained_model(str(asked), model)
        return Chosen(str(asked), combination(NoMethod.name), folder, trained_facts, saved.methods)
    method = _combination(asked)
    return Chosen(method.spec, method.resolve(facts, longest))


def _combination(asked: MethodLike) -> Combination:
    if isinstance(asked, Path) or (isinstance(asked, str) and "/" in asked.partition(":")[0]):
        raise SpecError(
            f"{asked} is no folder of a model or of a training; a method is named by its spec, such as 'ntk'"
        )
    return combination(asked)


def _asked(method: MethodLike) -> str:
    return str(method) if trained.is_folder(method) else _combination(method).spec


def _whole_catalogue(facts: ModelFacts, longest: int) -> tuple[list[Chosen], dict[str, str]]:
    chosen, left_out = [], {}
    for name, cls in catalogue().items():
        if NoMethod.works_on not in cls.works_on:
            left_out[name] = f"not for a trained decoder as it is; for: {cls.works_on}"
            continue
        try:
            chosen.append(Chosen(name, combination(cls()).resolve(facts, longest)))
        except LongspanError as error:
            left_out[name] = str(error)
        except TypeError:
            left_out[name] = "needs settings that do not follow from the length; ask for it by name"
    return chosen, left_out


def check_importable(cls: type) -> None:
    """Raises `NotSupported` for a class that a worker process cannot import."""
    if cls.__module__ == "__main__" and not hasattr(sys.modules["__main__"], "__file__"):
        raise NotSupported(
            f"{cls.__name__} was defined in an interactive session, which the worker processes of a comparison cannot "
            "read; put it into a .py file and import it from there"
        )


@functools.cache
def code_digest() -> str:
    """sha256 of the package's sources that results depend on."""
    root = Path(__file__).resolve().parent.parent
    files = [root / name for name in _FILES] + [f for folder in SOURCES for f in (root / folder).rglob("*.py")]
    sha = hashlib.sha256()
    for file in sorted(f for f in files if f.exists()):
        sha.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return sha.hexdigest()


def source_digest(cls: type[Method | Task]) -> str | None:
    """sha256 of the file of a class that is not this package's own; None for the package's."""
    if cls.__module__.startswith("longspan."):
        return None
    file = inspect.getsourcefile(cls)
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else None


@dataclass(frozen=True)
class Choice:
    """Lengths that were chosen for the user, the most samples of a cell (None: as many as each task wants), and why."""

    lengths: list[int]
    most_samples: int | None
    why: str


def choose_lengths(
    facts: ModelFacts,
    methods: int,
    counts: Sequence[int],
    dtype: torch.dtype,
    memory: int,
    speed: float,
    keep_counts: bool = False,
) -> Choice:
    """The native window, twice that, four times that, and so on, as far as one input fits into 80 % of `memory` bytes
    and all cells together take about half an hour. `counts` are the tasks' numbers of samples, `speed` is in
    operations a second. The native window and its double are kept in any case; then, unless `keep_counts`, the
    samples are made fewer.
    """

    def total(lengths: list[int], most: int | None = None) -> float:
        work = sum(min(n, most or n) for n in counts)
        return methods * sum(len(counts) * START + work * cost.prefill_flops(facts, x) / speed for x in lengths)

    lengths, why = [facts.window], "the next one does not fit into memory"
    while cost.memory_needed(facts, 2 * lengths[-1], dtype) <= 0.8 * memory:
        if len(lengths) > 1 and total([*lengths, 2 * lengths[-1]]) > PATIENCE:
            why = "with the next one the run would take more than half an hour"
            break
        lengths.append(2 * lengths[-1])
    most = None
    if total(lengths) > PATIENCE and max(counts) > 2 and not keep_counts:
        most = next((n for n in range(max(counts) - 1, 2, -1) if total(lengths, n) <= PATIENCE), 2)
        why += f"; at most {most} samples a cell, as the run would take long with more"
    if total(lengths, most) > PATIENCE:
        why += "; name fewer methods, or lengths, for a shorter run"
    return Choice(lengths, most, why)


def scale_of(task: Task, vocabulary: int) -> Scale:
    """How the task's score reads. A failed sample is as bad as the task says (`worst`), or 0 where more is better, or
    the loss of a guess among all tokens where less is."""
    worst = getattr(task, "worst", None)
    if worst is None:
        worst = 0.0 if task.higher_is_better else math.log(vocabulary)
    return Scale(task.higher_is_better, float(worst))


@dataclass(frozen=True)
class Request:
    """What the user asked for, not yet checked; None means: choose for me."""

    model: str
    methods: list[MethodLike] | None = None
    tasks: list[str | Task] | None = None
    lengths: list[int | str] | None = None
    seed: int = 0
    samples: int | None = None
    dtype: str | torch.dtype | None = None
    device: str | torch.device | None = None

    def check(self) -> None:
        """Raises `SpecError` for a number that is none."""
        if not _is_whole(self.seed) or self.seed < 0:
            raise SpecError(f"seed must be a whole number from 0 up, not {self.seed!r}")
        if self.samples is not None and (not _is_whole(self.samples) or self.samples < 1):
            raise SpecError(f"samples must be a whole number from 1 up, not {self.samples!r}")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class Plan:
    """A request, read and checked against the model: what will run, and what was decided for the user."""

    request: Request
    fingerprint: str
    facts: ModelFacts
    methods: list[Chosen]
    left_out: dict[str, str]
    tasks: list[Task]
    lengths: list[int]
    why: str
    """Why these lengths and samples."""
    counts: dict[str, int]
    """Samples of a cell, by task spec."""
    device: torch.device
    dtype: torch.dtype
    machine: dict[str, Any]
    speed: float

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def cells(self) -> list[Cell]:
        """The bare model first, then short lengths before long: what a stopped run leaves can be read as far as it
        goes."""
        cells = [
            Cell(
                model=self.request.model,
                fingerprint=self.fingerprint if chosen.trained is None else models.fingerprint(chosen.trained),
                asked=chosen.asked,
                method=chosen.method,
                task=task,
                length=length,
                samples=self.counts[task.spec],
                seed=self.request.seed,
                dtype=self.dtype_name,
                device=self.device.type,
                processor=self.machine["device_name"],
                trained=chosen.trained,
                saved=chosen.saved,
            )
            for chosen in self.methods
            for task in self.tasks
            for length in self.lengths
        ]
        return sorted(cells, key=lambda c: (c.spec != NoMethod.name, c.length))

    def seconds(self, cell: Cell) -> float:
        """A rough forecast of a cell's time."""
        return START + cell.samples * cost.prefill_flops(self.facts, cell.length) / self.speed

    def manifest(self) -> dict[str, Any]:
        """Everything that a reader of the run needs to know, as JSON data."""
        request = self.request
        return {
            "model": request.model,
            "fingerprint": self.fingerprint,
            "facts": dataclasses.asdict(self.facts),
            "card": cost.card(self.facts, self.dtype),
            "asked": {
                "methods": None if request.methods is None else [_asked(m) for m in request.methods],
                "tasks": None if request.tasks is None else [t.spec for t in self.tasks],
                "lengths": None if request.lengths is None else [str(x) for x in request.lengths],
                "samples": request.samples,
            },
            "methods": [self._method_facts(c) for c in self.methods],
            "left_out": self.left_out,
            "tasks": {t.spec: self._task_facts(t) for t in self.tasks},
            "lengths": self.lengths,
            "why": self.why,
            "native_length": self.facts.window,
            "seed": request.seed,
            "environment": {
                **self.machine,
                **environment.versions(),
                "dtype": self.dtype_name,
                "attention": f"{self.facts.attention}; methods with an attention of their own replace it",
                "command": environment.command_line(),
            },
            "cells": [c.describe() for c in self.cells()],
        }

    def _method_facts(self, chosen: Chosen) -> dict[str, Any]:
        return {
            "spec": chosen.spec,
            "asked": chosen.asked,
            **(_trained_facts(chosen) if chosen.trained else self._put_on_facts(chosen.method)),
            **self._notes(chosen),
        }

    def _notes(self, chosen: Chosen) -> dict[str, Any]:
        """What the methods have a report say of themselves, under `notes`; nothing where they say nothing."""
        facts, methods = chosen.facts or self.facts, (*chosen.method.methods, *chosen.saved)
        notes = [note for method in methods for note in method.report_notes(facts, self.lengths[-1])]
        return {"notes": notes} if notes else {}

    def _put_on_facts(self, method: Combination) -> dict[str, Any]:
        return {
            "title": " + ".join(m.title for m in method.methods),
            "reach": method.reach(self.facts),
            "exportable": method.exportable,
        }

    def _task_facts(self, task: Task) -> dict[str, Any]:
        scale = scale_of(task, self.facts.vocab)
        return {
            "spec": task.spec,
            "name": task.name,
            "title": task.title,
            "version": task.version,
            "measures": task.measures,
            "source": task.source,
            "metric": task.metric,
            "higher_is_better": scale.higher_is_better,
            "rates": task.rates,
            "worst": scale.worst,
            "samples": self.counts[task.spec],
        }


def _trained_facts(chosen: Chosen) -> dict[str, Any]:
    assert chosen.facts is not None
    methods = f" with {Combination(chosen.saved).spec}" if chosen.saved else ""
    return {
        "title": f"a model that was trained from this one, {chosen.facts.architecture}{methods}",
        "reach": chosen.facts.window,
        "exportable": True,
        "training": trained.training_cost(chosen.asked),
    }


def make_plan(request: Request) -> Plan:
    """Reads and checks the whole request; no weights are loaded. Raises `LongspanError`."""
    request.check()
    facts = models.inspect_model(request.model)
    device = models.pick_device(request.device)
    dtype = models.pick_dtype(request.dtype, device)
    machine, speed = environment.machine(device), cost.speed(device, dtype)
    tasks = read_tasks(request.tasks)
    counts = {t.spec: request.samples or t.default_count for t in tasks}
    if request.lengths is None:
        number = 1 + len(catalogue() if request.methods is None else request.methods)
        keep, memory = request.samples is not None, machine["device_memory"]
        choice = choose_lengths(facts, number, list(counts.values()), dtype, memory, speed, keep)
        lengths, why = choice.lengths, f"chosen: {choice.why}"
        counts = {spec: min(n, choice.most_samples or n) for spec, n in counts.items()}
    else:
        lengths, why = read_lengths(request.lengths, facts), "as asked for, with the native length"
    methods, left_out = read_methods(request.methods, facts, lengths[-1], request.model)
    return Plan(
        request=request,
        fingerprint=models.fingerprint(request.model),
        facts=facts,
        methods=methods,
        left_out=left_out,
        tasks=tasks,
        lengths=lengths,
        why=why,
        counts=counts,
        device=device,
        dtype=dtype,
        machine=machine,
        speed=speed,
    )
