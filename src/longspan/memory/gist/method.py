"""Gist tokens (Mu 2023): a model that has learned to put a prompt into a few tokens, which then stand for it.

    [prompt ; gist × k ; input]     nothing behind the gist tokens sees anything before them       (section 3.2, Figure 2)

Trained so on instructions, the model puts into the gist tokens' keys and values what of the prompt is needed later. `compress`
keeps these alone: k tokens' worth of cache for a prompt, to be saved and reused for any number of inputs. It is the mask's
own result, not another one, since tokens keep the positions that they had behind the prompt.

    positive    the control above: gist tokens, and nothing hidden
    negative    the control below: neither prompt nor gist tokens are seen by what comes after
                                                                                                    (section 4.2)

There is one gist token, written k times; its row in the model begins as the mean of the vocabulary's (section 3.2; the authors'
code does so for the output matrix as well). What it buys is room in the cache: prompts whose keys and values are kept whole cost
as little time.

In Python, on a model of one's own, decoder or encoder-decoder, before any training:

    longspan.apply(model, "gist:tokens=4", tokenizer=tokenizer)
    held = compress(model, tokenizer, "Instruction: translate into French")
    model.generate(**held.inputs(model, tokenizer, ["\nInput: bread\nOutput:"]))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longspan.core.facts import ModelFacts
from longspan.core.method import Combination, combination
from longspan.core.tokens import encode, with_bos
from longspan.core.training_setup import TrainingSetup
from longspan.hf.site import Site
from longspan.hf.trial import evaluating
from longspan.memory import files
from longspan.memory.base import reader_on
from longspan.memory.gist import decoder as gist_decoder
from longspan.memory.gist import encoder as gist_encoder
from longspan.memory.gist.decoder import DecoderReader, GistCache
from longspan.memory.gist.encoder import EncoderReader, GistStates
from longspan.memory.gist.settings import TOKEN, method_on
from longspan.memory.special_tokens import TokenMethod, known_id
from longspan.util.errors import NotSupported, SpecError

Held = GistCache | GistStates


@dataclass(frozen=True)
class Gist(TokenMethod):
    """`tokens` gist tokens stand for a prompt.

    `id` is the gist token's, which a training fills in.
    """

    tokens: int = 1
    mode: Literal["gist", "positive", "negative"] = "gist"
    id: int | None = None

    name: ClassVar[str] = "gist"
    token: ClassVar[str] = TOKEN
    title: ClassVar[str] = "Gist tokens"
    also: ClassVar[tuple[str, ...]] = ("gist-tokens", "gisting")
    near: ClassVar[tuple[str, ...]] = ("autocompressors", "icae")
    paper: ClassVar[str] = "Mu 2023, arXiv 2304.08467"
    seam: ClassVar[Any] = "memory"
    slots: ClassVar[frozenset[str]] = frozenset({"attention", "span", "cache", "cross-attention"})
    works_on: ClassVar[str] = "a trained model that is then fine-tuned"
    cost: ClassVar[str] = "time n², cache of a prompt constant"
    encoder_decoders: ClassVar[bool] = True
    why_not_exportable: ClassVar[str] = (
        "a prompt is hidden while the model runs, and a checkpoint holds weights; longspan train saves a model that has it on"
    )

    def __post_init__(self) -> None:
        self.require(self.tokens >= 1, f"tokens must be at least 1, not {self.tokens}; without gist tokens use none")
        self.require(self.id is None or self.id >= 0, f"id must be a token's, from 0, not {self.id}")

    def check(self, facts: ModelFacts) -> None:
        self.require(
            self.tokens < facts.window,
            f"tokens={self.tokens} leave no room for a text: the model reads {facts.window:,}; use 1 to 10",
        )

    def neutral_length(self) -> int:
        """Without gist tokens nothing changes, however long a text is."""
        return 2**31

    def check_training(self, setup: TrainingSetup, facts: ModelFacts) -> None:
        """Refuses adapters, and data without instructions for the gist tokens to stand behind."""
        if setup.lora:
            raise SpecError("lora: adapters do not train the gist token's own row; leave lora out")
        for key, text in setup.texts.items():
            if setup.task is None:
                raise SpecError(
                    f"{key}={text}: gist tokens stand behind instructions, and a text has none; use {key}=instructions, or mix "
                    "them in with data.task=instructions"
                )

    def inserted_tokens(self) -> int:
        return self.tokens

    def training_samples(self, samples: Sequence[Any]) -> list[Any]:
        """The samples with the gist tokens behind each one's instruction.

        Raises `SpecError` for a task whose samples do not say how many of their tokens that is (`meta["instruction_tokens"]`).
        """
        if not all("instruction_tokens" in s.meta for s in samples):
            raise SpecError(
                f"{self.name}: it must be known which tokens are the instruction; use data.train=instructions, or "
                "data.train=instructions:data=FOLDER for a folder in Alpaca's format"
            )
        return [self._with_gists(sample, int(sample.meta["instruction_tokens"])) for sample in samples]

    def _with_gists(self, sample: Any, at: int) -> Any:
        return replace(sample, tokens=[*sample.tokens[:at], *_gists(self), *sample.tokens[at:]])

    def attach(self, site: Site) -> None:
        if self.id is None and (known := known_id(site.model, Gist)) is not None:
            raise NotSupported(f"gist: this model's gist token is {known}: use {replace(self, id=known).spec}")
        self.check_token(site, self.id)
        reader = EncoderReader if site.facts.encoder_decoder else DecoderReader
        reader(self, site).attach()


# The token


def gist_of(method: Combination | str | None) -> Gist | None:
    """The gist among some methods; None where there is none."""
    found = combination(method).methods if method is not None else ()
    return next((m for m in found if isinstance(m, Gist)), None)


# Prompts


def compress(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: str | Sequence[str]) -> Held:
    """Reads prompts, each with the gist tokens behind it, and keeps the gist tokens alone.

    Raises `NotSupported` for a model without gist tokens, or with a control on it.

    The prompt is what stands before the gist tokens in training, to the letter: of the task `instructions`
    "Instruction: …", and what follows begins with a new line.
    """
    method = method_on(model)
    if method.mode != "gist":
        raise NotSupported(f"{method.spec} is a control that hides nothing or everything; compress with mode=gist")
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    rows = [with_bos(tokenizer, encode(tokenizer, text)) for text in texts]
    if not rows or not all(rows):
        raise SpecError("gist: a prompt is empty; give at least one token for each")
    if any(TOKEN in text for text in texts):
        raise SpecError(f"gist: a prompt has {TOKEN} in it; leave it out, it is put behind the prompt here")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else rows[0][0]
    ids, mask = gist_encoder.padded([[*row, *_gists(method)] for row in rows], pad, model.device)
    first = torch.tensor([len(row) for row in rows], device=model.device)
    side = gist_encoder if model.config.is_encoder_decoder else gist_decoder
    with evaluating(model):
        return side.compressed(model, ids, mask, first, method.tokens)


def joined(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, text: str) -> list[int]:
    """The ids of a prompt, the gist tokens and a text that goes on: what `compress` and `inputs` read in two parts."""
    before = with_bos(tokenizer, encode(tokenizer, prompt))
    after = gist_encoder.text_ids(tokenizer, text) if model.config.is_encoder_decoder else encode(tokenizer, text)
    return [*before, *_gists(method_on(model)), *after]


def _gists(method: Gist) -> list[int]:
    assert method.id is not None, "a method that is on a model, or a training's, has its token"
    return [method.id] * method.tokens


# Files


def save(held: Held, path: str | Path, model: PreTrainedModel) -> None:
    """Writes compressed prompts as a safetensors file that `model` can read again."""
    if isinstance(held, GistStates):
        files.write(path, model, None, held.tokens, {"shift": held.shift, "states": held.states})
    else:
        files.write(path, model, held, int(held.shift.max()), {})


def load(path: str | Path, model: PreTrainedModel) -> Held:
    """Reads what `save` wrote, onto the model's device and in its dtype.

    Raises `LongspanError` where it is no such file, or another model made it.
    """
    method_on(model)
    file = files.read(path, model)
    if "states" in file.tensors:
        states, shift = file.tensors["states"].to(model.device), file.tensors["shift"].to(model.device)
        return GistStates(file.cast(states, model), shift)
    restored = reader_on(model).restore(file.tensors, file.layers, file.layer_tensors(model), None)
    return cast(GistCache, restored)
