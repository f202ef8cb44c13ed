"""What a method may change on a model, and how each change is undone; the only code that touches a model's modules.

Every change goes through what transformers and torch offer for it: the model's own rotary module rebuilt from a changed
configuration, `AttentionInterface` and `AttentionMaskInterface`, forward hooks (`longspan.hf.hooks`), cache layers. No class is
patched. `remove` restores the model bit for bit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel

from longspan.core.facts import ModelFacts, decoder_of, rope_parameters, rotary_modules, text_config
from longspan.core.method import Combination
from longspan.hf.call import LayerCall
from longspan.hf.forward import handed
from longspan.hf.hooks import ModelHooks
from longspan.hf.model_attention import run_model_attention
from longspan.hf.parts import parts_of
from longspan.hf.rotary import Rotary, unrotated_copy
from longspan.util.errors import LongspanError, NotSupported

ATTENTION = "longspan"
"""The attention implementation whose masks are made as for SDPA: None where plainly causal, else boolean (B, 1, Tq, Tk)."""
ATTENTION_OWN_MASK = "longspan_own_mask"
"""The attention implementation of methods that decide by themselves which keys a query sees; no mask is made for it."""

_SCALING = frozenset(
    {"rope_type", "type", "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"}
    | {"truncate", "short_factor", "long_factor", "short_mscale", "long_mscale", "low_freq_factor", "high_freq_factor"}
    | {"mscale", "mscale_all_dim"}
)
"""Entries of `rope_parameters` that belong to one kind of scaling; the others (`mrope_section`, …) belong to the model."""
SITE = "_longspan"


class RecordLost(NotSupported):
    """The record of a forward did not reach an attention function."""


class Site(ModelHooks):
    """A model with methods on it: what methods may change, and how each change is undone."""

    def __init__(self, model: PreTrainedModel, methods: Combination, facts: ModelFacts):
        super().__init__(model, methods, facts)
        self.attention_modules: list[nn.Module] = []
        self.state: Any = None
        """What the method that computes attention keeps between calls, for the fast paths in `longspan.engine`."""
        self.query_scale: Callable[[LayerCall], Tensor] | None = None
        """A factor on every query, broadcastable to (B, 1, Tq, 1); set by `scale_queries`."""
        self._implementation = ""  # the model's own attention implementation, while ours is set

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
        """The angles of the model's rotary module, with whatever scaling has been put on it."""
        return self._rotary if hasattr(self, "_rotary") else Rotary(self._only_rotary()[1])

    def parts(self, name: str) -> nn.Module:
        """The module that the method of this name added to the model (`Method.parts`), with its trained parameters.

        Raises `NotSupported` for a model that was never trained with the method.
        """
        if name not in parts_of(self.model):
            raise NotSupported(
                f"{name} has parameters of its own, and this {self.facts.architecture} was not trained with it: longspan train "
                f"with method={name} teaches it, and longspan.hf.parts.add_parts gives it untrained ones"
            )
        return parts_of(self.model)[name]

    def set_rope(self, changes: dict[str, Any], window: int) -> None:
        """Static scaling: sets `rope_parameters` and `max_position_embeddings` and rebuilds the rotary modules from them.

        changes: entries of `rope_parameters`, which replace those of an earlier scaling; window: in tokens. The configuration
        then holds the whole method, so a saved model keeps it.
        """
        config = text_config(self.model.config)
        before = copy.deepcopy(config.rope_parameters), config.max_position_embeddings
        # First of all: a rotary module that cannot be built from the new settings must not leave them behind.
        self.keep_for_undo(partial(_restore_rope, config, *before))
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

    def takes_rope(self, parameters: dict[str, Any]) -> bool:
        """Whether this architecture's configuration allows such `rope_parameters` (Phi-3's allows LongRoPE only)."""
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
        """Lets queries and keys reach the attention function, and the KV cache, without rotation.

        `rotary` still gives the true angles, by which the method rotates by itself. Raises `NotSupported` for a model with more
        than one rotary module.
        """
        self.rotates = True
        name, module = self._only_rotary()
        self._rotary = Rotary(module)
        self._replace(name, unrotated_copy(module))

    def attention(self, attend: Callable[[LayerCall], Tensor], *, own_mask: bool = False) -> None:
        """Runs `attend` as the attention of every layer; it returns (B, H, Tq, D).

        own_mask: `attend` decides by itself which keys a query sees, and `LayerCall.mask` is None.
        """
        self._implementation = self.decoder.config._attn_implementation
        self.attend = attend
        self.keep_for_undo(partial(self.decoder.set_attn_implementation, self._implementation))
        self.decoder.set_attn_implementation(ATTENTION_OWN_MASK if own_mask else ATTENTION)
        self.attention_modules = [m for m in self.decoder.modules() if _is_attention(m)]
        for module in self.attention_modules:
            object.__setattr__(module, SITE, self)
            self.keep_for_undo(partial(object.__delattr__, module, SITE))
        self.before_forward(self._refuse_static_cache)
        if own_mask:
            self.before_forward(self._refuse_prepared_masks)

    @property
    def plain_attention(self) -> bool:
        """Whether the model's own attention, now under ours, is transformers' SDPA: softmax(scale · q kᵀ + mask) v."""
        return self._implementation == "sdpa"

    def own_attention(self, call: LayerCall, mask: Tensor | None, multiplicity: Tensor | None = None) -> Tensor:
        """The model's own attention (B, H, Tq, D) over the call's keys under another mask.

        For methods that only decide which keys are visible: whatever else the model does to its scores stays. The arguments, and
        what is raised, are those of `longspan.hf.model_attention.run_model_attention`.
        """
        return run_model_attention(call, mask, multiplicity, self._implementation, self.methods.spec)

    def scale_queries(self, scale: Callable[[LayerCall], Tensor]) -> None:
        """Multiplies every query by `scale(call)`, broadcastable to (B, 1, Tq, 1), before its attention.

        The attention is that of the method on the model, or the model's own where no method replaces it.
        """
        if self.attend is None:
            self.attention(self._unchanged)
        self.query_scale = scale

    def _unchanged(self, call: LayerCall) -> Tensor:
        return self.own_attention(call, call.mask)

    def _refuse_static_cache(self, arguments: dict[str, Any]) -> None:
        cache = arguments.get("cache")
        if getattr(cache, "is_compileable", False):
            raise NotSupported(
                f"{self.methods.spec} counts positions back from a cache's last key, and a {type(cache).__name__} has empty "
                "slots after it; use the default DynamicCache (in generate: leave out cache_implementation)"
            )

    def _refuse_prepared_masks(self, arguments: dict[str, Any]) -> None:
        if isinstance(arguments.get("attention_mask"), dict):
            raise NotSupported(
                f"{self.methods.spec} decides which keys a query sees, and {self.facts.architecture} prepares masks of its own "
                "before its decoder runs (tokens of an image see one another); use self-extend, window or yarn, or the text "
                "model alone"
            )

    def layer_type(self, module: nn.Module) -> str | None:
        """The module's entry in `config.layer_types` where rotary angles differ by it (Gemma 3), else None."""
        if self.facts.rope is None or not self.facts.rope.per_layer_type:
            return None
        return text_config(self.model.config).layer_types[layer_number(module)]

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
        self.keep_for_undo(partial(setattr, owner, leaf, getattr(owner, leaf)))
        setattr(owner, leaf, module)


