"""What is remembered between calls, in the caller's own cache: a mixer's tensors of fixed size, or the keys and values of a
pattern that sees no others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from longspan.hf.caches import CountedLayer, refuse_filled
from longspan.hf.rolling import WindowLayer
from longspan.util.errors import NotSupported


class MixerState(CountedLayer):
    """`tensors` by name, each with the batch first; `seen` is the number of tokens read, which the module counts up; `shared`
    is what all rows have in common, made once from the weights."""

    kind = "state"

    def __init__(self) -> None:
        super().__init__()
        self.tensors: dict[str, Tensor] = {}
        self.shared: dict[str, Tensor] = {}
        self.seen = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> NoReturn:
        raise NotSupported("this layer keeps a state and no keys and values")

    update = lazy_initialization  # type: ignore[assignment]

    def reset(self) -> None:
        self.tensors, self.shared, self.seen = {}, {}, 0

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise NotSupported("a state cannot forget single tokens: assisted decoding needs attention=full")

    def offload(self) -> None:
        self.each_row(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self.each_row(lambda x: x.to(self._device, non_blocking=True))

    def keep(self, seen: int, **tensors: Tensor) -> None:
        """What is remembered after `seen` more tokens."""
        self.tensors = tensors
        self._device = next(iter(tensors.values())).device
        self.seen += seen

    def batch_size(self) -> int:
        return len(next(iter(self.tensors.values()), ()))

    def each_row(self, change: Callable[[Tensor], Tensor]) -> None:
        self.tensors = {name: change(x) for name, x in self.tensors.items()}

    def stored_numbers(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def stored_tensors(self) -> dict[str, Tensor]:
        return self.tensors

    def restore(self, numbers: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.keep(int(numbers["seen"]), **tensors)


def state_of(cache: Cache, layer: int) -> MixerState:
    """The state of layer number `layer` in a cache, put there if the cache is new."""
    layers = _layers(cache, layer)
    if not isinstance(layers[layer], MixerState):
        refuse_filled(layers[layer])
        layers[layer] = MixerState()
    return layers[layer]


def rolling_of(cache: Cache, layer: int, sinks: int, window: int) -> WindowLayer | None:
    """The rolling layer number `layer` of a cache, put there if the cache is a new and growing one. None where the caller
    brought another kind, which then keeps every key."""
    layers = _layers(cache, layer)
    if type(layers[layer]) is DynamicLayer and not layers[layer].get_seq_length():
        layers[layer] = WindowLayer(sinks, window)
    held = layers[layer]
    if isinstance(held, WindowLayer) and (held.sinks, held.window) != (sinks, window):
        raise NotSupported("this cache keeps a window of another model; begin with an empty one")
    return held if isinstance(held, WindowLayer) else None


def _layers(cache: Cache, layer: int) -> list[Any]:
    """The layers of a cache, at least up to number `layer`."""
    while len(cache.layers) <= layer:
        cache.layers.append(DynamicLayer())
    return cache.layers
