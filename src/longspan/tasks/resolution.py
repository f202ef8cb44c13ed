"""Attention resolution: how clearly mean attention scores fall with distance (Sun 2023, eq. 11).

With s[n] the mean score before the softmax of a query and the key n tokens before it, over queries, heads, layers and texts,

    R(s) = Σ_n e^s[n] · (e^s[n] - e^s[n+1]) / (Σ_n e^s[n])²

is 0 where all distances have the same score, and grows where scores fall monotonically with distance. A position encoding
whose scores rise again at distances beyond training loses resolution there. It describes a model
and is not a quality. Sun 2023: arXiv 2212.10554.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from longspan.engine.core import expand_heads
from longspan.lm.attention import SCHEME, query_scores, relative_scores
from longspan.meter import Meter
from longspan.positions.scheme import PositionEncoding
from longspan.tasks.base import Outcome, Sample
from longspan.tasks.text import check_text
from longspan.tasks.windows import POINTS, TextWindows
from longspan.util.errors import NotSupported

SCORES = "longspan_scores"
"""The attention implementation that adds up scores by distance and then calls the one that was set before it."""
ROWS = 256
"""Queries whose scores are in memory at once."""


@dataclass(frozen=True)
class Resolution(TextWindows):
    """The score is R over all distances within the length."""

    text: str = "prose"

    name: ClassVar[str] = "resolution"
    title: ClassVar[str] = "Attention resolution"
    measures: ClassVar[str] = "how surely scores fall with distance"
    metric: ClassVar[str] = "resolution"

    def __post_init__(self) -> None:
        check_text(self.text, self.name)

    def run(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sample: Sample, meter: Meter) -> Outcome:
        with meter.prefill(len(sample.tokens)):
            scores = mean_scores(model, sample.tokens)
        value = float(resolution(scores))
        if value != value:
            return Outcome(0.0, {**sample.meta, "reason": "scores are not numbers"}, failed=True)
        places = torch.linspace(0, len(scores) - 1, min(POINTS, len(scores))).long()
        return Outcome(value, {**sample.meta, "distances": places.tolist(), "mean_score": scores[places].tolist()})


def resolution(scores: Tensor) -> Tensor:
    """R(s) of mean scores (N,) by distance, a scalar.

    Beyond the last distance the last score is repeated.
    """
    weights = (scores.double() - scores.double().amax()).exp()
    return (weights * (weights - torch.cat((weights[1:], weights[-1:])))).sum() / weights.sum() ** 2


@torch.no_grad()
def mean_scores(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """Mean scores s[n] of all distances n, (T,), float64 on the CPU.

    Raises `NotSupported` where the model's attention does not expose its scores.
    """
    sums = torch.zeros(len(ids), dtype=torch.float64, device=model.device)
    with _adding_up(model, sums) as calls:
        model.base_model(torch.tensor([ids], device=model.device), use_cache=False)
    if not calls:
        raise NotSupported("resolution: this model's attention is not transformers' exchangeable one; leave it out")
    pairs = torch.arange(len(ids), 0, -1, device=model.device) * len(calls)
    return (sums / pairs).cpu()


@contextlib.contextmanager
def _adding_up(model: PreTrainedModel, sums: Tensor) -> Iterator[list[int]]:
    before = str(model.config._attn_implementation)
    hidden = any(getattr(m, "pattern", None) is not None for m in model.modules())
    if hidden or before not in ("sdpa", SCHEME):
        raise NotSupported(
            "resolution: scores of every key are available in a model's own attention only; leave out methods that replace "
            'attention, and load the model with attn_implementation="sdpa"'
        )
    calls: list[int] = []
    token = _SINK.set((before, sums, calls))
    model.set_attn_implementation(SCORES)
    try:
        yield calls
    finally:
        model.set_attn_implementation(before)
        _SINK.reset(token)


_SINK: ContextVar[tuple[str, Tensor, list[int]]] = ContextVar("longspan_scores")


def _scores_then_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    name, sums, calls = _SINK.get()
    calls.append(1)
    _add_scores(module, query, key, sums, **kwargs)
    return ALL_ATTENTION_FUNCTIONS[name](module, query, key, value, attention_mask, **kwargs)


def _add_scores(
    module: nn.Module, query: Tensor, key: Tensor, sums: Tensor, scaling: float | None = None, **kwargs: Any
) -> None:
    """Adds the mean over heads of every causal pair's score to the sum of its distance."""
    place: PositionEncoding | None = getattr(module, "place", None)
    positions: Any = kwargs.get("position_ids")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if place is None:
        _add_block(query, key, scale, 0, sums)
        return
    relative = query_scores(place, query, positions, cast(int, module.layer_idx))
    factor, pair_bias = place.query_scale(positions), kwargs.get("pair_bias")
    scale *= place.score_scale

    def extra(start: int, end: int) -> Tensor | float:
        """Mean over heads of what the position encoding adds to the scores (queries, keys)."""
        added: Tensor | float = 0.0
        if place.defines("bias"):
            added = place.bias(_distances(start, end, key)).double().mean(0)
        if relative is not None:
            some = slice(start, end)
            added = added + scale * relative_scores(relative, some, positions[:, some], positions).double().mean(1)[0]
        return added if pair_bias is None else added + pair_bias[0, :, start:end].double().mean(0)

    for start, end in place.query_blocks(positions, key.dtype):
        rows, row_positions = query[:, :, start:end], positions[:, start:end]
        rows, keys = place.rotate_qk(rows, key, row_positions, positions)
        if factor is not None:
            rows = rows * factor[:, None, start:end, None].to(rows.dtype)
        _add_block(rows, keys, scale, start, sums, extra)


def _add_block(
    query: Tensor,
    key: Tensor,
    scale: float,
    first: int,
    sums: Tensor,
    extra: Callable[[int, int], Tensor | float] | None = None,
) -> None:
    """Adds the scores of rotated queries, numbered from `first` on, with all keys, `ROWS` queries at a time."""
    key = expand_heads(key, query.shape[1]).double()
    for part in query.split(ROWS, dim=2):
        end = first + part.shape[2]
        distance = _distances(first, end, key)
        scores = (part.double() @ key.mT * scale).mean(1)[0]
        if extra is not None:
            scores = scores + extra(first, end)
        causal = distance >= 0
        sums.index_add_(0, distance[causal], scores[causal])
        first = end


def _distances(start: int, end: int, key: Tensor) -> Tensor:
    """Distances (queries, keys) from queries `start` … `end` - 1 to all keys, negative for later keys."""
    return torch.arange(start, end, device=key.device)[:, None] - torch.arange(key.shape[2], device=key.device)


AttentionInterface.register(SCORES, _scores_then_attention)
AttentionMaskInterface.register(SCORES, AttentionMaskInterface()["sdpa"])
