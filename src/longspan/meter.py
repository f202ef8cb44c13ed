"""Time and memory of prefill and of decoding, with weights, KV cache and peak as separate figures.

The device is synchronised before and after a timed phase. The peak is reset at the start of each phase: on CUDA it is the most
that the allocator held, on a CPU the largest resident set of the process, interpreter and libraries included (Linux can reset it;
elsewhere it is the peak since the process began). Repeats give the median and the quartiles.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from longspan.core.facts import ModelFacts


@dataclass
class _Phase:
    """Repeats of one phase: seconds and tokens of each, and the highest peak of all, in bytes."""

    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    peak: int | None = None


class Meter:
    """Measures the phases that a task marks.

    `tokens` is the number of tokens of all phases so far.
    """

    def __init__(self, device: torch.device | str, model: nn.Module | None = None):
        self.device = torch.device(device)
        self.tokens = 0
        self._prefill, self._decode = _Phase(), _Phase()
        self._cache: int | None = None
        self._weights = weights_bytes(model) if model is not None else None

    def prefill(self, tokens: int) -> contextlib.AbstractContextManager[None]:
        """A context that is measured as the prefill of `tokens` tokens."""
        return self._timed(self._prefill, tokens)

    def decode(self, tokens: int) -> contextlib.AbstractContextManager[None]:
        """A context that is measured as the decoding of `tokens` tokens, one after another."""
        return self._timed(self._decode, tokens)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A context whose prefills count as one, of all their tokens: a stream that is read turn by turn."""
        phase = self._prefill
        before = len(phase.seconds)
        yield
        if len(phase.seconds) > before:
            phase.seconds[before:] = [sum(phase.seconds[before:])]
            phase.tokens[before:] = [sum(phase.tokens[before:])]

    def cache(self, past: Any) -> None:
        """Measures the size of a KV cache; `report` has the largest."""
        self._cache = max(self._cache or 0, cache_bytes(past))

    def report(self) -> dict[str, Any]:
        """Seconds, tokens and bytes by name; None where a figure was not measured.

        Times are medians over the repeats; the `_quartiles` beside them are None for fewer than four repeats.
        """
        per_token = [s / n for s, n in zip(self._decode.seconds, self._decode.tokens, strict=True) if n]
        return {
            "prefill_s": _median(self._prefill.seconds),
            "prefill_s_quartiles": _quartiles(self._prefill.seconds),
            "prefill_tokens": _median(self._prefill.tokens),
            "prefill_repeats": len(self._prefill.seconds),
            "decode_s_per_token": _median(per_token),
            "decode_s_per_token_quartiles": _quartiles(per_token),
            "decode_repeats": len(per_token),
            "peak_prefill_bytes": self._prefill.peak,
            "peak_decode_bytes": self._decode.peak,
            "weights_bytes": self._weights,
            "cache_bytes": self._cache,
        }

    @contextlib.contextmanager
    def _timed(self, phase: _Phase, tokens: int) -> Iterator[None]:
        synchronise(self.device)
        reset_peak(self.device)
        start = time.perf_counter()
        yield  # a phase that raises is not counted
        synchronise(self.device)
        seconds = time.perf_counter() - start
        peak = read_peak(self.device)
        phase.seconds.append(seconds)
        phase.tokens.append(int(tokens))
        phase.peak = peak if phase.peak is None else max(phase.peak, peak or 0)
        self.tokens += int(tokens)


def _median(values: list) -> Any:
    return statistics.median(values) if values else None


def _quartiles(values: list[float]) -> list[float] | None:
    if len(values) < 4:
        return None
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return [first, third]


def synchronise(device: torch.device) -> None:
    """Waits until the device has finished all work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def reset_peak(device: torch.device) -> None:
    """Resets the peak of memory to what is in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif device.type == "cpu":
        # fails where /proc is read-only or missing: the peak is then the one since the process began
        with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
            file.write("5")


def read_peak(device: torch.device) -> int | None:
    """The peak of memory in bytes since `reset_peak`; None on devices other than CUDA and CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type != "cpu":
        return None
    with contextlib.suppress(OSError), open("/proc/self/status") as file:
        for line in file:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def weights_bytes(model: nn.Module) -> int:
    """Bytes of the parameters; tied weights count once."""
    return _storage_bytes(model.parameters())


def cache_bytes(past: Any) -> int:
    """Bytes of the distinct storages in a KV cache; a view counts as the whole storage that it keeps alive."""
    found: list[Tensor] = []
    _collect(past, found, set())
    return _storage_bytes(found)


def _storage_bytes(tensors: Any) -> int:
    storages = [t.untyped_storage() for t in tensors if t.device.type != "meta"]
    return sum({(s.device, s.data_ptr()): s.nbytes() for s in storages}.values())


def _collect(value: Any, found: list[Tensor], visited: set[int]) -> None:
    """Appends to `found` the tensors within an object, through lists, dicts and attributes, but not through modules."""
    if id(value) in visited:
        return
    visited.add(id(value))
    if isinstance(value, Tensor):
        found.append(value)
    elif isinstance(value, dict):
        for part in value.values():
            _collect(part, found, visited)
    elif isinstance(value, list | tuple | set):
        for part in value:
            _collect(part, found, visited)
    elif hasattr(value, "__dict__") and not isinstance(value, _NOT_CACHE):
        _collect(vars(value), found, visited)


_NOT_CACHE = (nn.Module, PreTrainedConfig, ModelFacts, type, ModuleType, FunctionType, MethodType)
