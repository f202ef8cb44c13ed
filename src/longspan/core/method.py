"""Methods as frozen dataclasses of their settings, as spec strings, and in combination.

    yarn:factor=4                      one method with one setting
    ntk:factor=8 + streaming:window=4k two methods with different slots

A method declares which parts of a model it changes (`slots`); two methods that share one cannot be combined. Its code says what
it needs of a model (`check`), how settings follow from a target length (`resolve`) and how it is put on a model (`attach`,
through `longspan.hf.site.Site`). Subclassing `Method` with a `name` registers it.

Training, export, `plan`, `compare` and the report know no method by its name: they call the hooks of `Method`, each of which
does nothing unless a method overrides it. docs/own-method.md has a whole method with most of them.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import re
import sys
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longspan.core.facts import ModelFacts
from longspan.core.registry import Registered, import_all
from longspan.core.training_setup import TrainingSetup
from longspan.util.errors import NotSupported, SpecError, nearest
from longspan.util.units import read_size

T = typing.TypeVar("T")
_FOLDERS = ("positions", "attention", "memory", "prompts")


@dataclass(frozen=True)
class Method(Registered):
    """Base of every method.

    Class attributes describe it; dataclass fields, which have annotations, are its settings.
    """

    noun: ClassVar[str] = "method"
    name: ClassVar[str] = ""
    title: ClassVar[str] = ""
    also: ClassVar[tuple[str, ...]] = ()
    """Other names that are read as `name`, such as its paper's; the class's name is always one of them. Case and hyphens do not
    matter."""
    near: ClassVar[tuple[str, ...]] = ()
    """Names of methods that are not in the catalogue and for which the error suggests this one."""
    paper: ClassVar[str] = ""
    seam: ClassVar[Literal["position", "attention", "memory", "prompt", "training"]] = "position"
    slots: ClassVar[frozenset[str]] = frozenset()
    """The parts of a model that the method changes: two methods that share a slot cannot be combined."""
    cost: ClassVar[str] = ""
    """How time and cache grow with the length n, as text: `time n², cache n`."""
    works_on: ClassVar[str] = "pretrained"
    encoder_decoders: ClassVar[bool] = False
    """Whether it works on an encoder-decoder."""
    exportable: ClassVar[bool] = False
    """Whether a saved checkpoint holds the whole method, so that plain transformers runs it."""
    why_not_exportable: ClassVar[str] = ""
    """The reason that `longspan apply` gives where `exportable` is False."""
    examples: ClassVar[tuple[str, ...]] = ()
    """Two specs for a tiny model (a window of 32 tokens, a text of 40): the first changes its logits, the second changes nothing.
    With them the tests of all methods and the page on conformance take up a method by themselves."""

    def require(self, condition: bool, message: str) -> None:
        """Raises `SpecError` with the method's name before `message` unless `condition` holds."""
        if not condition:
            raise SpecError(f"{self.name}: {message}")

    def check(self, facts: ModelFacts) -> None:
        """Raises `NotSupported`, with the reason and what works instead, where the method cannot work on this model."""

    def resolve(self, facts: ModelFacts, length: int | None) -> Self:
        """The same method with every setting filled in, for a target of `length` tokens.

        Raises `SpecError` where `length` is None and a setting that follows from it is missing.
        """
        return self

    def reach(self, facts: ModelFacts) -> int | None:
        """The longest input in tokens that these settings are meant for; None where there is no limit."""
        return None if facts.endless else facts.window

    def neutral_length(self) -> int:
        """The longest input in tokens for which the resolved method changes nothing."""
        return 0

    def cache_tokens(self, facts: ModelFacts, length: int) -> int:
        """The number of tokens whose keys and values are in the cache after `length` tokens."""
        return length

    def keys_seen(self, facts: ModelFacts, length: int) -> int:
        """The number of keys that the last of `length` queries attends to."""
        return self.cache_tokens(facts, length)

    def prepare_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> Self:
        """The same method after it has added its special tokens, if any, to the tokenizer."""
        return self

    def prepare_model(self, model: PreTrainedModel) -> None:
        """Adds embedding rows for the method's special tokens, if any; `prepare_tokenizer` comes first."""

    def attach(self, site: Any) -> None:
        """Puts the resolved method on a model through `site` (`longspan.hf.site.Site`), which can undo it."""

    def token_ids(self) -> tuple[int, ...]:
        """Ids of the tokens that `prepare_model` gives the model rows for; none unless overridden."""
        return ()

    def parts(self, facts: ModelFacts) -> nn.Module | None:
        """The module of trained parameters that the method adds to a model of these `facts`, with its initial values.

        It becomes `model.longspan_parts[name]`, which `attach` finds as `site.parts(name)`: it is trained and saved with the
        model, and loaded with it. Called once the settings are filled in.
        """
        return None

    def build_model(self, model: PreTrainedModel) -> PreTrainedModel | None:
        """Another model around `model`, which then holds the method; None (the default) where `attach` puts it on `model`.

        The new model's type must be registered with transformers (`AutoConfig.register`, `AutoModelForCausalLM.register`) in
        the method's file, since a saved one is loaded by that type alone.
        """
        return None

    def check_training(self, setup: TrainingSetup, facts: ModelFacts) -> None:
        """Raises `SpecError` for a recipe that cannot train the method: the key, its value, and what to write instead."""

    def training_reach(self, facts: ModelFacts) -> int | None:
        """The longest input, in tokens, that a model trained with the method is meant for; `reach` unless overridden."""
        return self.reach(facts)

    def training_samples(self, samples: Sequence[Any]) -> Sequence[Any]:
        """A task's samples (`longspan.tasks.base.Sample`) as the model trains on them, longer by at most `inserted_tokens()`."""
        return samples

    def inserted_tokens(self) -> int:
        """How many tokens `training_samples` adds to a sample, for which room is left in `data.length`."""
        return 0

    def training_callbacks(self, model: PreTrainedModel) -> Sequence[Any]:
        """Callbacks (`transformers.TrainerCallback`) for the training of `model`, which has the method on it."""
        return ()

    def fixed_step(self) -> bool:
        """Whether decoding over a full cache is a step of fixed shape, which `longspan.reading.stream_decoder` runs."""
        return False

    def encoder_form(self) -> Any:
        """How a trained encoder becomes one with this method (`longspan.hf.encoder_form.EncoderForm`); None where it cannot."""
        return None

    def report_notes(self, facts: ModelFacts, length: int) -> Sequence[str]:
        """Sentences that a report should say of the method on this model, compared up to `length` tokens."""
        return ()

    @property
    def spec(self) -> str:
        """The method as a spec string, with the settings that differ from their defaults; `parse` reads it back."""
        settings = [
            f"{f.name}={text}"
            for f in dataclasses.fields(self)
            if (text := format_value(getattr(self, f.name))) != format_value(f.default)
        ]
        return self.name + (":" + ",".join(settings) if settings else "")


