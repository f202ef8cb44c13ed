"""What the tests of tasks run on: a tiny Llama, a byte tokenizer, a model whose every answer is known, and a fake meter."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}</s>{% endfor %}[assistant]"


class FakeMeter:
    """Measures nothing and remembers what it was asked to measure."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    @contextlib.contextmanager
    def prefill(self, tokens: int) -> Iterator[None]:
        self.calls.append(("prefill", tokens))
        yield

    @contextlib.contextmanager
    def decode(self, tokens: int) -> Iterator[None]:
        self.calls.append(("decode", tokens))
        yield

    def together(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def cache(self, past: Any) -> None:
        self.calls.append(("cache", past.get_seq_length()))


def byte_tokenizer(bos: bool = True) -> PreTrainedTokenizerFast:
    """One token for each byte; `bos`: whether plain text starts with `<s>` (id 0). `</s>` is id 1."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(["<s>", "</s>", *letters])}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    if bos:
        raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>" if bos else None, eos_token="</s>")
    made.chat_template = TEMPLATE
    return made


SHAPE: dict[str, Any] = {
    "vocab_size": 258,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}
"""Settings of a tiny decoder for the byte tokenizer's tokens."""


def llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    settings = {**SHAPE, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 1}
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()


class KnownModel(nn.Module):
    """A model that says the logits `rule(context)` of the next token, where `context` is how many tokens it has seen."""

    def __init__(self, rule: Callable[[int], Tensor], vocabulary: int):
        super().__init__()
        self.rule = rule
        self.weight = nn.Parameter(torch.zeros(1))
        self.config = LlamaConfig(num_hidden_layers=1, hidden_size=32, intermediate_size=8, vocab_size=vocabulary)
        self.generation_config = SimpleNamespace(eos_token_id=1)
        self.device, self.dtype, self.base_model = torch.device("cpu"), torch.float32, self
        self.longest = 0

    def get_output_embeddings(self) -> None:
        return None

    def forward(self, input_ids: Tensor, past_key_values: Any, use_cache: bool, logits_to_keep: int) -> Any:
        new = input_ids.shape[1]
        seen = past_key_values.get_seq_length()
        past_key_values.update(torch.zeros(1, 1, new, 2), torch.zeros(1, 1, new, 2), 0)
        self.longest = max(self.longest, seen + new)
        contexts = range(seen + 1, seen + new + 1)[-logits_to_keep:]
        logits = torch.stack([self.rule(c) for c in contexts])[None]
        return SimpleNamespace(logits=logits, past_key_values=past_key_values)
