"""A task is a benchmark: what it asks, how it is scored, and nothing of the method that is measured.

    ppl                       one task with its usual settings
    passkey:protocol=pi,depths=32,trials=10

A task is a frozen dataclass of its settings, written like a method. `samples` draws the inputs, which depend on the
tokenizer, the length, the count and the seed alone, so that all methods read the same tokens; `run` puts one of them
through a model. Subclassing `Task` with a `name` is all the registration there is.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longspan.core.method import format_value, read_settings
from longspan.core.registry import Registered, import_all
from longspan.meter import Meter
from longspan.util.errors import LongspanError, SpecError, nearest


@dataclass(frozen=True)
class Sample:
    """One input. `id` names it among the samples of a cell; `tokens` are ids, special tokens included, never more than
    the length asked for; `meta` is what the score needs and the report shows, JSON-able."""

    id: str
    tokens: list[int]
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass
class Outcome:
    """The result of one sample. `score` is finite, in the task's metric; where there is none, `failed` is set and the
    sample counts as the worst. `detail` is JSON-able."""

    score: float
    detail: dict[str, Any] = field(default_factory=dict)
    failed: bool = False


@dataclass(frozen=True)
class Task(Registered, ABC):
    """Base of every task. Class variables describe it; dataclass fields are its settings."""

    noun: ClassVar[str] = "task"
    name: ClassVar[str] = ""
    title: ClassVar[str] = ""
    version: ClassVar[int] = 1
    """Goes up when the same settings would give other samples or other scores."""
    measures: ClassVar[str] = ""
    source: ClassVar[str] = ""
    offline: ClassVar[bool] = True
    default_count: ClassVar[int] = 8
    """Samples of a cell, unless the user says how many."""
    metric: ClassVar[str] = "score"
    higher_is_better: ClassVar[bool] = True
    rates: ClassVar[bool] = True
    """False for what only describes a model: no advice is drawn from it."""

    def require(self, condition: bool, message: str) -> None:
        """Raises `SpecError` with the task's name before `message` unless `condition` holds."""
        if not condition:
            raise SpecError(f"{self.name}: {message}")

    @abstractmethod
    def samples(self, tokenizer: PreTrainedTokenizerBase, length: int, count: int, seed: int) -> list[Sample]:
        """`count` inputs of at most `length` tokens each, answer included. The same arguments give the same samples in
        every process; raises `LongspanError` where `length` is too short or there is not enough text."""

    @abstractmethod
    def run(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sample: Sample, meter: Meter) -> Outcome:
        """One sample on a model that has its method on it, with prefill, decoding and cache metered."""

    def answer(self, tokenizer: PreTrainedTokenizerBase, sample: Sample) -> list[int]:
        """The tokens of the right answer to a sample, for training on it; empty where a task has no such answer."""
        return []

    def answered(self, sample: Sample) -> list[tuple[int, int]]:
        """Places start … end - 1 of a sample's tokens that are right answers too, to earlier questions; a training learns
        them beside `answer`."""
        return []

    def data_digest(self) -> str:
        """sha256, in hex, of outside data that the samples are made from; empty where everything is generated."""
        return ""

    def describe_first(self, sample: Sample, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """The first and the last 200 characters of what the model reads, special tokens included, and its tokens."""
        return {
            "head": str(tokenizer.decode(sample.tokens[:200]))[:200],
            "tail": str(tokenizer.decode(sample.tokens[-200:]))[-200:],
            "tokens": len(sample.tokens),
        }

    @property
    def spec(self) -> str:
        """The task as text, with the settings that differ from their defaults; `parse_task` reads it back."""
        settings = [
            f"{f.name}={format_value(value)}"
            for f in dataclasses.fields(self)
            if (value := getattr(self, f.name)) != f.default
        ]
        return self.name + (":" + ",".join(settings) if settings else "")


def task_catalogue() -> dict[str, type[Task]]:
    """Every task by name: the files of this folder, subclasses defined elsewhere, and packages that name themselves in
    the entry-point group `longspan.tasks`."""
    import_all(["tasks"], "longspan.tasks")
    return dict(sorted(Task.registry.items()))


def parse_task(spec: str | Task) -> Task:
    """Reads `name:key=value,key=value`; a task is handed back as it is. Raises `SpecError` with the nearest right form."""
    if isinstance(spec, Task):
        return spec
    if not isinstance(spec, str) or not spec.strip():
        raise SpecError('a task is written "name:key=value,key=value", for example "passkey:protocol=pi"')
    name, colon, rest = spec.strip().partition(":")
    name, tasks = name.strip(), task_catalogue()
    if name not in tasks:
        if " + " in spec:
            raise SpecError(f"{spec!r} joins tasks; name each one by itself: -t {' -t '.join(spec.split(' + '))}")
        raise SpecError(f"there is no task {name!r}; {nearest(name, tasks)}")
    if colon and not rest.strip():
        raise SpecError(f'{name}: nothing after the colon; write "{name}" or "{name}:key=value"')
    return read_settings(tasks[name], name, rest)


def check_fits(samples: list[Sample], length: int) -> list[Sample]:
    """The samples, none of them longer than `length` tokens; nothing is ever cut."""
    for sample in samples:
        if len(sample.tokens) > length:
            raise LongspanError(f"sample {sample.id} has {len(sample.tokens):,} tokens and should fit into {length:,}")
    return samples