@dataclass(frozen=True)
class NoMethod(Method):
    """The model without a method, the baseline of every comparison."""

    name = "none"
    title = "The model as it is"
    also = ("baseline",)
    cost = "time n², cache n"
    exportable = True
    encoder_decoders = True


class CannotCombine(NotSupported):
    """Two methods that share a slot."""

    def __init__(self, first: Method, second: Method):
        super().__init__(first, second)
        self.first, self.second = first, second

    def __str__(self) -> str:
        """The reason, and what the first method can be combined with, which is computed only when the message is read."""
        shared = " and ".join(sorted(self.first.slots & self.second.slots))
        legal = importlib.import_module("longspan.combinable").combinable(type(self.first))
        hint = f"{self.first.name} combines with: {', '.join(legal)}" if legal else f"use {self.first.name} alone"
        return f"{self.first.name} and {self.second.name} cannot be combined: both take the model's {shared}. {hint}"


@dataclass(frozen=True)
class Combination:
    """Methods that are applied together. Raises `CannotCombine` where two of them share a slot."""

    methods: tuple[Method, ...]

    def __post_init__(self) -> None:
        for i, first in enumerate(self.methods):
            for second in self.methods[i + 1 :]:
                if first.slots & second.slots:
                    raise CannotCombine(first, second)

    @property
    def spec(self) -> str:
        """The spec strings of all methods, joined by " + "."""
        return " + ".join(m.spec for m in self.methods) or NoMethod.name

    @property
    def exportable(self) -> bool:
        """Whether a saved checkpoint holds all methods whole."""
        return all(m.exportable for m in self.methods)

    @property
    def sources(self) -> list[str]:
        """The users' own files and modules that define methods of this combination, as `source_of` names them."""
        return list(dict.fromkeys(source for m in self.methods if (source := source_of(type(m)))))

    def check(self, facts: ModelFacts) -> None:
        """Raises `NotSupported` where one of the methods cannot work on this model."""
        for method in self.methods:
            if facts.encoder_decoder and not method.encoder_decoders:
                raise NotSupported(
                    f"{method.name} works on decoder-only models, and {facts.architecture} has an encoder too; use unlimiformer, "
                    "which reads long inputs with it"
                )
            method.check(facts)

    def resolve(self, facts: ModelFacts, length: int | None = None) -> Combination:
        """The same methods, checked against the model and with every setting that follows from `length` (in tokens) filled in.

        Raises `NotSupported` and `SpecError` as the methods do.
        """
        self.check(facts)
        return Combination(tuple(m.resolve(facts, length) for m in self.methods))

    def prepare_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> Combination:
        """The same methods after each has added its special tokens to the tokenizer."""
        return Combination(tuple(m.prepare_tokenizer(tokenizer) for m in self.methods))

    def prepare_model(self, model: PreTrainedModel) -> None:
        """Adds embedding rows for the methods' special tokens."""
        for method in self.methods:
            method.prepare_model(model)

    def reach(self, facts: ModelFacts) -> int | None:
        """The longest input in tokens that one of the methods is meant for; None where there is no limit."""
        return _longest(m.reach(facts) for m in self.methods)

    def training_reach(self, facts: ModelFacts) -> int | None:
        """`reach` of a model that was trained with the methods on it."""
        return _longest(m.training_reach(facts) for m in self.methods)

    def parts(self, facts: ModelFacts) -> dict[str, nn.Module]:
        """The modules that the methods add to a model, by the method's name."""
        found = {m.name: m.parts(facts) for m in self.methods}
        return {name: module for name, module in found.items() if module is not None}

    def added_parameters(self, facts: ModelFacts) -> int:
        """How many parameters `parts` adds; no memory is taken to count them."""
        with torch.device("meta"):
            return sum(p.numel() for module in self.parts(facts).values() for p in module.parameters())


