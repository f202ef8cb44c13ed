"""What the user asks for: methods, tasks and lengths, read and checked against the model.

The native length and the bare model are always included, so that every figure has its reference beside it. A method is
resolved once, for the longest requested length, since a static method is deployed with one setting; that setting is then
measured at every length.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longspan.compare.planning import trained
from longspan.core.facts import ModelFacts
from longspan.core.method import Combination, Method, NoMethod, catalogue, combination
from longspan.tasks.base import Task, parse_task
from longspan.util.errors import LongspanError, NotSupported, SpecError
from longspan.util.units import read_size

DEFAULT_TASKS = ("ppl", "passkey")

MethodLike = str | Path | Method | Combination | Iterable[str | Method]
"""A method; or, as text or path, the folder of a model that was trained from the compared one."""


@dataclass(frozen=True)
class Request:
    """The arguments of `compare`, not yet checked; None leaves the choice to the plan."""

    model: str
    methods: list[MethodLike] | None = None
    tasks: list[str | Task] | None = None
    lengths: list[int | str] | None = None
    seed: int = 0
    samples: int | None = None
    dtype: str | torch.dtype | None = None
    device: str | torch.device | None = None

    def check(self) -> None:
        """Raises `SpecError` for a seed or a number of samples out of range."""
        if not _is_whole(self.seed) or self.seed < 0:
            raise SpecError(f"seed must be a whole number from 0 up, not {self.seed!r}")
        if self.samples is not None and (not _is_whole(self.samples) or self.samples < 1):
            raise SpecError(f"samples must be a whole number from 1 up, not {self.samples!r}")


@dataclass(frozen=True)
class Chosen:
    """A row: a method as requested and with all settings, or a trained model.

    trained, facts: the folder of a model that was trained from the compared one, and its facts; None for a method.
    saved: the methods that the trained model was saved with.
    """

    requested: str
    method: Combination
    trained: str | None = None
    facts: ModelFacts | None = None
    saved: tuple[Method, ...] = ()

    @property
    def spec(self) -> str:
        """The name of the row: the method's full spec, or a trained model's name."""
        return self.method.spec if self.trained is None else self.requested


def as_list(value: Any, kinds: tuple[type, ...]) -> list[Any] | None:
    """A value of `kinds` or an iterable of them as a list; None for nothing.

    Raises `SpecError` for anything else.
    """
    if value is None or isinstance(value, kinds):
        return None if value is None else [value]
    if not isinstance(value, Iterable):
        raise SpecError(f"a list was expected, not {type(value).__name__}")
    return list(value) or None


def read_lengths(lengths: Iterable[int | str], facts: ModelFacts) -> list[int]:
    """Lengths in tokens, ascending, each once, the native length included; raises `SpecError` below 1."""
    sizes = {facts.window}
    for length in lengths:
        size = read_size(str(length))
        if size < 1 or isinstance(length, bool):
            raise SpecError(f"a length must be at least 1 token, not {length}")
        sizes.add(size)
    return sorted(sizes)


def read_tasks(tasks: Iterable[str | Task] | None) -> list[Task]:
    """The tasks, each once; `DEFAULT_TASKS` for None. Raises `SpecError` for a spec that is wrong."""
    read = [parse_task(t) for t in tasks or DEFAULT_TASKS]
    for task in read:
        check_importable(type(task))
    return list({task.spec: task for task in read}.values())


def read_methods(
    methods: Iterable[MethodLike] | None, facts: ModelFacts, longest: int, model: str
) -> tuple[list[Chosen], dict[str, str]]:
    """The methods with settings for `longest` tokens, and the reasons of those left out.

    The bare model is first, and none is twice.

    methods: None for every method of the catalogue that the model can take; only then is anything left out.
    Raises `LongspanError` for a requested method that is wrong or that the model cannot take.
    """
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


def request_name(method: MethodLike) -> str:
    """A requested method as text: its spec, or the folder of a trained model."""
    return str(method) if trained.is_folder(method) else _combination(method).spec


def check_importable(cls: type) -> None:
    """Raises `NotSupported` for a class that a worker process cannot import."""
    if cls.__module__ == "__main__" and not hasattr(sys.modules["__main__"], "__file__"):
        raise NotSupported(
            f"{cls.__name__} was defined in an interactive session, which the worker processes of a comparison cannot "
            "read; put it into a .py file and import it from there"
        )


def _chosen(method: MethodLike, facts: ModelFacts, longest: int, model: str) -> Chosen:
    if trained.is_folder(method):
        folder, its_facts, saved = trained.trained_model(str(method), model)
        return Chosen(str(method), combination(NoMethod.name), folder, its_facts, saved.methods)
    read = _combination(method)
    return Chosen(read.spec, read.resolve(facts, longest))


def _combination(method: MethodLike) -> Combination:
    if isinstance(method, Path) or (isinstance(method, str) and "/" in method.partition(":")[0]):
        raise SpecError(
            f"{method} is not a folder of a model or of a training; a method is named by its spec, such as 'ntk'"
        )
    return combination(method)


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


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
