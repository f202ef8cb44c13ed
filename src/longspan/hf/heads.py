"""The output matrix of a language model, and its input."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from longspan.core.facts import text_config


@contextlib.contextmanager
def hidden_states(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """A context that collects the decoder's last hidden states (1, T, hidden) of each forward in a list."""
    states: list[Tensor] = []
    handle = model.get_decoder().register_forward_hook(lambda module, args, output: states.append(output[0]))
    try:
        yield states
    finally:
        handle.remove()


def plain_head(model: PreTrainedModel) -> nn.Module | None:
    """The output matrix, where logits are its product with the decoder's last state and nothing more; else None.

    Gemma 2, Granite and Cohere cap or scale logits. It is found out by one short forward, bit for bit.
    """
    head = model.get_output_embeddings()
    if head is None or model.base_model is model:
        return None
    probe = (torch.arange(8, device=model.device) * 7919 + 17)[None] % text_config(model.config).vocab_size
    with hidden_states(model) as states:
        logits = model(input_ids=probe, use_cache=False, logits_to_keep=1).logits
    plain = torch.equal(head(states[0][:, -1:]).to(logits), logits) and bool(logits.any())
    return head if plain else None  # all-zero logits, as of a padding token, would prove nothing
