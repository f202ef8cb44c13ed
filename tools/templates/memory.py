"""A query sees the last `size` tokens, and the KV cache keeps no more than they are."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Self

from torch import Tensor
from transformers import DynamicCache

from longspan.core.facts import ModelFacts, text_config
from longspan.hf.caches import OwnedSlidingLayer
from longspan.hf.site import Site
from longspan.positions.spans import Span
from longspan.util.errors import NotSupported


class Forgetting(OwnedSlidingLayer):
    """Keys and values of one layer, of the last `sliding_window` - 1 tokens."""

    def crop(self, *args: Any, **kwargs: Any) -> None:
        if self.cumulative_length >= self.sliding_window:
            raise NotSupported("what a window has left behind cannot be brought back; decode without an assistant")
        super().crop(*args, **kwargs)


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
    examples: ClassVar[tuple[str, ...]] = ("template:size=12", "template:size=64")
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
        site.before_forward(partial(self.bound, site))

    def bound(self, site: Site, arguments: dict[str, Any]) -> None:
        """Gives a forward a cache that forgets, in place of an empty one. Raises `NotSupported` for one that something else has
        filled. Nothing of a forward is kept on the method."""
        assert self.size is not None
        cache, use = arguments["cache"], arguments.get("use_cache")
        if cache is None:
            if site.drops_caches or not (text_config(site.model.config).use_cache if use is None else use):
                return
            cache = arguments["cache"] = DynamicCache()
        if type(cache) is DynamicCache and cache.get_seq_length() == 0:
            cache.layer_class_to_replicate = None
            cache.layers = [Forgetting(self.size) for _ in range(site.facts.layers)]
        elif not all(isinstance(layer, Forgetting) for layer in cache.layers):
            raise NotSupported(f"{self.name} keeps a cache of its own kind: pass an empty DynamicCache, or none")
