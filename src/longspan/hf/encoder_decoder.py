"""Changes to encoder-decoders: the input of the encoder, the states that the decoder gets, the cross-attention.

Every change is undone by `remove`, as in `longspan.hf.site`. Cross-attention is replaced through `AttentionInterface` where the
family uses it: only the modules of cross-attention get a copy of their configuration, with our implementation. Where the family
computes attention in its own code (LED), a forward hook replaces the module's output.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from longspan.hf import compat
from longspan.hf.site import Site
from longspan.util.errors import LongspanError, NotSupported

CROSS = "longspan_cross"
"""The attention implementation of cross-attention modules alone."""
_ATTACHED = "_longspan_attached"
"""The attribute of a tensor for what `attach` attaches to it."""
_CALL = "longspan_cross"
"""The keyword argument by which a cross-attention module passes this call's function to its attention function."""

_LAYOUTS = {
    "encoder_attn": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "EncDecAttention": ("q", "k", "v", "o"),
}
"""Names of cross-attention modules within a layer, and of their projections: BART's and T5's."""

Arguments = dict[str, Any]
CrossAttend = Callable[["Projections", Any, Tensor, float, float], Tensor]
"""(projections, what `attach` attached to the encoder's states, query (B, H, T, D), scale, dropout) -> (B, H, T, D)."""


class Projections:
    """The projections of one cross-attention module, looked up at each use, since an adapter may be added later."""

    def __init__(self, module: nn.Module, names: tuple[str, str, str, str]):
        self._module = module
        self._query, self._key, self._value, self._out = names

    def query(self, hidden: Tensor) -> Tensor:
        """The query projection of hidden states (B, T, d), heads side by side."""
        return getattr(self._module, self._query)(hidden)

    def out(self, attended: Tensor) -> Tensor:
        """The output projection of attention's result (B, T, H · D)."""
        return getattr(self._module, self._out)(attended)

    @property
    def key(self) -> nn.Linear:
        """The key projection. Raises `NotSupported` where it is not a plain `nn.Linear`."""
        return self._plain(self._key)

    @property
    def value(self) -> nn.Linear:
        """The value projection. Raises `NotSupported` where it is not a plain `nn.Linear`."""
        return self._plain(self._value)

    def _plain(self, name: str) -> nn.Linear:
        layer = getattr(self._module, name)
        if type(layer) is not nn.Linear:
            raise NotSupported(
                f"cross-attention projects its keys and values by a {type(layer).__name__}, and unlimiformer needs a plain "
                "nn.Linear, whose weight it multiplies into the query; merge the adapter, or load the model unquantized"
            )
        return layer


def around_encoder(
    site: Site,
    before: Callable[[nn.Module, Arguments], Arguments],
    after: Callable[[Arguments, Any], Any],
) -> None:
    """Replaces the arguments and the output of every call of the encoder.

    `before(encoder, arguments)` returns the arguments that it runs with; `after(arguments, output)` returns the output.
    """
    encoder = site.model.get_encoder()
    enter = partial(_enter_encoder, before, compat.parameters(encoder.forward))
    for handle in (
        encoder.register_forward_pre_hook(enter, with_kwargs=True),
        encoder.register_forward_hook(partial(_leave_encoder, after), with_kwargs=True),
    ):
        site.keep_for_undo(handle.remove)


def _enter_encoder(
    before: Callable[[nn.Module, Arguments], Arguments],
    names: list[str],
    module: nn.Module,
    args: tuple,
    kwargs: Arguments,
) -> tuple[tuple, Arguments]:
    return (), before(module, {**dict(zip(names, args, strict=False)), **kwargs})


def _leave_encoder(
    after: Callable[[Arguments, Any], Any], module: nn.Module, args: tuple, kwargs: Arguments, output: Any
) -> Any:
    return after(kwargs, output)


def before_model(site: Site, before: Callable[[Arguments], None]) -> None:
    """Calls `before` with all arguments, by name, of each forward of the whole model."""
    enter = partial(_enter_model, before, compat.parameters(site.model.forward))
    site.keep_for_undo(site.model.register_forward_pre_hook(enter, with_kwargs=True).remove)


def _enter_model(
    before: Callable[[Arguments], None], names: list[str], module: nn.Module, args: tuple, kwargs: Arguments
) -> None:
    before({**dict(zip(names, args, strict=False)), **kwargs})


