"""Memory and time before a run, for one input and every method.

Memory is computed from the configuration, as a run of this package uses it: weights, KV cache, activations of the tokens
that pass at once, logits of one token, and the process itself. Time is operations divided by speed: the speeds of a matrix
product, of attention, of memory and of the smallest operation are measured on the device, in less than a second. All figures
are estimates; times may be wrong by a factor of two. No weights are loaded.
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
"""Tokens at which the search for the longest input stops."""
REMARKS_FROM = 100
"""Columns of a terminal from which remarks are a column of the table, not lines below it."""
_CUDA_CONTEXT = 600 * 10**6
# Small operations (norms, rotation, activation, residuals) of a decoder layer, counted on Llama: their number, and how often
# they read or write a hidden or a feed-forward state.
_SMALL_OPS = 60
_HIDDEN_PASSES = 40
_WIDE_PASSES = 8
# Factors for a method that computes attention itself over a full cache, measured on a CPU: scores are computed more than
# once, and keys are rotated again, in fp32, for every token that is written.
_OWN_ATTENTION = 3.0
_ROTATION_PASSES = 8


@dataclass(frozen=True)
class Speeds:
    """Measured speeds of a device.

    product, attention: floating point operations a second. copying, reading: bytes a second where one large tensor is
    computed from another, and where a matrix multiplies one vector. operation: seconds of the smallest operation.
    """

    product: float
    attention: float
    copying: float
    reading: float
    operation: float


@dataclass(frozen=True)
class Needs:
    """Bytes on the device while an input is read and an output written."""

    weights: int
    cache: int
    activations: int
    process: int

    @property
    def total(self) -> int:
        """The sum of all parts, in bytes."""
        return self.weights + self.cache + self.activations + self.process


@dataclass(frozen=True)
class MethodPlan:
    """One method at the planned length.

    reason: why a method that is not `legal` on the model is refused, without figures; or how far a legal one reaches where
    that is less than the length.
    """

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
    """The plan for one method, with all methods for comparison.

    Lengths in tokens, sizes in bytes, times in seconds.
    """

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
    """The longest input that fits into memory; None from `LONGEST` tokens on."""
    prefill_flops: float
    prefill_s: float
    decode_s_per_token: float
    speeds: Speeds
    methods: tuple[MethodPlan, ...]

    @property
    def total_s(self) -> float:
        """Seconds to read the input and write the output."""
        return self.prefill_s + self.output_tokens * self.decode_s_per_token

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON data; every figure is an estimate."""
        return {"estimate": True, **asdict(self), "total_bytes": self.needs.total, "total_s": self.total_s}


@dataclass(frozen=True)
class _Case:
    """The inputs of every estimate, except method and length."""

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
    """Memory and time to read and write so many tokens, with every method.

    method: the bare model if left out. Raises `LongspanError` for a model that cannot be read, or a method that it cannot
    take.
    """
    if length < 1 or output_tokens < 0:
        raise SpecError("plan needs length ≥ 1 and output_tokens ≥ 0")
    where = models.pick_device(device)
    kind = models.pick_dtype(dtype, where)
    facts, config = models.inspect_model(model), models.read_config(model)
    applied = combination(method or "none").resolve(facts, length)
    case = _Case(facts, text_config(config), kind, where, _process_bytes(where), output_tokens)
    free = available(where)
    speeds = measure(where, kind, case.config)
    needs = needed(case, applied, length)
    prefill, decode = seconds(case, applied, length, speeds)
    return Plan(
        model=str(model),
        method=applied.spec,
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
        longest=longest(case, applied, free),
        prefill_flops=prefill_flops(case, applied, length),
        prefill_s=prefill,
        decode_s_per_token=decode,
        speeds=speeds,
        methods=tuple(_row(case, cls, length, free, speeds) for cls in _in_order()),
    )


def _in_order() -> list[type[Method]]:
    """The catalogue's methods for trained decoders, the bare model first."""
    known = (cls for cls in catalogue().values() if NoMethod.works_on in cls.works_on)
    return sorted(known, key=lambda cls: cls is not NoMethod)


