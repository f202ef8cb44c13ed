"""Cache layers that know which method filled them, select rows and can be written to a file.

Keys in a cache are rotated, or left unrotated, as the method on the model wants them. Under another method they would give wrong
logits without an error, so the layers of a cache remember their method and refuse any other, the plain model included.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

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


class Stored:
    """Mixed into cache layers that can be copied and written to a file: `stored_numbers` for JSON,
    `stored_tensors` with the batch first."""

    kind: ClassVar[str] = ""
    """The layer's name in files; a subclass that is saved has its own."""
    kinds: ClassVar[dict[str, type[Stored]]] = {}
    written_in_place: ClassVar[bool] = True
    """Whether `update` writes into the tensors, so that two layers cannot share them."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if kind := cls.__dict__.get("kind"):
            Stored.kinds[kind] = cls

    def stored_numbers(self) -> dict[str, Any]:
        """The layer's settings and counts."""
        raise NotImplementedError

    def stored_tensors(self) -> dict[str, Tensor]:
        """The layer's tensors, each (B, …)."""
        raise NotImplementedError

    @classmethod
    def empty(cls, numbers: dict[str, Any]) -> Self:
        """A layer with the settings among `numbers` and no tokens in it."""
        return cls()

    def restore(self, numbers: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Fills an empty layer with what `stored_numbers` and `stored_tensors` of another returned."""
        raise NotImplementedError

    def copied(self, rows: Tensor) -> Self:
        """A layer with rows `rows` (B',) of this one, which goes on by itself."""
        numbers, tensors = self.stored_numbers(), self.stored_tensors()
        copied = self.empty(numbers)
        first = next(iter(tensors.values()))
        if self.written_in_place or not torch.equal(rows, torch.arange(len(first))):
            tensors = {name: x[rows.to(x.device)] for name, x in tensors.items()}
        copied.restore(numbers, tensors)
        if isinstance(copied, Owned) and isinstance(self, Owned):
            copied.filled_by = self.filled_by
        return copied


def check_rows(held: Tensor, new: Tensor) -> None:
    """Raises `NotSupported` for new keys (B, …) that are not as many rows as those held."""
    if held.numel() and len(held) != len(new):
        raise NotSupported(
            f"a cache of {len(held)} rows does not go with {len(new)} rows of input; a memory's inputs take the beams of "
            f"generate, or its samples: inputs(question, beams={len(new)})"
        )


class CountedLayer(Stored, CacheLayerMixin):
    """Base of our cache layers: `seen` is the number of tokens read, however many of them are kept."""

    is_compileable = False
    is_sliding = False
    seen = 0

    @property
    def settings(self) -> str:
        """The settings that two layers must share for one to go on where the other ended, as text."""
        return ""

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def batch_size(self) -> int:
        """Rows held; 0 where nothing has been read."""
        return len(self.keys) if self.is_initialized and self.keys is not None else 0

    def each_row(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replaces every tensor x (B, …) of the layer by `change(x)`, which selects rows."""
        raise NotImplementedError

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.each_row(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.each_row(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.each_row(lambda x: x[indices.to(x.device)])


class Ordinary(Owned, Stored):
    """Mixed into transformers' own layers: emptied they are any model's, and what a method knows of their tokens goes where their
    rows go."""

    written_in_place = False
    keys: Any
    values: Any
    is_initialized: bool
    marks: Tensor | None = None
    """(B, T), of the tokens in the layer."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.check_owner()
        if self.is_initialized:
            check_rows(self.keys, key_states)
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

    def stored_numbers(self) -> dict[str, Any]:
        return {}

    def stored_tensors(self) -> dict[str, Tensor]:
        return {"key": self.keys, "value": self.values}

    def restore(self, numbers: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.lazy_initialization(tensors["key"], tensors["value"])  # type: ignore[attr-defined]
        self.keys, self.values = tensors["key"], tensors["value"]


class OwnedDynamicLayer(Ordinary, DynamicLayer):
    """A layer that keeps all keys, for one method."""

    kind = "full"


class OwnedSlidingLayer(Ordinary, DynamicSlidingWindowLayer):
    """A layer that keeps a sliding window of keys, for one method."""

    kind = "sliding"

    def stored_numbers(self) -> dict[str, Any]:
        return {"sliding_window": self.sliding_window, "seen": self.cumulative_length}

    @classmethod
    def empty(cls, numbers: dict[str, Any]) -> Self:
        return cls(int(numbers["sliding_window"]))

    def restore(self, numbers: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        super().restore(numbers, tensors)
        self.cumulative_length = int(numbers["seen"])


def claim(cache: Cache, spec: str, *, checked: bool) -> None:
    """Makes `cache` the method's before a forward of it.

    Raises `NotSupported` where another method, or the plain model, has put tokens into it. checked: whether the
    method has looked by itself, as those with layers of their own do.
    """
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


def stored_layers(cache: Cache) -> list[Stored]:
    """The layers of a filled cache, those of transformers as layers of ours that share their tensors. Raises `NotSupported` for
    a kind of layer that cannot be copied and saved."""
    return [_stored(layer) for layer in cache.layers]


def _stored(layer: Any) -> Stored:
    stored: OwnedDynamicLayer | OwnedSlidingLayer
    if isinstance(layer, Stored) and Stored.kinds.get(layer.kind) is type(layer):
        return layer
    if type(layer) is DynamicLayer:
        stored = OwnedDynamicLayer()
        numbers: dict[str, Any] = {}
    elif type(layer) is DynamicSlidingWindowLayer:
        stored = OwnedSlidingLayer(layer.sliding_window)
        numbers = {"seen": layer.cumulative_length}
    else:
        raise NotSupported(
            f"a cache with layers of type {type(layer).__name__} cannot be kept as a memory, which holds keys and values; "
            "read the text with each question"
        )
    stored.restore(numbers, {"key": layer.keys, "value": layer.values})
    return stored


def cache_of_layers(layers: list[Any], spec: str | None) -> DynamicCache:
    """A cache with these layers, filled by the method `spec`; None where any model may read it."""
    cache = DynamicCache()
    cache.layer_class_to_replicate = None
    cache.layers = layers
    if spec is not None:
        setattr(cache, _FILLED_BY, spec)
        for layer in layers:
            if isinstance(layer, Owned):
                layer.filled_by = spec
    return cache


def filled_by(cache: Cache) -> str | None:
    """The spec of the method that filled a cache; None where none is known."""
    return getattr(cache, _FILLED_BY, None)


def refuse_filled(cache: Any) -> None:
    """Raises `NotSupported` for a cache, or a layer of one, that holds keys and values of another model."""
    if cache.get_seq_length():
        raise NotSupported("this cache holds keys and values of another model; begin with an empty one")


def _mixed(before: str, now: str) -> str:
    return (
        f"this cache was filled under {before}, whose keys {now} would misread; begin with an empty cache after a method was put "
        "on or taken off"
    )