def attach(states: Tensor, what: Any) -> Tensor:
    """Attaches `what` to a tensor and returns the tensor, which carries it through layers, recomputed ones too.

    The function of `cross_attention` gets what is attached to the decoder's `encoder_hidden_states`.
    """
    setattr(states, _ATTACHED, what)
    return states


def attached(states: Any) -> Any:
    """What `attach` attached to a tensor; None where that is nothing."""
    return getattr(states, _ATTACHED, None)


def detach(states: Tensor) -> Any:
    """What `attach` attached to a tensor, removed from it, since a graph of gradients keeps tensors alive."""
    what = attached(states)
    delattr(states, _ATTACHED)
    return what


def cross_attention(site: Site, attend: CrossAttend) -> None:
    """Runs `attend` as the cross-attention of every decoder layer.

    Raises `NotSupported` for an architecture whose cross-attention modules are not known.
    """
    layers = 0
    for name, module in site.model.get_decoder().named_modules():
        names = _LAYOUTS.get(name.rpartition(".")[2])
        if names and all(isinstance(getattr(module, part, None), nn.Module) for part in names):
            _TakenOver(site, Projections(module, names), attend).attach(module)
            layers += 1
    if layers != site.facts.layers:
        raise NotSupported(
            f"{site.methods.spec} replaces the cross-attention of every decoder layer, and finds it in {layers} of "
            f"{site.facts.layers} layers of {site.facts.architecture}; use a model of BART's, T5's or LED's family"
        )


@dataclass(frozen=True)
class _TakenOver:
    """One cross-attention module whose result `attend` computes; state of a call is a keyword argument, and is not kept here."""

    site: Site
    projections: Projections
    attend: CrossAttend

    def attach(self, module: nn.Module) -> None:
        undo = self.site.keep_for_undo
        if not (self.site.facts.attention_interface and compat.takes_keywords(module.forward)):
            undo(module.register_forward_hook(self._instead, with_kwargs=True).remove)
            return
        undo(module.register_forward_pre_hook(self._hand_on, with_kwargs=True).remove)
        config: Any = module.config
        ours = copy.copy(config)
        ours._attn_implementation = CROSS
        module.config = ours
        undo(partial(setattr, module, "config", config))

    def _hand_on(self, module: nn.Module, args: tuple, kwargs: Arguments) -> tuple[tuple, Arguments]:
        return args, {**kwargs, _CALL: partial(self.attend, self.projections, self._given(args, kwargs))}

    def _instead(self, module: nn.Module, args: tuple, kwargs: Arguments, output: Any) -> Any:
        """The module's output with `attend`'s result in it, where the module computes attention in its own code."""
        projections, what = self.projections, self._given(args, kwargs)
        hidden = args[0] if args else kwargs["hidden_states"]
        heads, scale = cast(int, module.num_heads), cast(float, module.scaling)
        query = projections.query(hidden).unflatten(-1, (heads, -1)).transpose(1, 2)
        out = self.attend(projections, what, query, scale, cast(float, module.dropout) if module.training else 0.0)
        return projections.out(out.transpose(1, 2).flatten(2)), None, *output[2:]

    def _given(self, args: tuple, kwargs: Arguments) -> Any:
        found = next((what for x in (*args, *kwargs.values()) if (what := attached(x)) is not None), None)
        if found is None:
            raise NotSupported(
                f"{self.site.methods.spec}: a decoder layer got other encoder states than its decoder. With gradient "
                'checkpointing use gradient_checkpointing_kwargs={"use_reentrant": False}; otherwise run the whole decoder'
            )
        return found


def _run_cross_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function registered with transformers. key and value come from `stand_in` and are not used."""
    attend: Callable[[Tensor, float, float], Tensor] | None = kwargs.get(_CALL)
    if attend is None:
        raise LongspanError(f"the attention implementation {CROSS!r} runs only on a model that a method was applied to")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend(query, scale, dropout).transpose(1, 2).contiguous(), None


AttentionInterface.register(CROSS, _run_cross_attention)


def is_stand_in(states: Tensor) -> bool:
    """Whether states (B, T, d) are those of `stand_in`."""
    return states.shape[1] == 1 and bool(states.isnan().all())


def stand_in(rows: int, like: Tensor) -> Tensor:
    """A placeholder (rows, 1, d) for encoder states that are kept elsewhere.

    It is NaN, so that any use of it shows.
    """
    return torch.full((rows, 1, like.shape[-1]), float("nan"), dtype=like.dtype, device=like.device)
