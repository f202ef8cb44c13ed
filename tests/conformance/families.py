"""Tiny random models of every family in the matrix: three layers, two query heads on each key-value head, a window of 32.

Weights are drawn much wider than transformers draws them, so that logits answer to every key that is seen or missed.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY, WINDOW, SLIDING = 128, 32, 10

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": WINDOW,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_WIDE = {"head_dim": 16}
_GPT = {"max_position_embeddings": 64, "n_embd": 64, "n_layer": 3, "n_head": 4, "rotary_dim": 8}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "mistral-sliding": {"sliding_window": SLIDING},
    "qwen2": {},
    "qwen3": _WIDE,
    "phi3": {"original_max_position_embeddings": WINDOW},
    "phi": {"partial_rotary_factor": 0.5},
    "gemma": _WIDE,
    "gemma2": {**_WIDE, "sliding_window": SLIDING, "attn_implementation": "eager"},
    "gemma3_text": {**_WIDE, "sliding_window": SLIDING, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gpt_neox": {"rotary_pct": 0.5, "num_key_value_heads": None},
    "olmo2": {},
    "stablelm": {},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "granite": {"attention_multiplier": 0.25},
    "cohere": {"logit_scale": 1.0},
    "starcoder2": {},
    "glm4": _WIDE,
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "bloom": {},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 3, "max_seq_len": 64},
    "gptj": _GPT,
    "gpt2": _GPT,
    "opt": {"max_position_embeddings": 64, "ffn_dim": 96, "word_embed_proj_dim": 64},
}
"""What each family's configuration has beside the common sizes."""

FACTORS = ("ntk-by-parts", "longrope", "yarn:factor=2,ramp=paper", "yarn:factor=1,ramp=paper")
"""How specs begin whose frequencies travel as LongRoPE factors."""
SINCE: dict[str, tuple[str, tuple[str, ...], str]] = {
    "gptj": ("5.24", ("",), "its attention goes through transformers' AttentionInterface"),
    "gemma3_text": ("5.21", FACTORS, "factors for each type of layer hold past the trained window too"),
}
"""Families of which some methods run only from a version of transformers on: the version, how their specs begin, and why."""
RESTARTS = {"phi3": "5.23"}
"""Families whose `generate` begins a new cache at the end of the trained window, and goes on wrongly, before a version of
transformers."""


def _since(version: str) -> bool:
    return Version(transformers.__version__) >= Version(version)


def installed(family: str, spec: str) -> bool:
    """Whether the installed transformers is new enough for `spec` on `family`."""
    version, begins, _ = SINCE.get(family, ("0", (), ""))
    return _since(version) or not spec.startswith(begins)


def restarts(family: str) -> bool:
    """Whether the installed transformers cannot generate across the end of the family's window."""
    return family in RESTARTS and not _since(RESTARTS[family])


@functools.cache
def _made(family: str) -> PreTrainedModel:
    settings = {**_SIZES, **FAMILIES[family]}
    implementation = settings.pop("attn_implementation", None)
    if "layer_types" in settings:
        settings["layer_types"] = settings["layer_types"][: settings["num_hidden_layers"]]
    config = AutoConfig.for_model(family.removesuffix("-sliding"), **settings)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.normal_(0, 1.5 * weight.shape[1] ** -0.5)
    return model


def build(family: str) -> PreTrainedModel:
    """A fresh copy of the family's model, in evaluation mode."""
    return copy.deepcopy(_made(family))


def tokens(rows: int = 2, length: int = 48, seed: int = 0) -> torch.Tensor:
    """(rows, length) token ids without the special ones."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