def _restore_rope(config: PreTrainedConfig, parameters: dict[str, Any], window: int) -> None:
    config.rope_parameters, config.max_position_embeddings = parameters, window


def layer_number(module: nn.Module) -> int:
    """The index of the attention module's layer, from 0."""
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
    """The function registered with transformers: runs the attention of the method on this module's model, (B, Tq, H, D)."""
    site: Site | None = getattr(module, SITE, None)
    if site is None or site.attend is None:
        raise LongspanError("the attention implementation 'longspan' runs only on a model that a method was applied to")
    if kwargs.get("s_aux") is not None:
        raise NotSupported(
            f"{site.facts.architecture} has learned attention sinks, which {site.methods.spec} leaves out; use a model without"
        )
    forward = handed(kwargs, position_ids)
    if forward is None:
        raise RecordLost(
            f"{site.methods.spec}: {site.facts.architecture} ran its attention outside a forward of its decoder, so the "
            "positions and the cache of the forward are not known; call the model or its decoder, and not a layer"
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
    if site.query_scale is not None:
        call = replace(call, query=call.query * site.query_scale(call).to(call.query.dtype))
    return site.attend(call).transpose(1, 2).contiguous(), None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    return None


for _name, _mask in ((ATTENTION, AttentionMaskInterface()["sdpa"]), (ATTENTION_OWN_MASK, _no_mask)):
    AttentionInterface.register(_name, _run_attention)
    AttentionMaskInterface.register(_name, _mask)


def remove(model: PreTrainedModel) -> None:
    """Takes the methods off `model`, which is then as it was before `apply`, bit for bit; without a method nothing happens."""
    if (site := site_of(model)) is not None:
        site.undo()
        object.__delattr__(site.decoder, SITE)


def current(model: PreTrainedModel) -> Combination | None:
    """The methods on `model`, with every derived setting filled in; None where there are none."""
    site = site_of(model)
    return site.methods if site else None


def site_of(model: PreTrainedModel) -> Site | None:
    """The site that `apply` put on `model`, found through a head or an adapter around its decoder; None without a method."""
    holder = decoder_of(model) if hasattr(model, "get_decoder") else model
    return getattr(holder, SITE, None)
