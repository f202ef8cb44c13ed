"""Reading with a model: prefill in chunks, forced and greedy decoding, logits only where they are wanted.

A prompt goes through once with a KV cache, and a meter sees prefill and decoding apart.
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
"""Positions whose logits are held in fp32 at once: 256 × vocabulary × 4 bytes."""


Logits = Callable[[Tensor, int], None]
"""Takes fp32 logits (rows, vocabulary) and the position of the first row."""


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
    head = plain_head(model)
    if head is None:
        with meter.prefill(len(ids)):
            return _read(model, tokens, cache, min(chunk, _most_logits(model)), logits, first)
    with hidden_states(model) as states, meter.prefill(len(ids)):
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


def _most_logits(model: PreTrainedModel) -> int:
    """How many positions' logits over the whole vocabulary are made at once: at most 2,048 and about 1 GB."""
    return max(1, min(2048, 2**28 // text_config(model.config).vocab_size))


def _end_tokens(model: PreTrainedModel) -> set[int]:
    ends = model.generation_config.eos_token_id if model.generation_config else text_config(model.config).eos_token_id
    return set(ends) if isinstance(ends, list) else {ends} - {None}
