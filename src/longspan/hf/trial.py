"""Trials on a short input, by which `apply` refuses an architecture that a method would compute wrongly.

An architecture may rotate, cache or attend in a way that a method does not know. Logits before and after show it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from longspan.core.facts import text_config
from longspan.engine.core import attention, causal_mask, with_zero_key
from longspan.hf import compat
from longspan.hf.call import LayerCall
from longspan.hf.rotary import rotate
from longspan.hf.site import RecordLost, Site
from longspan.util.errors import LongspanError, NotSupported

SHORT = 8
"""Tokens of the short input."""
TOLERANCE = {True: 1e-3, False: 5e-2}
"""Largest relative error of logits that are computed in two ways, in 32 bits and more (True) and in 16 (False)."""
STILL_WORK = "Methods that only change frequencies may still work: ntk, yarn"
ANOTHER_MODEL = "Use none, or a model with RoPE (Llama, Mistral, Qwen, Phi-3, Gemma, …)"


def prove_rotation(site: Site) -> None:
    """Raises `NotSupported` unless `rotate` rotates as this architecture does, under plain attention.

    For methods that rotate by themselves, but nothing within a short input.
    """
    site.rotates = True
    trial = Site(site.model, site.methods, site.facts)

    def attend(call: LayerCall) -> Tensor:
        tables = trial.rotary.tables(call.position_ids, call.query, trial.layer_type(call.module))
        query, key = (rotate(call.module, x, *tables) for x in (call.query, call.key))
        return _own_plain_attention(replace(call, query=query, key=key))

    _prove(trial, attend, unrotated=True)


def prove_attention(site: Site) -> None:
    """Raises `NotSupported` unless plain attention over queries, keys, values and mask is this architecture's attention.

    For methods that change every input.
    """
    _prove(Site(site.model, site.methods, site.facts), _plain_attention)


def _prove(site: Site, attend: Callable[[LayerCall], Tensor], *, unrotated: bool = False) -> None:
    """Raises `NotSupported` where logits under `attend` differ from the model's; the model is then as before."""
    before = probe(site.model, SHORT)
    tolerance = tolerance_of(site, before)
    try:
        if unrotated:
            site.unrotate()
        site.attention(attend)
        check_unchanged(site, before, tried(site, SHORT), tolerance)
    finally:
        site.undo()


def _plain_attention(call: LayerCall) -> Tensor:
    query = call.query
    mask = call.mask if call.mask is not None else query.new_ones(query.shape[2], call.key.shape[2]).tril().bool()
    return attention(query, call.key, call.value, mask, call.scale, softcap=call.softcap)


def _plain_attention_in_float32(call: LayerCall) -> Tensor:
    wide = replace(call, query=call.query.float(), key=call.key.float(), value=call.value.float())
    return _own_plain_attention(wide).to(call.query.dtype)


def _own_plain_attention(call: LayerCall) -> Tensor:
    """Plain attention, with the zero key where a longspan model has one (`sink=zero`)."""
    if not getattr(call.module, "zero_key", False):
        return _plain_attention(call)
    mask = (
        call.mask if call.mask is not None else causal_mask(call.query.shape[2], call.key.shape[2], call.query.device)
    )
    key, value, with_zero = with_zero_key(call.key, call.value, mask)
    return _plain_attention(replace(call, key=key, value=value, mask=with_zero))


@contextlib.contextmanager
def counted(site: Site) -> Iterator[list[nn.Module]]:
    """A context that collects in a list the modules whose attention is called."""
    attend = site.attend
    called: list[nn.Module] = []

    def count(call: LayerCall) -> Tensor:
        called.append(call.module)
        assert attend is not None, "a method that replaces attention passes a function to site.attention(...)"
        return attend(call)

    site.attend = count
    yield called
    site.attend = attend


def relative_error(expected: Tensor, found: Tensor) -> float:
    """|found - expected| / |expected|, of Euclidean norms in float64."""
    return ((found - expected).double().norm() / expected.double().norm()).item()


def is_wide(dtype: torch.dtype) -> bool:
    """Whether the dtype has 32 bits or more."""
    return dtype in (torch.float32, torch.float64)


def tolerance_of(site: Site, before: Tensor) -> float:
    """The largest relative error from the logits `before` for a method that changes nothing in a short input.

    In 16 bits it is at least twice the error of the model's own attention computed in float32: scores may be large.
    """
    if is_wide(before.dtype):
        return TOLERANCE[True]
    plain = Site(site.model, site.methods, site.facts)
    try:
        plain.attention(_plain_attention_in_float32)
        rounding = relative_error(before, tried(plain, before.shape[1]))
    except LongspanError:
        rounding = 0.0
    finally:
        plain.undo()
    return max(TOLERANCE[False], 2 * rounding)


def check_unchanged(site: Site, before: Tensor, after: Tensor, tolerance: float) -> None:
    """Raises `NotSupported` where the relative error of the logits `after` is not below `tolerance`."""
    error = relative_error(before, after)
    if not error < tolerance:
        raise NotSupported(
            f"{site.methods.spec} does not reproduce {site.facts.architecture} on a short input (relative error {error:.1e}): "
            f"the architecture rotates or attends in a way that the method does not know. {STILL_WORK}"
        )


def tried(site: Site, length: int) -> Tensor:
    """Logits (1, T, vocab) of the short input under the methods of `site`.

    Finds out by the way whether the record of a forward must travel on `position_ids`, and sets `site.tags_positions`.
    """
    try:
        return probe(site.model, length)
    except RecordLost:
        if site.tags_positions:
            raise
        site.tags_positions = True
        return probe(site.model, length)


def reads_in_pieces(model: PreTrainedModel, whole: Tensor) -> bool:
    """Whether the model without a method gives the same logits from a KV cache; some longspan models do not decode exactly."""
    try:
        return (
            whole.shape[1] > 1
            and relative_error(whole, probe_in_pieces(model, whole.shape[1])) < TOLERANCE[is_wide(whole.dtype)]
        )
    except Exception:
        return False


@contextlib.contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """A context in evaluation mode, after which every module has its former mode."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def short_input(model: PreTrainedModel, length: int) -> Tensor:
    """Fixed token ids (1, length)."""
    vocabulary = text_config(model.config).vocab_size
    return (torch.arange(length, device=compat.input_device(model)) * 7919 + 17)[None] % vocabulary


@torch.no_grad()
def probe(model: PreTrainedModel, length: int, positions: Tensor | None = None) -> Tensor:
    """Logits (1, T, vocab) of the short input in evaluation mode, or the model's first output where it has no head."""
    ids = short_input(model, length)
    more: dict[str, Any] = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    if positions is not None:  # with a mask, or the jumps would be read as documents packed into a row
        more |= {"position_ids": positions.to(ids.device), "attention_mask": torch.ones_like(ids)}
    with evaluating(model):
        return _first(model(input_ids=ids, use_cache=False, **more))


@torch.no_grad()
def probe_in_pieces(model: PreTrainedModel, length: int) -> Tensor:
    """The same logits, with the second half of the input read after the KV cache of the first."""
    ids = short_input(model, length)
    with evaluating(model):
        first = model(input_ids=ids[:, : length // 2], use_cache=True)
        rest = {**compat.with_cache(model, compat.cache_of(first)), "use_cache": True}
        return torch.cat((_first(first), _first(model(input_ids=ids[:, length // 2 :], **rest))), dim=1)


def _first(output: Any) -> Tensor:
    return output.logits if "logits" in output else output[0]
