"""A query sees the last `size` tokens, and the KV cache keeps no more than they are."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Self

from torch import Tensor
from transformers import DynamicCache

from longspan.apply import Site
from longspan.facts import ModelFacts
from longspan.hf.ownership import OwnedSlidingLayer
from longspan.positions.spans import Span


@dataclass(frozen=True)
class Template(Span):
    """`size` in tokens; left out, it is the model's window."""

    size: int | None = None

    name: ClassVar[str] = "template"
    title: ClassVar[str] = "A window with a cache of its size"
    paper: ClassVar[str] = "Author year, arXiv number"
    seam: ClassVar[Any] = "memory"
    slots: ClassVar[frozenset[str]] = frozenset({*Span.slots, "cache"})
    cost: ClassVar[str] = "time n, cache constant"
    why_not_exportable: ClassVar[str] = "it lives in the cache, and a checkpoint only holds weights and settings"

    def __post_init__(self) -> None:
        self.require(self.size is None or self.size >= 2, f"size must be at least 2 tokens, not {self.size}")

    def resolve(self, facts: ModelFacts, length: int | None) -> Self:
        return replace(self, size=self.size or facts.window)

    def first(self, positions: Tensor) -> Tensor:
        assert self.size is not None
        return positions - self.size + 1

    def least(self, size: int) -> int:
        return size

    def cache_tokens(self, facts: ModelFacts, length: int) -> int:
        return min(length, (self.size or facts.window) - 1)

    def attach(self, site: Site) -> None:
        super().attach(site)
        site.before_forward(partial(self.bound, site.facts.layers))

    def bound(self, layers: int, arguments: dict[str, Any]) -> None:
        """Gives an empty cache of the caller's layers that forget. The method keeps nothing of a forward on itself."""
        assert self.size is not None
        cache = arguments["cache"]
        if type(cache) is DynamicCache and cache.get_seq_length() == 0:
            cache.layer_class_to_replicate = None
            cache.layers = [OwnedSlidingLayer(self.size) for _ in range(layers)]
