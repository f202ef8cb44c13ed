"""Tokens that a method adds to a model: in its tokenizer, in its embeddings and in its configuration.

A method with such a token derives from `TokenMethod` and names the token. `apply(model, method, tokenizer=tokenizer)` and
training then call `prepare_tokenizer` and `prepare_model`; the number of the token is saved with the model's configuration, so
that a learned row is never overwritten.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Self, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longspan.core.method import Method
from longspan.hf.site import Site, remove
from longspan.util.errors import NotSupported


class TokenMethod(Method):
    """Base of methods that teach a model one special token; a subclass has `id`, the token's number, among its settings."""

    token: ClassVar[str] = ""
    """The token as text, such as `<GIST>`."""
    id: int | None

    @classmethod
    def config_key(cls) -> str:
        """The entry of a model's configuration that names the token which the model has a row for."""
        return f"{cls.name}_token_id"

    def prepare_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> Self:
        """The same method with its token's id; a tokenizer without the token gets it.

        Raises `SpecError` where `id` is another token's, and `NotSupported` where the tokenizer's ids have gaps.
        """
        id = add_token(tokenizer, self.token)
        self.require(self.id in (None, id), f"id={self.id} is not {self.token}, which is {id} here; leave id out")
        return cast(Self, replace(cast(Any, self), id=id))

    def prepare_model(self, model: PreTrainedModel) -> None:
        """Adds the token's embedding row unless the configuration says that the model has one."""
        self.require(self.id is not None, "the token has no id yet; prepare_tokenizer comes before prepare_model")
        if known_id(model, type(self)) != self.id:
            remove(model)
            add_row(model, cast(int, self.id))
            setattr(model.config, self.config_key(), self.id)

    def token_ids(self) -> tuple[int, ...]:
        return () if self.id is None else (self.id,)

    def check_token(self, site: Site, id: int | None) -> int:
        """`id`, where the model has a row for it.

        Raises `NotSupported` for None and for an id past the vocabulary.
        """
        if id is None:
            raise NotSupported(
                f"{site.facts.architecture} has no {self.name} token: longspan train with method={self.spec} teaches it one, and "
                f'longspan.apply(model, "{self.spec}", tokenizer=tokenizer) adds an untrained one'
            )
        if id >= site.facts.vocab:
            raise NotSupported(
                f"{self.name}: id={id} is no token of this model, which has {site.facts.vocab:,}; load the model that was "
                "trained with it"
            )
        return id


def known_id(model: PreTrainedModel, method: type[TokenMethod]) -> int | None:
    """The id of the method's token by the model's configuration; None where the model has none."""
    return getattr(model.config, method.config_key(), None)


def add_token(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """The id of `token`, which is added to a tokenizer that lacks it.

    Raises `NotSupported` where the id is another token's.
    """
    if token not in tokenizer.get_vocab():
        tokenizer.add_tokens([token], special_tokens=True)
    id: Any = tokenizer.convert_tokens_to_ids(token)
    if other := next((name for name, other in tokenizer.get_vocab().items() if other == id and name != token), None):
        raise NotSupported(
            f"the tokenizer's ids have gaps, and a new token, {token}, would be {id}, which is {other!r}: number its tokens anew"
        )
    return int(id)


@torch.no_grad()
def add_row(model: PreTrainedModel, id: int) -> None:
    """Sets row `id` of the embeddings, and of an untied output matrix, to the mean of the rows before it."""
    table: Any = model.get_input_embeddings()
    if id >= len(table.weight):
        model.resize_token_embeddings(id + 1, mean_resizing=False)
    modules: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    for matrix in {m.weight: None for m in modules if m is not None}:
        matrix[id] = matrix[:id].float().mean(0).to(matrix)
