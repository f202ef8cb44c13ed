"""Landmark attention: the grouped softmax on models, retrieval against the training form and against a slow form, generation."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen3Config,
    StaticCache,
)

import longspan as ls
import tiny
from longspan.apply import applied, apply, current, remove
from longspan.errors import LongspanError, NotSupported, SpecError
from longspan.memory import landmark
from longspan.memory.landmark_cache import PageLayer

SIZES: dict[str, Any] = {
    "vocab_size": 270,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": 1,
}
FAMILIES: dict[str, Any] = {
    "llama": LlamaConfig(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
    "yarn": LlamaConfig(
        **SIZES,
        rope_parameters={
            "rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 128
        },
    ),
}
METHOD = "landmark:block=4,retrieve=2,local=8"
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


def model_of(family: str = "llama", method: str | None = METHOD) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(FAMILIES[family]))
    for _, weight in model.named_parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=1.2 * weight.shape[-1] ** -0.5)
    if method is not None:
        landmark.prepare(model, tiny.tokenizer(), method)
    return model.eval()


def some(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(2, 260, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def trained_form(model: PreTrainedModel, ids: Tensor, **more: Any) -> Tensor:
    model.train()
    try:
        return model(ids, **more).logits
    finally:
        model.eval()


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length", [3, 4, 15, 33, 47])
def test_all_retrieved_is_the_form_of_training(family: str, length: int) -> None:
    model = model_of(family, "landmark:block=4,retrieve=12,local=8")
    ids = some(2, length)
    torch.testing.assert_close(model(ids).logits, trained_form(model, ids), **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("per", ["token", "head"])
@pytest.mark.parametrize("offload", [False, True])
def test_any_cut_reads_the_same(per: str, offload: bool) -> None:
    """In one forward, in pieces, and token by token; by chunks where a chunk's queries choose together."""
    model, ids = model_of(method=f"{METHOD},per={per},offload={str(offload).lower()}"), some(2, 61)
    whole = model(ids, use_cache=False).logits
    cuts = [(8, 16, 40, 61)] if per == "head" else [(8, 16, 40, 61), (1, 5, 30, 31, 61), tuple(range(1, 62))]
    for cut in cuts:
        cache, made, first = DynamicCache(), [], 0
        for end in cut:
            made.append(model(ids[:, first:end], past_key_values=cache).logits)
            first = end
            assert cache.get_seq_length() == end
        torch.testing.assert_close(torch.cat(made, 1), whole, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("offload", [False, True])
def test_padding_changes_nothing(offload: bool) -> None:
    """Left padding of any width, two turns with padding between, and single steps, against rows read alone."""
    model = model_of(method=f"{METHOD},offload={str(offload).lower()}")
    texts = [some(1, n, seed)[0] for seed, n in enumerate((37, 5, 60))]
    alone = [model(t[None], use_cache=False).logits[0] for t in texts]
    turns = [[t[: len(t) // 2] for t in texts], [t[len(t) // 2 : -2] for t in texts]]
    cache, mask = DynamicCache(), torch.zeros(3, 0, dtype=torch.long)
    done = [0, 0, 0]
    for turn in [*turns, [t[-2:-1] for t in texts], [t[-1:] for t in texts]]:
        width = max(map(len, turn))
        ids = torch.stack([torch.cat((t.new_ones(width - len(t)), t)) for t in turn])
        new = torch.stack([torch.arange(width) >= width - len(t) for t in turn]).long()
        mask = torch.cat((mask, new), dim=1)
        logits = model(ids, attention_mask=mask, past_key_values=cache).logits
        for row, t in enumerate(turn):
            torch.testing.assert_close(
                logits[row, width - len(t) :], alone[row][done[row] : done[row] + len(t)], **CLOSE
            )
            done[row] += len(t)
