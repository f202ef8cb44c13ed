"""The recipe of a training: a YAML file, read into frozen dataclasses, which `key=value` pairs override.

    out: runs/small
    model: {type: longspan, hidden_size: 256, num_hidden_layers: 8, num_attention_heads: 4}
    tokenizer: {train: bpe, vocabulary: 4096}
    data: {train: books/train, valid: books/valid, length: 512}
    training: {steps: 2000, batch: 64, learning_rate: 1e-3}

Every key has a type and most have a default. Unknown keys, values of another type and impossible values are refused before
anything runs, with the nearest value that works. docs/training.md lists all keys.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from longspan.core.method import parse
from longspan.positions.pose import PoSE
from longspan.util.errors import LongspanError, SpecError, nearest
from longspan.util.textfiles import read_text
from longspan.util.units import read_size

T = typing.TypeVar("T")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise SpecError(message)


@dataclass(frozen=True)
class TokenizerRecipe:
    """A tokenizer trained on the training data; `vocabulary` includes its special tokens."""

    train: Literal["bpe"]
    vocabulary: int = 4096

    def __post_init__(self) -> None:
        _require(
            260 <= self.vocabulary <= 2**20,
            f"tokenizer.vocabulary must be from 260 (256 bytes and the special tokens) to 1m, not {self.vocabulary}",
        )


@dataclass(frozen=True)
class DataRecipe:
    """The data: `train` and `valid` name texts or tasks, a sample has `length` tokens, and `task_share` of them are `task`'s."""

    train: str
    valid: str | None = None
    length: int = 1024
    packing: Literal["plain", "boundaries", "none"] = "plain"
    field: str = "text"
    valid_samples: int = 64
    samples: int | None = None
    task: str | None = None
    task_share: float = 0.25

    def __post_init__(self) -> None:
        _require(0 < self.task_share < 1, f"data.task_share must be above 0 and below 1, not {self.task_share:g}")
        _require(
            self.task is not None or self.task_share == 0.25,
            f"data.task_share={self.task_share:g} would change nothing; name the task at data.task, or leave it out",
        )
        _require(
            self.task is None or self.packing != "boundaries",
            "data.packing=boundaries restarts positions within a sample and data.task does not; use data.packing=plain",
        )
        _require(self.length >= 8, f"data.length must be at least 8 tokens, not {self.length}")
        _require(self.valid_samples >= 1, f"data.valid_samples must be at least 1, not {self.valid_samples}")
        _require(self.samples is None or self.samples >= 1, f"data.samples must be at least 1, not {self.samples}")


@dataclass(frozen=True)
class PositionsRecipe:
    """The positions of a sample's tokens: 0, 1, 2, …, or PoSE's."""

    kind: Literal["ordinary", "pose"] = "ordinary"
    window: int | None = None
    target: int | None = None
    chunks: int = 2
    skips: bool = True
    content: Literal["skip", "contiguous"] = "skip"

    def __post_init__(self) -> None:
        if self.kind == "ordinary":
            changed = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
            _require(
                not changed,
                f"positions.{', '.join(changed)} would change nothing; add positions.kind=pose, or leave it out",
            )
        else:
            _require(self.target is not None, "positions.target must be given with pose, like positions.target=32k")

    def pose(self, length: int) -> PoSE | None:
        """PoSE for samples of `length` tokens; None for ordinary positions."""
        if self.kind == "ordinary":
            return None
        _require(
            self.window in (None, length),
            f"positions.window={self.window} differs from data.length={length}: a sample is one window; leave one of them out",
        )
        assert self.target is not None
        return PoSE(length, self.target, self.chunks, self.skips, self.content)


