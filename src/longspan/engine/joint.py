"""One softmax over keys in several pieces: blocks, dilated segments, global tokens.

A `Part` says where equal pieces of attention lie, as regular steps through the text, so that each is one dense call of a
flash kernel on views. Every call also gives log-sum-exps, and results are put together by them:

    L = log Σᵢ exp Lᵢ        out = Σᵢ exp(Lᵢ - L) outᵢ

which is the softmax over all keys of all parts, a key that lies in several parts counting several times. The gradient of
the whole is each piece's own flash backward given the common `out` and `L`, for P = exp(scores - L) are the joint weights.

Queries pass in chunks: within one, sums are float32 (float64 for float64), and nothing else is longer than the chunk.
The kernels are torch's own operators, those that its context-parallel attention uses; where none is, plain products run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

MOST_SCORES = 2**26
"""Scores that the plain products hold at once."""


@dataclass(frozen=True)
class Lane:
    """Token numbers in equal pieces: piece i has every `step`-th of the `length` tokens from `start` + i · `period` on."""

    start: int
    length: int
    period: int = 1
    step: int = 1

    def of(self, x: Tensor, count: int) -> Tensor:
        """The view (B, H, count, m, …) of x (B, H, T, …); pieces do not overlap where `length` ≤ `period`."""
        line = x.narrow(2, self.start, (count - 1) * self.period + self.length)
        pieces = line.unfold(2, self.length, self.period)[..., :: self.step]
        return pieces if x.ndim == 3 else pieces.transpose(-1, -2)


class Part(NamedTuple):
    """`pieces` calls of attention of one size: the queries of each see all its keys, with `causal` up to their own place."""

    pieces: int
    queries: Lane
    keys: Lane
    causal: bool = False
    heads: slice = slice(None)


class Chunk(NamedTuple):
    """The queries `start` … `end` - 1 and all their parts."""

    start: int
    end: int
    parts: list[Part]


@torch.compiler.disable  # its sums are written through overlapping views, which torch.compile refuses
def joint_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    chunks: list[Chunk],
    scale: float,
    *,
    detached: bool = False,
    zero_key: bool = False,
) -> Tensor:
    """(B, H, T, D); query (B, H, T, D), key and value (B, H_kv, T, D). Every query lies in one chunk and at least one part.
    detached: no gradient goes through the weights with which parts are put together. zero_key: a key and a value of zeros
    are in every query's softmax, whose sum begins at exp(0) then; the gradient's formula stays, since L holds that one too."""
    query, key, value = (_lined_up(x) for x in (query, key, value))
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        return _Joint.apply(query, key, value, chunks, scale, detached, zero_key)[0]
    return _forward(query, key, value, chunks, scale, zero_key)[0]


def by_row(call: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None) -> Tensor:
    """`call` on each row's real tokens, which come first in it; zeros elsewhere.

    padding (B, T), or None where all are real.
    """
    if padding is None:
        return call(query, key, value)
    rows = zip(padding.sum(-1).tolist(), *(x.split(1) for x in (query, key, value)), strict=True)
    out = [_first_tokens(call, length, *row) for length, *row in rows]
    return torch.cat(out)


def _first_tokens(call: Callable[..., Tensor], length: int, *row: Tensor) -> Tensor:
    if not length:
        return torch.zeros_like(row[0])
    out = call(*(x[:, :, :length] for x in row))
    return F.pad(out, (0, 0, 0, row[0].shape[2] - length))


class _Joint(torch.autograd.Function):
    @staticmethod
    def forward(
        query: Tensor, key: Tensor, value: Tensor, chunks: list[Chunk], scale: float, detached: bool, zero_key: bool
    ) -> tuple[Tensor, Tensor]:
        out, lse = _forward(query, key, value, chunks, scale, zero_key, keep=True)
        assert lse is not None
        return out, lse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        query, key, value, ctx.chunks, ctx.scale, ctx.detached, _ = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(query, key, value, *output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        grad = _lined_up(grad)
        sums = [torch.zeros_like(x, dtype=_wide(x)) for x in (query, key, value)]
        for part in (part for chunk in ctx.chunks for part in chunk.parts):
            q, k, v = _inputs(part, query, key, value)
            given, o, total = (_flat(part.queries.of(x[:, part.heads], part.pieces)) for x in (grad, out, lse))
            if ctx.detached:  # each part's softmax is differentiated by itself, under weights that are constants
                o = _kernel(q)[0](q, k, v, ctx.scale, part.causal)[0]
            grads = _kernel(q)[1](given, q, k, v, o, total, ctx.scale, part.causal)
            _collect(part, sums, grads)
        return *(s.to(x.dtype) for s, x in zip(sums, (query, key, value), strict=True)), None, None, None, None


def _forward(
    query: Tensor, key: Tensor, value: Tensor, chunks: list[Chunk], scale: float, zero_key: bool, keep: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Result, and with `keep` the log-sum-exps (B, H, T) of all keys that a query saw."""
    out = torch.empty_like(query)
    totals = query.new_empty(query.shape[:3], dtype=_wide(query)) if keep else None
    for start, end, parts in chunks:
        here = query[:, :, start:end]
        mixed = torch.zeros_like(here, dtype=_wide(query))
        lse = mixed.new_full(here.shape[:3], 0.0 if zero_key else float("-inf"))
        for part in parts:
            part_out, part_lse = _kernel(query)[0](*_inputs(part, query, key, value), scale, part.causal)
            lane = Lane(part.queries.start - start, part.queries.length, part.queries.period, part.queries.step)
            sums, weights = (lane.of(x[:, part.heads], part.pieces) for x in (mixed, lse))
            _merge(sums, weights, _pieces(part_out, part.pieces), _pieces(part_lse, part.pieces))
        out[:, :, start:end] = mixed
        if totals is not None:
            totals[:, :, start:end] = lse
    return out, totals


