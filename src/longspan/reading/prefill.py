"""Prefill in chunks, forced and greedy decoding, with logits computed only where they are used.

A prompt is read once into a KV cache; a meter measures prefill and decoding separately.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import psutil
import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel

from longspan.core.facts import text_config
from longspan.hf.compat import cache_of, with_cache
from longspan.hf.heads import hidden_states, plain_head
from longspan.meter import Meter

ROWS = 256
"""Positions whose fp32 logits are in memory at once: 256 × vocabulary × 4 bytes."""

Logits = Callable[[Tensor, int], None]
"""Takes fp32 logits (rows, vocabulary) and the position of the first row."""


@dataclass
class Prefilled:
    """The cache after a prompt, and fp32 logits (vocabulary,) of the next token."""

    cache: Cache
    logits: Tensor


def chunk_size(model: PreTrainedModel, length: int) -> int:
    """The tokens of a prefill that pass through the model at once.

    All of them where their activations take at most an eighth of the device's memory; else as many as do together with the
    mask of every further chunk (chunk × length entries, as booleans and as numbers), rounded down to a power of two, at
    least 128. Activations are estimated as 8 hidden and 4 feed-forward widths per token. One pass is the fastest, as causal
    attention then needs no mask: 8,000 tokens of a 135M model on two CPU cores take 39 s, and 45 s in chunks of 2,048.
    """
    config = text_config(model.config)
    hidden = config.hidden_size
    width = 8 * hidden + 4 * (getattr(config, "intermediate_size", None) or 4 * hidden)
    memory, itemsize = device_memory(model.device) // 8, model.dtype.itemsize
    if length <= memory // (width * itemsize):
        return length
    most = memory // (width * itemsize + length * (1 + itemsize))
    return max(128, 2 ** (most.bit_length() - 1))


def device_memory(device: torch.device) -> int:
    """Bytes of a CUDA device's memory, or of the machine's."""
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
    """Reads `ids` into a KV cache in chunks, timed as one prefill.

    chunk: tokens that pass at once (None: `chunk_size`). cache: a new one by default; a method may replace it, so continue
    with the returned one. logits: `last`, or a function that receives the logits of every position from `first` on,
    in order, `ROWS` rows at once, so that vocabulary × length is never in memory. Logits are computed after the timed
    pass, so that a prefill costs the same in every task; only where the model's head is more than one matrix are they
    computed within it, in chunks of at most 2,048 tokens.
    """
    chunk = chunk or chunk_size(model, len(ids))
    cache = cache if cache is not None else DynamicCache(config=model.config)
    tokens = torch.tensor([list(ids)], device=model.device)
    if logits == "last":
        with meter.prefill(len(ids)):
            return _read(model, tokens, cache, chunk)
    head = plain_head(model)
    if head is None:
        with meter.prefill(len(ids)):
            return _read(model, tokens, cache, min(chunk, _most_logits(model)), logits, first)
    with hidden_states(model) as states, meter.prefill(len(ids)):
        read = _read(model, tokens, cache, chunk)
    _pass_logits(torch.cat(states, dim=1), head, 0, first, logits)
    return read


@torch.no_grad()
def forced(model: PreTrainedModel, read: Prefilled, ids: Sequence[int], meter: Meter) -> Tensor:
    """Feeds known `ids` one at a time, timed as decoding.

    Returns fp32 logits (len(ids), vocabulary) after each.
    `read` is updated to the state after them.
    """
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
    """Token ids of the greedy continuation, at most `n`, up to the first end-of-text token.

    first_logits: (vocabulary,), from the prefill. timing: decodes all `n` tokens, past an end-of-text token too, and times
    their n - 1 forwards as decoding.
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
    """Feeds tokens (1, T) in chunks; `use` receives the logits of positions from `first` on."""
    start = 0
    for part in tokens.split(chunk, dim=1):
        all_logits = use is not None and first < start + part.shape[1]
        kwargs = with_cache(model, cache)
        outputs = model(input_ids=part, use_cache=True, logits_to_keep=0 if all_logits else 1, **kwargs)
        cache = cache_of(outputs)
        if use is not None and all_logits:
            _pass_logits(outputs.logits, None, start, first, use)
        start += part.shape[1]
    return Prefilled(cache, outputs.logits[0, -1].float())


def _pass_logits(rows: Tensor, head: nn.Module | None, start: int, first: int, use: Logits) -> None:
    """Calls `use` with the fp32 logits of hidden states or logits (1, T, width), the first at position `start`."""
    for i in range(max(0, first - start), rows.shape[1], ROWS):
        part = rows[0, i : i + ROWS]
        use((part if head is None else head(part)).float(), start + i)


def _most_logits(model: PreTrainedModel) -> int:
    """Positions whose logits over the whole vocabulary are computed at once: at most 2,048 and about 1 GB."""
    return max(1, min(2048, 2**28 // text_config(model.config).vocab_size))


def _end_tokens(model: PreTrainedModel) -> set[int]:
    ends = model.generation_config.eos_token_id if model.generation_config else text_config(model.config).eos_token_id
    return set(ends) if isinstance(ends, list) else {ends} - {None}
