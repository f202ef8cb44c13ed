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

from longspan.core.chat_template import QUESTION, encode_rendered, render
from longspan.core.method import NoMethod
from longspan.core.tokens import encode, with_bos
from longspan.hf import compat
from longspan.hf.caches import Stored
from longspan.memory import files
from longspan.memory.base import OnTokens, TextReader, reader_on, spec_on
from longspan.util.errors import LongspanError, NotSupported, SpecError


@dataclass
class Memory:
    """The KV cache of one document.

    ids (n,): what `generate` is given before a question; tokens: length of the document; method: the spec that it was
    read under.
    """

    ids: Tensor
    cache: Cache
    tokens: int
    method: str
    model: PreTrainedModel = field(repr=False)
    chat: bool = False
    """Whether the document begins a user's message in the tokenizer's chat template, which a question goes on with."""
    weights: files.Fingerprints | None = field(default=None, repr=False)
    """Of the model when it read the document."""

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
        if at_once is not None and at_once < 1:
            raise SpecError(f"at_once must be at least 1 token, not {at_once}")
        if isinstance(document, str):
            if not document:
                raise SpecError("the document is empty")
            if tokenizer is None:
                raise SpecError("a text needs a tokenizer; give one, or the text's ids")
            document = torch.tensor(with_bos(tokenizer, encode(tokenizer, document)), dtype=torch.long)
        if not isinstance(document, Tensor) or document.is_floating_point() or document.dtype == torch.bool:
            what = document.dtype if isinstance(document, Tensor) else type(document).__name__
            raise SpecError(f"a document is a text or a tensor of whole numbers, its ids, not {what}")
        if document.numel() == 0 or (document.ndim == 2 and len(document) != 1):
            raise SpecError(
                f"a memory is of one document with at least one token, and these ids are {tuple(document.shape)}; read several "
                "one after another"
            )
        reader = reader_on(model)
        check_keeps(model, reader)
        ids, vocabulary = document.reshape(-1).long(), len(model.get_input_embeddings().weight)  # type: ignore[arg-type]
        if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
            found = f"{int(ids.min())} to {int(ids.max())}"
            raise SpecError(
                f"the document has ids from {found}, and the model's are from 0 to {vocabulary - 1}; use its own tokenizer"
            )
        given, cache = reader.read(ids, at_once, on_tokens)
        return cls(given.cpu(), cache, len(ids), spec_on(model), model, chat, files.fingerprints(model))

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
        if beams < 1:
            raise SpecError(f"beams must be at least 1, not {beams}")
        rows = question[None] if question.ndim == 1 else question
        if rows.numel() == 0:
            raise SpecError("a question is empty; give at least one token")
        ids = torch.cat((self.ids.to(rows.device).expand(len(rows), -1), rows), dim=1)
        cache = reader_on(self.model).copy(self.cache, len(rows) * beams)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), compat.CACHE: cache}

    def ask(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, question: str, **settings: Any) -> str:
        """The model's continuation of the document and `question`, a text that follows it, or that ends the user's message where
        the document begins one (`chat`). settings: as for `generate`. Raises `LongspanError` for another model than read it."""
        self.check_model(model)
        ids = self.question_ids(tokenizer, question)
        beams = _rows_of_one(model, settings)
        given = self.inputs(torch.tensor([ids], dtype=torch.long, device=compat.input_device(model)), beams=beams)
        answer = model.generate(**given, **settings)  # type: ignore[operator]
        return str(tokenizer.decode(answer[0, given["input_ids"].shape[1] :], skip_special_tokens=True))

    def question_ids(self, tokenizer: PreTrainedTokenizerBase, question: str) -> list[int]:
        """The ids of a question that goes on after the document, in the chat template where the document is."""
        if not self.chat:
            return encode(tokenizer, question)
        message = [{"role": "user", "content": QUESTION + question}]
        return encode_rendered(tokenizer, render(tokenizer, message).partition(QUESTION)[2])

    def check_model(self, model: PreTrainedModel) -> None:
        """Raises `LongspanError` where another model read the document, or this one under another method or before it was trained
        further."""
        if spec_on(model) != self.method:
            raise LongspanError(
                f"this memory was read under {self.method}, and the model has {spec_on(model)} on it; apply that method, or read "
                "the text again"
            )
        if self.weights is not None and not self.weights.are_of(model):
            raise LongspanError(
                "this memory is of another model, or of this one before it was trained further; read the text again"
            )

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file that the same model, with the same method on it, can read again."""
        if spec_on(self.model) != self.method:
            raise LongspanError(
                f"the model no longer has {self.method} on it, under which the document was read; apply it again"
            )
        self.check_model(self.model)
        ids = {"ids": self.ids}
        files.write(path, self.model, self.cache, self.tokens, ids, chat=self.chat, weights=self.weights)

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
        return cls(ids[0], cache, file.tokens, spec, model, file.chat, files.fingerprints(model))


def check_keeps(model: PreTrainedModel, reader: TextReader) -> None:
    """Raises `NotSupported` for a model whose cache cannot be kept, which one token shows."""
    if model.config.is_encoder_decoder:
        raise NotSupported(
            f"{type(model).__name__} has an encoder, and a memory is a decoder's KV cache; keep longspan.Encoded.of(model, ids), "
            "or longspan.memory.gist.compress"
        )
    reader.read(torch.zeros(1, dtype=torch.long))


def _rows_of_one(model: PreTrainedModel, settings: dict[str, Any]) -> int:
    """The rows that `generate` makes of one under these settings: beams, or samples."""
    config = settings.get("generation_config") or model.generation_config
    named = (settings.get(name) or getattr(config, name, None) for name in ("num_beams", "num_return_sequences"))
    return max(int(count or 1) for count in named)


def _bytes_of(layer: Any) -> int:
    if hasattr(layer, "nbytes"):
        return int(layer.nbytes)
    tensors = (
        cast(Stored, layer).stored_tensors()
        if isinstance(layer, Stored)
        else {"key": layer.keys, "value": layer.values}
    )
    return sum(x.nbytes for x in tensors.values())
