"""The seams of an encoder-decoder: what its encoder reads, what its decoder is given, how its cross-attention is computed.

`longspan.apply` puts the method on; this is the part of it that knows encoder-decoders, and like there every change is undone
by `remove`. Cross-attention is taken over through `AttentionInterface` where the family calls it: the modules of
cross-attention, and no others, get a copy of their configuration that names ours. Where the family computes attention in its
own code (LED), a forward hook puts our answer in the place of the module's.
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
_GIVEN = "_longspan_given"
"""On a tensor: what `give` hands along with it."""
_CALL = "longspan_cross"
"""The keyword argument by which a module of cross-attention tells the attention function of this call."""

_LAYOUTS = {
    "encoder_attn": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "EncDecAttention": ("q", "k", "v", "o"),
}
"""Cross-attention modules by the name that they have in their layer, and their projections: of BART's kind and of T5's."""

Arguments = dict[str, Any]
CrossAttend = Callable[["Projections", Any, Tensor, float, float], Tensor]
"""(projections, what was given with the states, query (B, H, T, D), scale, dropout) -> (B, H, T, D)."""


class Projections:
    """The projections of one cross-attention module, looked up whenever they are used: an adapter may come later."""

    def __init__(self, module: nn.Module, names: tuple[str, str, str, str]):
        self._module = module
        self._query, self._key, self._value, self._out = names

    def query(self, hidden: Tensor) -> Tensor:
        return getattr(self._module, self._query)(hidden)

    def out(self, attended: Tensor) -> Tensor:
        return getattr(self._module, self._out)(attended)

    @property
    def key(self) -> nn.Linear:
        return self._plain(self._key)

    @property
    def value(self) -> nn.Linear:
        return self._plain(self._value)

    def _plain(self, name: str) -> nn.Linear:
        """Raises `NotSupported` for what is no plain `nn.Linear`: its weight is not where it can be moved to the query."""
        layer = getattr(self._module, name)
        if type(layer) is not nn.Linear:
            raise NotSupported(
                f"a cross-attention's keys and values are projected by a {type(layer).__name__} here, and unlimiformer moves "
                "the weight of a plain nn.Linear to the query; merge the adapter into the model, or load it unquantized"
            )
        return layer


def around_encoder(
    site: Site,
    before: Callable[[nn.Module, Arguments], Arguments],
    after: Callable[[Arguments, Any], Any],
) -> None:
    """Calls `before` with the encoder and the arguments of each of its calls, to get those that it runs with, and `after`
    with these and its output, to get the one that it returns. What `after` must know of this call is on those arguments."""
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
    """Calls `before` with the keyword arguments of each forward of the whole model."""
    enter = partial(_enter_model, before, compat.parameters(site.model.forward))
    site.keep_for_undo(site.model.register_forward_pre_hook(enter, with_kwargs=True).remove)


def _enter_model(
    before: Callable[[Arguments], None], names: list[str], module: nn.Module, args: tuple, kwargs: Arguments
) -> None:
    before({**dict(zip(names, args, strict=False)), **kwargs})


def give(states: Tensor, what: Any) -> Tensor:
    """`states` with `what` on it, which goes with them through layers and through layers computed again. The decoder's
    `encoder_hidden_states` carry what `cross_attention`'s function is given."""
    setattr(states, _GIVEN, what)
    return states


def given(states: Any) -> Any:
    """What `give` put on a tensor; None where there is nothing."""
    return getattr(states, _GIVEN, None)


def taken(states: Tensor) -> Any:
    """What `give` put on a tensor, which then is let go of: the graph of a training keeps tensors for long."""
    what = given(states)
    delattr(states, _GIVEN)
    return what


def cross_attention(site: Site, attend: CrossAttend) -> None:
    """Runs `attend` as the cross-attention of every layer of the decoder. Raises `NotSupported` for a model whose
    cross-attention is not known."""
    layers = 0
    for name, module in site.model.get_decoder().named_modules():
        names = _LAYOUTS.get(name.rpartition(".")[2])
        if names and all(isinstance(getattr(module, part, None), nn.Module) for part in names):
            _TakenOver(site, Projections(module, names), attend).attach(module)
            layers += 1
    if layers != site.facts.layers:
        raise NotSupported(
            f"{site.methods.spec} needs the cross-attention of every decoder layer, and knows {layers} of {site.facts.layers} in "
            f"{site.facts.architecture}; use a model of BART's, T5's or LED's family"
        )


@dataclass(frozen=True)
class _TakenOver:
    """One module of cross-attention whose answer is `attend`'s. Nothing of a call is kept here: the attention function gets
    it as a keyword argument, which the module passes on."""

    site: Site
    projections: Projections
    attend: CrossAttend

    def attach(self, module: nn.Module) -> None:
        undo = self.site.keep_for_undo
        if not (self.site.facts.attention_interface and compat.takes_keywords(module.forward)):
            undo(module.register_forward_hook(self._instead, with_kwargs=True).remove)
            return
        undo(module.register_forward_pre_hook(self._hand_on, with_kwargs=True).remove)
        own: Any = module.config
        ours = copy.copy(own)
        ours._attn_implementation = CROSS
        module.config = ours
        undo(partial(setattr, module, "config", own))

    def _hand_on(self, module: nn.Module, args: tuple, kwargs: Arguments) -> tuple[tuple, Arguments]:
        return args, {**kwargs, _CALL: partial(self.attend, self.projections, self._given(args, kwargs))}

    def _instead(self, module: nn.Module, args: tuple, kwargs: Arguments, output: Any) -> Any:
        """The module's output with our answer in the place of its own, where it computes attention in code of its own."""
        projections, what = self.projections, self._given(args, kwargs)
        hidden = args[0] if args else kwargs["hidden_states"]
        heads, scale = cast(int, module.num_heads), cast(float, module.scaling)
        query = projections.query(hidden).unflatten(-1, (heads, -1)).transpose(1, 2)
        out = self.attend(projections, what, query, scale, cast(float, module.dropout) if module.training else 0.0)
        return projections.out(out.transpose(1, 2).flatten(2)), None, *output[2:]

    def _given(self, args: tuple, kwargs: Arguments) -> Any:
        found = next((what for x in (*args, *kwargs.values()) if (what := given(x)) is not None), None)
        if found is None:
            raise NotSupported(
                f"{self.site.methods.spec}: a decoder layer was given other states than the decoder. With gradient checkpointing "
                'use gradient_checkpointing_kwargs={"use_reentrant": False}; else run the whole decoder'
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
    """The function registered with transformers. The key and value are of the stand-in, and not used."""
    attend: Callable[[Tensor, float, float], Tensor] | None = kwargs.get(_CALL)
    if attend is None:
        raise LongspanError(f"the attention implementation {CROSS!r} runs only on a model that a method was applied to")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend(query, scale, dropout).transpose(1, 2).contiguous(), None


AttentionInterface.register(CROSS, _run_cross_attention)


def is_stand_in(states: Tensor) -> bool:
    """Whether these are `stand_in`'s, of any number of rows."""
    return states.shape[1] == 1 and bool(states.isnan().all())


def stand_in(rows: int, like: Tensor) -> Tensor:
    """(rows, 1, d) that stands where a model expects its encoder's states, which are kept elsewhere. Not a number, so that
    whatever computes with it shows it."""
    return torch.full((rows, 1, like.shape[-1]), float("nan"), dtype=like.dtype, device=like.device)
