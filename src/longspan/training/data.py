"""The token ids that a training reads: a text is tokenised once and then read from a memory map on disk.

A text is a .txt or .txt.gz file, a folder of them, `prose`, `code` or `novel` (`tasks/text.py`), or a data set on the hub
(`owner/name` or `owner/name:config`, through the `datasets` library). A task of the catalogue that has answers, such as
`passkey:protocol=pi`, can be trained on too, with the loss on its answers alone. Tokens are stored in the run's folder under a
hash of documents and tokenizer, so that a changed text is never taken for the old one.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from longspan.core.method import parse
from longspan.core.tokens import encode_all
from longspan.models import rows_needed
from longspan.tasks.base import Sample, Task, parse_task, task_catalogue
from longspan.tasks.text import BUILT_IN, check_text, read_text
from longspan.training.recipe import DataRecipe, Recipe, TokenizerRecipe
from longspan.util.errors import NotSupported, SpecError, writing
from longspan.util.fetching import reading
from longspan.util.files import write_atomically

_READ_AS = "text without special tokens"
"""Part of the hash; it changes when the same texts give other tokens."""
_BATCH = 64
"""Documents that are tokenised together."""
_SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
_HUB = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


@dataclass(frozen=True)
class Tokens:
    """Documents one after another: ids (tokens,), and the end of each document in them, ends (documents,).

    learned (tokens,), boolean: the tokens that have a loss; None for all.
    """

    ids: np.ndarray
    ends: np.ndarray
    sha256: str
    learned: np.ndarray | None = None

    def document(self, index: int) -> np.ndarray:
        """The ids of one document."""
        return self.ids[self._places(index)]

    def learned_in(self, index: int) -> np.ndarray | None:
        """`learned` of one document."""
        return None if self.learned is None else self.learned[self._places(index)]

    def _places(self, index: int) -> slice:
        return slice(self.ends[index - 1] if index else 0, self.ends[index])


def source(data: DataRecipe, key: str) -> str | None:
    """The text or task at the recipe's key `data.train`, `data.valid` or `data.task`."""
    return {"data.train": data.train, "data.valid": data.valid, "data.task": data.task}[key]


def is_hub(name: str) -> bool:
    """True for a name that can only be a data set on the hub."""
    return name not in BUILT_IN and not Path(name).expanduser().exists() and bool(_HUB.fullmatch(name))


def is_task(name: str) -> bool:
    """True for the name or the spec of a task."""
    known = name not in BUILT_IN and not Path(name).expanduser().exists()
    return known and name.partition(":")[0].strip() in task_catalogue()


def check_source(recipe: Recipe, key: str) -> None:
    """Raises `LongspanError` where `key` names neither a text nor a task that can be trained on; reads no data."""
    data = recipe.data
    name = source(data, key)
    if name is None:
        return
    if key == "data.task":
        if not is_task(name):
            raise SpecError(f"data.task={name}: there is no such task; `longspan tasks` lists them")
        if is_task(data.train):
            raise SpecError(
                "data.task is mixed into a text, and data.train is a task already; name a text at data.train"
            )
        _check_task(recipe, parse_task(name), key)
    elif is_task(name):
        if data.packing != "none":
            raise SpecError(f"{key}={name}: a task's samples are a window each: use data.packing=none")
        _check_task(recipe, parse_task(name), key)
    elif data.samples is not None and key == "data.train" and data.task is None:
        raise SpecError(
            f"data.samples={data.samples} would change nothing: it counts a task's samples, and {name} is a text"
        )
    elif is_hub(name):
        _datasets(name, key)
    else:
        check_text(name, key)


def _check_task(recipe: Recipe, task: Task, key: str) -> None:
    if type(task).answer is Task.answer:
        raise NotSupported(f"{key}={task.spec}: this task has no answers to learn; passkey has")
    if isinstance(recipe.tokenizer, TokenizerRecipe) and key != "data.task":
        raise SpecError(f"{key}={task.spec}: a tokenizer is trained on a text: name one at tokenizer")


