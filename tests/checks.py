"""Checks that several models and methods must pass, which tests of several files call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from longspan.apply import apply

SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
}
"""The sizes that tiny `longspan.lm` models have in common."""


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor, **kwargs: Any) -> Tensor:
    """Logits (B, T, vocab) of whole texts."""
    return model(ids, **kwargs).logits


def padding_changes_nothing(model: PreTrainedModel, ids: Tensor, side: str, **close: float) -> tuple[Tensor, Tensor]:
    """The first of two rows of 30 tokens, padded on one side, reads as alone; returns the logits and the mask."""
    mask = torch.ones_like(ids)
    inside = slice(7, None) if side == "left" else slice(None, 23)
    mask[0] = 0
    mask[0, inside] = 1
    got = logits(model, ids, attention_mask=mask)
    torch.testing.assert_close(got[:1, inside], logits(model, ids[:1, inside]), **close)
    torch.testing.assert_close(got[1:], logits(model, ids[1:]), **close)
    return got, mask


def generation_uses_the_cache(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Greedy tokens of a left-padded batch of 25 tokens equal those of each row by itself without a cache; returns the mask."""
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    generated = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    for row, begin in ((0, 6), (1, 0)):
        expected = ids[row : row + 1, begin:]
        for _ in range(8):
            expected = torch.cat((expected, logits(model, expected)[:, -1:].argmax(-1)), dim=1)
        end = generated[row, begin:].tolist()
        assert end[: len(end)] == expected[0, : len(end)].tolist() or 1 in end[19:]
    return mask


def encoder_decoder_generates_what_it_computes(model: PreTrainedModel, ids: Tensor, padded: int, new: int) -> Tensor:
    """Greedy tokens of an encoder-decoder equal those without a cache; padded: of the first row. Returns the mask."""
    mask = torch.ones_like(ids)
    mask[0, -padded:] = 0
    generated = model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False)
    expected = torch.zeros(2, 1, dtype=torch.long)
    with torch.no_grad():
        while expected.shape[1] < generated.shape[1]:
            out = model(ids, attention_mask=mask, decoder_input_ids=expected, use_cache=False).logits
            expected = torch.cat((expected, out[:, -1:].argmax(-1)), dim=1)
    running = (generated == 1).cumsum(1) == 0
    assert torch.equal(generated[running], expected[running])
    return mask


def trains_alike_with_checkpointing(model: PreTrainedModel, ids: Tensor) -> None:
    """Every parameter gets a gradient, and the same one with gradient checkpointing."""
    model.train()(ids, labels=ids, use_cache=False).loss.backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert all(g.abs().sum() > 0 for g in plain.values())
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(ids, labels=ids, use_cache=False).loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, plain[name], msg=name)


def gradients_are_those_of(model: PreTrainedModel, ids: Tensor, expected: Tensor, method: Any) -> None:
    """Gradients under `method` are those of the logits `expected`, which were computed from the formula without it."""

    def gradients(logits: Tensor) -> list[Tensor]:
        return torch.autograd.grad(logits.logsumexp(-1).sum(), list(model.parameters()))

    correct = gradients(expected)
    apply(model, method)
    for got, want in zip(gradients(model(ids, use_cache=False).logits), correct, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
