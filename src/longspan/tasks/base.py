"""A task is a benchmark: inputs and a score, independent of the measured method.

    ppl                       one task with its usual settings
    passkey:protocol=pi,depths=32,trials=10

A task is a frozen dataclass of its settings, written like a method. `samples` draws the inputs, which depend only on the
tokenizer, the length, the count and the seed, so that all methods read the same tokens; `run` scores a model on one of
them. Subclassing `Task` with a `name` registers it.
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
    """One input of a task.

    id: unique among the samples of a cell. tokens: token ids, special tokens included, at most the requested length.
    meta: JSON data that the score needs and the report shows.
    """

    id: str
    tokens: list[int]
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass
class Outcome:
    """The result of one sample: a finite score, and JSON data in `detail`.

    failed: there is no score; the sample counts as the worst one.
    """

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
    """Incremented when the same settings would give other samples or other scores."""
    measures: ClassVar[str] = ""
    source: ClassVar[str] = ""
    offline: ClassVar[bool] = True
    default_count: ClassVar[int] = 8
    """Samples of a cell, where the user gives no number."""
    metric: ClassVar[str] = "score"
    higher_is_better: ClassVar[bool] = True
    rates: ClassVar[bool] = True
    """False for a task that only describes a model: the report's advice ignores it."""

    def require(self, condition: bool, message: str) -> None:
        """Raises `SpecError` with the task's name before `message` unless `condition` holds."""
        if not condition:
            raise SpecError(f"{self.name}: {message}")

    @abstractmethod
    def samples(self, tokenizer: PreTrainedTokenizerBase, length: int, count: int, seed: int) -> list[Sample]:
        """`count` inputs of at most `length` tokens each, answer included; the same in every process.

        Raises `LongspanError` where `length` is too short, or there is not enough text.
        """

    @abstractmethod
    def run(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sample: Sample, meter: Meter) -> Outcome:
        """The outcome of one sample on a model with its method applied.

        `meter` measures prefill, decoding and cache.
        """

    def answer(self, tokenizer: PreTrainedTokenizerBase, sample: Sample) -> list[int]:
        """Token ids of the right answer to a sample, for training.

        Empty where a task has no such answer.
        """
        return []

    def answered(self, sample: Sample) -> list[tuple[int, int]]:
        """Spans of a sample's tokens that answer earlier questions, for training beside `answer`.

        A span (start, end) covers tokens start … end - 1.
        """
        return []

    def data_digest(self) -> str:
        """sha256, in hex, of the text or file that samples are drawn from.

        Empty where everything is generated.
        """
        return ""

    def describe_first(self, sample: Sample, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """The first and last 200 characters of a sample, and its number of tokens.

        Special tokens are included.
        """
        return {
            "head": str(tokenizer.decode(sample.tokens[:200]))[:200],
            "tail": str(tokenizer.decode(sample.tokens[-200:]))[-200:],
            "tokens": len(sample.tokens),
        }

    @property
    def spec(self) -> str:
        """The task as text, with the settings that differ from their defaults.

        `parse_task` reads it back.
        """
        settings = [
            f"{f.name}={format_value(value)}"
            for f in dataclasses.fields(self)
            if (value := getattr(self, f.name)) != f.default
        ]
        return self.name + (":" + ",".join(settings) if settings else "")


def task_catalogue() -> dict[str, type[Task]]:
    """Every task by name, in alphabetical order.

    Those of this folder, of user files, and of packages in the entry-point group `longspan.tasks`.
    """
    import_all(["tasks"], "longspan.tasks")
    return dict(sorted(Task.registry.items()))


def parse_task(spec: str | Task) -> Task:
    """The task that a spec `name:key=value,key=value` describes; a task is returned as it is.

    Raises `SpecError`, which names the nearest task or setting.
    """
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
    """Returns the samples; raises `LongspanError` where one is longer than `length` tokens. Nothing is truncated."""
    for sample in samples:
        if len(sample.tokens) > length:
            raise LongspanError(f"sample {sample.id} has {len(sample.tokens):,} tokens and should fit into {length:,}")
    return samples
