"""Documents that are read once and asked often, in the tokenizer's chat template where there is one.

A document begins a user's message, `… document`, and each question ends it, `question …`; without a template both are plain text.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longspan.core.chat_template import QUESTION, encode_rendered, render
from longspan.core.tokens import encode, with_bos
from longspan.memory.base import OnTokens, reader_on
from longspan.memory.document import Memory
from longspan.reading.prefill import chunk_size
from longspan.util.errors import SpecError


def document_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, *, chat: bool) -> list[int]:
    """The ids of a document up to where a question begins.

    Raises `SpecError` for an empty document.
    """
    if not text.strip():
        raise SpecError("the document is empty")
    text += reader_on(model).separator
    if not chat:
        return with_bos(tokenizer, _before_a_word(lambda part: encode(tokenizer, part), text))
    message = text + QUESTION
    before, _, _ = render(tokenizer, [{"role": "user", "content": message}]).partition(QUESTION)
    return with_bos(tokenizer, _before_a_word(lambda part: encode_rendered(tokenizer, part), before))


def _before_a_word(encoded: Callable[[str], list[int]], text: str) -> list[int]:
    """The ids of `text` as they are before a word: many tokenizers split blank lines at a text's end otherwise."""
    word = encoded("A")
    ids = encoded(f"{text}A") if text[-1:].isspace() else []
    return ids[: -len(word)] if ids[-len(word) :] == word else encoded(text)


def read_document(model: PreTrainedModel, ids: list[int], *, chat: bool, on_tokens: OnTokens | None = None) -> Memory:
    """Reads the ids that `document_ids` returned, with as many tokens a forward as the device's memory allows."""
    return Memory.read(
        model, None, torch.tensor(ids), chat=chat, at_once=chunk_size(model, len(ids)), on_tokens=on_tokens
    )


def question_ids(tokenizer: PreTrainedTokenizerBase, memory: Memory, question: str) -> list[int]:
    """The ids of a question that goes on from a memory.

    Raises `SpecError` for an empty one.
    """
    if not question.strip():
        raise SpecError("the prompt is empty")
    return memory.question_ids(tokenizer, question)
