"""Speed and memory against named peers, side by side in one run: `longspan bench decode` and `longspan bench prefill`.

Every row is warmed up (compilation is its own column), synchronised, and the median of several runs with its quartiles.
Ratios are to the peer named in the row, never to a figure from elsewhere.
"""

from __future__ import annotations

import functools
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from longspan.apply import applied
from longspan.core.facts import facts_of, text_config
from longspan.core.method import Method, combination
from longspan.hf.compat import cache_of, with_cache
from longspan.reading.stream_decoder import StreamDecoder
from longspan.util.errors import LongspanError, SpecError

MOST_S = 10.0
LONG = 2**18
"""Prompts past this are read once by the dense peer."""


@dataclass
class Row:
    """One contender. Seconds are medians: per token when decoding, for the whole prompt in prefill."""

    name: str
    seconds: float | None = None
    quartiles: tuple[float, float] | None = None
    first_s: float | None = None
    """Seconds of the first call, with whatever it compiles."""
    peak_bytes: int | None = None
    note: str = ""


@dataclass
class Bench:
    """The rows of one run; ratios say how many times faster `rows[0]` is."""

    what: str
    unit: str
    settings: dict[str, Any]
    rows: list[Row] = field(default_factory=list)

    def ratio(self, row: Row) -> float | None:
        ours = self.rows[0].seconds
        return row.seconds / ours if row.seconds and ours else None

    def to_dict(self) -> dict[str, Any]:
        rows = [{**asdict(row), "times_slower_than_first": self.ratio(row)} for row in self.rows]
        return {"what": self.what, "unit": self.unit, "settings": self.settings, "rows": rows}


