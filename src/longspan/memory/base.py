"""Base of methods that own a KV cache: their layers in the caller's cache, left padding, and reading a text into a cache.

TextReader    any model: reads a text into the cache that the model fills, copies that cache, makes it again from a file
CacheReader   a method at work on a model (streaming, focused, landmark, gist): a TextReader whose cache has the method's layers
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar, Generic, NoReturn, TypeVar, cast

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from longspan.core.facts import decoder_of, text_config
from longspan.core.method import Method, NoMethod
from longspan.hf import compat
from longspan.hf.caches import CountedLayer, Stored, cache_of_layers, filled_by, stored_layers
from longspan.hf.site import Site, current, site_of
from longspan.hf.trial import evaluating
from longspan.util.errors import LongspanError, NotSupported

AT_ONCE = 2**13
"""Tokens of a document that go through the model in one forward."""
OnTokens = Callable[[int], None]
LayerTensors = Callable[[int], dict[str, Tensor]]
Layer = TypeVar("Layer", bound=CountedLayer)


class TextReader:
    """Reads a text with a model whose cache no method owns."""

    kind: ClassVar[str] = "plain"
    """The kind of cache, in files."""

    def __init__(self, model: PreTrainedModel):
        self._model = model

    @property
    def model(self) -> PreTrainedModel:
        return self._model

    @property
    def method(self) -> Method | None:
        """The method that owns the cache."""
        return None

    def reading(self) -> str:
        """The settings that decide keys and values, as text: caches of equal text are interchangeable."""
        return ""

    separator: ClassVar[str] = "\n\n"
    """What is written between a document and a question."""

    def at_once(self, most: int | None = None) -> int:
        """Tokens of one forward, `most` or about as many."""
        return most or AT_ONCE

    def read(self, ids: Tensor, at_once: int | None = None, on_tokens: OnTokens | None = None) -> tuple[Tensor, Cache]:
        """The document's ids as `generate` is given them, (n,), and the filled cache of ids (n,).

        at_once: tokens of one forward. on_tokens: called after each forward with the tokens read so far.
        """
        cache = self.prefill(ids[None], None, self.at_once(at_once), on_tokens)
        return ids, cache_of_layers(cast(list[Any], stored_layers(cache)), filled_by(cache))

    @torch.no_grad()
    def prefill(self, ids: Tensor, mask: Tensor | None, at_once: int, on_tokens: OnTokens | None = None) -> Cache:
        """The cache of ids (B, T) with a padding mask (B, T) or None, read `at_once` tokens a forward in evaluation mode."""
        decoder, cache, end = decoder_of(self.model), None, 0
        with evaluating(self.model):
            for part in ids.to(compat.input_device(self.model)).split(at_once, dim=1):
                end += part.shape[1]
                seen = None if mask is None else mask[:, :end].to(part.device)
                output = decoder(
                    input_ids=part, attention_mask=seen, use_cache=True, **compat.with_cache(decoder, cache)
                )
                cache = compat.cache_of(output)
                if on_tokens is not None:
                    on_tokens(end)
        if not isinstance(cache, Cache) or cache.get_seq_length() != end:
            raise NotSupported(
                f"{type(self.model).__name__} does not return a KV cache of the tokens that it has read, so no text can be kept; "
                "read the text with each question"
            )
        return cache

    def copy(self, cache: Cache, rows: int) -> Cache:
        """A cache of one document, `rows` times, which goes on by itself."""
        index = torch.zeros(rows, dtype=torch.long)
        layers: list[Any] = [layer.copied(index) for layer in cast(list[Stored], cache.layers)]
        return cache_of_layers(layers, filled_by(cache))

    def parts(self, cache: Cache) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
        """What a file holds of a cache: each layer's kind and counts, and tensors by layer number, such as `0.key`."""
        layers = cast(list[Stored], cache.layers)
        numbers = [{"kind": layer.kind, **layer.stored_numbers()} for layer in layers]
        tensors = {f"{n}.{name}": x for n, layer in enumerate(layers) for name, x in layer.stored_tensors().items()}
        return numbers, tensors

    def ids_of(self, tensors: dict[str, Tensor]) -> Tensor:
        """What `generate` is given before a question, among a file's tensors."""
        return tensors["ids"]

    def restore(
        self, tensors: dict[str, Tensor], numbers: list[dict[str, Any]], tensors_of: LayerTensors, spec: str | None
    ) -> Cache:
        """The cache that `parts` was taken of.

        tensors: the whole file's, on the CPU; tensors_of: the tensors of one layer, on its device, by the layer's
        number.
        """
        layers = self.empty_layers(tensors, numbers)
        for number, layer in enumerate(layers):
            layer.restore(numbers[number], tensors_of(number))
        return cache_of_layers(cast(list[Any], layers), spec)

    def stays_on_cpu(self, name: str) -> bool:
        """Whether a layer keeps its tensor `name` in CPU memory."""
        return False

    def empty_layers(self, tensors: dict[str, Tensor], numbers: list[dict[str, Any]]) -> list[Stored]:
        """New layers for a file's.

        Raises `LongspanError` for a kind that this version does not know.
        """
        unknown = {one["kind"] for one in numbers} - set(Stored.kinds)
        if unknown:
            raise LongspanError(
                f"layers of kind {', '.join(sorted(unknown))} are not known; use the version that wrote them"
            )
        return [Stored.kinds[one["kind"]].empty(one) for one in numbers]


