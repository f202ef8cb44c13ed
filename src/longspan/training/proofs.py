"""Trials before the first step: whether the model reads positions as the recipe means them.

A model's masks decide whether a jump of positions is a jump or the start of another document, and a model that decides otherwise
would train wrongly without any error. So a few tokens are changed, and the logits after them are compared.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from longspan.core.facts import text_config
from longspan.util.errors import NotSupported

_HALF = 8


@torch.no_grad()
def prove_jump(model: PreTrainedModel) -> None:
    """Raises `NotSupported` unless tokens after a jump of positions see those before it."""
    places = torch.arange(2 * _HALF, device=model.device)
    places[_HALF:] += _HALF
    first, second = _states(model, places, mask=True)
    if torch.equal(first[:, _HALF:], second[:, _HALF:]):
        raise NotSupported(
            f"positions.kind=pose: {type(model).__name__} takes a jump of positions for the start of another document, so "
            "nothing would be learned across it; use positions.kind=ordinary"
        )


@torch.no_grad()
def prove_boundaries(model: PreTrainedModel) -> None:
    """Raises `NotSupported` unless positions that restart hide the document before them."""
    places = torch.arange(2 * _HALF, device=model.device)
    joined, apart = (_change(model, p) for p in (places, places % _HALF))
    if not apart <= 1e-2 * joined:
        raise NotSupported(
            f"data.packing=boundaries: {type(model).__name__} attends to the document before; use data.packing=plain or none"
        )


def _change(model: PreTrainedModel, places: Tensor) -> float:
    """Norm of the change of the second half's logits when the first half's tokens change."""
    first, second = _states(model, places, mask=False)
    return (first - second)[:, _HALF:].norm().item()


def _states(model: PreTrainedModel, places: Tensor, *, mask: bool) -> tuple[Tensor, Tensor]:
    """Logits (1, 2·_HALF, vocabulary) of an input, and of one with other tokens in its first half."""
    vocabulary = text_config(model.config).vocab_size
    ids = (torch.arange(2 * _HALF, device=model.device) * 7919 + 17)[None] % vocabulary
    other = ids.clone()
    other[:, :_HALF] = (ids[:, :_HALF] + 1) % vocabulary
    inputs = {"position_ids": places[None]} | ({"attention_mask": torch.ones_like(ids)} if mask else {})
    training = model.training
    model.eval()
    try:
        first, second = (model(input_ids=x, use_cache=False, **inputs).logits.float() for x in (ids, other))
    finally:
        model.train(training)
    return first, second
