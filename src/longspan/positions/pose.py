"""PoSE: training for a long window on short inputs whose positions skip (Zhu 2023, arXiv 2309.10400, section 3).

An input of `window` tokens is split into chunks. A skip u_i is added to the positions of chunk i, with u_0 = 0 and u_i uniform in
[u_(i-1), target - window]; so two tokens of an input are up to `target` positions apart. The tokens may skip too: chunk i is
taken v_i tokens further in a longer text, with v_0 = 0 and v_i uniform in [v_(i-1), text - window].

It is not a method of the catalogue: it changes the training and nothing in the model. `longspan train` uses it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from longspan.util.errors import SpecError

SPAN = 5
"""The windows of text from which the chunks of an input are taken, at most; as in the authors' code."""


@dataclass(frozen=True)
class Draw:
    """One sample.

    positions (window,) of its tokens; tokens (window + 1,): their indices in the text, and that of the next token;
    biases (chunks,): u_i; starts (chunks,): the index in the window at which each chunk begins.
    """

    positions: np.ndarray
    tokens: np.ndarray
    biases: np.ndarray
    starts: np.ndarray


@dataclass(frozen=True)
class PoSE:
    """Samples of `window` tokens with positions below `target`, in `chunks` of random lengths.

    skips=False leaves positions consecutive and draws everything else alike: the control that PoSE is compared with.
    content=contiguous takes consecutive tokens of the text. Raises `SpecError` for values out of range.
    """

    window: int
    target: int
    chunks: int = 2
    skips: bool = True
    content: Literal["skip", "contiguous"] = "skip"

    def __post_init__(self) -> None:
        self._require(self.window >= 2, f"window must be at least 2 tokens, not {self.window}")
        self._require(
            self.target >= self.window,
            f"target must be at least the window of {self.window:,} tokens, not {self.target:,}",
        )
        self._require(
            2 <= self.chunks <= self.window,
            f"chunks must be from 2 to the window's {self.window:,} tokens, not {self.chunks}; 2 is the paper's",
        )

    def draw(self, rng: np.random.Generator, text: int) -> Draw:
        """A sample from a text of `text` tokens, at least window + 1."""
        assert text > self.window, "a text has at least window + 1 tokens"
        starts = np.sort(rng.choice(self.window - 1, self.chunks - 1, replace=False) + 1)
        starts = np.concatenate(([0], starts))
        biases, skips = self._rising(rng, self.target - self.window), self._rising(rng, text - self.window - 1)
        chunk = np.searchsorted(starts, np.arange(self.window + 1), side="right") - 1
        order = np.arange(self.window + 1)
        tokens = order + skips[chunk] if self.content == "skip" else order + skips[-1]
        if not self.skips:
            biases = np.zeros_like(biases)
        return Draw(order[:-1] + biases[chunk[:-1]], tokens, biases, starts)

    def _rising(self, rng: np.random.Generator, most: int) -> np.ndarray:
        """(chunks,): 0, then each uniform between the one before and `most`."""
        values = [0]
        for _ in range(self.chunks - 1):
            values.append(int(rng.integers(values[-1], most, endpoint=True)))
        return np.array(values)

    @staticmethod
    def _require(condition: bool, message: str) -> None:
        if not condition:
            raise SpecError(f"positions: {message}")


def sampler(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The random generator of one sample in one epoch, the same in every process."""
    return np.random.default_rng((seed, epoch, index))
