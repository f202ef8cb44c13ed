"""A Llama in its plainest form, from the formulas alone, as the judge of methods that change attention.

Every query meets every key under an angle of its own choosing: nothing is cached, cut or fused.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import tiny


def llama(layers: int = 1, window: int = 32, theta: float = 10_000.0, seed: int = 0) -> LlamaForCausalLM:
    """A small Llama in float64 whose logits answer to every key."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        **tiny.sizes(96, 48, 64, layers, 4, 2),
        head_dim=12,
        max_position_embeddings=window,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval().double()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.normal_(0, 1.5 * weight.shape[1] ** -0.5)
    return model


def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(1, 96, (rows, length), generator=torch.Generator().manual_seed(seed))


def frequencies(model: LlamaForCausalLM) -> Tensor:
    """theta_i = b^(-2i/d), float64, (d/2,)."""
    width, base = model.config.head_dim, model.config.rope_parameters["rope_theta"]
    return base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)


def turned(query: Tensor, angles: Tensor) -> Tensor:
    """query (H, T, D) turned by angles (T, T, D/2), one for each key: (H, T, T, D), pairs (c, c + D/2)."""
    first, second = (half[:, :, None] for half in query.chunk(2, dim=-1))
    return torch.cat(
        (first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()), dim=-1
    )


def logits(
    model: LlamaForCausalLM, ids: Tensor, angles: Tensor, visible: Tensor, scales: Tensor | None = None
) -> Tensor:
    """Logits (T, vocabulary) of `ids` (T,) where query i meets key j turned by angles[i, j] (T, T, D/2) if visible[i, j], and
    is multiplied by scales[i]."""
    x = model.model.embed_tokens(ids)
    for layer in model.model.layers:
        attention, normed = layer.self_attn, layer.input_layernorm(x)
        query, key, value = (
            project(normed).unflatten(-1, (-1, attention.head_dim)).transpose(0, 1)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        key, value = (y.repeat_interleave(query.shape[0] // y.shape[0], dim=0) for y in (key, value))
        scores = (turned(query, angles) * key[:, None]).sum(-1) * attention.head_dim**-0.5
        if scales is not None:
            scores = scores * scales[:, None]
        weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
        x = x + attention.o_proj((weights @ value).transpose(0, 1).flatten(1))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.lm_head(model.model.norm(x))


def causal(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


def distances(length: int) -> Tensor:
    """i - j, (T, T)."""
    at = torch.arange(length)
    return at[:, None] - at[None]
