"""The mixing of gated attention units (Hua 2022, arXiv 2202.10447): weights are the squares of positive scores.

`quadratic` is over all keys. `mixed` is FLASH: the same within chunks, and a linear product q (Σ kᵀv) with the chunks before,
or in an encoder with all. The linear part has no features and no denominator of its own, only a normaliser.

Scores, running sums and normalisers are float32 or wider; products with the values are of the values' dtype, whose
accumulators are float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from longspan.engine.biased.bias import bias_rows
from longspan.engine.core import causal_mask
from longspan.engine.slices import Slices

QUERIES_AT_ONCE = 512
"""Queries whose scores with all keys are held at once."""

Bias = Callable[[Tensor], Tensor]
"""What a score gets at a distance (query's number - key's), whole numbers of any shape."""


class Heads(NamedTuple):
    """The one head's parts, each (B, T, ·).

    Values of padding are zero, and so are its far keys.
    """

    query: Tensor
    key: Tensor
    far_query: Tensor
    far_key: Tensor
    value: Tensor

    def each(self, change: Callable[[Tensor], Tensor]) -> Heads:
        return Heads(*[change(x) for x in self])


class Memory(NamedTuple):
    """What FLASH's decoder keeps of the past.

    sums (B, s, e): Σ kᵀv over whole chunks; key, far_key (B, c, s) and value (B, c, e): the tokens of the chunk that
    is not whole yet, and after them what is never read; tokens (B,): how many in all.
    """

    sums: Tensor
    key: Tensor
    far_key: Tensor
    value: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class Rule:
    """Weights within chunks of `chunk` tokens are relu(inner·qk + bias)²·outer."""

    chunk: int
    inner: float
    outer: float
    bias: Bias


def weights(scores: Tensor, bias: Tensor, inner: Tensor | float, outer: Tensor | float) -> Tensor:
    """relu(inner·scores + bias)²·outer (Hua 2022, section 2.2)."""
    return (scores * inner + bias).relu().square() * outer


def product(query: Tensor, key: Tensor) -> Tensor:
    """Scores (…, Tq, Tk), float32 or wider."""
    wide = torch.promote_types(query.dtype, torch.float32)
    return query.to(wide) @ key.to(wide).mT


def quadratic(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    numbers: Tensor | None,
    bias: Bias,
    inner: Tensor,
    outer: Tensor,
    *,
    causal: bool,
) -> Tensor:
    """(B, Tq, e).

    The queries are the last of the keys; numbers (B or 1, Tk): the tokens' in the text, None where these run without
    a gap; inner, outer (B or 1, Tq or 1, 1). In training scores are made again in the backward pass, so that memory
    grows with the length and not with its square.
    """
    new, total = query.shape[1], key.shape[1]
    inner, outer = (x.expand(-1, new, -1) for x in (inner, outer))
    again = torch.is_grad_enabled() and new > QUERIES_AT_ONCE
    queries, keys, values = (Slices(x) for x in (query, key, value))
    blocks = []
    for start in range(0, new, QUERIES_AT_ONCE):
        rows = slice(start, min(start + QUERIES_AT_ONCE, new))
        first, last = total - new + start, total - new + rows.stop
        seen = last if causal else total
        shifts = partial(_rows_of_bias, bias, numbers, range(first, last), seen, query.device, causal=causal)
        given = queries[:, rows], keys[:, :seen], values[:, :seen], inner[:, rows], outer[:, rows], shifts
        if again:
            blocks.append(checkpoint(_some_queries, *given, use_reentrant=False, preserve_rng_state=False))
        else:
            blocks.append(_some_queries(*given))
    return torch.cat(blocks, dim=1)


def _some_queries(
    query: Tensor, key: Tensor, value: Tensor, inner: Tensor, outer: Tensor, shifts: Callable[[], Tensor]
) -> Tensor:
    made = weights(product(query, key), shifts(), inner, outer)
    return made.to(value.dtype) @ value


def _rows_of_bias(
    bias: Bias, numbers: Tensor | None, queries: range, seen: int, device: torch.device, *, causal: bool
) -> Tensor:
    """(B or 1, queries, seen), from the bias at every distance once; -inf, which weighs 0, for keys after a query."""
    if numbers is None:
        return bias_rows(partial(_of_distances, bias, causal=causal), queries, range(seen), device)[None]
    distance = numbers[:, queries.start : queries.stop, None] - numbers[:, None, :seen]
    low, high = int(distance.min()), int(distance.max())
    line = bias(torch.arange(low, high + 1, device=device))
    rows = F.embedding(distance - low, line[:, None])[..., 0]
    return rows if not causal else rows.masked_fill(~causal_mask(len(queries), seen, device), float("-inf"))


def _of_distances(bias: Bias, distance: Tensor, *, causal: bool) -> Tensor:
    found = bias(distance)
    return found.masked_fill(distance < 0, float("-inf")) if causal else found


class Layout:
    """Where new tokens lie in a frame of whole chunks: each row's behind the `held` tokens (B,) of its unfinished chunk, and
    without its padding. real (B, T) says what is none; None for both where there is nothing of the kind."""

    def __init__(self, length: int, chunk: int, real: Tensor | None = None, held: Tensor | None = None):
        self.length, self.chunk = length, chunk
        longest = length + (0 if held is None else int(held.max()))
        self.slots = -(-longest // chunk) * chunk
        self.index: Tensor | None = None
        if held is not None or real is not None:
            number = torch.arange(length, device=(real if real is not None else held).device)[None]  # type: ignore[union-attr]
            if real is not None:
                number = (real.long().cumsum(1) - 1).masked_fill(~real, self.slots)
            self.index = (number if held is None else number + held[:, None]).clamp(max=self.slots)

    def lay(self, x: Tensor, held: Tensor | None = None) -> Tensor:
        """(B, chunks, c, ·) from x (B, T, ·) and what the unfinished chunk holds (B, c, ·)."""
        if self.index is None:
            frame = F.pad(x, (0, 0, 0, self.slots - self.length))
        else:
            frame = x.new_zeros(len(x), self.slots + 1, x.shape[2])  # the last slot takes padding
            if held is not None:
                frame = torch.cat((held, frame[:, self.chunk :]), dim=1)
            frame = frame.scatter(1, self.index[..., None].expand_as(x), x)[:, : self.slots]
        return frame.unflatten(1, (-1, self.chunk))

    def take(self, frame: Tensor) -> Tensor:
        """(B, T, ·) from (B, chunks, c, ·)."""
        frame = frame.flatten(1, 2)
        if self.index is None:
            return frame[:, : self.length]
        index = self.index.clamp(max=self.slots - 1)[..., None]
        return frame.gather(1, index.expand(len(frame), -1, frame.shape[2]))


def mixed_both_ways(heads: Heads, rule: Rule, share: Tensor, real: Tensor | None) -> Tensor:
    """(B, T, e) for an encoder: V_quad + V_lin with V_lin = share·q Σ kᵀv over the whole text (Hua 2022, section 3.2). share
    (B or 1, 1, 1, 1), float32; real (B, T) or None."""
    layout = Layout(heads.value.shape[1], rule.chunk, real)
    laid = heads.each(layout.lay)
    sums = (laid.far_key.mT @ laid.value).to(share.dtype).sum(1, keepdim=True) * share
    return layout.take(_within(laid, rule, causal=False) + laid.far_query @ sums.to(heads.value.dtype))


def mixed_causal(
    heads: Heads, rule: Rule, share: Callable[[Tensor], Tensor], real: Tensor | None, memory: Memory | None
) -> tuple[Tensor, Memory]:
    """(B, T, e) for a decoder, and what it keeps.

    V_lin = share(g)·q Σ kᵀv over the g chunks before the query's own (Hua 2022, section 3.2); share takes numbers of
    chunks.
    """
    if memory is not None and heads.value.shape[1] == 1:
        return _step(heads, rule, share, real, memory)
    layout = Layout(heads.value.shape[1], rule.chunk, real, None if memory is None else memory.tokens % rule.chunk)
    if memory is None:
        laid = heads.each(layout.lay)
    else:
        parts = (None, memory.key, None, memory.far_key, memory.value)
        laid = Heads(*(layout.lay(x, held) for x, held in zip(heads, parts, strict=True)))
    wide = torch.promote_types(heads.value.dtype, torch.float32)
    sums = F.pad((laid.far_key.mT @ laid.value).to(wide).cumsum(1), (0, 0, 0, 0, 1, 0))
    done = torch.arange(sums.shape[1] - 1, device=sums.device)[None]
    if memory is not None:
        sums, done = sums + memory.sums[:, None], done + memory.tokens[:, None] // rule.chunk
    far = (sums[:, :-1] * share(done)[..., None, None]).to(heads.value.dtype)
    out = layout.take(_within(laid, rule, causal=True) + laid.far_query @ far)
    return out, _kept(laid, sums, layout, real, memory)


def _within(laid: Heads, rule: Rule, *, causal: bool) -> Tensor:
    """V_quad, (B, chunks, c, e): every chunk on itself."""
    numbers = torch.arange(rule.chunk, device=laid.value.device)
    made = weights(product(laid.query, laid.key), rule.bias(numbers[:, None] - numbers), rule.inner, rule.outer)
    return (made.tril() if causal else made).to(laid.value.dtype) @ laid.value


def _kept(laid: Heads, sums: Tensor, layout: Layout, real: Tensor | None, memory: Memory | None) -> Memory:
    """The sums of each row's whole chunks and the tokens of the one after them, which may not have begun."""
    rows = torch.arange(len(sums), device=sums.device)
    count = torch.full_like(rows, layout.length) if real is None else real.sum(1)
    whole = (count if memory is None else count + memory.tokens % layout.chunk) // layout.chunk
    key, far_key, value = (F.pad(x, (0, 0, 0, 0, 0, 1))[rows, whole] for x in (laid.key, laid.far_key, laid.value))
    return Memory(sums[rows, whole], key, far_key, value, count if memory is None else memory.tokens + count)


