"""Layers of the caller's cache for mixers, a state of fixed size, and for patterns with a window, rolling keys and values."""

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
    """The state of a mixer's module between calls.

    tensors: by name, each with the batch first; seen: the number of tokens read so far; shared: tensors that are alike for all
    rows, computed once from the weights.
    """

    kind = "state"

    def __init__(self) -> None:
        super().__init__()
        self.tensors: dict[str, Tensor] = {}
        self.shared: dict[str, Tensor] = {}
        self.seen = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> NoReturn:
        """Raises `NotSupported`: a state has no keys and values."""
        raise NotSupported(
            "this cache layer holds a mixer's state, and keys and values cannot be added; begin with an empty cache"
        )

    update = lazy_initialization  # type: ignore[assignment]

    def reset(self) -> None:
        self.tensors, self.shared, self.seen = {}, {}, 0

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise NotSupported(
                f"a mixer's state cannot drop its last {tokens_to_remove:,} tokens, as assisted decoding does; use attention=full"
            )

    def offload(self) -> None:
        self.each_row(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self.each_row(lambda x: x.to(self._device, non_blocking=True))

    def keep(self, seen: int, **tensors: Tensor) -> None:
        """Stores the tensors of the state after `seen` more tokens."""
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
    """The state of layer `layer` in a cache, added where the layer is empty.

    Raises `NotSupported` where the layer holds keys and values.
    """
    layers = _layers(cache, layer)
    if not isinstance(layers[layer], MixerState):
        refuse_filled(layers[layer])
        layers[layer] = MixerState()
    return layers[layer]


def rolling_of(cache: Cache, layer: int, sinks: int, window: int) -> WindowLayer | None:
    """The rolling layer `layer` of a cache, put in the place of an empty `DynamicLayer`; sinks and window in tokens.

    None where the caller's cache has layers of another class, which then keep every key. Raises `NotSupported` where it rolls
    with another window.
    """
    layers = _layers(cache, layer)
    if type(layers[layer]) is DynamicLayer and not layers[layer].get_seq_length():
        layers[layer] = WindowLayer(sinks, window)
    rolling = layers[layer]
    if not isinstance(rolling, WindowLayer):
        return None
    if (rolling.sinks, rolling.window) != (sinks, window):
        raise NotSupported(
            f"this cache keeps {rolling.sinks} sinks and a window of {rolling.window}, and the model needs {sinks} and {window}; "
            "begin with an empty cache"
        )
    return rolling


def _layers(cache: Cache, layer: int) -> list[Any]:
    """The layers of a cache, extended to contain layer `layer`."""
    while len(cache.layers) <= layer:
        cache.layers.append(DynamicLayer())
    return cache.layers
