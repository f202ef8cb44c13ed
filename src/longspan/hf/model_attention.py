"""A model's own attention function, as transformers finds it, called under another mask."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask, flex_attention_mask

from longspan.engine.core import causal_mask
from longspan.hf.call import LayerCall
from longspan.util.errors import NotSupported


def run_model_attention(
    call: LayerCall, mask: Tensor | None, multiplicity: Tensor | None, implementation: str, spec: str
) -> Tensor:
    """Attention (B, H, Tq, D) of the call's queries by the model's function `implementation` under `mask`.

    mask: boolean, broadcastable to (B, H, Tq, Tk); None where each query sees all keys up to its own, the last key being the last
    query's. multiplicity: how often each visible key counts, of the mask's shape; None where each counts once. spec: the method,
    for errors. Raises `NotSupported` where the function takes no such mask or is not known.
    """
    attend, additive = model_function(call.module, implementation, spec)
    if multiplicity is not None and implementation.startswith("longspan"):
        raise NotSupported(
            f"{spec} counts some keys more than once, which a longspan model under its position scheme only does when built "
            "with this attention (attention=…); use a method that only hides keys, such as window"
        )
    new, total = call.query.shape[2], call.key.shape[2]
    if mask is None and new > 1 and (additive or new != total):
        mask = causal_mask(new, total, call.query.device)[None, None]
    if mask is not None and (additive or multiplicity is not None):
        mask = _additive(mask, multiplicity, call.query.dtype)
    optional = {"softcap": call.softcap, "sliding_window": call.sliding_window, "position_ids": call.position_ids}
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
        **{name: value for name, value in optional.items() if value is not None},
    )
    return out.transpose(1, 2)


def _additive(mask: Tensor, multiplicity: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A boolean mask as numbers to add to scores: log(multiplicity) where visible, the lowest finite number elsewhere."""
    # Eager attention takes its softmax in float32, where the lowest float64 would be -inf and a row of padding NaN.
    lowest = max(torch.finfo(dtype).min, torch.finfo(torch.float32).min)
    numbers = torch.zeros_like(mask, dtype=dtype) if multiplicity is None else multiplicity.clamp(min=1).log()
    return numbers.to(dtype).masked_fill(~mask, lowest)


def model_function(module: nn.Module, implementation: str, spec: str) -> tuple[Callable[..., tuple], bool]:
    """The attention function of this name for `module`, and whether it takes masks as numbers to add.

    Raises `NotSupported` where it takes no mask (flash and flex attention), or where the architecture has it in its own code.
    """
    masks = AttentionMaskInterface()
    kind = masks.get(implementation)
    if kind in (None, flash_attention_mask, flex_attention_mask):
        raise NotSupported(
            f"{spec} gives the model's attention a mask, and its implementation {implementation!r} takes none; load the model "
            'with attn_implementation="sdpa"'
        )
    files = [sys.modules[cls.__module__] for cls in type(module).__mro__]
    eager = next((f.eager_attention_forward for f in files if hasattr(f, "eager_attention_forward")), None)
    interface = next((f.ALL_ATTENTION_FUNCTIONS for f in files if hasattr(f, "ALL_ATTENTION_FUNCTIONS")), None)
    found = (interface or AttentionInterface()).get(implementation, eager)
    if found is None:
        raise NotSupported(
            f"{spec}: {type(module).__name__} computes {implementation!r} attention in its own code, not in a function that can "
            'be called; load the model with attn_implementation="sdpa"'
        )
    return found, kind is masks["eager"]