class CacheReader(TextReader, Generic[Layer]):
    """A method at work on a model, which fills a cache with layers of its own."""

    layer_class: ClassVar[type[CountedLayer]]

    def __init__(self, method: Any, site: Site):
        self._method, self.site = method, site

    @property
    def model(self) -> PreTrainedModel:
        return self.site.model

    @property
    def method(self) -> Any:
        return self._method

    def new_layers(self) -> list[Layer]:
        """The method's layers, one for each of the model's, with nothing in them."""
        raise NotImplementedError

    def empty_layers(self, tensors: dict[str, Tensor], numbers: list[dict[str, Any]]) -> list[Stored]:
        return cast(list[Stored], self.new_layers())

    def refuse(self, problem: str) -> NoReturn:
        """Raises `NotSupported` with the method's name before `problem`."""
        raise NotSupported(f"{self.method.name}{problem}")

    # The layers of a forward's cache

    @functools.cached_property
    def _settings(self) -> list[str]:
        return [cast(Any, layer).settings for layer in self.new_layers()]

    def cache_layers(self, arguments: dict[str, Any]) -> list[Layer] | None:
        """The layers of this forward's cache; None where it has none.

        An empty `DynamicCache`, which `generate` and most callers bring, gets the method's layers in place, so that
        whoever holds the cache goes on with it. Raises `NotSupported` for a cache of another kind, or filled under
        other settings.
        """
        cache = requested_cache(self.site, arguments)
        if cache is None:
            return None
        layers: list[Any] = cache.layers
        if layers and isinstance(layers[0], self.layer_class):
            if [layer.settings for layer in layers] != self._settings:
                raise NotSupported(
                    f"this cache was filled under other settings ({layers[0].settings}) than {self.method.spec}; start a new "
                    "cache after changing the method"
                )
            return cast(list[Layer], layers)
        filled = cache.get_seq_length() > 0
        if type(cache) is not DynamicCache or filled:
            self.refuse(
                f" fills a cache of its own kind, and a {type(cache).__name__} {'with tokens in it ' if filled else ''}cannot "
                f"become one. Pass {compat.CACHE}=None or an empty DynamicCache"
            )
        return self.fill(cache)

    def fill(self, cache: Cache) -> list[Layer]:
        """Puts the method's layers, with nothing in them, into an empty cache."""
        layers = self.new_layers()
        cache.layer_class_to_replicate = None
        cache.layers = cast(Any, layers)
        return layers

    # Padding

    def refuse_mask(self) -> NoReturn:
        """Raises `NotSupported` for a mask that is not one of padding."""
        self.refuse(" computes the causal mask itself: give a 2-D attention mask (padding only) over all tokens so far")

    def left_padding(
        self, mask: Any, start: int, new: int, known: Tensor | None, *, settled: int, cached: bool
    ) -> Tensor | None:
        """Left-padding tokens of each row, (B,), or None where there are none.

        mask: (B, start + new) or longer; start: tokens in the cache; known: the padding of rows that have begun; settled: the
        token number from which a mask for one new token is not read again; cached: whether the forward fills a cache.
        Raises `NotSupported` for a mask that hides tokens between a row's first and last.
        """
        if mask is None or (new == 1 and start >= max(1, settled)):
            return known
        if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[1] < start + new:
            self.refuse_mask()
        real = mask[:, : start + new].bool()
        pad, end = ((x.cumsum(-1) == 0).sum(-1) for x in (real, real.flip(-1)))
        begun = pad < real.shape[1]
        if bool(((real.sum(-1) + pad + end != real.shape[1]) & begun).any()):
            self.refuse(
                ": a mask may hide tokens before and after a row's text, not between its tokens; give generate an "
                "attention_mask, or it takes every padding token for padding"
            )
        if cached and bool(((end > 0) & begun).any()):
            self.refuse(" keeps a cache of left-padded rows only: set tokenizer.padding_side = 'left'")
        before = torch.zeros_like(pad) if known is None else known.to(pad.device)
        if bool(((pad != before) & (before < start)).any()):
            self.refuse(
                ": this mask hides tokens that are in the cache already; pad rows once, on the left, and give the mask from the "
                "first call on"
            )
        return pad if bool((pad > 0).any()) else None


def requested_cache(site: Site, arguments: dict[str, Any]) -> Cache | None:
    """The caller's cache, or a new one where the forward is to return one; None otherwise."""
    cache, use = arguments.get("cache"), arguments.get("use_cache")
    config = text_config(site.model.config)
    if cache is None and (config.use_cache if use is None else use):
        cache = arguments["cache"] = DynamicCache(config=config)
    return cache


def reader_on(model: PreTrainedModel) -> TextReader:
    """What reads texts with a model: the method that owns its cache, or the model as it is."""
    state = getattr(site_of(model), "state", None)
    return state if isinstance(state, TextReader) else TextReader(model)


def spec_on(model: PreTrainedModel) -> str:
    """The spec of what is on a model; `none` for the model as it is."""
    methods = current(model)
    return methods.spec if methods else NoMethod.name


def reading_spec(model: PreTrainedModel) -> str:
    """All settings that decide what a cache of the model holds, as text."""
    methods, reader = current(model), reader_on(model)
    own = reader.method.name if reader.method is not None else None
    parts = [reader.reading() if method.name == own else method.spec for method in (methods.methods if methods else ())]
    return " + ".join(parts) or NoMethod.name
