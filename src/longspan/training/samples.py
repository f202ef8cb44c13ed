"""Samples out of tokens: what a model reads, which token comes next, and at which positions.

Step after step, sample i of the training is number i in one long row, which knows its epoch and, through a permutation of the
seed and the epoch, its window. Nothing depends on what ran before, on the number of devices or on who asks: a resumed run
reads what an unbroken one would.

    plain        windows of the documents one after another; a window may hold the end of one and the start of another
    boundaries   the same windows, with positions that start anew at every document and no attention across
    none         one window a document, from its start; short ones are padded. Of a task's samples the answers alone have labels
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from longspan.positions.pose import SPAN, PoSE, sampler
from longspan.training.data import Tokens
from longspan.util.errors import SpecError

IGNORE = -100
"""The label of a place where no loss is wanted."""

Sample = dict[str, np.ndarray]


class Windows(Protocol):
    """Samples by number; `epoch` is the repetition of the data that they are drawn for."""

    def __len__(self) -> int: ...

    def sample(self, index: int, epoch: int) -> Sample: ...

    def read(self, indices: np.ndarray, epoch: int) -> np.ndarray:
        """How many tokens these samples hold, padding left out, (samples,)."""
        ...


@dataclass(frozen=True)
class TextWindows:
    """Windows of `length` tokens with the labels one token ahead. With `pose`, positions and text are drawn anew for every
    sample and epoch."""

    tokens: Tokens
    length: int
    packing: Literal["plain", "boundaries", "none"]
    pad: int
    pose: PoSE | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.packing == "none":
            sizes = np.diff(self.tokens.ends, prepend=0)
            whole = np.flatnonzero(sizes > (self.length if self.pose and self.tokens.learned is None else 1))
            object.__setattr__(self, "_documents", whole)

    def __len__(self) -> int:
        if self.packing == "none":
            return len(self._documents)  # type: ignore[attr-defined]
        return max(0, (len(self.tokens.ids) - 1) // self.length)

    def sample(self, index: int, epoch: int) -> Sample:
        if self.pose is not None and self.tokens.learned is None:
            return self._posed(index, epoch, self.pose)
        if self.packing == "none":
            return self._document(index, epoch)
        start = index * self.length
        ids = self.tokens.ids[start : start + self.length + 1].astype(np.int64)
        if self.packing == "plain":
            return {"input_ids": ids[:-1], "labels": ids[1:]}
        return self._bounded(ids, start)

    def read(self, indices: np.ndarray, epoch: int) -> np.ndarray:
        if self.packing != "none":
            return np.full(len(indices), self.length)
        sizes = np.diff(self.tokens.ends, prepend=0)[self._documents[indices]]  # type: ignore[attr-defined]
        return np.minimum(sizes, self.length)

    def _bounded(self, ids: np.ndarray, start: int) -> Sample:
        """Documents apart: transformers reads positions that start anew, without a mask, as documents to keep apart."""
        places = np.arange(start, start + self.length)
        number = np.searchsorted(self.tokens.ends, places, side="right")
        begins = np.maximum(np.concatenate(([0], self.tokens.ends))[number], start)
        last = places + 1 == self.tokens.ends[number]
        return {
            "input_ids": ids[:-1],
            "labels": np.where(last, IGNORE, ids[1:]),
            "position_ids": places - begins,
        }

    def _document(self, index: int, epoch: int) -> Sample:
        """A task's sample may have PoSE's positions too: its tokens stay as they are. What pads it is at its end, where no
        token looks, so the mask can be the ones that PoSE needs."""
        number = self._documents[index]  # type: ignore[attr-defined]
        document, learned = self.tokens.document(number), self.tokens.learned_in(number)
        ids = document[: self.length + 1].astype(np.int64)
        inputs, labels = np.full(self.length, self.pad), np.full(self.length, IGNORE)
        read = min(len(ids), self.length)
        inputs[:read] = ids[:read]
        labels[: len(ids) - 1] = ids[1:]
        if learned is not None:
            labels[: len(ids) - 1][~learned[1 : len(ids)]] = IGNORE
        if self.pose is not None:
            draw = self.pose.draw(sampler(self.seed, epoch, index), self.length + 1)
            ones = np.ones(self.length, dtype=np.int64)
            return {"input_ids": inputs, "labels": labels, "position_ids": draw.positions, "attention_mask": ones}
        return {
            "input_ids": inputs,
            "labels": labels,
            "attention_mask": (np.arange(self.length) < read).astype(np.int64),
        }

    def _posed(self, index: int, epoch: int, pose: PoSE) -> Sample:
        """The mask of ones matters: without it transformers takes a jump of positions for another document."""
        span = SPAN * self.length
        if self.packing == "none":
            text = self.tokens.document(self._documents[index])[:span]  # type: ignore[attr-defined]
        else:
            text = self.tokens.ids[index * self.length : index * self.length + span]
        draw = pose.draw(sampler(self.seed, epoch, index), len(text))
        ids = text[draw.tokens].astype(np.int64)
        return {
            "input_ids": ids[:-1],
            "labels": ids[1:],
            "position_ids": draw.positions,
            "attention_mask": np.ones(self.length, dtype=np.int64),
        }


class Mixture:
    """Windows of a text, and samples of a task that make up `share` of all; in every epoch of the text other ones, as far as they
    reach."""

    def __init__(self, text: Windows, task: Windows, share: float):
        self.text, self.task = text, task
        self.extra = max(1, round(len(text) * share / (1 - share)))

    def __len__(self) -> int:
        return len(self.text) + self.extra if len(self.text) else 0

    def sample(self, index: int, epoch: int) -> Sample:
        """A task's sample comes in the text's form: a window without padding has no mask, and none is needed for padding at
        the end, where no token looks and no loss is taken."""
        texts = len(self.text)
        if index < texts:
            return self.text.sample(index, epoch)
        number = epoch * self.extra + index - texts
        found = self.task.sample(number % len(self.task), number // len(self.task))
        return {name: found[name] for name in self.text.sample(0, epoch)}

    def read(self, indices: np.ndarray, epoch: int) -> np.ndarray:
        """Of a task's samples too, whose padding no mask shows here."""
        texts = len(self.text)
        numbers = epoch * self.extra + indices[indices >= texts] - texts
        found = np.empty(len(indices), dtype=np.int64)
        found[indices < texts] = self.text.read(indices[indices < texts], epoch)
        found[indices >= texts] = self.task.read(numbers % len(self.task), epoch)
        return found


