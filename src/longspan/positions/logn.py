"""Log-n scaling: queries times the logarithm of the number of keys, which keeps the entropy of attention constant.

The entropy of softmax attention over n unrelated keys grows with log n; scores multiplied by log n keep it constant. On a model
that was trained without it, the query at position i (from 0) is multiplied by max(1, log(i + 1) / log L), so inputs within L are
computed exactly as before. Distances stay, so by itself it does not let a model read longer texts; it is combined with a method
that does. A longspan model is trained with it, beside any scheme, by `position="rope + logn"`; the factor then is
log(i + 1) / log L at every position.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from longspan.core.facts import ModelFacts
from longspan.engine.biased.bias import Bias
from longspan.hf.call import LayerCall
from longspan.hf.site import Site
from longspan.positions.scheme import PositionEncoding, SchemeModifier
from longspan.util.errors import NotSupported


@dataclass(frozen=True)
class LogN(SchemeModifier):
    """A factor on queries that grows with their position.

    `window`: L in tokens, by default the model's window.
    """

    window: int | None = None

    name = "logn"
    title = "Log-n attention scale"
    also = ("log-n-scaling",)
    paper = "Su 2021, kexue.fm/archives/8823; Chiang 2022, arXiv 2202.12172"
    slots = frozenset({"queries", "span"})
    """`span`: where another method bounds the number of keys, it does not grow and the factor would be wrong."""
    works_on = "pretrained, from scratch"
    cost = "time n², cache n"
    why_not_exportable = "it scales queries by their position, which no setting of a checkpoint can say"

    def __post_init__(self) -> None:
        self.require(self.window is None or self.window >= 2, f"window must be at least 2 tokens, not {self.window}")

    def resolve(self, facts: ModelFacts, length: int | None) -> Self:
        return replace(self, window=self.window or max(2, facts.window))

    def neutral_length(self) -> int:
        return self.window or 0

    def wrap(self, encoding: PositionEncoding, window: int, *, causal: bool) -> PositionEncoding:
        if not causal:
            raise NotSupported(
                "logn scales a query by the number of keys before it, and in an encoder it sees all keys; leave logn out"
            )
        return LogNEncoding(encoding, self.window or max(2, window))

    def attach(self, site: Site) -> None:
        site.scale_queries(self._shared_scale)

    def _shared_scale(self, call: LayerCall) -> Tensor:
        return call.forward.once(f"logn:{call.query.shape[2]}", lambda: self.scale(call))

    def scale(self, call: LayerCall) -> Tensor:
        """(B or 1, 1, Tq, 1), float32: max(1, log(i + 1) / log L)."""
        assert self.window is not None
        past = (call.position_ids + 1).clamp(min=self.window).float() / self.window
        return 1 + (past.log() / math.log(self.window))[:, None, :, None]  # within L exactly 1


class LogNEncoding(PositionEncoding):
    """Another scheme's encoding with log-n scaling, for models trained with it: log(i + 1) / log L at every position."""

    def __init__(self, inner: PositionEncoding, window: int):
        super().__init__()
        self.inner, self.window = inner, window
        self.score_scale, self.reach = inner.score_scale, inner.reach

    def defines(self, what: str) -> bool:
        return what == "query_scale" or self.inner.defines(what)

    def query_scale(self, positions: Tensor) -> Tensor:
        scale = (positions + 1).float().log() / math.log(self.window)
        inner = self.inner.query_scale(positions)
        return scale if inner is None else inner * scale

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        return self.inner.embed(x, positions)

    def rotate_qk(self, query: Tensor, key: Tensor, q_positions: Tensor, k_positions: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner.rotate_qk(query, key, q_positions, k_positions)

    def query_blocks(self, positions: Tensor, dtype: torch.dtype) -> list[tuple[int, int]]:
        return self.inner.query_blocks(positions, dtype)

    def bias(self, distance: Tensor) -> Tensor:
        return self.inner.bias(distance)

    def distance_bias(self, past: int, ahead: int, device: torch.device) -> Bias:
        return self.inner.distance_bias(past, ahead, device)

    def pair_bias(self, q_positions: Tensor, k_positions: Tensor) -> Tensor:
        return self.inner.pair_bias(q_positions, k_positions)

    def query_scores(self, query: Tensor, distance: Tensor, layer: int) -> Tensor:
        return self.inner.query_scores(query, distance, layer)
