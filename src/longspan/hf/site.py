"""What a method may change on a model, and how each change is undone; the only code that touches a model's modules.

Everything goes through places that transformers and torch keep open: the model's own rotary module rebuilt from a changed
configuration, `AttentionInterface` with `AttentionMaskInterface` beside it, forward pre-hooks, cache layers. No class is
patched. `remove` restores the model bit for bit.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Cache,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.masking_utils import flash_attention_mask, flex_attention_mask

from longspan.core.facts import ModelFacts, decoder_of, rope_parameters, rotary_modules, text_config
from longspan.core.method import Combination
from longspan.engine.core import causal_mask
from longspan.hf import compat
from longspan.hf.caches import claim, mark
from longspan.hf.call import LayerCall
from longspan.hf.compat import FORWARD
from longspan.hf.forward import Forward, forward_of, handed, tag
from longspan.hf.rotary import Rotary, unrotated_copy
from longspan.util.errors import LongspanError, NotSupported

ATTENTION = "longspan"
"""Attention implementation whose masks are made as for SDPA: None where plainly causal, else boolean (B, 1, Tq, Tk)."""
ATTENTION_OWN_MASK = "longspan_own_mask"
"""The same for methods that know by themselves what each query sees."""

_SCALING = frozenset(
    {
        "rope_type",
        "type",
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "truncate",
    }
    | {"short_factor", "long_factor", "short_mscale", "long_mscale", "low_freq_factor", "high_freq_factor"}
    | {"mscale", "mscale_all_dim"}
)
"""Entries of `rope_parameters` that belong to one kind of scaling; the others (`mrope_section`, …) belong to the model."""
SITE = "_longspan"


class RecordLost(NotSupported):
    """The record of a forward did not reach an attention function."""


class Site:
    """A model with methods on it: what methods may change, and how each change is undone."""

    def __init__(self, model: PreTrainedModel, methods: Combination, facts: ModelFacts):
        self.model = model
        self.methods = methods
        self.facts = facts
        self.attention_modules: list[nn.Module] = []
        self.state: Any = None
        """What the method that computes attention keeps between calls, for the fast paths in `longspan.engine`."""
        self._undo: list[Callable[[], None]] = []
        self.attend: Callable[[LayerCall], Tensor] | None = None
        self._scale: Callable[[LayerCall], Tensor] | None = None
        self._own = ""  # the model's own attention implementation, while ours is set
        self.decoder = decoder_of(model)
        self._before: list[Callable[[dict[str, Any]], None]] = []
        self._names = compat.parameters(self.decoder.forward)
        self._takes_cache = getattr(self.decoder.config, "use_cache", None) is not None
        self._keywords = compat.takes_keywords(self.decoder.forward)
        self._opened = False
        self.makes_dynamic_caches = True
        """Whether the decoder makes itself a `DynamicCache` where it is given none; MiniMax has a kind of its own."""
        self.rotates = False
        """Whether a method turns queries or keys by itself."""
        self.tags_positions = False
        """Whether the record of a forward travels on `position_ids`, since the architecture's layers drop keyword arguments."""

    # What is stored for undo, and what hooks call, are bound methods and partials: copy.deepcopy of a model follows them to the
    # copy, where it would keep a lambda's references to the original.

    def __deepcopy__(self, memo: dict[int, Any]) -> Site:
        copied = memo[id(self)] = object.__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def __reduce__(self) -> NoReturn:
        raise NotSupported(
            f"a model with {self.methods.spec} on it cannot be pickled: call remove(model) first and apply the method again "
            "where it is loaded, or save it with model.save_pretrained(folder)"
        )

    @property
    def rotary(self) -> Rotary:
        """The angles that the model would use: of its rotary module, with whatever scaling has been put on it."""
        return self._rotary if hasattr(self, "_rotary") else Rotary(self._only_rotary()[1])

    def set_rope(self, changes: dict[str, Any], window: int) -> None:
        """Static scaling: sets `rope_parameters` and `max_position_embeddings` and rebuilds the rotary modules from them.
        What stands in the configuration afterwards is the whole method, so a saved model keeps it."""
        config = text_config(self.model.config)
        before = copy.deepcopy(config.rope_parameters), config.max_position_embeddings
        # First of all: a rotary module that cannot be built from the new settings must not leave them behind.
        self._undo.append(partial(_restore_rope, config, *before))
        parameters = rope_parameters(config)
        assert parameters is not None, "check() refuses models without rotary positions"
        for key in _SCALING & set(parameters):
            del parameters[key]
        parameters.update(changes)
        config.max_position_embeddings = window
        for name, old in rotary_modules(self.model):
            device = next(old.buffers()).device
            new = type(old)(config=config)  # type: ignore[call-arg]
            self._replace(name, new.to(device).train(old.training))

    def keep_for_undo(self, undo: Callable[[], None]) -> None:
        """Has `undo` called when the methods are taken off, after all that was done later."""
        self._undo.append(undo)

    def takes_rope(self, parameters: dict[str, Any]) -> bool:
        """Whether this architecture's configuration allows such `rope_parameters` (Phi-3 allows LongRoPE only)."""
        config = copy.deepcopy(text_config(self.model.config))
        current = rope_parameters(config)
        assert current is not None, "check() refuses models without rotary positions"
        current.update(parameters)
        try:
            config.validate_rope()
        except ValueError:
            return False
        return True

    def unrotate(self) -> None:
        """Lets queries and keys reach the attention function, and the cache, without rotation. `rotary` still gives the
        true angles, and the method rotates by itself."""
        self.rotates = True
        name, module = self._only_rotary()
        self._rotary = Rotary(module)
        self._replace(name, unrotated_copy(module))

    def attention(self, attend: Callable[[LayerCall], Tensor], *, own_mask: bool = False) -> None:
        """Runs `attend` as every layer's attention; it returns (B, H, Tq, D)."""
        self._own = self.decoder.config._attn_implementation
        self.attend = attend
        self._undo.append(partial(self.decoder.set_attn_implementation, self._own))
        self.decoder.set_attn_implementation(ATTENTION_OWN_MASK if own_mask else ATTENTION)
        self.attention_modules = [m for m in self.decoder.modules() if _is_attention(m)]
        for module in self.attention_modules:
            object.__setattr__(module, SITE, self)
            self._undo.append(partial(object.__delattr__, module, SITE))
        self.before_forward(self._refuse_static)
        if own_mask:
            self.before_forward(self._refuse_made_masks)

    @property
    def plain_attention(self) -> bool:
        """Whether the model's own attention, now under ours, is transformers' SDPA: softmax(scale · q kᵀ + mask) v."""
        return self._own == "sdpa"

    def own_attention(self, call: LayerCall, mask: Tensor | None, counts: Tensor | None = None) -> Tensor:
        """The model's own attention over the call's keys under another mask, (B, H, Tq, D), for methods that only decide what
        is seen: whatever else the model does to its scores stays. mask: boolean, broadcastable to (B, H, Tq, Tk); None where
        each query sees all keys up to its own, which is the last one's for the last query. counts: how often each visible
        key counts, of the mask's shape, where not once."""
        attend, as_numbers = self._own_function(call.module)
        if counts is not None and self._own.startswith("longspan"):
            raise NotSupported(
                f"{self.methods.spec} weighs keys, which a model of ours under its position scheme does when it is built with "
                "it (attention=…), not afterwards; use a method that only hides keys, such as window"
            )
        new, held = call.query.shape[2], call.key.shape[2]
        if mask is None and new > 1 and (as_numbers or new != held):
            mask = causal_mask(new, held, call.query.device)[None, None]
        if mask is not None and (as_numbers or counts is not None):
            # Eager attention takes its softmax in float32, where the lowest float64 would be -inf and padding's rows no numbers.
            lowest = max(torch.finfo(call.query.dtype).min, torch.finfo(torch.float32).min)
            numbers = torch.zeros_like(mask, dtype=call.query.dtype) if counts is None else counts.clamp(min=1).log()
            mask = numbers.to(call.query.dtype).masked_fill(~mask, lowest)
        known = {"softcap": call.softcap, "sliding_window": call.sliding_window, "position_ids": call.position_ids}
        known = {name: value for name, value in known.items() if value is not None}
        out, _ = attend(
            call.module,
            call.query,
            call.key,
            call.value,
            mask,
            dropout=call.dropout,
            scaling=call.scale,
            key_positions=call.key_positions,
            **call.extra,
            **known,
        )
        return out.transpose(1, 2)

    def _own_function(self, module: nn.Module) -> tuple[Callable[..., tuple], bool]:
        """The function that was the module's attention before ours, and whether it takes masks as numbers to add."""
        masks = AttentionMaskInterface()
        kind = masks.get(self._own)
        if kind in (None, flash_attention_mask, flex_attention_mask):
            raise NotSupported(
                f"{self.methods.spec} hands the model's attention a mask, which {self._own!r} does not take; load the model with "
                'attn_implementation="sdpa"'
            )
        files = [sys.modules[cls.__module__] for cls in type(module).__mro__]
        eager = next((f.eager_attention_forward for f in files if hasattr(f, "eager_attention_forward")), None)
        interface = next((f.ALL_ATTENTION_FUNCTIONS for f in files if hasattr(f, "ALL_ATTENTION_FUNCTIONS")), None)
        found = (interface or AttentionInterface()).get(self._own, eager)
        if found is None:
            raise NotSupported(
                f"{self.facts.architecture} computes {self._own!r} attention in a place of its own; load the model with "
                'attn_implementation="sdpa"'
            )
        return found, kind is masks["eager"]

    def scale_queries(self, scale: Callable[[LayerCall], Tensor]) -> None:
        """Multiplies every query by `scale(call)`, broadcastable to (B, 1, Tq, 1), before its attention: that of the method on
        the model, or the model's own where no method takes it."""
        if self.attend is None:
            self.attention(self._unchanged)
        self._scale = scale

    def _unchanged(self, call: LayerCall) -> Tensor:
        return self.own_attention(call, call.mask)

    def _refuse_static(self, arguments: dict[str, Any]) -> None:
        cache = arguments.get("cache")
        if getattr(cache, "is_compileable", False):
            raise NotSupported(
                f"{self.methods.spec} counts positions back from a cache's last key, and a {type(cache).__name__} has empty "
                "places after it; use the default DynamicCache (in generate: leave out cache_implementation)"
            )

    def _refuse_made_masks(self, arguments: dict[str, Any]) -> None:
        if isinstance(arguments.get("attention_mask"), dict):
            raise NotSupported(
                f"{self.methods.spec} knows by itself what a query sees, and {self.facts.architecture} makes masks around its "
                "decoder (tokens of an image see one another); use self-extend, window or yarn, or the text model alone"
            )

    def before_forward(self, hook: Callable[[dict[str, Any]], None]) -> None:
        """Calls `hook` with the keyword arguments of each forward of the decoder; it may change them. Whatever transformers calls
        it, the KV cache is `arguments["cache"]`; `forward_of(arguments)` is where to keep what belongs to this forward alone."""
        self.open()
        self._before.append(hook)
        self._undo.append(partial(list.remove, self._before, hook))

    def after_forward(self, hook: Callable[[Forward, Any], Any]) -> None:
        """Calls `hook` with the record and the output of each forward of the decoder, to get the output that it returns."""
        handle = self.decoder.register_forward_hook(partial(_leave, hook), with_kwargs=True)
        self._undo.append(handle.remove)

    def open(self) -> None:
        """Gives every forward of the decoder its record, and its cache an owner."""
        if not self._opened:
            self._opened = True
            self._undo.append(partial(setattr, self, "_opened", False))
            for handle in (
                self.decoder.register_forward_pre_hook(self._enter, with_kwargs=True),
                self.decoder.register_forward_hook(self._mark),
            ):
                self._undo.append(handle.remove)

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        arguments = {**dict(zip(self._names, args, strict=False)), **kwargs}
        cache = arguments["cache"] = compat.given_cache(arguments)
        mask = arguments.get("attention_mask")
        causal = mask is None or (isinstance(mask, Tensor) and mask.ndim == 2)
        forward = arguments[FORWARD] = Forward(
            self._positions(arguments, _length(cache)), _length(cache), causal=causal
        )
        for hook in self._before:
            hook(arguments)
        if (positions := arguments.get("position_ids")) is not None and positions.ndim == 2:
            forward.given = positions
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

    def _positions(self, arguments: dict[str, Any], start: int) -> Tensor | None:
        """One position for each token, (B or 1, T), or None where they follow the cache. Qwen-VL's models count in time, height
        and width, in which tokens of an image differ: for methods that rotate by themselves that is refused, the others count
        tokens."""
        given = arguments.get("position_ids")
        if given is None or given.ndim == 2 or self.attend is None:
            return given
        time, *others = given[-3:]
        if self.rotates:
            if not all(torch.equal(time, other) for other in others):
                raise NotSupported(
                    f"{self.methods.spec} rotates by itself, along one line, and tokens of an image have positions in time, "
                    f"height and width in {self.facts.architecture}; use window, logn or yarn with images, or texts without"
                )
            arguments["position_ids"] = time
            return time
        mask, new = arguments.get("attention_mask"), given.shape[-1]
        if isinstance(mask, Tensor) and mask.ndim == 2:
            return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -new:]
        return torch.arange(start, start + new, device=given.device)[None]

    def _claim(self, arguments: dict[str, Any]) -> None:
        """Makes the forward's cache this method's. One that the decoder would make is made here, as it would."""
        cache, use = arguments["cache"], arguments.get("use_cache")
        config = self.decoder.config
        wanted = getattr(config, "use_cache", False) if use is None else use
        made = self.makes_dynamic_caches and not self.drops_caches and getattr(self.decoder, "causal", True)
        if cache is None and wanted and made:
            cache = arguments["cache"] = DynamicCache(config=config)
        if cache is not None:
            claim(cache, self.methods.spec, checked="cache" in self.slots)

    def _mark(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Makes a cache of the decoder's own kind, which it has just filled, this method's."""
        if not self.facts.encoder_decoder and isinstance(cache := compat.cache_of(output), Cache):
            mark(cache, self.methods.spec)

    def _tag(self, arguments: dict[str, Any], forward: Forward) -> None:
        positions = arguments.get("position_ids")
        if positions is None:
            given = arguments.get("input_ids")
            given = arguments["inputs_embeds"] if given is None else given
            start = _length(arguments["cache"])
            positions = torch.arange(start, start + given.shape[1], device=given.device)[None]
        arguments["position_ids"] = tag(positions, forward)

    @property
    def drops_caches(self) -> bool:
        """Whether gradient checkpointing keeps the caches from the layers, as transformers does in training."""
        return self.training and any(getattr(m, "gradient_checkpointing", False) for m in self.decoder.modules())

    @property
    def training(self) -> bool:
        """Whether the decoder is in training mode, whatever the mode of a head or an adapter around it."""
        return self.decoder.training

    @property
    def slots(self) -> frozenset[str]:
        return frozenset().union(*(method.slots for method in self.methods.methods))

    def layer_type(self, module: nn.Module) -> str | None:
        """The module's entry in `config.layer_types` where rotary angles differ by it (Gemma 3), else None."""
        if self.facts.rope is None or not self.facts.rope.per_layer_type:
            return None
        return text_config(self.model.config).layer_types[layer_number(module)]

    def undo(self) -> None:
        while self._undo:
            self._undo.pop()()

    def _only_rotary(self) -> tuple[str, nn.Module]:
        modules = rotary_modules(self.model)
        if len(modules) != 1:
            raise NotSupported(
                f"{self.facts.architecture} has {len(modules)} rotary modules; methods that rotate by themselves need exactly one"
            )
        return modules[0]

    def _replace(self, name: str, module: nn.Module) -> None:
        parent, _, leaf = name.rpartition(".")
        owner = self.model.get_submodule(parent)
        self._undo.append(partial(setattr, owner, leaf, getattr(owner, leaf)))
        setattr(owner, leaf, module)


def _restore_rope(config: PreTrainedConfig, parameters: dict[str, Any], window: int) -> None:
    config.rope_parameters, config.max_position_embeddings = parameters, window


def _leave(
    hook: Callable[[Forward, Any], Any], module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any
) -> Any:
    return hook(forward_of(kwargs), output)


def _length(cache: Any) -> int:
    """Tokens in a cache."""
    return 0 if cache is None else int(cache.get_seq_length())


def layer_number(module: nn.Module) -> int:
    """The attention module's place in the model, from 0."""
    return int(module.layer_idx)  # type: ignore[arg-type]


def _is_attention(module: nn.Module) -> bool:
    return hasattr(module, "layer_idx") and "attention" in type(module).__name__.lower()


def _run_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_ids: Tensor | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function registered with transformers: hands the call to the method that is on this module's model."""
    site: Site | None = getattr(module, SITE, None)
    if site is None or site.attend is None:
        raise LongspanError("the attention implementation 'longspan' runs only on a model that a method was applied to")
    if kwargs.get("s_aux") is not None:
        raise NotSupported(
            f"{site.facts.architecture} has learned attention sinks, which {site.methods.spec} does not know"
        )
    forward = handed(kwargs, position_ids)
    if forward is None:
        raise RecordLost(
            f"{site.methods.spec}: {site.facts.architecture} runs its attention outside a forward of its decoder, where what "
            "belongs to a forward is not known; call the model or its decoder, and not a layer"
        )
    # Under autocast a model's float32 angles make queries and keys float32 beside 16-bit values, and not every kernel takes both.
    query, key = query.to(value.dtype), key.to(value.dtype)
    call = LayerCall(
        module=module,
        query=query,
        key=key,
        value=value,
        mask=attention_mask,
        scale=scaling if scaling is not None else query.shape[-1] ** -0.5,
        dropout=dropout,
        position_ids=forward.positions(query) if position_ids is None or position_ids.ndim > 2 else position_ids,
        softcap=softcap,
        sliding_window=sliding_window,
        forward=forward,
        extra=kwargs,
    )
    if site._scale is not None:
        call = replace(call, query=call.query * site._scale(call).to(call.query.dtype))
    return site.attend(call).transpose(1, 2).contiguous(), None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    return None


for _name, _mask in ((ATTENTION, AttentionMaskInterface()["sdpa"]), (ATTENTION_OWN_MASK, _no_mask)):
    AttentionInterface.register(_name, _run_attention)
    AttentionMaskInterface.register(_name, _mask)


def remove(model: PreTrainedModel) -> None:
    """Takes off whatever `apply` put on; a model without a method is left alone."""
    if (site := site_of(model)) is not None:
        site.undo()
        object.__delattr__(site.decoder, SITE)


def current(model: PreTrainedModel) -> Combination | None:
    """What is on the model, with every derived setting filled in; None where nothing is."""
    site = site_of(model)
    return site.methods if site else None


def site_of(model: PreTrainedModel) -> Site | None:
    """What `apply` has put on a model, through whichever of its wrappers (a head, an adapter); None where nothing is."""
    holder = decoder_of(model) if hasattr(model, "get_decoder") else model
    return getattr(holder, SITE, None)