def _row(case: _Case, cls: type[Method], length: int, free: int, speeds: Speeds) -> MethodPlan:
    try:
        applied = Combination((cls(),)).resolve(case.facts, length)
    except LongspanError as error:
        return MethodPlan(cls.name, legal=False, reason=str(error).removeprefix(f"{cls.name}: "))
    except TypeError:  # a setting has no default
        reason = "it needs settings that do not follow from the length: name it with them"
        return MethodPlan(cls.name, legal=False, reason=reason)
    needs, reach = needed(case, applied, length), applied.reach(case.facts)
    prefill, decode = seconds(case, applied, length, speeds)
    reason = f"made for up to {reach:,} tokens" if reach is not None and reach < length else ""
    return MethodPlan(applied.spec, True, reason, reach, needs, needs.total <= free, prefill, decode)


# Memory


def available(device: torch.device) -> int:
    """Bytes that a run could use: free memory, on the CPU with this process's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    free = psutil.virtual_memory().available + psutil.Process().memory_info().rss
    return min(free, environment.machine(device)["device_memory"])


def _process_bytes(device: torch.device) -> int:
    """Bytes of a process before any model: its libraries, or the context on the device."""
    return _CUDA_CONTEXT if device.type == "cuda" else psutil.Process().memory_info().rss


def needed(case: _Case, applied: Combination, length: int) -> Needs:
    """Memory for one input of `length` tokens.

    A layer whose cache grows briefly has the old and the new one.
    """
    facts = case.facts
    per_token = facts.cache_bytes_per_token(case.dtype)
    cache = per_token * cached_tokens(facts, applied, length + case.output_tokens)
    at_once = _at_once(case, length)
    width = 8 * facts.hidden + 4 * _feed_forward(case.config)
    activations = at_once * width * case.dtype.itemsize + cache // facts.layers + facts.vocab * 4
    # Chunks after the first attend with a mask, as booleans and as numbers.
    activations += min(at_once, length - at_once) * cached_tokens(facts, applied, length) * (1 + case.dtype.itemsize)
    weights = (facts.parameters + applied.added_parameters(facts)) * case.dtype.itemsize
    return Needs(weights, cache, activations, case.process)


def cached_tokens(facts: ModelFacts, applied: Combination, length: int) -> int:
    """Tokens in the KV cache after `length` tokens."""
    cached = min((m.cache_tokens(facts, length) for m in applied.methods), default=length)
    if facts.sliding_window and "full_attention" not in facts.layer_types:
        cached = min(cached, facts.sliding_window)
    return cached


def _at_once(case: _Case, length: int) -> int:
    """Tokens that pass through the model at once."""
    model: Any = SimpleNamespace(config=case.config, device=case.device, dtype=case.dtype)
    return min(length, chunk_size(model, length))


def _feed_forward(config: PreTrainedConfig) -> int:
    return getattr(config, "intermediate_size", None) or 4 * config.hidden_size


def longest(case: _Case, applied: Combination, free: int) -> int | None:
    """The longest input, in tokens, that fits into `free` bytes.

    0 for none, None from `LONGEST` on.
    """
    if needed(case, applied, LONGEST).total <= free:
        return None
    low, high = 0, LONGEST
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if needed(case, applied, middle).total <= free else (low, middle)
    return low


# Time


def prefill_flops(case: _Case, applied: Combination, length: int) -> float:
    """Floating point operations of a prefill of `length` tokens.

    Two for each token and weight of a matrix product, and four for each head, channel and pair of a query and a key under
    its mask. Embeddings are looked up, and only the last token has logits.
    """
    return product_flops(case, length) + attention_flops(case, applied, length)


def product_flops(case: _Case, length: int) -> float:
    """Floating point operations of all matrix products in a prefill of `length` tokens."""
    facts = case.facts
    table = facts.vocab * facts.hidden
    tables = table if getattr(case.config, "tie_word_embeddings", False) else 2 * table
    return 2.0 * (facts.parameters - tables) * length + 2.0 * table


def attention_flops(case: _Case, applied: Combination, length: int) -> float:
    """Floating point operations of attention in a prefill of `length` tokens."""
    facts = case.facts
    keys = min(cached_tokens(facts, applied, length), length, *(m.keys_seen(facts, length) for m in applied.methods))
    pairs = keys * (keys + 1) / 2 + (length - keys) * keys
    return 4.0 * facts.layers * facts.heads * facts.head_dim * pairs


def seconds(case: _Case, applied: Combination, length: int, speeds: Speeds) -> tuple[float, float]:
    """Seconds to read `length` tokens, and to write each token after them."""
    facts, size = case.facts, case.dtype.itemsize
    states = (_HIDDEN_PASSES * facts.hidden + _WIDE_PASSES * _feed_forward(case.config)) * size * facts.layers
    calls = facts.layers * _SMALL_OPS * speeds.operation
    cache = facts.cache_bytes_per_token(case.dtype) * cached_tokens(facts, applied, length)
    rotates = _rotates_all_keys(facts, applied, length)
    attention = attention_flops(case, applied, length) / speeds.attention * (_OWN_ATTENTION if rotates else 1)
    read = product_flops(case, length) / speeds.product + attention + length * states / speeds.copying + calls
    write = (facts.parameters * size + cache) / speeds.reading + calls
    return read, write + (_ROTATION_PASSES * cache * 4 / size / speeds.copying if rotates else 0)


def _rotates_all_keys(facts: ModelFacts, applied: Combination, length: int) -> bool:
    """True for a method that replaces attention and keeps every key in the cache."""
    replaces = any("attention" in m.slots and "span" not in m.slots for m in applied.methods)
    return replaces and all(m.cache_tokens(facts, length) >= length for m in applied.methods)


def measure(device: torch.device, dtype: torch.dtype, config: PreTrainedConfig) -> Speeds:
    """Measures the device's speeds on the model's shapes, in about half a second."""
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
    """Median seconds of `work`, over `budget` seconds and at least three calls, after one that is not counted."""
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


def terminal(plan: Plan, console: Console | None = None) -> None:
    """Prints the plan: memory, time, the longest input, and a table of all methods."""
    from rich.console import Console
    from rich.text import Text

    console = console or Console(width=None if sys.stdout.isatty() else 160)
    verdict = "fits" if plan.fits else "does not fit"
    console.print(
        Text.assemble(
            f"{plan.model} with {plan.method}, {plan.length:,} tokens in and {plan.output_tokens:,} out: ",
            (verdict, "bold green" if plan.fits else "bold red"),
            f" on {plan.device_name} ({plan.device}, {plan.dtype}). All figures are estimates.",
        )
    )
    needs, at_most = plan.needs, f"{LONGEST:,} tokens and more"
    console.print(
        f"memory   {size(needs.total)} of {size(plan.available)}: weights {size(needs.weights)}, cache {size(needs.cache)}, "
        f"activations {size(needs.activations)}, process {size(needs.process)}"
    )
    console.print(
        f"time     reading {duration(plan.prefill_s)} ({plan.prefill_flops / 1e12:,.3g} TFLOP), "
        f"writing {duration(plan.decode_s_per_token)} a token, {duration(plan.total_s)} in all"
    )
    console.print(
        f"longest  {at_most if plan.longest is None else f'{plan.longest:,} tokens'} fit into memory; the model's own window "
        f"is {plan.window:,}"
    )
    beside = console.width >= REMARKS_FROM
    console.print(_table(plan, beside))
    for row in () if beside else plan.methods:
        if remark := _remark(row):
            console.print(Text(f"{row.spec}: {remark}"))


def _remark(row: MethodPlan) -> str:
    return row.reason if row.legal else f"not here: {row.reason}"


def _table(plan: Plan, remarks: bool) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table("method", "cache", "memory", "fits", "reading", "writing a token", *(["remark"] if remarks else []))
    for column in table.columns:
        column.overflow, column.no_wrap = "fold", column.header in ("cache", "memory", "fits", "reading")
    for row in plan.methods:
        figures = [""] * 5
        if row.needs and row.prefill_s is not None and row.decode_s_per_token is not None:
            times = duration(row.prefill_s), duration(row.decode_s_per_token)
            figures = [size(row.needs.cache), size(row.needs.total), "yes" if row.fits else "no", *times]
        table.add_row(Text(row.spec), *figures, *([Text(_remark(row))] if remarks else []))
    return table