class Course(Dataset[Sample]):
    """Every sample of a training, in its order: `total` of them, through the windows again and again, shuffled anew each time
    by (seed, epoch)."""

    def __init__(self, windows: Windows, total: int, seed: int):
        self.windows, self.total, self.seed = windows, total, seed
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, place: int) -> Sample:
        epoch, rest = divmod(place, len(self.windows))
        return self.windows.sample(int(self._permutation(epoch)[rest]), epoch)

    def read(self, first: int, last: int) -> np.ndarray:
        """How many tokens each of the samples first … last - 1 holds, padding left out, (last - first,)."""
        size, parts = len(self.windows), [np.empty(0, dtype=np.int64)]
        while first < last:
            epoch, rest = divmod(first, size)
            some = self._permutation(epoch)[rest : rest + last - first]
            parts.append(self.windows.read(some, epoch))
            first += len(some)
        return np.concatenate(parts)

    def _permutation(self, epoch: int) -> np.ndarray:
        if self._order[0] != epoch:
            self._order = epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self.windows))
        return self._order[1]


class Validation(Dataset[Sample]):
    """At most `count` windows, evenly spread and always the same."""

    def __init__(self, windows: Windows, count: int):
        self.windows = windows
        self.places = np.linspace(0, len(windows) - 1, min(count, len(windows))).round().astype(int)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, place: int) -> Sample:
        return self.windows.sample(int(self.places[place]), 0)


def check_enough(windows: Windows, key: str, length: int, have: int) -> None:
    """Raises `SpecError` where a text gives not even one window."""
    if len(windows) == 0:
        raise SpecError(
            f"{key} has {have:,} tokens, too few for data.length={length:,}; give a longer text or a lower length"
        )


def collate(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """A batch: every entry (B, length), int64. Where not every place has a label, `labelled` (places,) says which do, by their
    numbers in the batch as one row."""
    batch = {key: torch.from_numpy(np.stack([s[key] for s in samples])) for key in samples[0]}
    wanted = batch["labels"].flatten() != IGNORE
    return batch if wanted.all() else {**batch, "labelled": wanted.nonzero()[:, 0]}


def labelled_share(samples: Dataset[Sample], count: int) -> float:
    """The share of places with a label, in the first `count` samples."""
    return float(np.mean([np.mean(samples[i]["labels"] != IGNORE) for i in range(count)]))
