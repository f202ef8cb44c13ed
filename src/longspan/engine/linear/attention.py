"""Linear attention: φ(q)·φ(k) in place of e^(q·k), with a state of fixed size.

    out_t = φ(q_t) Σ_{j<=t} φ(k_j) v_jᵀ / φ(q_t) Σ_{j<=t} φ(k_j)        (Katharopoulos 2020, eqs. 9 and 12)

Causal form: within a chunk of 64 tokens by masked products, across chunks by the carried sum. Chunks go in segments of 1,024
tokens. Training keeps one sum for each segment and makes the rest of a segment again in the backward pass, so its memory is
queries, keys and values plus T / 1,024 sums. One token is a step of the recurrence; calls hand the state on.

Sums, products and features are float32 (float64 for float64), whatever comes in and whatever autocast says.
A kernel that grows like e^x gives logarithms of its features, and sums are kept divided by e^level, where the level is the
greatest logarithm so far in its head. A sum is brought to a new level as in online softmax, so no token reaches back to the
ones before it, and nothing is added to the features to keep them from zero.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK = 64
"""Tokens that meet one another by masked products."""
SEGMENT = 1024
"""Tokens between two sums that training keeps."""
_NOTHING_READ = -1e30
_FLOOR = -60.0
"""A key's features below e^-60 of the greatest so far are held there: no query's denominator is zero in float32."""


class State(NamedTuple):
    """What was read: sums (B, H_kv, M, D + 1 or D) of φ(k)[v, 1]ᵀ / e^level, and level (B, H_kv)."""

    sums: Tensor
    level: Tensor


@dataclass(frozen=True)
class Kernel:
    """phi: (…, D) float32 or float64 → (…, M).

    `logarithms`: whether these are logarithms of features. `normalised`: whether the sum over values is divided by
    the sum of weights; without it features must not be logarithms, since only in the quotient their level falls out.
    """

    phi: Callable[[Tensor], Tensor]
    logarithms: bool = False
    normalised: bool = True

    def __post_init__(self) -> None:
        assert self.normalised or not self.logarithms

    def queries(self, query: Tensor) -> Tensor:
        raw = self.phi(_wide(query))
        return (raw - raw.detach().amax(-1, keepdim=True)).exp() if self.logarithms else raw

    def keys(self, key: Tensor, real: Tensor | None, level: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, H_kv, T, M), zero for padding, and the level that each is divided by (B, H_kv, T), `level` (B, H_kv)
        being that of all before."""
        raw = self.phi(_wide(key))
        levels = level[..., None].expand(raw.shape[:-1])
        if self.logarithms:
            tops = raw.detach().amax(-1)
            if real is not None:
                tops = tops.masked_fill(~real[:, None], _NOTHING_READ)
            levels = torch.cat((level[..., None], tops), dim=-1).cummax(-1).values[..., 1:]
            raw = raw - levels[..., None]
            # Filled and not clamped: the greatest feature is always at the bound 0, where clamp has a gradient to torch 2.13
            # and none from 2.14 on.
            raw = raw.masked_fill(raw < _FLOOR, _FLOOR)
            if real is not None:  # only padding can be above 0
                raw = raw.masked_fill(~real[:, None, :, None], float("-inf"))
            return raw.exp(), levels
        return (raw if real is None else raw.masked_fill(~real[:, None, :, None], 0)), levels

    def values(self, value: Tensor) -> Tensor:
        """With a column of ones, whose sums are the denominators."""
        return F.pad(_wide(value), (0, 1), value=1.0) if self.normalised else _wide(value)

    def quotient(self, mixed: Tensor, like: Tensor) -> Tensor:
        if not self.normalised:
            return mixed.to(like.dtype)
        total = mixed[..., -1:]
        total = total.where(total > 0, 1.0)  # who sees nothing is padding, and gets zeros
        return (mixed[..., :-1] / total).to(like.dtype)

    def empty(self, key: Tensor, value: Tensor) -> State:
        """The state before the first token."""
        features, values = self.phi(_wide(key[:, :, :0])), self.values(value[:, :, :0])
        level = features.new_full(key.shape[:2], _NOTHING_READ if self.logarithms else 0.0)
        return State(features.new_zeros(*key.shape[:2], features.shape[-1], values.shape[-1]), level)


def causal(
    query: Tensor, key: Tensor, value: Tensor, kernel: Kernel, state: State | None = None, real: Tensor | None = None
) -> tuple[Tensor, State]:
    """Each token attends to those of `state`, to those before it and to itself.

    query (B, H, T, D), key and value (B, H_kv, T, D) of the new tokens; real (B, T) boolean, False for padding, None where all
    are. Returns (B, H, T, D) in the query's dtype, and the state with the new tokens in it.
    """
    with _full_precision(query):
        state = state or kernel.empty(key, value)
        if query.shape[2] == 1:
            mixed, state = _step(query, key, value, real, state, kernel)
            return kernel.quotient(mixed, query), state
        run = _recomputed(_segment, query, key, value)
        parts = []
        for given in zip(*map(_segments, (query, key, value)), _segments_of(real, query.shape[2]), strict=True):
            mixed, state = run(*given, state, kernel)
            parts.append(mixed)
        return kernel.quotient(torch.cat(parts, dim=2), query), state


