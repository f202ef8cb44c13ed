"""Memory and time before the run: what a model needs for one input of a length, and which methods fit this machine.

Memory is counted from the configuration, the way a run here takes it: weights, the key-value cache, the activations of the
tokens that pass at once, the logits of one token, and the process itself. Time is operations over speed: the speeds of a
matrix product, of attention, of memory and of the smallest operation are measured on the device for under a second. All of
it is an estimate; times may be off by a factor of two. No weights are loaded.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import psutil
import torch
import torch.nn.functional as F
from transformers import PreTrainedConfig

from longspan import meter, models
from longspan.core.facts import ModelFacts, text_config
from longspan.core.method import Combination, Method, NoMethod, catalogue, combination
from longspan.reading.prefill import chunk_size
from longspan.util import environment
from longspan.util.errors import LongspanError, SpecError
from longspan.util.units import duration, size

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

LONGEST = 2**27
"""Where the search for the longest length ends, in tokens."""
REMARKS_FROM = 100
"""Columns of a terminal in which remarks stand in the table, and not under it."""
_CUDA_CONTEXT = 600 * 10**6
# Small operations (norms, rotation, activation, residuals) of a decoder layer: how many, and how often they read or write a
# hidden or a feed-forward state. Counted on a Llama layer.
_SMALL_OPS = 60
_HIDDEN_PASSES = 40
_WIDE_PASSES = 8
# What a method adds that computes attention itself over a full cache, as measured on a CPU: scores made more than once, and
# keys turned again, in fp32, for every token that is written.
_OWN_ATTENTION = 3.0
_TURNED_PASSES = 8


@dataclass(frozen=True)
class Speeds:
    """What the device reaches, measured: operations a second in products and in attention, bytes a second where one large
    tensor is made of another and where a matrix meets one vector, seconds of the smallest operation."""

    product: float
    attention: float
    copying: float
    reading: float
    operation: float


@dataclass(frozen=True)
class Needs:
    """Bytes on the device while `length` tokens are read and some more written."""

    weights: int
    cache: int
    activations: int
    process: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.activations + self.process


@dataclass(frozen=True)
class MethodPlan:
    """One method at the planned length. Where it is not `legal`, `reason` says why and there are no figures; where it is
    legal but not made for the length, `reason` says how far it reaches."""

    spec: str
    legal: bool
    reason: str = ""
    reach: int | None = None
    needs: Needs | None = None
    fits: bool = False
    prefill_s: float | None = None
    decode_s_per_token: float | None = None


@dataclass(frozen=True)
class Plan:
    """The plan for one method, and all methods beside it. Lengths in tokens, sizes in bytes, times in seconds."""

    model: str
    method: str
    length: int
    output_tokens: int
    dtype: str
    device: str
    device_name: str
    parameters: int
    window: int
    needs: Needs
    available: int
    fits: bool
    longest: int | None
    """The longest input that fits into memory; None where there is no end within reach."""
    prefill_flops: float
    prefill_s: float
    decode_s_per_token: float
    speeds: Speeds
    methods: tuple[MethodPlan, ...]

    @property
    def total_s(self) -> float:
        """Reading the input and writing the output."""
        return self.prefill_s + self.output_tokens * self.decode_s_per_token

    def to_dict(self) -> dict[str, Any]:
        """The plan for programs; every figure is an estimate."""
        return {"estimate": True, **asdict(self), "total_bytes": self.needs.total, "total_s": self.total_s}


@dataclass(frozen=True)
class _Case:
    """What the estimates are made of, but for method and length."""

    facts: ModelFacts
    config: PreTrainedConfig
    dtype: torch.dtype
    device: torch.device
    process: int
    output_tokens: int


def plan(
    model: str | Path,
    *,
    length: int,
    method: str | Method | Combination | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    output_tokens: int = 256,
) -> Plan:
    """What reading `length` tokens and writing `output_tokens` needs, with `method` (the bare model if left out) and with
    every method of the catalogue. Raises `LongspanError` for a model or a method that cannot be."""
    if length < 1 or output_tokens < 0:
        raise SpecError("plan needs length ≥ 1 and output_tokens ≥ 0")
    where = models.pick_device(device)
    kind = models.pick_dtype(dtype, where)
    facts, config = models.inspect_model(model), models.read_config(model)
    wanted = combination(method or "none").resolve(facts, length)
    case = _Case(facts, text_config(config), kind, where, _process_bytes(where), output_tokens)
    free = available(where)
    speeds = measure(where, kind, case.config)
    needs = needed(case, wanted, length)
    prefill, decode = seconds(case, wanted, length, speeds)
    return Plan(
        model=str(model),
        method=wanted.spec,
        length=length,
        output_tokens=output_tokens,
        dtype=str(kind).removeprefix("torch."),
        device=str(where),
        device_name=environment.machine(where)["device_name"],
        parameters=facts.parameters,
        window=facts.window,
        needs=needs,
        available=free,
        fits=needs.total <= free,
        longest=longest(case, wanted, free),
        prefill_flops=prefill_flops(case, wanted, length),
        prefill_s=prefill,
        decode_s_per_token=decode,
        speeds=speeds,
        methods=tuple(_row(case, cls, length, free, speeds) for cls in _in_order()),
    )


def _in_order() -> list[type[Method]]:
    """The catalogue, the bare model first."""
    known = (cls for cls in catalogue().values() if NoMethod.works_on in cls.works_on)
    return sorted(known, key=lambda cls: cls is not NoMethod)


def _row(case: _Case, cls: type[Method], length: int, free: int, speeds: Speeds) -> MethodPlan:
    try:
        method = Combination((cls(),)).resolve(case.facts, length)
    except LongspanError as error:
        return MethodPlan(cls.name, legal=False, reason=str(error).removeprefix(f"{cls.name}: "))
    except TypeError:  # a setting has no default
        reason = "it needs settings that do not follow from the length: name it with them"
        return MethodPlan(cls.name, legal=False, reason=reason)
    needs, reach = needed(case, method, length), method.reach(case.facts)
    prefill, decode = seconds(case, method, length, speeds)
    reason = f"made for up to {reach:,} tokens" if reach is not None and reach < length else ""
    return MethodPlan(method.spec, True, reason, reach, needs, needs.total <= free, prefill, decode)


# Memory


def available(device: torch.device) -> int:
    """Bytes that a run could take: what is free, and on the CPU what this process holds as well, since a run holds it too."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    free = psutil.virtual_memory().available + psutil.Process().memory_info().rss
    return min(free, environment.machine(device)["device_memory"])


