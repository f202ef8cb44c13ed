"""Attention resolution: how well the mean score tells a near token from the next one further away (Sun 2023, eq. 11).

With s[n] the mean score before the softmax of a query and the key n tokens before it, over queries, heads, layers and texts,

    R(s) = Σ_n e^s[n] · (e^s[n] - e^s[n+1]) / (Σ_n e^s[n])²

is 0 where all distances score alike, and grows where scores fall with distance and fall surely. A scheme whose scores rise
again at distances that were never trained loses resolution there. It describes a model; it is no quality by itself.
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
from longspan.tasks.base import Outcome, Sample, Task
from longspan.tasks.receptive_field import POINTS, windows
from longspan.tasks.text import check_text, read_text
from longspan.util.errors import NotSupported

SCORES = "longspan_scores"
"""The attention implementation that adds up scores by distance and then does what the one before it did."""
ROWS = 256
"""Queries whose scores are held at once."""


@dataclass(frozen=True)
class Resolution(Task):
    """The score is R over all distances within the length."""

    text: str = "prose"

    name: ClassVar[str] = "resolution"
    title: ClassVar[str] = "Attention resolution"
    measures: ClassVar[str] = "how surely scores fall with distance"
    source: ClassVar[str] = (
        "Python's own help texts or library sources, a novel that comes along, or a text file of yours"
    )
    default_count: ClassVar[int] = 4
    metric: ClassVar[str] = "resolution"
    rates: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_text(self.text, self.name)

    def data_digest(self) -> str:
        return read_text(self.text, self.name).sha256

    def samples(self, tokenizer: PreTrainedTokenizerBase, length: int, count: int, seed: int) -> list[Sample]:
        """Windows of exactly `length` tokens that end at places evenly spread over the text."""
        return windows(self, tokenizer, self.text, length, count, seed)

    def run(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sample: Sample, meter: Meter) -> Outcome:
        with meter.prefill(len(sample.tokens)):
            scores = mean_scores(model, sample.tokens)
        value = float(resolution(scores))
        if value != value:
            return Outcome(0.0, {**sample.meta, "reason": "scores are not numbers"}, failed=True)
        places = torch.linspace(0, len(scores) - 1, min(POINTS, len(scores))).long()
        return Outcome(value, {**sample.meta, "distances": places.tolist(), "mean_score": scores[places].tolist()})


def resolution(scores: Tensor) -> Tensor:
    """R(s) of mean scores (N,) by distance; the last one's neighbour is taken to score as it does."""
    weights = (scores.double() - scores.double().amax()).exp()
    return (weights * (weights - torch.cat((weights[1:], weights[-1:])))).sum() / weights.sum() ** 2


@torch.no_grad()
def mean_scores(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """s[n] for n = 0 … T - 1, (T,), float64 on the CPU. Raises `NotSupported` where scores cannot be seen."""
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
            "resolution: scores are seen where every key is, in a model's own attention; leave methods with an attention of "
            'their own off, and load the model with attn_implementation="sdpa"'
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
    scores = query_scores(place, query, positions, cast(int, module.layer_idx))
    factor, pair_bias = place.query_scale(positions), kwargs.get("pair_bias")
    scale *= place.score_scale

    def extra(start: int, end: int) -> Tensor | float:
        """What the scheme adds to the scores of these queries with all keys, mean over heads."""
        added: Tensor | float = 0.0
        if place.defines("bias"):
            added = place.bias(_distances(start, end, key)).double().mean(0)
        if scores is not None:
            some = slice(start, end)
            added = added + scale * relative_scores(scores, some, positions[:, some], positions).double().mean(1)[0]
        return added if pair_bias is None else added + pair_bias[0, :, start:end].double().mean(0)

    for start, end in place.query_blocks(positions, key.dtype):
        rows, row_positions = query[:, :, start:end], positions[:, start:end]
        rows, turned = place.rotate_qk(rows, key, row_positions, positions)
        if factor is not None:
            rows = rows * factor[:, None, start:end, None].to(rows.dtype)
        _add_block(rows, turned, scale, start, sums, extra)


def _add_block(
    query: Tensor,
    key: Tensor,
    scale: float,
    first: int,
    sums: Tensor,
    extra: Callable[[int, int], Tensor | float] | None = None,
) -> None:
    """The same for the queries from number `first` on, ready to meet all keys, ROWS of them at a time."""
    key = expand_heads(key, query.shape[1]).double()
    for part in query.split(ROWS, dim=2):
        end = first + part.shape[2]
        distance = _distances(first, end, key)
        scores = (part.double() @ key.mT * scale).mean(1)[0]
        if extra is not None:
            scores = scores + extra(first, end)
        seen = distance >= 0
        sums.index_add_(0, distance[seen], scores[seen])
        first = end


def _distances(start: int, end: int, key: Tensor) -> Tensor:
    """(queries, keys) for the queries `start` … `end` - 1 and all keys."""
    return torch.arange(start, end, device=key.device)[:, None] - torch.arange(key.shape[2], device=key.device)


AttentionInterface.register(SCORES, _scores_then_attention)
AttentionMaskInterface.register(SCORES, AttentionMaskInterface()["sdpa"])
