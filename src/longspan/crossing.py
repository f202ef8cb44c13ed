"""The seams of an encoder-decoder: what its encoder reads, what its decoder is given, how its cross-attention is computed.

`longspan.apply` puts the method on; this is the part of it that knows encoder-decoders, and like there every change is undone
by `remove`. Cross-attention is taken over through `AttentionInterface` where the family calls it: the modules of
cross-attention, and no others, get a copy of their configuration that names ours. Where the family computes attention in its
own code (LED), a forward hook puts our answer in the place of the module's.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from longspan.apply import Site
from longspan.errors import LongspanError, NotSupported

CROSS = "longspan_cross"
"""The attention implementation of cross-attention modules alone."""
_CROSSING = "_longspan_cross"

_LAYOUTS = {
    "encoder_attn": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "EncDecAttention": ("q", "k", "v", "o"),
}
"""Cross-attention modules by the name that they have in their layer, and their projections: of BART's kind and of T5's."""

Arguments = dict[str, Any]
Attend = Callable[["Projections", Tensor, Any, float, float], Tensor]
"""(projections, query (B, H, T, D), what was given with the states, scale, dropout) -> (B, H, T, D)."""


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
    site: Site, before: Callable[[nn.Module, Arguments], Arguments], after: Callable[[Any], Any]
) -> None:
    """Calls `before` with the encoder and the arguments of each of its calls, to get those that it runs with, and `after`
    with its output, to get the one that it returns."""
    encoder = site.model.get_encoder()
    names = list(inspect.signature(encoder.forward).parameters)

    def pre(module: nn.Module, args: tuple, kwargs: Arguments) -> tuple[tuple, Arguments]:
        return (), before(module, {**dict(zip(names, args, strict=False)), **kwargs})

    for handle in (
        encoder.register_forward_pre_hook(pre, with_kwargs=True),
        encoder.register_forward_hook(lambda module, args, output: after(output)),
    ):
        site.keep_for_undo(handle.remove)


def around_model(site: Site, before: Callable[[Arguments], None], after: Callable[[], None]) -> None:
    """Calls `before` with the keyword arguments of each forward of the whole model, and `after` when it ends, however."""
    names = list(inspect.signature(site.model.forward).parameters)

    def pre(module: nn.Module, args: tuple, kwargs: Arguments) -> None:
        before({**dict(zip(names, args, strict=False)), **kwargs})

    for handle in (
        site.model.register_forward_pre_hook(pre, with_kwargs=True),
        site.model.register_forward_hook(lambda *call: after(), always_call=True),
    ):
        site.keep_for_undo(handle.remove)


def give(states: Tensor, what: Any) -> Tensor:
    """`states` (B, 1, d), to be handed to the decoder as the encoder's, with `what` for `cross_attention`'s function on it: it
    goes with them through layers and through layers computed again."""
    setattr(states, _CROSSING, what)
    return states


def cross_attention(site: Site, attend: Attend) -> None:
    """Runs `attend` as the cross-attention of every layer of the decoder. Raises `NotSupported` for a model whose
    cross-attention is not known."""
    layers = 0
    for name, module in site.model.get_decoder().named_modules():
        names = _LAYOUTS.get(name.rpartition(".")[2])
        if names and all(isinstance(getattr(module, part, None), nn.Module) for part in names):
            _take_over(site, module, Projections(module, names), attend)
            layers += 1
    if layers != site.facts.layers:
        raise NotSupported(
            f"{site.methods.spec} needs the cross-attention of every decoder layer, and knows {layers} of {site.facts.layers} in "
            f"{site.facts.architecture}; use a model of BART's, T5's or LED's family"
        )


def _take_over(site: Site, module: nn.Module, projections: Projections, attend: Attend) -> None:
    def before(module: nn.Module, args: tuple, kwargs: Arguments) -> None:
        given = next((getattr(x, _CROSSING) for x in (*args, *kwargs.values()) if hasattr(x, _CROSSING)), None)
        if given is None:
            _lost(site)
        object.__setattr__(module, _CROSSING, lambda *call: attend(projections, call[0], given, *call[1:]))

    def after(module: nn.Module, args: tuple, kwargs: Arguments, output: Any) -> Any:
        if site.facts.attention_interface:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        query = projections.query(hidden).unflatten(-1, (module.num_heads, -1)).transpose(1, 2)
        dropout = module.dropout if module.training else 0.0
        out = getattr(module, _CROSSING)(query, module.scaling, dropout)
        return projections.out(out.transpose(1, 2).flatten(2)), None, *output[2:]

    def forget(*call: Any) -> None:
        module.__dict__.pop(_CROSSING, None)

    for handle in (
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after, with_kwargs=True),
        module.register_forward_hook(forget, always_call=True),
    ):
        site.keep_for_undo(handle.remove)
    if site.facts.attention_interface:
        own: Any = module.config
        ours = copy.copy(own)
        ours._attn_implementation = CROSS
        module.config = ours
        site.keep_for_undo(lambda: setattr(module, "config", own))


def _lost(site: Site) -> NoReturn:
    raise NotSupported(
        f"{site.methods.spec}: a decoder layer was given other states than the decoder. With gradient checkpointing use "
        'gradient_checkpointing_kwargs={"use_reentrant": False}; else run the whole decoder'
    )


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
    attend = module.__dict__.get(_CROSSING)
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
