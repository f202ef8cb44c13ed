"""How a method says what becomes of a trained BERT or RoBERTa with it: transformers' own classes, and where each weight goes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class EncoderForm:
    """What `longspan.longer_encoder` makes of a trained encoder.

    check(length): raises `LongspanError` where the classes have not the method's settings, or cannot read `length` tokens.
    config(old, settings, length): the new configuration, of the old one and those of its settings that both have.
    """

    encoder: type[PreTrainedModel]
    masked: type[PreTrainedModel]
    """The encoder with its head for masked tokens."""
    check: Callable[[int], None]
    config: Callable[[PreTrainedConfig, dict[str, Any], int], PreTrainedConfig]
    bert_names: bool
    """Whether the head for masked tokens and the pooler are named as in BERT; else as in RoBERTa."""
    copied: tuple[tuple[str, str], ...] = ()
    """Parts of weights' names, and the names of second weights that begin as copies of them."""
    note: str = ""
    """What whoever uses the model must know."""
