"""Puts a method on a model and takes it off again; the only code that touches a model's modules.

Everything goes through places that transformers and torch keep open: the model's own rotary module rebuilt from a changed
configuration, `AttentionInterface` with `AttentionMaskInterface` beside it, forward pre-hooks, cache layers. No class is
patched. `remove` restores the model bit for bit.

    apply(model, "yarn:factor=4")
    with applied(model, "streaming:window=2044"):
        model.generate(...)
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NoReturn, TypeVar

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

from longspan.engine.core import attention, causal_mask, with_zero_key
from longspan.errors import LongspanError, NotSupported
from longspan.facts import ModelFacts, facts_of, rope_parameters, rotary_modules, text_config
from longspan.hf import compat
from longspan.hf.compat import FORWARD, decoder_of
from longspan.hf.forward import Forward, forward_of, handed, tag
from longspan.hf.ownership import claim, mark
from longspan.method import Combination, Method, combination
from longspan.positions.rotary import Rotary, angles, rotate, unrotated_copy
from longspan.positions.scheme import ending_at

ATTENTION = "longspan"
"""Attention implementation whose masks are made as for SDPA: None where plainly causal, else boolean (B, 1, Tq, Tk)."""
ATTENTION_OWN_MASK = "longspan_own_mask"
"""The same for methods that know by themselves what each query sees."""

_SITE = "_longspan"
_SHORT = 8
"""Tokens of the input on which a method is tried."""
_TOLERANCE = {True: 1e-3, False: 5e-2}
"""Relative error of logits between two ways to compute the same, in 32 bits and more (True) and in 16."""
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
_STILL_WORK = "Methods that only change frequencies may still work: ntk, yarn"
_ANOTHER = "Use none, or a model with RoPE (Llama, Mistral, Qwen, Phi-3, Gemma, …)"
Model = TypeVar("Model", bound=PreTrainedModel)


@dataclass
class Attend:
    """One call of attention. Shapes: query (B, H, Tq, D), key and value (B, H_kv, Tk, D) as the cache returned them,
    mask None or boolean (B, 1, Tq, Tk), position_ids (B or 1, Tq). `extra` is what else the model says to its attention."""

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scale: float
    dropout: float
    position_ids: Tensor
    softcap: float | None
    sliding_window: int | None
    extra: dict[str, Any] = field(default_factory=dict)
    forward: Forward = field(default_factory=Forward)
    """What belongs to the forward that this call is part of."""
    keys_at: Tensor | None = None
    """(B or 1, Tk), where the positions of the keys are known to be others than the usual."""

    @property
    def key_positions(self) -> Tensor:
        """(B or 1, Tk). Without a cache they are the queries' own, whatever these are; with one, keys end where queries end."""
        if self.keys_at is not None:
            return self.keys_at
        return ending_at(self.position_ids, self.key.shape[2])

    @property
    def ahead(self) -> int:
        """How many keys past its own place a query may see: none, unless tokens of an image see one another."""
        if self.forward.causal or self.mask is None:
            return 0
        return self.forward.once(f"ahead:{self.mask.shape}", self._ahead)

    def _ahead(self) -> int:
        assert self.mask is not None
        new, held = self.mask.shape[-2:]
        columns = torch.arange(held, device=self.mask.device)
        last = torch.where(self.mask, columns, 0).amax(-1)
        return max(0, int((last - columns[held - new :]).max()))

    def part(self, queries: slice, keys: slice | Tensor) -> Attend:
        """The same for some queries and some keys."""
        return replace(
            self,
            query=self.query[:, :, queries],
            key=self.key[:, :, keys],
            value=self.value[:, :, keys],
            mask=None if self.mask is None else self.mask[:, :, queries, keys],
            position_ids=self.position_ids[:, queries],
            keys_at=self.key_positions[:, keys],
        )


