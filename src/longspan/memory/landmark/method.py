"""Landmark attention (Mohtashami & Jaggi 2023): a token after every block stands for the block, and attention retrieves by it.

In training every block of `block` tokens is followed by a landmark, and attention is a grouped softmax: a token of an earlier
block weighs its share of the block times the share of the block's landmark (section 3.1; `engine/retrieval`). So the landmark's
key learns to say whether anything in its block is asked for. In use a chunk of `local` tokens is read with the `retrieve` blocks
before it whose landmarks score highest, for each token and head, at positions that are never past those of training however
long the text (sections 3.2 and 3.3; `engine/retrieval/landmarks.py`).

    model.train()   all blocks in sight, at their true distances
    model.eval()    `retrieve` blocks and the chunk; the same thing where no more blocks than that are before the chunk

Whoever calls the model gives ordinary tokens: landmarks are put in, and taken out, in every forward. The paper's models have as
many key-value heads as query heads; where several query heads share one, each still retrieves for itself.

In Python, on a model that was trained with it, a document is read once and asked many times:

    model, tokenizer = longspan.load("runs/landmark/model")
    held = read(model, tokenizer, text)
    model.generate(**held.inputs(model, tokenizer, "\nWho wrote it?"), max_new_tokens=20)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from longspan.core.facts import ModelFacts
from longspan.core.method import Combination, combination
from longspan.core.tokens import encode, with_bos
from longspan.core.training_setup import TrainingSetup
from longspan.engine.retrieval.landmarks import Layout
from longspan.hf import compat
from longspan.hf.site import Site, site_of
from longspan.memory import files
from longspan.memory.landmark.cache import PageLayer, Rows
from longspan.memory.landmark.reader import LandmarkReader, copied
from longspan.memory.special_tokens import TokenMethod, known_id
from longspan.util.errors import LongspanError, NotSupported, SpecError

TOKEN = "<LANDMARK>"


@dataclass(frozen=True)
class Landmark(TokenMethod):
    """A landmark after every `block` tokens; `retrieve` blocks for each token and head (`per=token`) or for each head and chunk
    (`per=head`), beside the chunk of `local` tokens at hand. `offload` keeps the other blocks in the CPU's memory. `id` is the
    landmark's token, which a training fills in.

    The defaults are those of the paper's language models, trained with 512 tokens: (retrieve + 1) · 51 + 255 = 510.
    """

    block: int = 50
    retrieve: int = 4
    local: int = 250
    per: Literal["token", "head"] = "token"
    offload: bool = False
    id: int | None = None

    name: ClassVar[str] = "landmark"
    token: ClassVar[str] = TOKEN
    title: ClassVar[str] = "Landmark attention"
    also: ClassVar[tuple[str, ...]] = ("landmark-attention", "landmark-tokens")
    paper: ClassVar[str] = "Mohtashami & Jaggi 2023, arXiv 2305.16300"
    seam: ClassVar[Any] = "memory"
    slots: ClassVar[frozenset[str]] = frozenset({"attention", "span", "cache"})
    works_on: ClassVar[str] = "a trained model that is then fine-tuned"
    cost: ClassVar[str] = "time n²/block, cache n, on the device n/block with offload"
    why_not_exportable: ClassVar[str] = (
        "blocks are retrieved while the model runs, and a checkpoint holds weights; longspan train saves a model that has it on"
    )

    def __post_init__(self) -> None:
        self.require(self.block >= 1, f"block must be at least 1 token, not {self.block}")
        self.require(self.retrieve >= 1, f"retrieve must be at least 1 block, not {self.retrieve}")
        near = max(1, round(self.local / self.block)) * self.block
        self.require(
            self.local >= 1 and self.local % self.block == 0,
            f"local={self.local} is not whole blocks of {self.block} tokens; use local={near}",
        )
        self.require(self.id is None or self.id >= 0, f"id must be a token's, from 0, not {self.id}")

    @property
    def layout(self) -> Layout:
        return Layout(self.block, self.local // self.block, self.retrieve, self.per == "head")

    @property
    def positions(self) -> int:
        """How many positions are ever used in reading (section 3.3)."""
        return (self.retrieve + 1) * self.layout.size + self.layout.chunk

    def check(self, facts: ModelFacts) -> None:
        if facts.rope is None:
            raise NotSupported(
                f"landmark gives retrieved blocks positions of their own, and {facts.architecture} has no rotary positions; use "
                "a model with RoPE (Llama, Mistral, Qwen, Phi-3, …)"
            )
        if facts.sliding_window or facts.layer_types - {"full_attention"}:
            raise NotSupported(
                f"landmark retrieves in every layer from the whole text, and {facts.architecture} has layers that do not see all "
                "of it; use a model whose layers all have full attention"
            )
        if facts.rope.varies and self.positions > facts.rope.window:
            raise NotSupported(
                f"{self.spec} reads at {self.positions:,} positions, and the frequencies of {facts.architecture} "
                f"({facts.rope.type}) are others past {facts.rope.window:,}; take less of local or retrieve, or use self-extend"
            )
        if self.positions > facts.window:
            raise NotSupported(
                f"{self.spec} reads at {self.positions:,} positions, and the model's window is {facts.window:,}; take less of "
                "local or retrieve"
            )

    def reach(self, facts: ModelFacts) -> int | None:
        return None

    def neutral_length(self) -> int:
        """Until the first landmark nothing changes."""
        return self.block - 1

    def cache_tokens(self, facts: ModelFacts, length: int) -> int:
        return length + length // self.block

    def keys_seen(self, facts: ModelFacts, length: int) -> int:
        """The retrieved blocks', the chunk's, and all landmarks."""
        return min(self.cache_tokens(facts, length), self.positions - self.layout.size + length // self.block)

    def check_training(self, setup: TrainingSetup, facts: ModelFacts) -> None:
        """Refuses adapters, positions that are not counted in order, and samples that exceed the window with landmarks."""
        if setup.lora:
            raise SpecError("lora: adapters do not train the landmark's own row; leave lora out")
        if setup.positions != "ordinary":
            raise SpecError("positions.kind: landmark counts positions by itself; use positions.kind=ordinary")
        if setup.packing == "boundaries":
            raise SpecError("data.packing=boundaries: landmark's blocks go through a whole sample; use plain or none")
        most = facts.window * self.block // (self.block + 1)
        if setup.length > most:
            new = "set model.max_position_embeddings higher, or " if setup.from_scratch else ""
            raise SpecError(
                f"data.length={setup.length}: with a landmark after every {self.block} tokens this model's window of "
                f"{facts.window:,} holds {most:,}; {new}train on shorter texts, it reads longer ones afterwards"
            )

    def attach(self, site: Site) -> None:
        known = known_id(site.model, Landmark)
        id = self.check_token(site, known if self.id is None else self.id)
        if known not in (None, id):
            raise NotSupported(f"landmark: this model's landmark is token {known}, not {id}; leave id out")
        if getattr(site.model.base_model, "leading", 0):
            raise NotSupported(
                "landmark counts blocks from a text's first token, and this model puts a learned sink before it; use a model "
                "without sink=learned"
            )
        _suppress(site, id)
        site.state = LandmarkReader(replace(self, id=id), site)
        site.state.attach()


def _suppress(site: Site, id: int) -> None:
    """Keeps `generate` from saying the landmark, which is put in and never said."""
    settings = getattr(site.model, "generation_config", None)  # a model without a head has none
    if settings is None:
        return
    before = settings.suppress_tokens
    settings.suppress_tokens = sorted({*(before or []), id})
    site.keep_for_undo(partial(setattr, settings, "suppress_tokens", before))


# The token


def landmark_of(method: Combination | str | None) -> Landmark | None:
    """The landmark attention among some methods; None where there is none."""
    found = combination(method).methods if method is not None else ()
    return next((m for m in found if isinstance(m, Landmark)), None)


def reader_on(model: PreTrainedModel) -> LandmarkReader:
    """The landmark attention that is on a model. Raises `NotSupported` where there is none."""
    site = site_of(model)
    if site is None or not isinstance(site.state, LandmarkReader):
        raise NotSupported(
            "this model has no landmarks: load one that was trained with them, or "
            'longspan.apply(model, "landmark", tokenizer=tokenizer)'
        )
    return site.state


# Documents


@dataclass
class Memory:
    """Documents that were read, as a cache; `inputs` gives each asking a copy of it."""

    cache: Cache

    @property
    def layers(self) -> list[PageLayer]:
        return cast(list[PageLayer], self.cache.layers)

    @property
    def rows(self) -> Rows:
        return self.layers[0].rows

    def __len__(self) -> int:
        """How many documents."""
        return len(self.rows.ids)

    @property
    def device_bytes(self) -> int:
        """Bytes on the model's device."""
        return sum(layer.device_bytes for layer in self.layers)

    @property
    def cpu_bytes(self) -> int:
        """Bytes of blocks that `offload` keeps in the CPU's memory."""
        return sum(layer.far_bytes for layer in self.layers)

    def copy(self, rows: int | None = None, each: int = 1) -> Cache:
        """A cache to go on with: a row for each document, or the only one `rows` times, and every row `each` times."""
        rows = len(self) if rows is None else rows
        if len(self) not in (1, rows):
            raise LongspanError(f"{len(self)} documents cannot go before {rows} texts; give one text for each document")
        return copied(self.cache, torch.arange(rows).repeat_interleave(each) % len(self))

    def inputs(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: str | Sequence[str], *, beams: int = 1
    ) -> dict[str, Any]:
        """What `generate` takes to go on after the documents: input_ids, attention_mask and a cache.

        The ids begin with the documents', which are in the cache. beams: `num_beams` of that call, or its
        `num_return_sequences` where it samples.
        """
        rows = [encode(tokenizer, text) for text in ([texts] if isinstance(texts, str) else texts)]
        if not rows or not all(rows):
            raise SpecError("landmark: a text to go on with is empty; give at least one token for each")
        cache = self.copy(len(rows), beams)
        new, mask = _left_padded(rows, tokenizer)
        index = torch.arange(len(rows)) % len(self)
        ids = torch.cat((self.rows.ids[index], new), dim=1)
        real = torch.cat((self.rows.real[index].long(), mask), dim=1)
        return {
            "input_ids": ids.to(model.device),
            "attention_mask": real.to(model.device),
            compat.CACHE: cache,
        }


