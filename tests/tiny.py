"""A tiny random Llama with a byte tokenizer and a chat template, made in a moment, for tests that need one."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] | trim }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

SIZES = {
    "vocab_size": 270,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": 1,
}
"""Sizes of a configuration for tests that make models of several families; they name the window."""


def sizes(
    vocabulary: int, hidden: int, inner: int, layers: int, heads: int, kv_heads: int | None = None
) -> dict[str, int]:
    """The sizes of a model as arguments of most configurations of transformers; kv_heads: none for families without them."""
    named = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }
    return named if kv_heads is None else {**named, "num_key_value_heads": kv_heads}


def tokenizer(gap: int = 1) -> PreTrainedTokenizerFast:
    """One token for each byte, `<s>` and `</s>`; plain text starts with `<s>`. The ids of bytes are `gap` apart."""
    special = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {t: i for i, t in enumerate(special)} | {t: len(special) + gap * i for i, t in enumerate(letters)}
    raw = Tokenizer(models.BPE(vocab=ids, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", additional_special_tokens=special[2:]
    )
    made.chat_template = TEMPLATE
    return made


def model(window: int = 128, seed: int = 0) -> LlamaForCausalLM:
    """Two layers, four heads on two key-value heads; `</s>` is never its likeliest token."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        **sizes(264, 64, 96, 2, 4, 2),
        max_position_embeddings=window,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    made = LlamaForCausalLM(config).eval()
    made.lm_head.weight.data[1].zero_()
    return made


def folder(path: Path, window: int = 128) -> Path:
    """The model and its tokenizer saved in `path`."""
    model(window).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path
