"""Models, tokenizers and a meter for the tests of tasks."""

from __future__ import annotations

import pytest
from tasks_tiny import FakeMeter, byte_tokenizer, llama
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast


@pytest.fixture
def meter() -> FakeMeter:
    return FakeMeter()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def model() -> LlamaForCausalLM:
    return llama()
