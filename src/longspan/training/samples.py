"""Samples of a training from its tokens: inputs, labels and positions.

Sample i of a training follows from i alone: its epoch is i divided by the number of windows, and its window comes from a
permutation by seed and epoch. So a resumed run, on any number of devices, reads what an uninterrupted one would.

    plain        windows of the documents one after another; a window may contain the end of one and the start of another
    boundaries   the same windows, with positions that restart at every document and no attention across
    none         one window a document, from its start; short ones are padded. In a task's samples only answers have labels
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
"""The label of a position without a loss."""

Sample = dict[str, np.ndarray]


class Windows(Protocol):
    """Samples by number; `epoch` counts the repetitions of the data."""

    def __len__(self) -> int: ...

    def sample(self, index: int, epoch: int) -> Sample: ...

    def read(self, indices: np.ndarray, epoch: int) -> np.ndarray:
        """Tokens of these samples without padding, (samples,)."""
        ...


@dataclass(frozen=True)
class TextWindows:
    """Windows of `length` tokens with the labels one token ahead.

    pad: the token that fills short documents. pose: draws positions and text anew for every sample and epoch.
    """

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
        """A window whose positions restart at every document, which transformers reads, without a mask, as separate documents."""
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
        """One document, padded at its end.

        A task's sample may have PoSE's positions, with its tokens unchanged. No token attends to padding at the end, so the mask
        can be the ones that PoSE needs.
        """
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
        """A window at PoSE's positions, with a mask of ones, without which transformers takes a jump for another document."""
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
    """Windows of a text mixed with samples of a task, `share` of all; each epoch of the text takes the next samples."""

    def __init__(self, text: Windows, task: Windows, share: float):
        self.text, self.task = text, task
        self.extra = max(1, round(len(text) * share / (1 - share)))

    def __len__(self) -> int:
        return len(self.text) + self.extra if len(self.text) else 0

    def sample(self, index: int, epoch: int) -> Sample:
        """A window of the text, or a sample of the task with the same entries.

        Windows without padding have no mask, and padding at the end needs none: no token attends to it and it has no label.
        """
        texts = len(self.text)
        if index < texts:
            return self.text.sample(index, epoch)
        number = epoch * self.extra + index - texts
        found = self.task.sample(number % len(self.task), number // len(self.task))
        return {name: found[name] for name in self.text.sample(0, epoch)}

    def read(self, indices: np.ndarray, epoch: int) -> np.ndarray:
        """Tokens of these samples without padding, also where no mask marks it, (samples,)."""
        texts = len(self.text)
        numbers = epoch * self.extra + indices[indices >= texts] - texts
        found = np.empty(len(indices), dtype=np.int64)
        found[indices < texts] = self.text.read(indices[indices < texts], epoch)
        found[indices >= texts] = self.task.read(numbers % len(self.task), epoch)
        return found


class Course(Dataset[Sample]):
    """The `total` samples of a training in order: all windows epoch after epoch, each shuffled by (seed, epoch)."""

    def __init__(self, windows: Windows, total: int, seed: int):
        self.windows, self.total, self.seed = windows, total, seed
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, place: int) -> Sample:
        epoch, rest = divmod(place, len(self.windows))
        return self.windows.sample(int(self._permutation(epoch)[rest]), epoch)

    def read(self, first: int, last: int) -> np.ndarray:
        """Tokens of each of the samples first … last - 1 without padding, (last - first,)."""
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
    """At most `count` windows, evenly spread over the data, the same in every run."""

    def __init__(self, windows: Windows, count: int):
        self.windows = windows
        self.places = np.linspace(0, len(windows) - 1, min(count, len(windows))).round().astype(int)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, place: int) -> Sample:
        return self.windows.sample(int(self.places[place]), 0)


def check_enough(windows: Windows, key: str, length: int, have: int) -> None:
    """Raises `SpecError` where a text is shorter than one window."""
    if len(windows) == 0:
        raise SpecError(
            f"{key} has {have:,} tokens, too few for data.length={length:,}; use a longer text or a smaller length"
        )


def collate(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """A batch of samples, each entry (B, length), int64.

    Where some positions have no label, `labelled` (places,) lists those that have one, as indices of the flattened batch.
    """
    batch = {key: torch.from_numpy(np.stack([s[key] for s in samples])) for key in samples[0]}
    has_label = batch["labels"].flatten() != IGNORE
    return batch if has_label.all() else {**batch, "labelled": has_label.nonzero()[:, 0]}


def labelled_share(samples: Dataset[Sample], count: int) -> float:
    """The share of positions with a label in the first `count` samples."""
    return float(np.mean([np.mean(samples[i]["labels"] != IGNORE) for i in range(count)]))
