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

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longspan.core.facts import ModelFacts
from longspan.core.method import Combination, combination
from longspan.core.tokens import encode, with_bos
from longspan.core.training_setup import TrainingSetup
from longspan.hf.site import Site
from longspan.memory.gist import decoder as gist_decoder
from longspan.memory.gist import encoder as gist_encoder
from longspan.memory.gist.decoder import DecoderReader, GistCache
from longspan.memory.gist.encoder import EncoderReader, GistStates
from longspan.memory.gist.settings import TOKEN, method_on
from longspan.memory.special_tokens import TokenMethod, known_id
from longspan.util.errors import LongspanError, NotSupported, SpecError, writing

Held = GistCache | GistStates


@dataclass(frozen=True)
class Gist(TokenMethod):
    """`tokens` gist tokens stand for a prompt. `id` is the gist token's, which a training fills in."""

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
    """Reads prompts, each with the gist tokens behind it, and keeps the gist tokens alone. Raises `NotSupported` for a model
    without gist tokens, or with a control on it.

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
    with _evaluating(model):
        return side.compressed(model, ids, mask, first, method.tokens)


def joined(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, text: str) -> list[int]:
    """The ids of a prompt, the gist tokens and a text that goes on: what `compress` and `inputs` read in two parts."""
    before = with_bos(tokenizer, encode(tokenizer, prompt))
    after = gist_encoder.text_ids(tokenizer, text) if model.config.is_encoder_decoder else encode(tokenizer, text)
    return [*before, *_gists(method_on(model)), *after]


def _gists(method: Gist) -> list[int]:
    assert method.id is not None, "a method that is on a model, or a training's, has its token"
    return [method.id] * method.tokens


@contextlib.contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


# Files


def save(held: Held, path: str | Path, model: PreTrainedModel) -> None:
    """Writes compressed prompts as a safetensors file that `model` can read again."""
    tensors = {"shift": held.shift}
    if isinstance(held, GistStates):
        tensors["states"] = held.states
    else:
        for number, (key, value) in enumerate(held.copy().pairs()):
            tensors |= {f"{number}.key": key, f"{number}.value": value}
    said = {"longspan": "gist tokens", "method": method_on(model).spec, "model": _fingerprint(model)}
    with writing(path):
        save_file({name: x.detach().contiguous().cpu() for name, x in tensors.items()}, str(path), metadata=said)


def load(path: str | Path, model: PreTrainedModel) -> Held:
    """Reads what `save` wrote, onto the model's device and in its dtype. Raises `LongspanError` where it is no such file, or
    another model made it."""
    method = method_on(model)
    try:
        with safe_open(str(path), "pt", device=str(model.device)) as file:
            said = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    except (SafetensorError, OSError) as error:
        raise LongspanError(f"{path} cannot be read as gist tokens: {error}; save them again") from error
    if said.get("longspan") != "gist tokens":
        raise LongspanError(f"{path} holds no gist tokens; write them with longspan.memory.gist.save")
    if said.get("model") != _fingerprint(model):
        raise LongspanError(
            f"{path} was made by another model, or before this one was trained further ({said.get('method')}; here "
            f"{method.spec}); compress the prompts again"
        )
    shift = tensors.pop("shift")
    tensors = {name: x.to(model.dtype) for name, x in tensors.items()}
    if "states" in tensors:
        return GistStates(tensors["states"], shift)
    count = len(tensors) // 2
    return GistCache([(tensors[f"{i}.key"], tensors[f"{i}.value"]) for i in range(count)], shift)


def _fingerprint(model: PreTrainedModel) -> str:
    """sha256, in hex, of the gist token's row and of all vectors among the weights, such as those of norms: any training changes
    them, and they are few. As bfloat16, so that a model in another dtype is the same one."""
    table: Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
    vectors = [("gist", table[method_on(model).id]), *((n, p) for n, p in model.named_parameters() if p.ndim == 1)]
    total = hashlib.sha256()
    for name, vector in sorted(vectors, key=lambda one: one[0]):
        total.update(f"{name} {tuple(vector.shape)}\n".encode())
        total.update(vector.detach().cpu().bfloat16().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
