"""A task is a benchmark: what it asks, how it is scored, and nothing of the method that is measured.

    ppl                       one task with its usual settings
    passkey:protocol=pi,depths=32,trials=10

A task is a frozen dataclass of its settings, written like a method. `samples` draws the inputs, which depend on the
tokenizer, the length, the count and the seed alone, so that all methods read the same tokens; `run` puts one of them
through a model. Subclassing `Task` with a `name` is all the registration there is.

The functions below `Task` are how tasks read with a model: the prompt goes through once with a cache, logits are only
made where they are wanted, and the meter sees prefill and decoding apart.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import itertools
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import psutil
import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from longspan.core.facts import text_config
from longspan.core.method import _format, read_settings
from longspan.hf.compat import cache_of, with_cache
from longspan.util.errors import LongspanError, SpecError, nearest

if TYPE_CHECKING:
    from longspan.compare.cost import Meter

ROWS = 256
"""Positions whose logits are held in fp32 at once: 256 × vocabulary × 4 bytes."""

Logits = Callable[[Tensor, int], None]
"""Takes fp32 logits (rows, vocabulary) and the position of the first row."""

_REGISTRY: dict[str, type[Task]] = {}


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
class Task(ABC):
    """Base of every task. Class variables describe it; dataclass fields are its settings."""

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

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if name := cls.__dict__.get("name"):
            other = _REGISTRY.get(name)
            if other and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
                raise TypeError(f"two tasks are named {name!r}: {other.__module__} and {cls.__module__}")
            _REGISTRY[name] = cls

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
            f"{f.name}={_format(value)}"
            for f in dataclasses.fields(self)
            if (value := getattr(self, f.name)) != f.default
        ]
        return self.name + (":" + ",".join(settings) if settings else "")


def task_catalogue() -> dict[str, type[Task]]:
    """Every task by name: the files of this folder, subclasses defined elsewhere, and packages that name themselves in
    the entry-point group `longspan.tasks`."""
    package = importlib.import_module("longspan.tasks")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"longspan.tasks.{module.name}")
    for entry in entry_points(group="longspan.tasks"):
        entry.load()
    return dict(sorted(_REGISTRY.items()))


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


# Tokens


def encode_all(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, add_special_tokens: bool = False
) -> list[list[int]]:
    """Ids of each text. What looks like a special token in a text (`<s>`, `<pad>`) is text: those of a tokenizer are set by
    whoever asks the model, not by what it reads.

    add_special_tokens: begun and ended as the tokenizer begins and ends a text.
    """
    settings: dict[str, Any] = {"split_special_tokens": True}
    if (
        type(tokenizer).__name__ == "MistralCommonBackend"
    ):  # never takes text for a special token, and refuses the setting
        settings = {}
    batch = tokenizer(
        list(texts), add_special_tokens=add_special_tokens, return_attention_mask=False, verbose=False, **settings
    )
    return [list(ids) for ids in batch["input_ids"]]


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of `text` alone, without special tokens; see `encode_all`."""
    return encode_all(tokenizer, [text])[0]