def _process_bytes(device: torch.device) -> int:
    """What a process holds before any model: its libraries, or the context on the device."""
    return _CUDA_CONTEXT if device.type == "cuda" else psutil.Process().memory_info().rss


def needed(case: _Case, wanted: Combination, length: int) -> Needs:
    """Memory for one input of `length` tokens. A layer whose cache grows holds the old and the new one for a moment."""
    facts = case.facts
    per_token = facts.cache_bytes_per_token(case.dtype)
    cache = per_token * _kept(facts, wanted, length + case.output_tokens)
    at_once = _at_once(case, length)
    width = 8 * facts.hidden + 4 * _feed_forward(case.config)
    activations = at_once * width * case.dtype.itemsize + cache // facts.layers + facts.vocab * 4
    # Chunks after the first attend with a mask, as booleans and as numbers.
    activations += min(at_once, length - at_once) * _kept(facts, wanted, length) * (1 + case.dtype.itemsize)
    weights = (facts.parameters + wanted.added_parameters(facts)) * case.dtype.itemsize
    return Needs(weights, cache, activations, case.process)


def _kept(facts: ModelFacts, wanted: Combination, length: int) -> int:
    """Tokens in the cache after `length` tokens."""
    kept = min((m.cache_tokens(facts, length) for m in wanted.methods), default=length)
    if facts.sliding_window and "full_attention" not in facts.layer_types:
        kept = min(kept, facts.sliding_window)
    return kept


def _at_once(case: _Case, length: int) -> int:
    """Tokens that pass through the model together."""
    model: Any = SimpleNamespace(config=case.config, device=case.device, dtype=case.dtype)
    return min(length, chunk_size(model, length))


def _feed_forward(config: PreTrainedConfig) -> int:
    return getattr(config, "intermediate_size", None) or 4 * config.hidden_size


def longest(case: _Case, wanted: Combination, free: int) -> int | None:
    """The longest input that fits into `free` bytes; 0 where not even one token does, None where the end is out of sight."""
    if needed(case, wanted, LONGEST).total <= free:
        return None
    low, high = 0, LONGEST
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if needed(case, wanted, middle).total <= free else (low, middle)
    return low


# Time


def prefill_flops(case: _Case, wanted: Combination, length: int) -> float:
    """Operations of reading `length` tokens: two for each weight that multiplies and token, and four per head, channel and
    pair of a query and a key that it sees. Embeddings are looked up, and the last token alone gets logits."""
    return _product_flops(case, length) + _attention_flops(case, wanted, length)


def _product_flops(case: _Case, length: int) -> float:
    facts = case.facts
    table = facts.vocab * facts.hidden
    tables = table if getattr(case.config, "tie_word_embeddings", False) else 2 * table
    return 2.0 * (facts.parameters - tables) * length + 2.0 * table


def _attention_flops(case: _Case, wanted: Combination, length: int) -> float:
    facts = case.facts
    seen = min(_kept(facts, wanted, length), length, *(m.keys_seen(facts, length) for m in wanted.methods))
    pairs = seen * (seen + 1) / 2 + (length - seen) * seen
    return 4.0 * facts.layers * facts.heads * facts.head_dim * pairs


