"""Hooks around every forward of a decoder under a method: the forward's record, its cache's owner, what methods add to both.

`ModelHooks` is the base of `longspan.hf.site.Site`. Before each forward of the decoder it makes the record of that forward
(`longspan.hf.forward`), calls the hooks of the methods and claims the KV cache; after it, it marks a cache that the decoder made.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel

from longspan.core.facts import ModelFacts, decoder_of
from longspan.core.method import Combination
from longspan.hf import compat
from longspan.hf.caches import claim, mark
from longspan.hf.call import LayerCall
from longspan.hf.compat import FORWARD
from longspan.hf.forward import Forward, forward_of, tag
from longspan.util.errors import NotSupported


class ModelHooks:
    """A model whose decoder's forwards run through hooks, and how everything that was changed on it is undone."""

    def __init__(self, model: PreTrainedModel, methods: Combination, facts: ModelFacts):
        self.model = model
        self.methods = methods
        self.facts = facts
        self.decoder = decoder_of(model)
        self.attend: Callable[[LayerCall], Tensor] | None = None
        self.rotates = False
        """Whether a method rotates queries or keys by itself."""
        self.makes_dynamic_caches = True
        """Whether the decoder makes a `DynamicCache` where the caller passes no cache; MiniMax makes one of its own class."""
        self.tags_positions = False
        """Whether the record of a forward travels on `position_ids`, since the architecture's layers drop keyword arguments."""
        self._undo: list[Callable[[], None]] = []
        self._before: list[Callable[[dict[str, Any]], None]] = []
        self._names = compat.parameters(self.decoder.forward)
        self._takes_cache = getattr(self.decoder.config, "use_cache", None) is not None
        self._keywords = compat.takes_keywords(self.decoder.forward)
        self._opened = False

    @property
    def slots(self) -> frozenset[str]:
        """The slots of all methods on the model."""
        return frozenset().union(*(method.slots for method in self.methods.methods))

    @property
    def drops_caches(self) -> bool:
        """Whether gradient checkpointing keeps caches from the layers, as transformers does in training."""
        return self.training and any(getattr(m, "gradient_checkpointing", False) for m in self.decoder.modules())

    @property
    def training(self) -> bool:
        """Whether the decoder is in training mode, whatever the mode of a head or an adapter around it."""
        return self.decoder.training

    def keep_for_undo(self, undo: Callable[[], None]) -> None:
        """Calls `undo` when the methods are taken off, before what was registered earlier.

        It must be a bound method or a partial: copy.deepcopy of a model follows those to the copy, and not a lambda's references.
        """
        self._undo.append(undo)

    def undo(self) -> None:
        """Undoes every change, the last one first."""
        while self._undo:
            self._undo.pop()()

    def before_forward(self, hook: Callable[[dict[str, Any]], None]) -> None:
        """Calls `hook` with the keyword arguments of each forward of the decoder; it may change them in place.

        The KV cache is `arguments["cache"]`, whatever transformers calls it. `forward_of(arguments)` keeps what belongs to this
        forward alone.
        """
        self.open()
        self._before.append(hook)
        self.keep_for_undo(partial(list.remove, self._before, hook))

    def after_forward(self, hook: Callable[[Forward, Any], Any]) -> None:
        """Replaces the output of each forward of the decoder by `hook(record of the forward, output)`."""
        handle = self.decoder.register_forward_hook(partial(_leave, hook), with_kwargs=True)
        self.keep_for_undo(handle.remove)

    def open(self) -> None:
        """Makes a record of every forward of the decoder and claims its KV cache, from now on."""
        if self._opened:
            return
        self._opened = True
        self.keep_for_undo(partial(setattr, self, "_opened", False))
        for handle in (
            self.decoder.register_forward_pre_hook(self._enter, with_kwargs=True),
            self.decoder.register_forward_hook(self._mark),
        ):
            self.keep_for_undo(handle.remove)

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        arguments = {**dict(zip(self._names, args, strict=False)), **kwargs}
        cache = arguments["cache"] = compat.given_cache(arguments)
        mask, cached = arguments.get("attention_mask"), _length(cache)
        causal = mask is None or (isinstance(mask, Tensor) and mask.ndim == 2)
        forward = arguments[FORWARD] = Forward(self._positions(arguments, cached), cached, causal=causal)
        for hook in self._before:
            hook(arguments)
        if (positions := arguments.get("position_ids")) is not None and positions.ndim == 2:
            forward.position_ids = positions
        if not self.facts.encoder_decoder:
            self._claim(arguments)
        if self.tags_positions:
            self._tag(arguments, forward)
        cache = arguments.pop("cache")
        if cache is not None or self._takes_cache:
            arguments[compat.cache_argument(module)] = cache
        if not self._keywords or self.attend is None:
            del arguments[FORWARD]
        return (), arguments

    def _positions(self, arguments: dict[str, Any], cached: int) -> Tensor | None:
        """One position per token, (B or 1, T), or None where positions follow the cache.

        Qwen-VL's models number tokens in time, height and width, (3 or 4, B, T), which differ for tokens of an image. Methods
        that rotate by themselves refuse such positions; the others number the tokens one by one.
        """
        positions = arguments.get("position_ids")
        if positions is None or positions.ndim == 2 or self.attend is None:
            return positions
        time, *others = positions[-3:]
        if self.rotates:
            if not all(torch.equal(time, other) for other in others):
                raise NotSupported(
                    f"{self.methods.spec} rotates by one position per token, and {self.facts.architecture} gives image tokens "
                    "three (time, height, width); use window, logn or yarn with images, or text alone"
                )
            arguments["position_ids"] = time
            return time
        mask, new = arguments.get("attention_mask"), positions.shape[-1]
        if isinstance(mask, Tensor) and mask.ndim == 2:
            return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -new:]
        return torch.arange(cached, cached + new, device=positions.device)[None]

    def _claim(self, arguments: dict[str, Any]) -> None:
        """Makes the forward's cache this method's.

        A cache that the decoder would make is made here, as it would make it.
        """
        cache, use = arguments["cache"], arguments.get("use_cache")
        config = self.decoder.config
        use = getattr(config, "use_cache", False) if use is None else use
        makes = self.makes_dynamic_caches and not self.drops_caches and getattr(self.decoder, "causal", True)
        if cache is None and use and makes:
            cache = arguments["cache"] = DynamicCache(config=config)
        if cache is not None:
            claim(cache, self.methods.spec, checked="cache" in self.slots)

    def _mark(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Makes a cache of the decoder's own class, which it has just filled, this method's."""
        if not self.facts.encoder_decoder and isinstance(cache := compat.cache_of(output), Cache):
            mark(cache, self.methods.spec)

    def _tag(self, arguments: dict[str, Any], forward: Forward) -> None:
        positions = arguments.get("position_ids")
        if positions is None:
            ids = arguments.get("input_ids")
            tokens = arguments["inputs_embeds"] if ids is None else ids
            cached = _length(arguments["cache"])
            positions = torch.arange(cached, cached + tokens.shape[1], device=tokens.device)[None]
        arguments["position_ids"] = tag(positions, forward)


def _leave(
    hook: Callable[[Forward, Any], Any], module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any
) -> Any:
    return hook(forward_of(kwargs), output)


def _length(cache: Any) -> int:
    """The number of tokens in a cache."""
    return 0 if cache is None else int(cache.get_seq_length())