def _longest(reaches: Iterable[int | None]) -> int | None:
    """The largest of some reaches; None where one has no end, or where there are none."""
    known = list(reaches)
    return None if None in known or not known else max(r for r in known if r is not None)


def find(name: str, kind: str, known: Mapping[str, type]) -> str:
    """The key in `known` of the entry that is also called `name`; kind: what an entry is called in the error.

    Raises `SpecError`, with the nearest names, where there is none.
    """
    if name in known:
        return name
    spelling = _spelling(name)
    for key, cls in known.items():
        others = {_spelling(other) for other in (cls.__name__, *getattr(cls, "also", ()))}
        if spelling in others - {_spelling(key)}:  # the name itself is written in one way
            return key
    for key, cls in known.items():
        if spelling in map(_spelling, getattr(cls, "near", ())):
            raise SpecError(f"there is no {kind} {name!r}; the nearest here is {key} ({getattr(cls, 'title', '')})")
    raise SpecError(f"there is no {kind} {name!r}; {nearest(name, known)}")


def _spelling(name: str) -> str:
    """A name in lower case without hyphens, underscores and spaces."""
    return re.sub("[-_ ]", "", name.lower())


def source_of(cls: type) -> str | None:
    """The name of the file, or the dotted name of the module, that defines a user's own class; None for this package's."""
    if cls.__module__.startswith("longspan."):
        return None
    if "." in cls.__module__:
        return cls.__module__
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    return Path(file).name if file else None