def task_tokens(recipe: Recipe, key: str, tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """A task's samples with their answers, as the recipe's method changes them; validation draws with the next seed."""
    train = key != "data.valid"
    task = parse_task(source(recipe.data, key) or "")
    count = (recipe.data.samples or 1000) if train else recipe.data.valid_samples
    seed = recipe.seed + (not train)
    methods = parse(recipe.method).prepare_tokenizer(tokenizer).methods if recipe.method else ()
    room = sum(method.inserted_tokens() for method in methods)
    samples: Sequence[Sample] = task.samples(tokenizer, recipe.data.length - room, count, seed)
    for method in methods:
        samples = method.training_samples(samples)
    whole = [[*s.tokens, *task.answer(tokenizer, s), tokenizer.eos_token_id] for s in samples]
    ids = np.array([i for one in whole for i in one], dtype=np.int64)
    ends = np.cumsum([len(one) for one in whole])
    learned = np.zeros(len(ids), dtype=bool)
    for sample, end, one in zip(samples, ends, whole, strict=True):
        begin = end - len(one)
        learned[begin + len(sample.tokens) : end] = True
        for first, last in task.answered(sample):
            learned[begin + first : begin + last] = True
    digest = hashlib.sha256(ids.tobytes() + ends.tobytes() + learned.tobytes()).hexdigest()
    return Tokens(ids, ends, digest, learned)


def documents(data: DataRecipe, key: str) -> Sequence[str]:
    """The documents of the text at `key`, in a fixed order."""
    name = source(data, key)
    assert name is not None
    if not is_hub(name):
        return read_text(name, key).documents
    library = _datasets(name, key)
    repository, _, config = name.partition(":")
    split = "train" if key == "data.train" else "validation"
    with reading(f"{key}: the data set {name} cannot be read"):
        rows = library.load_dataset(repository, config or None, split=split)
    if data.field not in rows.column_names:
        raise SpecError(f"data.field={data.field}: {name} has no such column; it has {', '.join(rows.column_names)}")
    return rows[data.field]


def _datasets(name: str, key: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise NotSupported(
            f"{key}: there is no text {name} here, and reading a data set of that name from the hub needs the datasets library: "
            "pip install 'longspan[train]'. A .txt or .txt.gz file or a folder of them works without it"
        ) from error
    return datasets


# Tokenizers


def train_tokenizer(texts: Iterable[str], recipe: TokenizerRecipe) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on `texts`, the same for the same texts; it begins a text with <s>.

    Raises `SpecError` where the texts give fewer tokens than `recipe.vocabulary`.
    """
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = list(_SPECIAL.values())
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(texts, trainer)
    if (size := raw.get_vocab_size()) < recipe.vocabulary:
        raise SpecError(
            f"tokenizer.vocabulary={recipe.vocabulary}: the training text yields only {size} tokens; set at most {size}"
        )
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, **_SPECIAL)


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256, in hex, of the tokenizer's rules and its end-of-text token."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(f"{rules}\n{tokenizer.eos_token_id}".encode()).hexdigest()


# Tokens on disk


def tokenise(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, cache: Path, *, title: str, show: bool = True
) -> Tokens:
    """The tokens of every document, each with the tokenizer's beginning of a text and its end-of-text token.

    cache: the folder of the files of tokens. title, show: of a progress bar on standard error.
    Raises `SpecError` for a tokenizer without an end-of-text token.
    """
    if tokenizer.eos_token_id is None:
        raise SpecError("tokenizer: it has no end-of-text token, which separates documents; use another tokenizer")
    sha256 = _digest(texts)
    place = cache / hashlib.sha256(f"{sha256}\n{tokenizer_digest(tokenizer)}\n{_READ_AS}".encode()).hexdigest()[:24]
    if not (place / "ends.npy").is_file():
        _write(texts, tokenizer, place, title, show)
    ids = np.memmap(place / "ids.bin", dtype=_dtype(tokenizer), mode="r")
    return Tokens(ids, np.load(place / "ends.npy"), sha256)


def _write(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, place: Path, title: str, show: bool) -> None:
    part = place.with_name(f".{place.name}.{uuid.uuid4().hex[:8]}")
    part.mkdir(parents=True)
    lengths: list[int] = []
    try:
        with writing(place / "ids.bin"), open(part / "ids.bin", "wb") as file:
            for ids in _encoded(texts, tokenizer, title, show):
                file.write(ids.tobytes())
                lengths.append(len(ids))
        with writing(place / "ends.npy"):
            np.save(part / "ends.npy", np.cumsum(lengths, dtype=np.int64))
        write_atomically(part / "about.json", json.dumps({"documents": len(lengths), "tokens": sum(lengths)}) + "\n")
        part.rename(place)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _encoded(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, title: str, show: bool) -> Iterator[np.ndarray]:
    from rich.console import Console

    starts = range(0, len(texts), _BATCH)
    kind, end = _dtype(tokenizer), tokenizer.eos_token_id
    for start in track(starts, title, console=Console(stderr=True), disable=not show, transient=True):
        for ids in encode_all(tokenizer, texts[start : start + _BATCH], add_special_tokens=True):
            yield np.array(ids if ids[-1:] == [end] else [*ids, end], dtype=kind)


def _dtype(tokenizer: PreTrainedTokenizerBase) -> type:
    return np.uint16 if rows_needed(tokenizer) <= 2**16 else np.uint32


def _digest(texts: Iterable[str]) -> str:
    total = hashlib.sha256()
    for text in texts:
        total.update(f"{len(text)}\n{text}".encode())
    return total.hexdigest()