class _Clock(BaseStreamer):
    """Takes the time whenever `generate` hands over a token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    def steps(self) -> list[float]:
        """Seconds of each decode step: the first call is the prompt itself, the second ends the prefill."""
        return [b - a for a, b in zip(self.times[1:], self.times[2:], strict=False)]


def decode(
    model: PreTrainedModel,
    *,
    method: str = "streaming:sinks=4,window=2044",
    tokens: int = 64,
    on_row: Callable[[Row], None] | None = None,
) -> Bench:
    """Time per output token at a full rolling cache, beside stock transformers with as many tokens in its cache.

    tokens: how many steps each contender is timed for. Raises `SpecError` unless the method is `streaming` alone.
    """
    methods = combination(method).methods
    if len(methods) != 1 or not methods[0].fixed_step():
        raise SpecError(f'bench decode times the rolling cache: give "streaming:sinks=4,window=2044", not {method!r}')
    if tokens < 8:
        raise SpecError(f"bench decode needs at least 8 tokens for a median, not {tokens}")
    streaming = methods[0]
    context = streaming.cache_tokens(facts_of(model), LONG)
    prompt = _random_ids(model, context)
    bench = Bench("decode", "s/token", _settings(model, method=method, context=context, tokens=tokens))
    contenders: list[tuple[str, Callable[[], Row]]] = [
        (
            "longspan rolling cache, fixed step",
            lambda: _fixed_step(model, streaming, prompt, tokens, compile=_cuda(model)),
        ),
        ("longspan rolling cache, model.generate", lambda: _rolling_generate(model, streaming, prompt, tokens)),
        ("stock generate, dynamic cache", lambda: generate_row(model, prompt, tokens)),
        ("longspan none, model.generate", lambda: _none_generate(model, prompt, tokens)),
        ("window recomputed for every token", lambda: _recompute(model, prompt, max(3, tokens // 16))),
    ]
    if _cuda(model):
        contenders.insert(
            1,
            (
                "longspan rolling cache, fixed step, not compiled",
                lambda: _fixed_step(model, streaming, prompt, tokens, compile=False),
            ),
        )
        contenders.insert(
            4, ("stock generate, static cache, compiled", lambda: generate_row(model, prompt, tokens, static=True))
        )
    _run(bench, contenders, on_row)
    return bench


def prefill(
    model: PreTrainedModel,
    *,
    length: int,
    method: str = "streaming:sinks=4,window=4092",
    chunk: int = 16384,
    repeats: int = 3,
    on_row: Callable[[Row], None] | None = None,
) -> Bench:
    """Time and peak memory of reading `length` tokens: the method in chunks, beside one dense SDPA forward."""
    if length < 2 or chunk < 1 or repeats < 1:
        raise SpecError("bench prefill needs length ≥ 2, chunk ≥ 1 and repeats ≥ 1")
    ids = _random_ids(model, length)
    combination(method).resolve(facts_of(model), length)
    bench = Bench("prefill", "s", _settings(model, method=method, length=length, chunk=chunk))

    def ours(size: int) -> Callable[[], None]:
        def read() -> None:
            with applied(model, method, length=length):
                _read_in_chunks(model, ids[:, :size], chunk)

        return read

    def dense() -> None:
        with torch.inference_mode():
            model(input_ids=ids, use_cache=False, logits_to_keep=1)

    def none() -> None:
        with applied(model, "none"):
            dense()

    timed = [
        (f"longspan {method}, chunks of {chunk:,}", ours(length), ours(min(length, 3 * chunk))),
        ("stock dense SDPA, one forward", dense, None),
        ("longspan none, one forward", none, None),
    ]
    if (
        length > LONG
    ):  # the seam's own cost shows at any length; minutes of dense attention once more would show nothing new
        timed.pop()
    contenders: list[tuple[str, Callable[[], Row]]] = [
        (name, functools.partial(_timed, model, work, repeats, warm_up)) for name, work, warm_up in timed
    ]
    _run(bench, contenders, on_row)
    return bench


def _read_in_chunks(model: PreTrainedModel, ids: Tensor, chunk: int) -> None:
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        for part in ids.split(chunk, dim=1):
            cache = cache_of(model(input_ids=part, use_cache=True, logits_to_keep=1, **with_cache(model, cache)))


def _run(bench: Bench, contenders: list[tuple[str, Callable[[], Row]]], on_row: Callable[[Row], None] | None) -> None:
    for name, contender in contenders:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            row = contender()
            row.name = name
            if torch.cuda.is_available():
                row.peak_bytes = torch.cuda.max_memory_allocated()
        except (torch.OutOfMemoryError, MemoryError):
            row = Row(name, note="out of memory")
        bench.rows.append(row)
        if on_row:
            on_row(row)


def _timed(model: PreTrainedModel, work: Callable[[], None], repeats: int, warm_up: Callable[[], None] | None) -> Row:
    """Median seconds of `work`; runs of over MOST_S seconds are not repeated, and warm up on their first part where they can."""
    first = _seconds(model, warm_up) if warm_up else None
    times = [_seconds(model, work)]
    while len(times) < repeats + (warm_up is None) and times[-1] < MOST_S:
        times.append(_seconds(model, work))
    if warm_up is None:
        first = times[0]
        times = times[1:] or times
    return _row(times, first)


def _seconds(model: PreTrainedModel, work: Callable[[], Any]) -> float:
    _synchronize(model)
    start = time.perf_counter()
    work()
    _synchronize(model)
    return time.perf_counter() - start


def _row(times: list[float], first: float | None) -> Row:
    low, high = (
        (statistics.quantiles(times, n=4)[0], statistics.quantiles(times, n=4)[2]) if len(times) > 1 else times * 2
    )
    return Row("", statistics.median(times), (low, high), first)


def _fill(model: PreTrainedModel, prompt: Tensor) -> tuple[DynamicCache, Tensor]:
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        logits = model(input_ids=prompt, use_cache=True, logits_to_keep=1, **with_cache(model, cache)).logits
    return cache, logits[:, -1].argmax(-1, keepdim=True)


def _fixed_step(model: PreTrainedModel, method: Method, prompt: Tensor, tokens: int, *, compile: bool) -> Row:
    with applied(model, method):
        cache, ids = _fill(model, prompt)
        decoder = StreamDecoder(model, cache, compile=compile)
        first = _seconds(model, lambda: decoder.step(ids))
        times = []
        start = time.perf_counter()
        for _ in zip(range(tokens + 4), decoder.stream(decoder.ids.clone()), strict=False):
            times.append(time.perf_counter() - start)  # a user sees every token, as a streamer of `generate` does
            start = time.perf_counter()
        return _row(times[4:], first)


def _rolling_generate(model: PreTrainedModel, method: Method, prompt: Tensor, tokens: int) -> Row:
    with applied(model, method):
        return generate_row(model, prompt, tokens)


def _none_generate(model: PreTrainedModel, prompt: Tensor, tokens: int) -> Row:
    with applied(model, "none"):
        return generate_row(model, prompt, tokens)


def generate_row(model: PreTrainedModel, prompt: Tensor, tokens: int, *, static: bool = False) -> Row:
    """Steps of `model.generate`, greedy, as its streamer sees them; the second of two calls counts.

    static: with transformers' static cache, which compiles the step on CUDA. The row has no name.
    """
    settings: dict[str, Any] = {"cache_implementation": "static"} if static else {}

    def run() -> _Clock:
        clock = _Clock()
        model.generate(  # type: ignore[operator]
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=tokens + 4,
            min_new_tokens=tokens + 4,
            do_sample=False,
            streamer=clock,
            pad_token_id=0,
            **settings,
        )
        return clock

    first = _seconds(model, run)
    return _row(run().steps()[2:], first)


def _recompute(model: PreTrainedModel, prompt: Tensor, tokens: int) -> Row:
    def step() -> None:
        with torch.inference_mode():
            model(input_ids=prompt, use_cache=False, logits_to_keep=1)

    first = _seconds(model, step)
    return _row([_seconds(model, step) for _ in range(tokens)], first)


def _random_ids(model: PreTrainedModel, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    vocabulary = text_config(model.config).vocab_size
    return torch.randint(0, vocabulary, (1, length), generator=generator).to(model.device)


def _settings(model: PreTrainedModel, **settings: Any) -> dict[str, Any]:
    import transformers

    if model.training:
        raise LongspanError("bench needs the model in evaluation mode: call model.eval() first")
    name = torch.cuda.get_device_name(model.device) if _cuda(model) else "CPU"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {**settings, "dtype": str(model.dtype).removeprefix("torch."), "device": name, **versions}


def _cuda(model: PreTrainedModel) -> bool:
    return model.device.type == "cuda"


def _synchronize(model: PreTrainedModel) -> None:
    if _cuda(model):
        torch.cuda.synchronize(model.device)