def _step(
    heads: Heads, rule: Rule, share: Callable[[Tensor], Tensor], real: Tensor | None, memory: Memory
) -> tuple[Tensor, Memory]:
    """One token, (B, 1, e): it joins its chunk, and a chunk that is whole joins the sums."""
    held, slots = memory.tokens % rule.chunk, torch.arange(rule.chunk, device=memory.tokens.device)
    distance = held[:, None] - slots
    new = (distance == 0)[..., None] if real is None else (distance == 0)[..., None] & real[..., None]
    key, far_key, value = (
        torch.where(new, x, before)
        for x, before in zip((heads.key, heads.far_key, heads.value), memory[1:4], strict=True)
    )
    made = weights(product(heads.query, key), rule.bias(distance)[:, None], rule.inner, rule.outer)
    made = made.masked_fill((distance < 0)[:, None], 0)
    far = (memory.sums * share(memory.tokens // rule.chunk)[:, None, None]).to(value.dtype)
    out = made.to(value.dtype) @ value + heads.far_query @ far
    tokens, sums = memory.tokens + (1 if real is None else real[:, 0].long()), memory.sums
    whole = (tokens > memory.tokens) & (tokens % rule.chunk == 0)
    if bool(whole.any()):
        sums = sums + (far_key.mT @ value).to(sums.dtype) * whole[:, None, None]
    return out, Memory(sums, key, far_key, value, tokens)