def bidirectional(query: Tensor, key: Tensor, value: Tensor, kernel: Kernel, real: Tensor | None = None) -> Tensor:
    """Each token attends to all; shapes as in `causal`.

    The level is the greatest logarithm of all keys.
    """
    with _full_precision(query):
        state = read(key, value, kernel, real=real)
        run = _recomputed(_look_up, query, key, value)
        parts = [run(part, state, kernel) for part in _segments(query)]
        return kernel.quotient(torch.cat(parts, dim=2), query)


def read(key: Tensor, value: Tensor, kernel: Kernel, state: State | None = None, real: Tensor | None = None) -> State:
    """The state with these tokens in it, which nobody asks; shapes as in `causal`."""
    with _full_precision(key):
        state = state or kernel.empty(key, value)
        run = _recomputed(_absorb, key, value)
        for given in zip(_segments(key), _segments(value), _segments_of(real, key.shape[2]), strict=True):
            state = run(*given, state, kernel)
        return state


def _step(
    query: Tensor, key: Tensor, value: Tensor, real: Tensor | None, state: State, kernel: Kernel
) -> tuple[Tensor, State]:
    """The recurrence: one token joins the sum and asks it."""
    state = _absorb(key, value, real, state, kernel)
    return _look_up(query, state, kernel), state


def _look_up(query: Tensor, state: State, kernel: Kernel) -> Tensor:
    """What queries (B, H, T, D) find in the whole state: (B, H, T, D + 1)."""
    asked = kernel.queries(query).unflatten(1, (state.level.shape[1], -1))
    return (asked @ state.sums[:, :, None]).flatten(1, 2)


def _absorb(key: Tensor, value: Tensor, real: Tensor | None, state: State, kernel: Kernel) -> State:
    features, levels = kernel.keys(key, real, state.level)
    level = levels[..., -1]
    own = (features * (levels - level[..., None]).exp()[..., None]).mT @ kernel.values(value)
    return State(state.sums * (state.level - level).exp()[..., None, None] + own, level)


def _segment(
    query: Tensor, key: Tensor, value: Tensor, real: Tensor | None, state: State, kernel: Kernel
) -> tuple[Tensor, State]:
    """All chunks of a segment at once: (B, H, T, D + 1) before the division, and the state after them.
    Shapes within: B batch, K key-value heads, G queries for each, N chunks, C tokens of a chunk."""
    length, chunk = query.shape[2], min(CHUNK, query.shape[2])
    features, levels = kernel.keys(key, real, state.level)
    asked = _chunks(kernel.queries(query), chunk).unflatten(1, (key.shape[1], -1))  # B K G N C M
    held, given = _chunks(features, chunk), _chunks(kernel.values(value), chunk)  # B K N C M, B K N C D
    levels = _chunks(levels[..., None], chunk, last=True)[..., 0]  # B K N C
    ends = torch.cat((state.level[..., None], levels[..., -1]), dim=-1)  # B K N+1, from before the first chunk on
    weights = (asked @ held.mT[:, :, None]) * _fading(levels)[:, :, None]
    mixed = weights @ given[:, :, None]
    own = (held * (levels - ends[..., 1:, None]).exp()[..., None]).mT @ given  # B K N M D
    sums = torch.cat((state.sums[:, :, None], own), dim=2)
    before = (_fading(ends) @ sums.flatten(-2)).unflatten(-1, sums.shape[-2:])  # the sum at each end
    fade = (ends[..., :-1, None] - levels).exp()
    mixed = mixed + (asked @ before[:, :, None, :-1]) * fade[:, :, None, ..., None]
    after = State(before[:, :, -1].clone(), ends[..., -1])  # a view would keep all the sums
    return mixed.flatten(3, 4).flatten(1, 2)[:, :, :length], after


def _fading(levels: Tensor) -> Tensor:
    """(…, n, n): what brings a thing of an earlier level to that of each later place, and 0 for what is later."""
    change = levels[..., None, :] - levels[..., :, None]
    later = torch.ones(change.shape[-2:], dtype=torch.bool, device=levels.device).triu(1)
    return change.masked_fill(later, float("-inf")).exp()


def _chunks(x: Tensor, chunk: int, *, last: bool = False) -> Tensor:
    """(B, H, T, W) → (B, H, N, chunk, W), the end filled with zeros, or with what came last."""
    missing = -x.shape[2] % chunk
    if missing and last:
        x = torch.cat((x, x[:, :, -1:].expand(-1, -1, missing, -1)), dim=2)
    elif missing:
        x = F.pad(x, (0, 0, 0, missing))
    return x.unflatten(2, (-1, chunk))


def _segments(x: Tensor) -> Sequence[Tensor]:
    """Split and not sliced: the backward pass of a slice makes zeros for the whole text."""
    return x.split(SEGMENT, dim=2)


def _segments_of(real: Tensor | None, length: int) -> Sequence[Tensor | None]:
    return [None] * -(-length // SEGMENT) if real is None else real.split(SEGMENT, dim=1)


def _recomputed(run: Callable[..., Any], first: Tensor, *others: Tensor) -> Callable[..., Any]:
    """`run`, made again in the backward pass where there is more than one segment and a gradient is wanted."""
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in (first, *others))
    if not wanted or first.shape[2] <= SEGMENT:
        return run
    return lambda *given: checkpoint(run, *given, use_reentrant=False, preserve_rng_state=False)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _full_precision(x: Tensor) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
