"""Forecasts from a model's shape alone: operations, bytes, and the speed that a device reaches."""

from __future__ import annotations

import time
from typing import Any

import torch

from longspan.core.facts import ModelFacts


def prefill_flops(facts: ModelFacts, length: int) -> float:
    """Floating point operations of a prefill of `length` tokens with dense causal attention.

    2 for each parameter and token, and 2·d for each layer, head and pair of tokens (half of the square, two products).
    """
    return 2.0 * facts.parameters * length + 2.0 * facts.layers * facts.heads * facts.head_dim * float(length) ** 2


def memory_needed(facts: ModelFacts, length: int, dtype: torch.dtype) -> int:
    """Bytes that one input of `length` tokens takes with a full KV cache, roughly.

    Weights, the cache twice (it is copied as it grows), fp32 logits of a chunk of 1,024 tokens, and 1 GiB for libraries.
    """
    weights = facts.parameters * dtype.itemsize
    cache = facts.cache_bytes_per_token(dtype) * length
    logits = min(length, 1024) * facts.vocab * 4
    return weights + 2 * cache + logits + 2**30


def speed(device: torch.device, dtype: torch.dtype) -> float:
    """Floating point operations a second that a model can be expected to reach, roughly.

    On the CPU it is measured by a matrix product; on CUDA it follows from the number of multiprocessors, so that this
    process takes no memory there.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count * (1e12 if dtype.itemsize == 2 else 1e11)
    size = 768
    a = torch.ones(size, size, dtype=dtype)
    times = []
    for _ in range(8):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return 0.6 * 2 * size**3 / min(times)  # the best, since other programs only ever slow it down


def card(facts: ModelFacts, dtype: torch.dtype) -> dict[str, Any]:
    """The model's parameters, bytes of weights, and KV cache bytes per token."""
    return {
        "parameters": facts.parameters,
        "weights_bytes": facts.parameters * dtype.itemsize,
        "cache_bytes_per_token": facts.cache_bytes_per_token(dtype),
    }
