"""A document that a model has read: kept, written to a file, and asked any number of times, also by another process.

    book = Memory.read(model, tokenizer, text)
    book.save("book.memory")
    print(Memory.load("book.memory", model).ask(model, tokenizer, "Who wrote it?", max_new_tokens=50))

What is kept is the KV cache: of the method that owns it (streaming, focused, landmark, gist), of a recurrent memory model, or the
plain one, with full attention or sliding windows. Each question goes on from a copy, so that answers are those of reading again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from longspan.core.method import NoMethod
from longspan.core.tokens import encode, with_bos
from longspan.hf import compat
from longspan.hf.caches import Stored
from longspan.memory import files
from longspan.memory.base import OnTokens, TextReader, reader_on, spec_on
from longspan.util.errors import LongspanError, NotSupported, SpecError


@dataclass
class Memory:
    """The KV cache of one document. ids (n,): what `generate` is given before a question; tokens: length of the document; method:
    the spec that it was read under."""

    ids: Tensor
    cache: Cache
    tokens: int
    method: str
    model: PreTrainedModel = field(repr=False)
    chat: bool = False
    """Whether the document begins a user's message in the tokenizer's chat template, which a question goes on with."""

    @classmethod
    def read(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        document: str | Tensor,
        *,
        chat: bool = False,
        at_once: int | None = None,
        on_tokens: OnTokens | None = None,
    ) -> Memory:
        """Reads a document, text or ids (n,) or (1, n), with whatever method is on the model.

        tokenizer: None for ids. chat: kept with the memory. at_once: tokens of one forward. on_tokens: called after each forward
        with the tokens read so far.
        Raises `SpecError` for an empty document and `NotSupported`, before reading, for a model whose cache cannot be kept.
        """
        if isinstance(document, str):
            if tokenizer is None:
                raise SpecError("a text needs a tokenizer; give one, or the text's ids")
            document = torch.tensor(with_bos(tokenizer, encode(tokenizer, document)), dtype=torch.long)
        if document.numel() == 0 or (document.ndim == 2 and len(document) != 1):
            raise SpecError(
                f"a memory is of one document with at least one token, and these ids are {tuple(document.shape)}; read several "
                "one after another"
            )
        reader = reader_on(model)
        check_keeps(model, reader)
        ids = document.reshape(-1)
        given, cache = reader.read(ids, at_once, on_tokens)
        return cls(given.cpu(), cache, len(ids), spec_on(model), model, chat)

    @classmethod
    def of(cls, model: PreTrainedModel, input_ids: Tensor) -> Memory:
        """`read` of ids (n,) or (1, n) for a model with a method that owns its cache. Raises `NotSupported` for another."""
        if reader_on(model).method is None:
            raise NotSupported('this model has no memory: longspan.apply(model, "focused") first')
        return cls.read(model, None, input_ids)

    def __len__(self) -> int:
        """Tokens that `inputs` puts before a question."""
        return len(self.ids)

    @property
    def layers(self) -> list[Any]:
        """The layers of the cache."""
        return list(self.cache.layers)

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values, wherever they are."""
        return sum(_bytes_of(layer) for layer in self.layers)

    def inputs(self, question: Tensor, *, beams: int = 1) -> dict[str, Any]:
        """What `generate` takes to go on after the document with each of some questions, ids (t,) or (questions, t): input_ids
        that begin with the document, attention_mask, and a cache of its own. beams: `num_beams` of that call, or its
        `num_return_sequences` where it samples."""
        rows = question[None] if question.ndim == 1 else question
        if rows.numel() == 0:
            raise SpecError("a question is empty; give at least one token")
        ids = torch.cat((self.ids.to(rows.device).expand(len(rows), -1), rows), dim=1)
        cache = reader_on(self.model).copy(self.cache, len(rows) * beams)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), compat.CACHE: cache}

    def ask(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, question: str, **settings: Any) -> str:
        """The model's continuation of the document and `question`, a text that follows it. settings: as for `generate`."""
        given = self.inputs(
            torch.tensor([encode(tokenizer, question)], dtype=torch.long, device=compat.input_device(model))
        )
        answer = model.generate(**given, **settings)  # type: ignore[operator]
        return str(tokenizer.decode(answer[0, given["input_ids"].shape[1] :], skip_special_tokens=True))

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file that the same model, with the same method on it, can read again."""
        if spec_on(self.model) != self.method:
            raise LongspanError(
                f"the model no longer has {self.method} on it, under which the document was read; apply it again"
            )
        files.write(path, self.model, self.cache, self.tokens, {"ids": self.ids}, chat=self.chat)

    @classmethod
    def load(cls, path: str | Path, model: PreTrainedModel) -> Memory:
        """Reads what `save` wrote, onto the model's devices, or into CPU memory where the method offloads. Raises `LongspanError`
        where it is no such file or is cut short, or where another model, method or settings wrote it."""
        file, reader = files.read(path, model), reader_on(model)
        ids = torch.atleast_2d(reader.ids_of(file.tensors))
        if len(ids) != 1 or not bool(file.tensors.get("real", torch.ones(1)).all()):
            raise LongspanError(f"{path} holds {len(ids)} documents; load them with longspan.memory.{file.kind}.load")
        spec = spec_on(model)
        owner = None if spec == NoMethod.name else spec
        cache = reader.restore(file.tensors, file.layers, file.layer_tensors(model), owner)
        return cls(ids[0], cache, file.tokens, spec, model, file.chat)


def check_keeps(model: PreTrainedModel, reader: TextReader) -> None:
    """Raises `NotSupported` for a model whose cache cannot be kept, which one token shows."""
    if model.config.is_encoder_decoder:
        raise NotSupported(
            f"{type(model).__name__} has an encoder, and a memory is a decoder's KV cache; keep longspan.Encoded.of(model, ids), "
            "or longspan.memory.gist.compress"
        )
    reader.read(torch.zeros(1, dtype=torch.long))


def _bytes_of(layer: Any) -> int:
    if hasattr(layer, "nbytes"):
        return int(layer.nbytes)
    tensors = (
        cast(Stored, layer).stored_tensors()
        if isinstance(layer, Stored)
        else {"key": layer.keys, "value": layer.values}
    )
    return sum(x.nbytes for x in tensors.values())
