"""Attention layers as other architectures might have them: one that rotates in its own way, one that asks nobody."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as true_rotation


def apply_rotary_pos_emb(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """What this module says its rotation is, while its layers inherit Llama's."""
    return true_rotation(query, key, cos, -sin)


class OddlyRotatedAttention(LlamaAttention):
    """Keeps Llama's forward, and so Llama's rotation."""


class DeafAttention(LlamaAttention):
    """Computes its attention by itself, whatever implementation is set."""

    def forward(self, hidden_states: Tensor, position_embeddings: tuple, attention_mask: Any = None, **_: Any) -> tuple:
        query, key, value = (
            project(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = true_rotation(query, key, *position_embeddings)
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2)), None


class FailingAttention(LlamaAttention):
    """Fails as soon as the implementation is not one that it knows."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple:
        if self.config._attn_implementation not in ("sdpa", "eager"):
            raise TypeError("unexpected implementation")
        return super().forward(*args, **kwargs)


def with_layers(model: LlamaForCausalLM, kind: type[LlamaAttention]) -> LlamaForCausalLM:
    for layer in model.model.layers:
        layer.self_attn.__class__ = kind
    return model
