"""Texts to token ids: no special tokens out of text, and exactly one BOS."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from longspan.util.errors import LongspanError


def encode_all(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, add_special_tokens: bool = False
) -> list[list[int]]:
    """Token ids of each text.

    What looks like a special token in a text (`<s>`, `<pad>`) is encoded as plain text.

    add_special_tokens: whether the tokenizer adds the tokens that begin and end a text.
    """
    settings: dict[str, Any] = {"split_special_tokens": True}
    if (
        type(tokenizer).__name__ == "MistralCommonBackend"
    ):  # never finds special tokens in text, and refuses the setting
        settings = {}
    batch = tokenizer(
        list(texts), add_special_tokens=add_special_tokens, return_attention_mask=False, verbose=False, **settings
    )
    return [list(ids) for ids in batch["input_ids"]]


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of one text, without special tokens; see `encode_all`."""
    return encode_all(tokenizer, [text])[0]


def bos_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id of the token that this tokenizer puts before every text; None where it puts none."""
    first = list(tokenizer("a")["input_ids"])[:1]
    return tokenizer.bos_token_id if tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id] else None


def with_bos(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """`ids` with exactly one BOS before them, where the tokenizer uses one.

    Raises `LongspanError` where there are two, which changes a model's output: a chat template wrote BOS into a text that has it.
    """
    bos = bos_id(tokenizer)
    if bos is None:
        return ids
    if ids[:2] == [bos, bos]:
        raise LongspanError(
            f"the prompt begins with {tokenizer.bos_token!r} twice, which changes the output; remove one from the chat template"
        )
    return ids if ids[:1] == [bos] else [bos, *ids]