def _merge(mixed: Tensor, lse: Tensor, out: Tensor, out_lse: Tensor) -> None:
    """Adds one part to the views of what there is, in place."""
    total = torch.logaddexp(lse, out_lse)
    mixed.mul_((lse - total).exp_()[..., None]).addcmul_(out.to(mixed.dtype), (out_lse - total).exp_()[..., None])
    lse.copy_(total)


def _inputs(part: Part, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The part's queries, keys and values, (B · pieces, h, m, D) with a key head for every query head."""
    q = part.queries.of(query[:, part.heads], part.pieces)
    k, v = (part.keys.of(x, part.pieces) for x in (key, value))
    index = _key_heads(part, query, key)
    k, v = (x[:, part.heads] if index is None else x.index_select(1, index) for x in (k, v))
    return _flat(q), _flat(k), _flat(v)


def _key_heads(part: Part, query: Tensor, key: Tensor) -> Tensor | None:
    """The key head of each of the part's heads; None where every head has its own."""
    groups = query.shape[1] // key.shape[1]
    if groups == 1:
        return None
    return torch.arange(query.shape[1], device=key.device)[part.heads] // groups


def _collect(part: Part, sums: list[Tensor], grads: tuple[Tensor, ...]) -> None:
    """Adds the gradients of one part's queries, keys and values to where they came from."""
    index = _key_heads(part, sums[0], sums[1])
    for lane, total, grad in zip((part.queries, part.keys, part.keys), sums, grads, strict=True):
        pieces = _pieces(grad, part.pieces).to(total.dtype)
        if total is sums[0] or index is None:
            lane.of(total[:, part.heads], part.pieces).add_(pieces)
        else:
            lane.of(total, part.pieces).index_add_(1, index, pieces)


def _flat(x: Tensor) -> Tensor:
    """(B, h, count, m, …) → (B · count, h, m, …); a view where B is 1."""
    return x.transpose(1, 2).flatten(0, 1)


def _pieces(x: Tensor, count: int) -> Tensor:
    """(B · count, h, m, …) → (B, h, count, m, …)."""
    return x.unflatten(0, (-1, count)).transpose(1, 2)


def _lined_up(x: Tensor) -> Tensor:
    """With the numbers of a head side by side, as the kernels read them."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# Attention of one part with its log-sum-exps (N, h, m), and its gradient given the common result and log-sum-exps.


def _kernel(query: Tensor) -> tuple[Callable[..., tuple[Tensor, Tensor]], Callable[..., tuple[Tensor, ...]]]:
    if query.device.type == "cpu":
        return _cpu, _cpu_backward
    half = query.dtype in (torch.bfloat16, torch.float16)
    if query.device.type == "cuda" and half and query.shape[-1] % 8 == 0 and query.shape[-1] <= 256:
        return _flash, _flash_backward
    return plain, plain_backward


def _cpu(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)


def _cpu_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, causal: bool
) -> tuple[Tensor, ...]:
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return backward(grad, q, k, v, out, lse, 0.0, causal, scale=scale)


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)[:2]


def _flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, causal: bool
) -> tuple[Tensor, ...]:
    state = torch.empty(2, dtype=torch.int64, device=q.device)  # of random numbers, which there are none of
    lengths = None, None, q.shape[2], k.shape[2]
    backward = torch.ops.aten._scaled_dot_product_flash_attention_backward
    return backward(grad, q, k, v, out, lse.contiguous(), *lengths, 0.0, causal, state, state, scale=scale)


def plain(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Attention and log-sum-exps by products, some pieces and queries at a time."""
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=_wide(q))
    for n, rows in _tiles(q, k):
        scores = _scores(q[n, :, rows], k[n], scale, rows, causal)
        lse[n, :, rows] = total = scores.logsumexp(-1)
        out[n, :, rows] = (scores - total[..., None]).exp() @ v[n].to(scores.dtype)
    return out, lse


def plain_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, causal: bool
) -> tuple[Tensor, ...]:
    """Gradients of queries, keys and values where softmax's sums are `lse`."""
    dq, dk, dv = (torch.zeros_like(x, dtype=_wide(x)) for x in (q, k, v))
    for n, rows in _tiles(q, k):
        queries, pull, mixed = (x[n, :, rows].to(dq.dtype) for x in (q, grad, out))
        weights = (_scores(queries, k[n], scale, rows, causal) - lse[n, :, rows, None]).exp()
        dv[n] += weights.mT @ pull
        slope = weights * (pull @ v[n].to(dq.dtype).mT - (pull * mixed).sum(-1, keepdim=True)) * scale
        dq[n, :, rows] = slope @ k[n].to(dq.dtype)
        dk[n] += slope.mT @ queries
    return dq, dk, dv


def _scores(q: Tensor, k: Tensor, scale: float, rows: slice, causal: bool) -> Tensor:
    scores = q.to(_wide(q)) @ k.to(_wide(k)).mT * scale
    if not causal:
        return scores
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(rows.start)
    return scores.masked_fill(~seen, float("-inf"))


def _tiles(q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice]]:
    """Slices of pieces and of queries whose scores are at most MOST_SCORES, where one query's are."""
    row = q.shape[1] * k.shape[2]
    pieces = max(1, MOST_SCORES // (row * q.shape[2]))
    queries = q.shape[2] if pieces > 1 else max(1, MOST_SCORES // row)
    for n in range(0, len(q), pieces):
        for start in range(0, q.shape[2], queries):
            yield slice(n, n + pieces), slice(start, min(start + queries, q.shape[2]))