def seconds(case: _Case, wanted: Combination, length: int, speeds: Speeds) -> tuple[float, float]:
    """Seconds to read `length` tokens, and to write each token after them."""
    facts, size = case.facts, case.dtype.itemsize
    states = (_HIDDEN_PASSES * facts.hidden + _WIDE_PASSES * _feed_forward(case.config)) * size * facts.layers
    calls = facts.layers * _SMALL_OPS * speeds.operation
    cache = facts.cache_bytes_per_token(case.dtype) * _kept(facts, wanted, length)
    turns = _turns_all_keys(facts, wanted, length)
    attention = _attention_flops(case, wanted, length) / speeds.attention * (_OWN_ATTENTION if turns else 1)
    read = _product_flops(case, length) / speeds.product + attention + length * states / speeds.copying + calls
    write = (facts.parameters * size + cache) / speeds.reading + calls
    return read, write + (_TURNED_PASSES * cache * 4 / size / speeds.copying if turns else 0)


def _turns_all_keys(facts: ModelFacts, wanted: Combination, length: int) -> bool:
    """True for a method with an attention of its own that keeps every key and may see it."""
    own = any("attention" in m.slots and "span" not in m.slots for m in wanted.methods)
    return own and all(m.cache_tokens(facts, length) >= length for m in wanted.methods)


def measure(device: torch.device, dtype: torch.dtype, config: PreTrainedConfig) -> Speeds:
    """Takes the device's speeds, in about half a second, on shapes of the model."""
    hidden, wide = config.hidden_size, _feed_forward(config)
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or hidden // heads
    tokens = 512 if device.type == "cpu" else 4096
    states, weight = _filled((tokens, hidden), device, dtype), _filled((hidden, wide), device, dtype)
    query = _filled((1, heads, 2 * tokens, width), device, dtype)
    block, number = _filled((2**24,), device, dtype), _filled((1,), device, dtype)
    matrices = _filled((max(1, 2**24 // (hidden * wide)), wide, hidden), device, dtype)
    product = _time(device, lambda: states @ weight)
    attention = _time(device, lambda: F.scaled_dot_product_attention(query, query, query, is_causal=True))
    return Speeds(
        product=2.0 * tokens * hidden * wide / product,
        attention=2.0 * heads * width * (2 * tokens) ** 2 / attention,
        copying=2.0 * block.nbytes / _time(device, lambda: block + 1),
        reading=matrices.nbytes / _time(device, lambda: [F.linear(states[:1], m) for m in matrices]),
        operation=_time(device, lambda: [number + 1 for _ in range(100)]) / 100,
    )


def _filled(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return torch.full(shape, 0.01, device=device, dtype=dtype)


def _time(device: torch.device, work: Callable[[], Any], budget: float = 0.12) -> float:
    """Median seconds of `work`, called as often as `budget` seconds allow, after one call that is not counted."""
    times: list[float] = []
    work()
    meter.synchronise(device)
    while len(times) < 3 or sum(times) < budget:
        start = time.perf_counter()
        work()
        meter.synchronise(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


# For people


def terminal(made: Plan, console: Console | None = None) -> None:
    """Prints the plan: what it needs, how long it takes, and the methods beside each other."""
    from rich.console import Console
    from rich.text import Text

    console = console or Console(width=None if sys.stdout.isatty() else 160)
    verdict = "fits" if made.fits else "does not fit"
    console.print(
        Text.assemble(
            f"{made.model} with {made.method}, {made.length:,} tokens in and {made.output_tokens:,} out: ",
            (verdict, "bold green" if made.fits else "bold red"),
            f" on {made.device_name} ({made.device}, {made.dtype}). All figures are estimates.",
        )
    )
    needs, at_most = made.needs, f"{LONGEST:,} tokens and more"
    console.print(
        f"memory   {size(needs.total)} of {size(made.available)}: weights {size(needs.weights)}, cache {size(needs.cache)}, "
        f"activations {size(needs.activations)}, process {size(needs.process)}"
    )
    console.print(
        f"time     reading {duration(made.prefill_s)} ({made.prefill_flops / 1e12:,.3g} TFLOP), "
        f"writing {duration(made.decode_s_per_token)} a token, {duration(made.total_s)} in all"
    )
    console.print(
        f"longest  {at_most if made.longest is None else f'{made.longest:,} tokens'} fit into memory; the model's own window "
        f"is {made.window:,}"
    )
    beside = console.width >= REMARKS_FROM
    console.print(_table(made, beside))
    for row in () if beside else made.methods:
        if remark := _remark(row):
            console.print(Text(f"{row.spec}: {remark}"))


def _remark(row: MethodPlan) -> str:
    return row.reason if row.legal else f"not here: {row.reason}"


def _table(made: Plan, remarks: bool) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table("method", "cache", "memory", "fits", "reading", "writing a token", *(["remark"] if remarks else []))
    for column in table.columns:
        column.overflow, column.no_wrap = "fold", column.header in ("cache", "memory", "fits", "reading")
    for row in made.methods:
        figures = [""] * 5
        if row.needs and row.prefill_s is not None and row.decode_s_per_token is not None:
            times = duration(row.prefill_s), duration(row.decode_s_per_token)
            figures = [size(row.needs.cache), size(row.needs.total), "yes" if row.fits else "no", *times]
        table.add_row(Text(row.spec), *figures, *([Text(_remark(row))] if remarks else []))
    return table