@dataclass(frozen=True)
class LoraRecipe:
    """Low-rank adapters, which train in place of the weights (peft)."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ()
    save: Literal["merged", "adapter"] = "merged"

    def __post_init__(self) -> None:
        _require(self.rank >= 1, f"lora.rank must be at least 1, not {self.rank}")
        _require(self.alpha > 0, f"lora.alpha must be above 0, not {self.alpha:g}")
        _require(0 <= self.dropout < 1, f"lora.dropout must be from 0 to below 1, not {self.dropout:g}")


@dataclass(frozen=True)
class TrainingRecipe:
    """The optimisation: `batch` counts sequences a step over all devices, `micro_batch` those of one forward on a device."""

    steps: int = 1000
    batch: int = 64
    micro_batch: int | None = None
    learning_rate: float = 1e-3
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: int = 0
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float | None = 1.0
    dtype: Literal["fp32", "bf16", "pure-bf16"] | None = None
    gradient_checkpointing: bool = False
    compile: bool = False
    loss_chunk: int | None = 2048
    log_every: int = 10
    save_every: int | None = 100
    eval_every: int | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "micro_batch", "log_every", "save_every", "eval_every", "loss_chunk"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"training.{name} must be at least 1, not {value}")
        _require(self.learning_rate > 0, f"training.learning_rate must be above 0, not {self.learning_rate:g}")
        _require(self.weight_decay >= 0, f"training.weight_decay must not be negative, not {self.weight_decay:g}")
        _require(self.clip is None or self.clip > 0, f"training.clip must be above 0 or none, not {self.clip}")
        _require(
            all(0 <= b < 1 for b in self.betas), f"training.betas must be from 0 to below 1, not {list(self.betas)}"
        )
        _require(
            0 <= self.warmup <= self.steps,
            f"training.warmup must be from 0 to the {self.steps} steps, not {self.warmup}",
        )
        for name in ("save_every", "eval_every"):
            every = getattr(self, name)
            below = max(self.log_every, (every or 0) // self.log_every * self.log_every)
            _require(
                every is None or every % self.log_every == 0,
                f"training.{name}={every} must be a multiple of training.log_every={self.log_every}, such as {below}: a "
                "logged loss is the mean since the last record, and a resumed run must log the same",
            )

    def at_once(self, devices: int) -> int:
        """Sequences of one forward on one of `devices`."""
        return self.micro_batch or max(1, self.batch // devices)

    def number_format(self, cuda: bool) -> str:
        """`dtype`, or the device's default: bf16 on CUDA, else fp32."""
        return self.dtype or ("bf16" if cuda else "fp32")


@dataclass(frozen=True)
class Recipe:
    """A whole recipe.

    `model` is the name of a model to tune, or a `type` and the settings of a new one's configuration.
    """

    out: str
    model: str | dict[str, Any]
    data: DataRecipe
    seed: int = 0
    method: str | None = None
    tokenizer: str | TokenizerRecipe | None = None
    positions: PositionsRecipe = field(default_factory=PositionsRecipe)
    training: TrainingRecipe = field(default_factory=TrainingRecipe)
    lora: LoraRecipe | None = None

    def __post_init__(self) -> None:
        _require(bool(self.out.strip()), "out must name a folder")
        _require(0 <= self.seed < 2**32, f"seed must be from 0 to 4,294,967,295, not {self.seed}")
        self._check_model()
        self._check_data()
        if self.method is not None:
            parse(self.method)

    def _check_model(self) -> None:
        if isinstance(self.model, str):
            _require(
                not isinstance(self.tokenizer, TokenizerRecipe),
                f"tokenizer.train: {self.model} was trained with its own tokenizer; leave tokenizer out",
            )
            _require(
                self.tokenizer is None, f"tokenizer={self.tokenizer}: {self.model} has its own; leave tokenizer out"
            )
        else:
            _require(
                isinstance(self.model.get("type"), str),
                "model.type must name an architecture, like model.type=longspan or model.type=llama",
            )
            _require(
                self.tokenizer is not None,
                "a model from scratch needs a tokenizer: a name, or tokenizer.train=bpe",
            )
            _require(
                self.lora is None, "lora adapts a trained model, and this one is built from scratch; leave lora out"
            )
        if self.lora is not None and self.lora.save == "adapter":
            _require(
                self.method is None,
                f"lora.save=adapter holds no {self.method}: the adapter would be put on a model without it; use lora.save=merged",
            )

    def _check_data(self) -> None:
        self.positions.pose(self.data.length)
        if self.positions.kind == "pose":
            _require(
                self.data.packing != "boundaries",
                "data.packing=boundaries restarts positions at every document, and PoSE's run through the whole sample; use "
                "data.packing=plain or none",
            )
        if self.data.valid is None:
            for key, default in (("training.eval_every", None), ("data.valid_samples", DataRecipe.valid_samples)):
                section, _, name = key.partition(".")
                value = getattr(getattr(self, section), name)
                _require(value == default, f"{key}={value} would change nothing without data.valid; name a text there")

    def to_dict(self) -> dict[str, Any]:
        """Every key with its value, as data for YAML and JSON."""
        return _plain(dataclasses.asdict(self))


