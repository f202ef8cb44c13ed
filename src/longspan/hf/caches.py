"""Caches that know which method filled them.

Keys in a cache are rotated, or left unrotated, as the method on the model wants them. Read on under another method they give
wrong logits without a word, so the layers of a cache remember their method and refuse any other, the plain model included.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from longspan.util.errors import NotSupported

_FILLED_BY = "longspan_filled_by"


class Owned:
    """Mixed into cache layers whose keys only one method can read: `check_owner` comes first in their `update`."""

    filled_by: str | None = None
    """The method's spec; None where any model may fill the layer."""
    expected = False
    """Whether a forward of a model with that method on it has announced itself; its update takes this back."""

    def check_owner(self) -> None:
        """Raises `NotSupported` for an update by a model that does not have the layer's method on it."""
        if self.filled_by is None:
            return
        if not self.expected:
            raise NotSupported(_mixed(self.filled_by, "the model as it is"))
        self.expected = False


class OwnedDynamicLayer(Owned, DynamicLayer):
    """A layer that keeps all keys, for one method."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.check_owner()
        return super().update(key_states, value_states, *args, **kwargs)


class OwnedSlidingLayer(Owned, DynamicSlidingWindowLayer):
    """A layer that keeps a sliding window of keys, for one method."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.check_owner()
        return super().update(key_states, value_states, *args, **kwargs)


def claim(cache: Cache, spec: str, *, checked: bool) -> None:
    """Makes `cache` the method's before a forward of it. Raises `NotSupported` where another method, or the plain model, has put
    tokens into it. checked: whether the method has looked by itself, as those with layers of their own do."""
    before: str | None = getattr(cache, _FILLED_BY, None)
    if before != spec:
        if cache.get_seq_length() > 0 and not (checked and before is None):
            raise NotSupported(_mixed(before or "the model as it is", spec))
        setattr(cache, _FILLED_BY, spec)
        if type(cache) is DynamicCache:
            _own_layers(cache)
    for layer in cache.layers:
        if isinstance(layer, Owned):
            layer.filled_by, layer.expected = spec, True


def mark(cache: Cache, spec: str) -> None:
    """Makes a cache the method's that a forward of it has made and filled."""
    if getattr(cache, _FILLED_BY, None) is None:
        setattr(cache, _FILLED_BY, spec)


def _own_layers(cache: DynamicCache) -> None:
    """Replaces the layers of an empty cache by those that know their owner."""
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = OwnedDynamicLayer
    for number, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[number] = OwnedDynamicLayer()
        elif type(layer) is DynamicSlidingWindowLayer:
            owned = OwnedSlidingLayer(layer.sliding_window)
            owned.record_past = layer.record_past
            cache.layers[number] = owned


def _mixed(before: str, now: str) -> str:
    return (
        f"this cache was filled under {before}, whose keys {now} would misread; begin with an empty cache after a method was put "
        "on or taken off"
    )
