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


class Ordinary(Owned):
    """Mixed into transformers' own layers: emptied they are any model's, and what a method knows of their tokens goes where their
    rows go."""

    marks: Tensor | None = None
    """(B, T), of the tokens in the layer."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.check_owner()
        made: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)  # type: ignore[misc]
        return made

    def reset(self) -> None:
        self.is_initialized = False  # or transformers 5.17 keeps zeros in the tokens' places
        super().reset()  # type: ignore[misc]
        self.filled_by, self.expected, self.marks = None, False, None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._pick(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        if self.marks is not None:
            self.marks = self.marks.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._pick(indices)

    def _pick(self, rows: Tensor) -> None:
        if self.marks is not None:
            self.marks = self.marks[rows.to(self.marks.device)]


class OwnedDynamicLayer(Ordinary, DynamicLayer):
    """A layer that keeps all keys, for one method."""


class OwnedSlidingLayer(Ordinary, DynamicSlidingWindowLayer):
    """A layer that keeps a sliding window of keys, for one method."""


def claim(cache: Cache, spec: str, *, checked: bool) -> None:
    """Makes `cache` the method's before a forward of it. Raises `NotSupported` where another method, or the plain model, has put
    tokens into it. checked: whether the method has looked by itself, as those with layers of their own do."""
    before: str | None = getattr(cache, _FILLED_BY, None)
    if any(isinstance(layer, Ordinary) and layer.filled_by is None for layer in cache.layers):
        before = None  # emptied since
    if before != spec:
        if cache.get_seq_length() > 0 and not (checked and before is None):
            raise NotSupported(_mixed(before or "the model as it is", spec))
        setattr(cache, _FILLED_BY, spec)
        if type(cache) is DynamicCache:
            own_layers(cache)
    for layer in cache.layers:
        if isinstance(layer, Owned):
            layer.filled_by, layer.expected = spec, True


def mark(cache: Cache, spec: str) -> None:
    """Makes a cache the method's that a forward of it has made and filled, with the layers that were made in this forward."""
    if getattr(cache, _FILLED_BY, None) is None:
        setattr(cache, _FILLED_BY, spec)
    for layer in cache.layers:
        if isinstance(layer, Ordinary) and layer.filled_by is None:
            layer.filled_by = spec


def own_layers(cache: DynamicCache, count: int = 0) -> None:
    """Replaces the layers of an empty cache by those that know their owner, and makes it have `count` at least."""
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = OwnedDynamicLayer
    for number, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[number] = OwnedDynamicLayer()
        elif type(layer) is DynamicSlidingWindowLayer:
            owned = OwnedSlidingLayer(layer.sliding_window)
            owned.record_past = layer.record_past
            cache.layers[number] = owned
    if cache.layer_class_to_replicate is OwnedDynamicLayer:
        cache.layers.extend(OwnedDynamicLayer() for _ in range(len(cache.layers), count))


def _mixed(before: str, now: str) -> str:
    return (
        f"this cache was filled under {before}, whose keys {now} would misread; begin with an empty cache after a method was put "
        "on or taken off"
    )