def bos_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that this tokenizer begins every text with, or None where it begins with none."""
    first = list(tokenizer("a")["input_ids"])[:1]
    return tokenizer.bos_token_id if tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id] else None


def with_bos(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """`ids` with exactly one BOS before them where the tokenizer uses one. Raises `LongspanError` for a double one, which
    changes what a model says and comes from a chat template that writes BOS into a text that already has it."""
    bos = bos_id(tokenizer)
    if bos is None:
        return ids
    if ids[:2] == [bos, bos]:
        raise LongspanError(
            f"the prompt begins with {tokenizer.bos_token!r} twice; check the tokenizer's chat template"
        )
    return ids if ids[:1] == [bos] else [bos, *ids]


def check_fits(samples: list[Sample], length: int) -> list[Sample]:
    """The samples, none of them longer than `length` tokens; nothing is ever cut."""
    for sample in samples:
        if len(sample.tokens) > length:
            raise LongspanError(f"sample {sample.id} has {len(sample.tokens):,} tokens and should fit into {length:,}")
    return samples


# Reading with a model


@dataclass
class Prefilled:
    """A model that has read a prompt: the cache that it goes on with, and fp32 logits (vocabulary,) of the next token."""

    cache: Cache
    logits: Tensor


def chunk_size(model: PreTrainedModel, length: int) -> int:
    """How many of `length` tokens go through the model at once: all of them where their activations take at most an
    eighth of the device's memory, else as many as do together with the mask that every further chunk needs (chunk × length
    entries, as booleans and as numbers), rounded down to a power of two.

    One pass is the fastest, as causal attention then needs no mask: 8,000 tokens of a 135M model on two CPU cores take
    39 s, and 45 s in chunks of 2,048 or 1,024. Activations are put at 8 hidden and 4 feed-forward widths a token.
    """
    config = text_config(model.config)
    hidden = config.hidden_size
    width = 8 * hidden + 4 * (getattr(config, "intermediate_size", None) or 4 * hidden)
    memory, itemsize = _device_memory(model.device) // 8, model.dtype.itemsize
    if length <= memory // (width * itemsize):
        return length
    most = memory // (width * itemsize + length * (1 + itemsize))
    return max(128, 2 ** (most.bit_length() - 1))


def _device_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total


@torch.no_grad()
def chunked_prefill(
    model: PreTrainedModel,
    ids: Sequence[int],
    *,
    meter: Meter,
    chunk: int | None = None,
    cache: Cache | None = None,
    logits: Literal["last"] | Logits = "last",
    first: int = 0,
) -> Prefilled:
    """Reads `ids` into a cache, `chunk` tokens at once (None: `chunk_size`), timed as one prefill.

    cache: an empty one by default; a method may put its own in its place, so go on with the one that comes back.
    logits: a function is handed the logits of every position from `first` on, in order, `ROWS` rows at once: vocabulary
    × length is never held. They are made after the timed pass, so that a prefill costs the same in every task; only
    where the model does more to logits than its output matrix are they made within it, in chunks of at most 2,048.
    """
    chunk = chunk or chunk_size(model, len(ids))
    cache = cache if cache is not None else DynamicCache(config=model.config)
    tokens = torch.tensor([list(ids)], device=model.device)
    if logits == "last":
        with meter.prefill(len(ids)):
            return _read(model, tokens, cache, chunk)
    head = _plain_head(model)
    if head is None:
        with meter.prefill(len(ids)):
            return _read(model, tokens, cache, min(chunk, _most_logits(model)), logits, first)
    with _hidden_states(model) as states, meter.prefill(len(ids)):
        read = _read(model, tokens, cache, chunk)
    _hand_over(torch.cat(states, dim=1), head, 0, first, logits)
    return read


@torch.no_grad()
def forced(model: PreTrainedModel, read: Prefilled, ids: Sequence[int], meter: Meter) -> Tensor:
    """Feeds known `ids` one at a time, timed as decoding; fp32 logits (len(ids), vocabulary) after each of them. `read` is
    then what the model has read with them."""
    tokens = torch.tensor([list(ids)], device=model.device)
    rows = []
    with meter.decode(len(ids)):
        for token in tokens.split(1, dim=1):
            after = _read(model, token, read.cache)
            read.cache, read.logits = after.cache, after.logits
            rows.append(after.logits)
    meter.cache(read.cache)
    return torch.stack(rows)


@torch.no_grad()
def greedy(
    model: PreTrainedModel, cache: Cache, first_logits: Tensor, n: int, meter: Meter, *, timing: bool = False
) -> list[int]:
    """The likeliest continuation, at most `n` tokens, ended before the first end-of-text token.

    first_logits: (vocabulary,), from the prefill. timing: makes all `n` tokens whatever they are, and times the n - 1
    forwards of it as decoding; what comes after an end-of-text token is still left out of the answer.
    """
    ends = _end_tokens(model)
    tokens = [first_logits.argmax().view(1, 1)]
    with meter.decode(n - 1) if timing else contextlib.nullcontext():
        while len(tokens) < n and (timing or int(tokens[-1]) not in ends):
            read = _read(model, tokens[-1], cache)
            cache = read.cache
            tokens.append(read.logits.argmax().view(1, 1))
    meter.cache(cache)
    return list(itertools.takewhile(lambda t: t not in ends, map(int, tokens)))


def _read(
    model: PreTrainedModel,
    tokens: Tensor,
    cache: Cache,
    chunk: int = 1,
    use: Logits | None = None,
    first: int = 0,
) -> Prefilled:
    """Feeds tokens (1, T) in chunks; `use` gets the logits of positions from `first` on."""
    start = 0
    for part in tokens.split(chunk, dim=1):
        wanted = use is not None and first < start + part.shape[1]
        given = with_cache(model, cache)
        outputs = model(input_ids=part, use_cache=True, logits_to_keep=0 if wanted else 1, **given)
        cache = cache_of(outputs)
        if use is not None and wanted:
            _hand_over(outputs.logits, None, start, first, use)
        start += part.shape[1]
    return Prefilled(cache, outputs.logits[0, -1].float())


def _hand_over(rows: Tensor, head: nn.Module | None, start: int, first: int, use: Logits) -> None:
    """Gives `use` the fp32 logits of rows (1, T, width), the first of which is at position `start`."""
    for i in range(max(0, first - start), rows.shape[1], ROWS):
        part = rows[0, i : i + ROWS]
        use((part if head is None else head(part)).float(), start + i)


@contextlib.contextmanager
def _hidden_states(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Collects what the decoder hands to the output matrix in each forward, (1, T, hidden)."""
    states: list[Tensor] = []
    handle = model.get_decoder().register_forward_hook(lambda module, args, output: states.append(output[0]))
    try:
        yield states
    finally:
        handle.remove()


def _plain_head(model: PreTrainedModel) -> nn.Module | None:
    """The output matrix, where logits are its product with the decoder's last state and nothing else: no cap, no scale
    (Gemma 2, Granite and Cohere have those). Found by trying, bit for bit."""
    head = model.get_output_embeddings()
    if head is None or model.base_model is model:
        return None
    probe = (torch.arange(8, device=model.device) * 7919 + 17)[None] % text_config(model.config).vocab_size
    with _hidden_states(model) as states:
        logits = model(input_ids=probe, use_cache=False, logits_to_keep=1).logits
    plain = torch.equal(head(states[0][:, -1:]).to(logits), logits) and bool(logits.any())
    return head if plain else None  # all-zero logits, as of a padding token, would prove nothing


def _most_logits(model: PreTrainedModel) -> int:
    """How many positions' logits over the whole vocabulary are made at once: at most 2,048 and about 1 GB."""
    return max(1, min(2048, 2**28 // text_config(model.config).vocab_size))


def _end_tokens(model: PreTrainedModel) -> set[int]:
    ends = model.generation_config.eos_token_id if model.generation_config else text_config(model.config).eos_token_id
    return set(ends) if isinstance(ends, list) else {ends} - {None}