def unknown_names(spec: str) -> list[str]:
    """The names in a spec string that no method goes by here."""
    names = [part.partition(":")[0].strip() for part in spec.split("+")]
    return [name for name in names if not _is_known(name)]


def _is_known(name: str) -> bool:
    try:
        return bool(find(name, "method", catalogue()))
    except SpecError:
        return False


def catalogue() -> dict[str, type[Method]]:
    """Every method class by name, ascending: of the package's method folders, of the entry-point group `longspan.methods`, and
    every other subclass that was defined."""
    _import_methods()
    return dict(sorted(Method.registry.items()))


@functools.cache
def _import_methods() -> None:
    import_all(_FOLDERS, "longspan.methods")


def parse(text: str) -> Combination:
    """The methods of a spec string, `name:key=value,key=value + name…`.

    Raises `SpecError` with the nearest valid form.
    """
    if not isinstance(text, str) or not text.strip():
        raise SpecError('a method is written "name:key=value,key=value", for example "yarn:factor=4"')
    head = text.partition(":")[0].strip().lower()
    signed = any(head == other for cls in catalogue().values() for other in cls.also if "+" in other)  # favor+
    methods = [_parse_one(part) for part in ([text] if signed else text.split("+"))]
    return Combination(tuple(m for m in methods if not isinstance(m, NoMethod) or len(methods) == 1))


def combination(method: str | Method | Combination | Iterable[str | Method]) -> Combination:
    """A spec string, a method, or several of them as one combination.

    Raises `SpecError` and `CannotCombine`.
    """
    if isinstance(method, Combination):
        return method
    if isinstance(method, str):
        return parse(method)
    if isinstance(method, Method):
        return Combination((method,))
    if isinstance(method, Iterable):
        return Combination(tuple(m for part in method for m in combination(part).methods))
    raise SpecError(f"a method is a spec string or a Method, not {type(method).__name__}")


def _parse_one(text: str) -> Method:
    name, colon, rest = text.strip().partition(":")
    name = name.strip()
    methods = catalogue()
    if not name:
        raise SpecError(f'no method name in {text!r}: write "name:key=value", several joined by " + "')
    name = find(name, "method", methods)
    if colon and not rest.strip():
        raise SpecError(f'{name}: nothing after the colon; write "{name}" or "{name}:key=value"')
    return read_settings(methods[name], name, rest)


def read_settings(cls: type[T], name: str, text: str) -> T:
    """An instance of the dataclass `cls` from `key=value,key=value`, converted to the types of its fields.

    name: the method or task, for errors. Raises `SpecError` for unknown settings and for values of another type.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for item in filter(None, (s.strip() for s in text.split(","))):
        key, equals, value = (s.strip() for s in item.partition("="))
        if not equals or not value:
            raise SpecError(f"{name}: {item!r} is not key=value")
        if key not in fields:
            known = nearest(key, fields) if fields else "it has no settings"
            raise SpecError(f"{name} has no setting {key!r}; {known}")
        if key in values:
            raise SpecError(f"{name}: {key} is given twice")
        values[key] = _read_value(f"{name}: {key}", value, hints[key])
    return cls(**values)


def _read_value(what: str, text: str, hint: Any) -> Any:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        if text.lower() == "none" and type(None) in typing.get_args(hint):
            return None
        hint = next(a for a in typing.get_args(hint) if a is not type(None))
    if typing.get_origin(hint) is Literal:
        choices = [str(c) for c in typing.get_args(hint)]
        if text not in choices:
            raise SpecError(f"{what} must be one of {', '.join(choices)}, not {text!r}")
        return text
    if hint is bool:
        if text.lower() not in ("true", "false"):
            raise SpecError(f"{what} must be true or false, not {text!r}")
        return text.lower() == "true"
    if hint is int:
        return read_size(text, what)
    if hint is float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not abs(value) < float("inf"):
            raise SpecError(f"{what} must be a finite number, not {text!r}")
        return value
    return text


def format_value(value: Any) -> str:
    """The value of a setting as it is written in a spec string."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.12g}" if isinstance(value, float) else str(value)