def read_recipe(source: str | Path | Mapping[str, Any], overrides: Iterable[tuple[str, Any]] = ()) -> Recipe:
    """The recipe in a YAML file or a mapping, overridden by `overrides` of dotted keys.

    Raises `SpecError` for YAML that cannot be read, unknown keys and impossible values.
    """
    values = _plain(dict(source)) if isinstance(source, Mapping) else _read_file(Path(source))
    for key, value in overrides:
        _set(values, key, value)
    return read_section(Recipe, "", values)


def read_overrides(texts: Iterable[str]) -> dict[str, Any]:
    """Values by dotted key, from texts such as `training.steps=200`. Raises `SpecError` for a repeated key."""
    values: dict[str, Any] = {}
    for key, value in map(read_override, texts):
        if key in values:
            raise SpecError(f"{key} is set twice, to {values[key]} and to {value}; leave one out")
        values[key] = value
    return values


def read_override(text: str) -> tuple[str, Any]:
    """The dotted key and the value in a text such as `training.steps=200`; the value is YAML."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise SpecError(f"{text!r} is not key=value; write, for example, training.steps=200")
    try:
        return key.strip(), yaml.load(value, _Loader)
    except _Twice as error:
        raise SpecError(f"{key.strip()}={value}: {error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise SpecError(f"{key.strip()}: {value!r} cannot be read as YAML; quote it") from error


def read_section(cls: type[T], name: str, values: Any) -> T:
    """An instance of the dataclass `cls` from a mapping.

    name: the section's dotted key, empty for the whole recipe. Raises `SpecError` for unknown keys and wrong values.
    """
    if not isinstance(values, Mapping):
        raise SpecError(f"{name or 'a recipe'} must be keys with values, not {values!r}")
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in fields:
            raise SpecError(f"{name or 'a recipe'} has no key {key!r}; {nearest(str(key), fields)}")
    for key, known in fields.items():
        needed = known.default is dataclasses.MISSING and known.default_factory is dataclasses.MISSING
        if needed and values.get(key) is None:
            raise SpecError(f"{_join(name, key)} needs a value")
    return cls(**{k: _read_value(_join(name, k), v, hints[k]) for k, v in values.items()})


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """The differences between two recipes, each as `training.steps: 100 → 200`."""
    one, two = _flat(first), _flat(second)
    return [f"{k}: {one.get(k)} → {two.get(k)}" for k in sorted(one.keys() | two.keys()) if one.get(k) != two.get(k)]


class _Twice(yaml.MarkedYAMLError):
    """A repeated key of a mapping."""

    def __str__(self) -> str:
        assert self.context_mark is not None and self.problem_mark is not None
        first, second = self.context_mark.line + 1, self.problem_mark.line + 1
        where = f"twice on line {first}" if first == second else f"on line {first} and again on line {second}"
        return f"{self.problem} is {where}; leave one out"


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which takes the last of two equal keys, changed to refuse them as YAML demands.

    Nodes are checked where they are composed; later, merged keys (`<<`) are among them.
    """

    def compose_mapping_node(self, anchor: Any) -> Any:
        node: Any = super().compose_mapping_node(anchor)  # type: ignore[no-untyped-call]
        begun: dict[tuple[str, str], Any] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                before = begun.setdefault((key.tag, key.value), key)
                if before is not key:
                    raise _Twice(None, before.start_mark, f"the key {key.value!r}", key.start_mark)
        return node


