"""Copy and reverse: a random sequence is repeated twice, or once in reverse order.

A recurrent memory of fixed size must store the whole sequence; full attention need not. RMT's paper (Bulatov 2022, arXiv
2207.06881) has both tasks over 3 to 9 segments, with sequences of 8 symbols, a start symbol for the answer, and the
accuracy of single symbols, each after the right ones before it. Here symbols are letters and the start symbol is a word,
since a pretrained model knows no others, and the sequence is as long as the cell's length allows: three tokens of text
for a symbol of `copy`, two for one of `reverse`. So RMT's copy of 120 symbols is a length of about 370 tokens.
"""

from __future__ import annotations

import random
import string
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longspan.core.tokens import encode, with_bos
from longspan.meter import Meter
from longspan.tasks.answers import UNSOUND, by_position, continuation, judge
from longspan.tasks.base import Outcome, Sample, Task, check_fits


@dataclass(frozen=True)
class Sequence(Task):
    """Base of both tasks, with `symbols` different letters; a guess scores 1 / symbols.

    score: the share of right symbols, each after the right ones before it, or (`exact`) of samples without an error.
    """

    symbols: int = 8
    score: Literal["symbols", "exact"] = "symbols"

    source: ClassVar[str] = "generated, after Bulatov 2022, arXiv 2207.06881"
    default_count: ClassVar[int] = 16
    metric: ClassVar[str] = "share right"
    sign: ClassVar[str]
    """The word between the sequence and the answer."""

    def __post_init__(self) -> None:
        self.require(2 <= self.symbols <= 26, f"symbols must be from 2 to 26, the letters, not {self.symbols}")
        self.require(self.score in ("symbols", "exact"), f"score must be symbols or exact, not {self.score!r}")

    @abstractmethod
    def answer_of(self, sequence: list[int]) -> list[int]:
        """The right answer, as numbers of symbols from 0."""

    def samples(self, tokenizer: PreTrainedTokenizerBase, length: int, count: int, seed: int) -> list[Sample]:
        """Sequences of as many symbols as fit with the answer.

        A shorter length has a prefix of each.
        Raises `SpecError` where fewer than two symbols fit.
        """
        letters = self._letters(tokenizer)
        head, sign = with_bos(tokenizer, encode(tokenizer, "Sequence:")), encode(tokenizer, f"\n{self.sign}:")
        width = max(map(len, letters)) * len([0, *self.answer_of([0])])
        number = (length - len(head) - len(sign)) // width
        least = len(head) + len(sign) + 2 * width
        self.require(number >= 2, f"a length of at least {least} tokens is needed, not {length:,}")
        samples = []
        for i in range(count):
            rng = random.Random(f"{self.name}/{self.symbols}/{seed}/{i}")
            sequence = [rng.randrange(self.symbols) for _ in range(number)]
            ids = [*head, *(t for s in sequence for t in letters[s]), *sign]
            samples.append(Sample(f"sequence-{i}", ids, {"sequence": sequence}))
        return check_fits(samples, length)

    def answer(self, tokenizer: PreTrainedTokenizerBase, sample: Sample) -> list[int]:
        letters = self._letters(tokenizer)
        return [t for s in self.answer_of(sample.meta["sequence"]) for t in letters[s]]

    def run(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sample: Sample, meter: Meter) -> Outcome:
        letters, answer = self._letters(tokenizer), self.answer_of(sample.meta["sequence"])
        judged = judge(model, [*sample.tokens, *self.answer(tokenizer, sample)], len(sample.tokens), meter)
        right, at = [], 0
        for symbol in answer:
            end = at + len(letters[symbol])
            right.append(judged.likeliest[at:end] == judged.ids[at:end])
            at = end
        detail = {"symbols": len(sample.meta["sequence"]), "asked": len(answer), "chance": 1 / self.symbols}
        if not judged.sound:
            return Outcome(0.0, {**detail, "reason": UNSOUND}, failed=True)
        share = sum(right) / len(right)
        figures = {"symbols_right": share, "exact": judged.exact, "nll": judged.loss}
        figures |= by_position(range(len(right)), right, len(right))
        return Outcome(float(judged.exact) if self.score == "exact" else share, detail | figures)

    def _letters(self, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        return [continuation(tokenizer, ":", f" {letter}") for letter in string.ascii_lowercase[: self.symbols]]


@dataclass(frozen=True)
class Copy(Sequence):
    """The sequence repeated `copies` times; RMT's task has two."""

    copies: int = 2

    name: ClassVar[str] = "copy"
    title: ClassVar[str] = "Copy of a sequence"
    measures: ClassVar[str] = "whether a random sequence can be said again, whole"
    sign: ClassVar[str] = "Copy"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(1 <= self.copies <= 16, f"copies must be from 1 to 16, not {self.copies}")

    def answer_of(self, sequence: list[int]) -> list[int]:
        return sequence * self.copies


@dataclass(frozen=True)
class Reverse(Sequence):
    """The sequence once, in reverse order."""

    name: ClassVar[str] = "reverse"
    title: ClassVar[str] = "Reverse of a sequence"
    measures: ClassVar[str] = "whether a random sequence can be said from its end"
    sign: ClassVar[str] = "Reverse"

    def answer_of(self, sequence: list[int]) -> list[int]:
        return sequence[::-1]
