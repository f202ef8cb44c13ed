"""The records of one call of attention: its tensors, its shape, and the pattern of keys that queries see."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from longspan.engine.blocks.tables import Blocks


@dataclass(frozen=True)
class AttentionCall:
    """One call of attention: query (B, H, Tq, D), key and value (B, H_kv, Tk, D), the queries the last of the keys."""

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    padding: Tensor | None = None
    """Boolean (B, Tk), True where a key is real; None where all are."""
    bias: Callable[[Tensor], Tensor] | None = None
    """What a score gets at a distance in tokens: (H, *shape) float32 for whole numbers of any shape."""
    dropout: float = 0.0
    query_scores: Callable[[slice, Tensor], Tensor] | None = None
    """What some of the queries get at each of N distances, before the scale: (B, H, rows, N) float32."""
    columns: Tensor | None = None
    """Which tokens the keys are, (B or 1, Tk), -1 for none, where they come from a rolling cache: the sinks that the pattern
    keeps, then the others. None where they are all tokens."""
    always_visible: Tensor | None = None
    """Boolean (B, Tk), True for keys that every query sees whatever the pattern says; of the patterns only some know it."""
    zero_key: bool = False
    """Whether every query also sees a key and a value of zeros (`longspan.engine.core.with_zero_key`)."""

    softcap: float | None = None
    """Scores s become softcap · tanh(s / softcap) before the softmax (Gemma 2)."""

    @property
    def plain(self) -> bool:
        """Whether the weights are the softmax of products of queries and keys, with or without the zero key."""
        return self.bias is None and self.query_scores is None and not self.dropout


@dataclass(frozen=True)
class AttentionShape:
    """The sizes that a pattern is computed for: `length` tokens in all, `heads` heads, layer number `layer`."""

    heads: int
    length: int
    layer: int
    causal: bool
    lengths: Tensor | None = field(default=None, compare=False)
    """How many tokens each row's text has, (B,), where padding makes them differ."""


class Pattern(Protocol):
    """Which keys a query sees, as the engine uses it; `longspan.lm.base.Pattern` documents each member."""

    runs_zero_key: ClassVar[bool]
    name: ClassVar[str]

    @property
    def spec(self) -> str: ...

    def mask(self, queries: Tensor, keys: Tensor, shape: AttentionShape) -> Tensor: ...

    def multiplicity(self, queries: Tensor, keys: Tensor, shape: AttentionShape) -> Tensor | None: ...

    def ranges(self, start: int, end: int, shape: AttentionShape) -> list[tuple[int, int]]: ...

    def blocks(self, shape: AttentionShape, size: int, device: torch.device) -> Blocks | None: ...

    def sinks_and_window(self) -> tuple[int, int] | None: ...

    def cached(self) -> tuple[int, int] | None: ...

    def run(self, call: AttentionCall, shape: AttentionShape) -> Tensor: ...
