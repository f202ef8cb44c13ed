"""Which methods can be combined, computed by combining them: there is no list.

Methods for a trained model are combined in one spec, `yarn + streaming`: their slots must differ, and some model must accept
both. Methods that a longspan model is trained with are settings of one configuration, `position=alibi` and `attention=window`:
a model of one layer with both is built without weights.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import torch

from longspan.core.facts import ModelFacts, RopeFacts
from longspan.core.method import Combination, Method, catalogue
from longspan.lm import LongspanConfig, LongspanModel
from longspan.lm.base import Attention
from longspan.positions.scheme import Scheme
from longspan.util.errors import LongspanError

_DECODER = ModelFacts(
    model_type="llama",
    architecture="LlamaForCausalLM",
    window=8192,
    layers=8,
    hidden=256,
    heads=4,
    kv_heads=4,
    head_dim=64,
    vocab=1000,
    parameters=10_000_000,
    rope=RopeFacts(theta=10_000.0, dim=64, type="default", window=8192, per_layer_type=False),
    attention_interface=True,
    attention="sdpa",
    sliding_window=None,
    layer_types=frozenset(),
)
_ENCODER_DECODER = replace(
    _DECODER,
    model_type="bart",
    architecture="BartForConditionalGeneration",
    rope=None,
    absolute_positions=True,
    encoder_decoder=True,
)


def combinable(cls: type[Method]) -> list[str]:
    """Names, ascending, of the methods that can be combined with `cls`, both with their default settings."""
    return [name for name, other in catalogue().items() if _fit(cls, other)]


def _fit(first: type[Method], second: type[Method]) -> bool:
    if not first.slots or not second.slots or first.slots & second.slots:
        return False
    if issubclass(first, Scheme) or issubclass(second, Scheme):
        scheme, other = (first, second) if issubclass(first, Scheme) else (second, first)
        return _can_be_built(scheme.name, other.name)
    return bool(_models_of(first) & _models_of(second))


def _models_of(cls: type[Method]) -> set[str]:
    """Which of the two models above the method works on; a method that needs settings counts as one for decoders."""
    if (method := _example(cls)) is None:
        return {_DECODER.architecture}
    return {facts.architecture for facts in (_DECODER, _ENCODER_DECODER) if _passes(method, facts)}


def _example(cls: type[Method]) -> Method | None:
    """The method with its defaults, resolved; None where it needs settings."""
    try:
        return cls().resolve(_DECODER, _DECODER.window)
    except (LongspanError, TypeError):
        return None


def _passes(method: Method, facts: ModelFacts) -> bool:
    try:
        Combination((method,)).check(facts)
    except LongspanError:
        return False
    return True


@functools.cache  # it builds a small model, and `methods --json` needs every pair twice
def _can_be_built(scheme: str, other: str) -> bool:
    """Whether a longspan decoder or encoder can have the scheme with the other method as its attention, memory or position."""
    first, second = (_example(catalogue()[name]) for name in (scheme, other))
    if first is None or second is None:
        return False
    settings = {"position": f"{first.spec} + {second.spec}"}
    if isinstance(second, Attention):
        settings = {"position": first.spec, second.seam: second.spec}
    return any(_builds(kind, settings) for kind in ("decoder", "encoder"))


def _builds(kind: str, settings: dict[str, str]) -> bool:
    sizes = {"num_hidden_layers": 1, "head_dim": 128, "vocab_size": 1000}  # gated units have heads of 128
    try:
        with torch.device("meta"):
            LongspanModel(LongspanConfig(kind=kind, **sizes, **settings))  # type: ignore[arg-type]
    except LongspanError:
        return False
    return True