def _read_file(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(read_text(path.expanduser()), _Loader)
    except FileNotFoundError as error:
        raise SpecError(f"there is no recipe {path}; docs/training.md shows how to write one") from error
    except (OSError, UnicodeDecodeError) as error:
        raise LongspanError(f"{path} cannot be read: {error}") from error
    except _Twice as error:
        raise SpecError(f"{path}: {error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise SpecError(f"{path} is not YAML: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(values, dict):
        raise SpecError(f"{path} must hold keys with values, such as `model: smollm2-135m`")
    return values


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    """Sets a dotted key to `value`, with the sections around it where they are missing."""
    *sections, last = key.split(".")
    place = values
    for i, section in enumerate(sections):
        inner = place.get(section)
        if inner is None:
            inner = place[section] = {}
        if not isinstance(inner, dict):
            at = ".".join(sections[: i + 1])
            raise SpecError(f"{key}: the recipe has {at}={inner}, which has no keys; set {at} as a whole")
        place = inner
    place[last] = value


def _read_value(what: str, value: Any, hint: Any) -> Any:
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if value is None or (isinstance(value, str) and value.lower() == "none" and type(None) in options):
        if type(None) in options:
            return None
        raise SpecError(f"{what} needs a value")
    sections = [o for o in options if dataclasses.is_dataclass(o) or typing.get_origin(o) is dict]
    others = [o for o in options if o is not type(None) and o not in sections]
    if sections and (isinstance(value, Mapping) or not others):
        section: Any = sections[0]
        return dict(value) if typing.get_origin(section) is dict else read_section(section, what, value)
    return _read_plain(what, value, others[0])


def _read_plain(what: str, value: Any, kind: Any) -> Any:
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            raise SpecError(f"{what} cannot be {value!r}; {nearest(str(value), choices)}")
        return value
    if typing.get_origin(kind) is tuple:
        return _read_tuple(what, value, typing.get_args(kind))
    if kind is bool:
        if not isinstance(value, bool):
            raise SpecError(f"{what} must be true or false, not {value!r}")
        return value
    if kind in (int, float):
        return _read_number(what, value, kind)
    if not isinstance(value, str):
        raise SpecError(f"{what} must be text, not {value!r}")
    return value


def _read_number(what: str, value: Any, kind: type) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise SpecError(f"{what} must be a number, not {value!r}")
    if kind is int:
        return read_size(str(value), what)
    try:
        number = float(value)  # YAML reads 1e-4, which has no point, as text
    except ValueError:
        number = float("nan")
    if not abs(number) < float("inf"):
        raise SpecError(f"{what} must be a finite number, not {value!r}")
    return number


def _read_tuple(what: str, value: Any, kinds: tuple[Any, ...]) -> tuple[Any, ...]:
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",")]
    if not isinstance(value, list | tuple):
        raise SpecError(f"{what} must be a list, not {value!r}")
    if kinds[-1] is not Ellipsis and len(value) != len(kinds):
        raise SpecError(f"{what} must be {len(kinds)} values, not {len(value)}")
    return tuple(_read_plain(what, v, kinds[0]) for v in value)


def _plain(value: Any) -> Any:
    """A copy with lists in place of tuples, for YAML."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _flat(values: Mapping[str, Any], name: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, _join(name, key)) if isinstance(value, Mapping) else {_join(name, key): value}
    return found


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else str(key)
