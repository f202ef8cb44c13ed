"""PoSE: training for a long window on short inputs whose positions have jumps (Zhu 2023, arXiv 2309.10400, section 3).

An input of `window` tokens is cut into chunks. Chunk i keeps its places and gets a bias u_i on top of them, with u_0 = 0 and
u_i uniform in [u_(i-1), target - window]; so two tokens of one input can be anything up to `target` apart. What the chunks
read may jump too: v_0 = 0 and v_i uniform in [v_(i-1), text - window] say where in a longer text chunk i takes its tokens.

This is no method of the catalogue: it changes how a model is trained, and nothing in the model. `longspan train` uses it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from longspan.util.errors import SpecError

SPAN = 5
"""How many windows of text the chunks are taken from, where there are as many; as in the authors' code."""


@dataclass(frozen=True)
class Draw:
    """One sample. positions (window,): a place for each token read. tokens (window + 1,): which tokens of the text are read,
    and the one that comes after them. biases and starts (chunks,): u_i, and where in the window each chunk begins."""

    positions: np.ndarray
    tokens: np.ndarray
    biases: np.ndarray
    starts: np.ndarray


@dataclass(frozen=True)
class PoSE:
    """`window` tokens are read with positions below `target`, in `chunks` of random lengths.

    skips=False leaves the positions as they are and draws everything else alike: the control that PoSE is compared with.
    content=contiguous reads one stretch of text, whatever the positions say.
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
        """A sample out of `text` tokens; at least window + 1 are needed."""
        assert text > self.window, "a text has at least window + 1 tokens"
        starts = np.sort(rng.choice(self.window - 1, self.chunks - 1, replace=False) + 1)
        starts = np.concatenate(([0], starts))
        biases, places = self._rising(rng, self.target - self.window), self._rising(rng, text - self.window - 1)
        chunk = np.searchsorted(starts, np.arange(self.window + 1), side="right") - 1
        order = np.arange(self.window + 1)
        tokens = order + places[chunk] if self.content == "skip" else order + places[-1]
        if not self.skips:
            biases = np.zeros_like(biases)
        return Draw(order[:-1] + biases[chunk[:-1]], tokens, biases, starts)

    def _rising(self, rng: np.random.Generator, most: int) -> np.ndarray:
        """(chunks,): 0, then each uniform from the one before it to `most`."""
        values = [0]
        for _ in range(self.chunks - 1):
            values.append(int(rng.integers(values[-1], most, endpoint=True)))
        return np.array(values)

    @staticmethod
    def _require(condition: bool, message: str) -> None:
        if not condition:
            raise SpecError(f"positions: {message}")


def sampler(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The random numbers of one sample in one epoch, whoever draws it and whenever."""
    return np.random.default_rng((seed, epoch, index))