@torch.no_grad()
def read(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: str | Sequence[str]) -> Memory:
    """Reads documents, as a prompt begins, and keeps their blocks.

    Raises `NotSupported` for a model without landmarks.
    """
    reader = reader_on(model)
    rows = [with_bos(tokenizer, encode(tokenizer, t)) for t in ([texts] if isinstance(texts, str) else texts)]
    if not rows or not all(rows):
        raise SpecError("landmark: a document is empty; give at least one token for each")
    ids, mask = (x.to(model.device) for x in _left_padded(rows, tokenizer))
    return read_ids(model, ids, mask, at_once=reader.at_once())


@torch.no_grad()
def read_ids(model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None, *, at_once: int = 16_000) -> Memory:
    """The same for tokens (B, T), some at once."""
    reader = reader_on(model)
    if reader.site.training:
        raise NotSupported("landmark retrieves in evaluation mode only; call model.eval() first")
    return Memory(reader.prefill(ids, mask, at_once))


def _left_padded(rows: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
    """ids and mask, (B, T), on the CPU."""
    width = max(map(len, rows))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else rows[0][0]
    ids = torch.tensor([[*[pad] * (width - len(row)), *row] for row in rows])
    return ids, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])


# Files


def save(held: Memory, path: str | Path, model: PreTrainedModel) -> None:
    """Writes documents that were read as a safetensors file that `model` can read again."""
    tokens = int(held.rows.tokens(len(held)).max())
    files.write(path, model, held.cache, tokens, {"ids": held.rows.ids, "real": held.rows.real})


def load(path: str | Path, model: PreTrainedModel) -> Memory:
    """Reads what `save` wrote, in the model's dtype, onto its device or, with `offload`, into the CPU's memory. Raises
    `LongspanError` where it is no such file, or was made by another model or with other settings."""
    reader = reader_on(model)
    file = files.read(path, model)
    return Memory(reader.restore(file.tensors, file.layers, file.layer_tensors(model), None))