class _Lost(NotSupported):
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
        self._attend: Callable[[Attend], Tensor] | None = None
        self._scale: Callable[[Attend], Tensor] | None = None
        self._own = ""  # the model's own attention implementation, while ours is set
        self.decoder = decoder_of(model)
        self._before: list[Callable[[dict[str, Any]], None]] = []
        self._names = compat.parameters(self.decoder.forward)
        self._takes_cache = getattr(self.decoder.config, "use_cache", None) is not None
        self._keywords = compat.takes_keywords(self.decoder.forward)
        self._opened = False
        self.makes_dynamic_caches = True
        """Whether the decoder makes itself a `DynamicCache` where it is given none; MiniMax has a kind of its own."""
        self._rotates = False
        """Whether a method turns queries or keys by itself."""
        self._tags_positions = False
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
        self._rotates = True
        name, module = self._only_rotary()
        self._rotary = Rotary(module)
        self._replace(name, unrotated_copy(module))

    def prove_rotation(self) -> None:
        """For methods that turn only some queries or keys by themselves, and none in a short input: proves that `rotate`
        turns as this architecture does, by plain attention over what it has turned."""
        self._rotates = True
        trial = Site(self.model, self.methods, self.facts)

        def attend(call: Attend) -> Tensor:
            tables = trial.rotary.tables(call.position_ids, call.query, trial.layer_type(call.module))
            query, key = (rotate(call.module, x, *tables) for x in (call.query, call.key))
            return _own_plain_attention(replace(call, query=query, key=key))

        trial._prove(attend, unrotated=True)

    def prove_attention(self) -> None:
        """For methods that change every input: proves that queries, keys, values and mask are all there is to this
        architecture's attention, by plain attention over them."""
        Site(self.model, self.methods, self.facts)._prove(_plain_attention)

    def _prove(self, attend: Callable[[Attend], Tensor], *, unrotated: bool = False) -> None:
        """Compares a short input under `attend` with the model as it is; nothing stays on the model."""
        before = _probe(self.model, _SHORT)
        tolerance = _tolerance(self, before)
        try:
            if unrotated:
                self.unrotate()
            self.attention(attend)
            _compare(self, before, _tried(self, _SHORT), tolerance)
        finally:
            self.undo()

    def attention(self, attend: Callable[[Attend], Tensor], *, own_mask: bool = False) -> None:
        """Runs `attend` as every layer's attention; it returns (B, H, Tq, D)."""
        self._own = self.decoder.config._attn_implementation
        self._attend = attend
        self._undo.append(partial(self.decoder.set_attn_implementation, self._own))
        self.decoder.set_attn_implementation(ATTENTION_OWN_MASK if own_mask else ATTENTION)
        self.attention_modules = [m for m in self.decoder.modules() if _is_attention(m)]
        for module in self.attention_modules:
            object.__setattr__(module, _SITE, self)
            self._undo.append(partial(object.__delattr__, module, _SITE))
        self.before_forward(self._refuse_static)
        if own_mask:
            self.before_forward(self._refuse_made_masks)

    @property
    def plain_attention(self) -> bool:
        """Whether the model's own attention, now under ours, is transformers' SDPA: softmax(scale · q kᵀ + mask) v."""
        return self._own == "sdpa"

    def own_attention(self, call: Attend, mask: Tensor | None, counts: Tensor | None = None) -> Tensor:
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

    def scale_queries(self, scale: Callable[[Attend], Tensor]) -> None:
        """Multiplies every query by `scale(call)`, broadcastable to (B, 1, Tq, 1), before its attention: that of the method on
        the model, or the model's own where no method takes it."""
        if self._attend is None:
            self.attention(self._unchanged)
        self._scale = scale

    def _unchanged(self, call: Attend) -> Tensor:
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
        if self._tags_positions:
            self._tag(arguments, forward)
        cache = arguments.pop("cache")
        if cache is not None or self._takes_cache:
            arguments[compat.cache_argument(module)] = cache
        if not self._keywords or self._attend is None:
            del arguments[FORWARD]
        return (), arguments

    def _positions(self, arguments: dict[str, Any], start: int) -> Tensor | None:
        """One position for each token, (B or 1, T), or None where they follow the cache. Qwen-VL's models count in time, height
        and width, in which tokens of an image differ: for methods that rotate by themselves that is refused, the others count
        tokens."""
        given = arguments.get("position_ids")
        if given is None or given.ndim == 2 or self._attend is None:
            return given
        time, *others = given[-3:]
        if self._rotates:
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
            claim(cache, self.methods.spec, checked="cache" in self._slots)

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
    def _slots(self) -> frozenset[str]:
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
    site: Site | None = getattr(module, _SITE, None)
    if site is None or site._attend is None:
        raise LongspanError("the attention implementation 'longspan' runs only on a model that a method was applied to")
    if kwargs.get("s_aux") is not None:
        raise NotSupported(
            f"{site.facts.architecture} has learned attention sinks, which {site.methods.spec} does not know"
        )
    forward = handed(kwargs, position_ids)
    if forward is None:
        raise _Lost(
            f"{site.methods.spec}: {site.facts.architecture} runs its attention outside a forward of its decoder, where what "
            "belongs to a forward is not known; call the model or its decoder, and not a layer"
        )
    # Under autocast a model's float32 angles make queries and keys float32 beside 16-bit values, and not every kernel takes both.
    query, key = query.to(value.dtype), key.to(value.dtype)
    call = Attend(
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
        call.query = call.query * site._scale(call).to(call.query.dtype)
    return site._attend(call).transpose(1, 2).contiguous(), None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    return None


for _name, _mask in ((ATTENTION, AttentionMaskInterface()["sdpa"]), (ATTENTION_OWN_MASK, _no_mask)):
    AttentionInterface.register(_name, _run_attention)
    AttentionMaskInterface.register(_name, _mask)


def apply(
    model: Model, method: str | Method | Combination | Iterable[str | Method], *, length: int | None = None
) -> Model:
    """Puts `method` on `model` in place and returns the model; what was on it before is taken off first.

    length: the target length in tokens, from which settings that were left open are derived.
    Raises `SpecError` for a method that cannot be read and `NotSupported` for one that cannot work on this model; the model
    is then as it was.
    """
    methods = combination(method)
    previous = current(model)
    remove(model)
    try:
        facts = facts_of(model)
        site = Site(model, methods.resolve(facts, length), facts)
        site.makes_dynamic_caches = facts.encoder_decoder or not site._slots or _makes_dynamic_caches(model)
        _attach(site)
    except BaseException:
        if previous is not None:
            apply(model, previous)
        raise
    object.__setattr__(site.decoder, _SITE, site)
    # An encoder's model has one configuration, of which `text_config` gives a copy.
    config = model.config if site.facts.encoder_decoder else text_config(model.config)
    before = getattr(config, "longspan", None)  # a checkpoint may have been saved with a method in it
    config.longspan = {"method": site.methods.spec}
    site.keep_for_undo(partial(setattr, config, "longspan", before) if before else partial(delattr, config, "longspan"))
    return model


def remove(model: PreTrainedModel) -> None:
    """Takes off whatever `apply` put on; a model without a method is left alone."""
    if (site := site_of(model)) is not None:
        site.undo()
        object.__delattr__(site.decoder, _SITE)


def current(model: PreTrainedModel) -> Combination | None:
    """What is on the model, with every derived setting filled in; None where nothing is."""
    site = site_of(model)
    return site.methods if site else None


def site_of(model: PreTrainedModel) -> Site | None:
    """What `apply` has put on a model, through whichever of its wrappers (a head, an adapter); None where nothing is."""
    holder = decoder_of(model) if hasattr(model, "get_decoder") else model
    return getattr(holder, _SITE, None)


@contextlib.contextmanager
def applied(
    model: Model, method: str | Method | Combination | Iterable[str | Method], *, length: int | None = None
) -> Iterator[Model]:
    """`apply` for the length of a `with` block; afterwards the model is as it was before."""
    previous = current(model)
    apply(model, method, length=length)
    try:
        yield model
    finally:
        remove(model)
        if previous is not None:
            apply(model, previous)


def _attach(site: Site) -> None:
    """Frequencies first, attention after them, then what changes its queries; methods within the attention must leave short
    inputs unchanged."""
    try:
        for method in sorted(site.methods.methods, key=lambda m: ("queries" in m.slots, "attention" in m.slots)):
            if site.facts.encoder_decoder and method.slots:
                _attach_to_encoder_decoder(site, method)
            elif method.slots & {"attention", "queries"}:
                _attach_attention(site, method)
            elif "frequencies" in method.slots:
                _attach_frequencies(site, method)
            else:
                method.attach(site)
        if site._slots and not site.facts.encoder_decoder:
            site.open()
    except BaseException:
        site.undo()
        raise


def _attach_attention(site: Site, method: Method) -> None:
    """Attaches, then proves on one short input that the model calls our attention and that nothing changed where the method
    changes nothing: an architecture with a rotation or a kernel that we do not know is refused, never run wrongly. Where a
    method changes every input, plain attention in its place is compared first."""
    if not site.facts.attention_interface:
        raise NotSupported(
            f"{method.name} needs a model that calls its attention through transformers' AttentionInterface; "
            f"{site.facts.architecture} does not. "
            + ("Methods that only change frequencies still work: ntk, yarn" if site.facts.rope else _ANOTHER)
        )
    built_with = next((p for m in site.model.modules() if hasattr(p := getattr(m, "pattern", None), "visible")), None)
    if "attention" in method.slots and built_with is not None:
        raise NotSupported(
            f"{method.name} changes which keys are seen, and this model was built with {built_with.spec}, which says so itself; "
            "build it with attention=full, or with the other pattern"
        )
    try:
        neutral = method.neutral_length()
        length = min(_SHORT, neutral) or _SHORT
        if not neutral:
            site.prove_attention()
        before = _probe(site.model, length)
        tolerance = _tolerance(site, before) if neutral else 0.0
        caches = _reads_in_pieces(site.model, before)
        method.attach(site)
        after = _tried(site, length)
        with _counted(site) as called:
            _probe(site.model, length)
        pieces = _probe_in_pieces(site.model, length) if caches else None
    except LongspanError:
        raise
    except Exception as error:
        raise NotSupported(
            f"{method.name} does not run on {site.facts.architecture}: {type(error).__name__}: {error}. {_STILL_WORK}"
        ) from error
    if len(called) != site.facts.layers:
        raise NotSupported(
            f"{method.name} works in every layer's attention, and {site.facts.architecture} asked for {len(called)} of "
            f"{site.facts.layers}. {_STILL_WORK}"
        )
    if neutral:
        _compare(site, before, after, tolerance)
    if pieces is not None and not _error(after, pieces) < max(tolerance, _TOLERANCE[_wide(after.dtype)]):
        raise NotSupported(
            f"{site.methods.spec} reads a short input otherwise when its second part goes on from a KV cache (relative error "
            f"{_error(after, pieces):.1e}): {site.facts.architecture} hands on its cache in a way that is not known. "
            + _STILL_WORK
        )


def _attach_frequencies(site: Site, method: Method) -> None:
    """Attaches, then proves on tokens far apart that new angles make new logits: a rotary module that the model has and never
    calls would change nothing."""
    try:
        positions = torch.linspace(0, site.facts.window - 1, min(_SHORT, site.facts.window)).long()[None]
        old = [(module, angles(module, positions)) for _, module in rotary_modules(site.model)]
        before = _probe(site.model, positions.shape[1], positions)
        method.attach(site)
        new = [angles(module, positions) for _, module in rotary_modules(site.model)]
        after = _probe(site.model, positions.shape[1], positions)
        # Twice past the trained window: some versions of transformers choose other frequencies there, and fail the second time.
        past = positions + text_config(site.model.config).max_position_embeddings
        for _ in range(2):
            _probe(site.model, positions.shape[1], past)
    except LongspanError:
        raise
    except Exception as error:
        raise NotSupported(
            f"{method.spec} does not run on {site.facts.architecture}: {type(error).__name__}: {error}. {_ANOTHER}"
        ) from error
    others = any(not torch.equal(a, b) for (_, a), b in zip(old, new, strict=True))
    if others and torch.equal(before, after):
        raise NotSupported(
            f"{method.spec} changes nothing here: {site.facts.architecture} has a rotary module and does not use it for its "
            f"attention. {_ANOTHER}"
        )


def _plain_attention(call: Attend) -> Tensor:
    query = call.query
    mask = call.mask if call.mask is not None else query.new_ones(query.shape[2], call.key.shape[2]).tril().bool()
    return attention(query, call.key, call.value, mask, call.scale, softcap=call.softcap)


def _plain_attention_in_float32(call: Attend) -> Tensor:
    wide = replace(call, query=call.query.float(), key=call.key.float(), value=call.value.float())
    return _own_plain_attention(wide).to(call.query.dtype)


def _own_plain_attention(call: Attend) -> Tensor:
    """The same with the zero key that a model of ours may have; what it keeps from other methods is theirs to know."""
    if not getattr(call.module, "zero_key", False):
        return _plain_attention(call)
    mask = (
        call.mask if call.mask is not None else causal_mask(call.query.shape[2], call.key.shape[2], call.query.device)
    )
    key, value, shown = with_zero_key(call.key, call.value, mask)
    return _plain_attention(replace(call, key=key, value=value, mask=shown))


def _attach_to_encoder_decoder(site: Site, method: Method) -> None:
    """Attaches, then proves on one short input that nothing changed where the method changes nothing."""
    length = min(_SHORT, method.neutral_length())
    try:
        before = _probe(site.model, length)
        method.attach(site)
        after = _probe(site.model, length)
    except LongspanError:
        raise
    except Exception as error:
        raise NotSupported(
            f"{method.name} does not run on {site.facts.architecture}: {type(error).__name__}: {error}"
        ) from error
    _compare(site, before, after, _TOLERANCE[_wide(before.dtype)])


@contextlib.contextmanager
def _counted(site: Site) -> Iterator[list[nn.Module]]:
    """The modules that ask for their attention within the block."""
    attend = site._attend
    called: list[nn.Module] = []

    def count(call: Attend) -> Tensor:
        called.append(call.module)
        assert attend is not None, "a method that takes the attention gives site.attention(...) a function"
        return attend(call)

    site._attend = count
    yield called
    site._attend = attend


def _error(expected: Tensor, found: Tensor) -> float:
    return ((found - expected).double().norm() / expected.double().norm()).item()


def _wide(dtype: torch.dtype) -> bool:
    return dtype in (torch.float32, torch.float64)


def _tolerance(site: Site, before: Tensor) -> float:
    """How far a method that must leave the short input unchanged may be from it, as a relative error. In 16 bits that is at
    least what two ways to round the model's own attention differ by: scores may be large."""
    if _wide(before.dtype):
        return _TOLERANCE[True]
    plain = Site(site.model, site.methods, site.facts)
    try:
        plain.attention(_plain_attention_in_float32)
        own = _error(before, _tried(plain, before.shape[1]))
    except LongspanError:
        own = 0.0
    finally:
        plain.undo()
    return max(_TOLERANCE[False], 2 * own)


def _compare(site: Site, before: Tensor, after: Tensor, tolerance: float) -> None:
    """Raises `NotSupported` where a method that must leave a short input unchanged does not."""
    error = _error(before, after)
    if not error < tolerance:
        raise NotSupported(
            f"{site.methods.spec} does not reproduce {site.facts.architecture} on a short input (relative error {error:.1e}): "
            f"this architecture rotates or attends in a way that the method does not know. {_STILL_WORK}"
        )


def _tried(site: Site, length: int) -> Tensor:
    """Logits of the short input under the methods of `site`; finds out how the record of a forward reaches attention here."""
    try:
        return _probe(site.model, length)
    except _Lost:
        if site._tags_positions:
            raise
        site._tags_positions = True
        return _probe(site.model, length)


def _reads_in_pieces(model: PreTrainedModel, whole: Tensor) -> bool:
    """Whether the model by itself gives the same logits when it goes on from a cache: some of ours decode otherwise or not."""
    try:
        return (
            whole.shape[1] > 1
            and _error(whole, _probe_in_pieces(model, whole.shape[1])) < _TOLERANCE[_wide(whole.dtype)]
        )
    except Exception:
        return False


@torch.no_grad()
def _makes_dynamic_caches(model: PreTrainedModel) -> bool:
    with _evaluating(model):
        try:
            cache = compat.cache_of(model(input_ids=_short_input(model, 1), use_cache=True))
        except Exception:  # whatever it is, the method's own trial says it
            return True
    return cache is None or type(cache) is DynamicCache


@contextlib.contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _short_input(model: PreTrainedModel, length: int) -> Tensor:
    vocabulary = text_config(model.config).vocab_size
    return (torch.arange(length, device=compat.input_device(model)) * 7919 + 17)[None] % vocabulary


@torch.no_grad()
def _probe(model: PreTrainedModel, length: int, positions: Tensor | None = None) -> Tensor:
    """Logits of a short fixed input in evaluation mode, or what the model's first output is where it has no such head."""
    ids = _short_input(model, length)
    asked: dict[str, Any] = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    if positions is not None:  # with a mask, or the jumps would be read as documents packed into a row
        asked |= {"position_ids": positions.to(ids.device), "attention_mask": torch.ones_like(ids)}
    with _evaluating(model):
        return _first(model(input_ids=ids, use_cache=False, **asked))


@torch.no_grad()
def _probe_in_pieces(model: PreTrainedModel, length: int) -> Tensor:
    """The same of an input whose second part goes on from the cache of the first."""
    ids = _short_input(model, length)
    with _evaluating(model):
        first = model(input_ids=ids[:, : length // 2], use_cache=True)
        rest = {**compat.with_cache(model, compat.cache_of(first)), "use_cache": True}
        return torch.cat((_first(first), _first(model(input_ids=ids[:, length // 2 :], **rest))), dim=1)


def _first(output: Any) -> Tensor:
    return output.logits if "logits" in output else output[0]
