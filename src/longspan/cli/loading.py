"""A model for a command, and the method that the command applies to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Loaded(NamedTuple):
    """A model without its method, its tokenizer, and `apply_method(length)`.

    The length, in tokens, decides settings that the spec leaves open.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    apply_method: Callable[[int | None], Any]


def load(name: str, method: str | None, dtype: str | None, device: str | None) -> Loaded:
    """Loads a model, after its configuration was checked against the method's spec.

    Raises `LongspanError` for a model that cannot be loaded, or a method that it cannot take.
    """
    from longspan import models
    from longspan.apply import apply
    from longspan.core.method import parse

    combination = None if method is None else parse(method)
    facts = models.inspect_model(name)
    if combination is not None:
        combination.check(facts)
    model, tokenizer = models.load(name, dtype=dtype, device=device)
    return Loaded(
        model, tokenizer, lambda length: model if combination is None else apply(model, combination, length=length)
    )
