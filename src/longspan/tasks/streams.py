"""Streams: questions without end on one KV cache, to find where a model stops answering.

    stream-eval   numbered lines, each with a number; every 10 lines a question for the number of the line 20 lines back
    stream-qa     one question after another, each with an answer of its own

Both are from StreamingLLM's paper (Xiao 2024, arXiv 2309.17453). A stream is read like a chat: only new tokens are fed, on
the same cache, and a method that bounds its cache forgets. The right answer follows every question, whatever the model would
have produced, so that all methods read the same tokens; a question counts as answered where greedy decoding produces exactly
the right answer. The share right is reported by position, since a method that fails beyond its cache or its window answers
well up to there.

Data and code of StreamEval were not released: this is rebuilt from the paper's description, and its figures cannot be
compared with published ones. It needs a model that can find lines by their numbers at all: SmolLM2-135M answered none of 8
questions well within its window. The paper's other stream has ARC's questions: write them to a file for `stream-qa:data=FILE`,
one JSON line with question, answer and choices each. The default questions are generated.
"""

from __future__ import annotations

import hashlib
import random
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import ClassVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longspan.core.tokens import encode_all, with_bos
from longspan.meter import Meter
from longspan.tasks.answers import UNSOUND, EarlierAnswers, Span, by_position, continuations, judge_stream
from longspan.tasks.base import Outcome, Sample, Task, check_fits
from longspan.tasks.questions import Question, generated, read_questions

Turn = tuple[str, str]
"""New text up to where the answer begins, and the answer."""


@dataclass(frozen=True)
class Stream(EarlierAnswers, Task):
    """Base of both tasks.

    The score of a stream is the share of its questions that are answered exactly.
    """

    default_count: ClassVar[int] = 4
    metric: ClassVar[str] = "share right"

    @abstractmethod
    def turns(self, rng: random.Random) -> Iterator[Turn]:
        """Turns without end; each follows the answer of the one before."""

    def samples(self, tokenizer: PreTrainedTokenizerBase, length: int, count: int, seed: int) -> list[Sample]:
        """Streams of as many whole turns as fit, the last answer included.

        A shorter one is a prefix of a longer one.
        Raises `SpecError` where not even one question fits.
        """
        samples = [self._sample(tokenizer, length, i, random.Random(f"{self.name}/{seed}/{i}")) for i in range(count)]
        return check_fits(samples, length)

    def run(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sample: Sample, meter: Meter) -> Outcome:
        spans, ids = sample.meta["spans"], [*sample.tokens, *sample.meta["last"]]
        judged = judge_stream(model, ids, spans, meter)
        broken = sum(not j.sound for j in judged)
        right = [j.exact for j in judged]
        detail = {"questions": len(spans), "stream_tokens": len(ids)}
        detail |= by_position([start for start, _ in spans], right, sample.meta["length"])
        if broken:
            return Outcome(0.0, {**detail, "reason": f"{UNSOUND}, at {broken:,} questions"}, failed=True)
        return Outcome(sum(right) / len(right), {**detail, "nll": sum(j.loss for j in judged) / len(judged)})

    def _sample(self, tokenizer: PreTrainedTokenizerBase, length: int, number: int, rng: random.Random) -> Sample:
        ids, last = with_bos(tokenizer, []), list[int]()
        spans: list[Span] = []
        for question, answer in _encoded(tokenizer, self.turns(rng)):
            end = len(ids) + len(last) + len(question) + len(answer)
            if end > length:
                self.require(
                    bool(spans), f"a length of at least {end} tokens is needed for one question, not {length:,}"
                )
                break
            ids += last + question
            spans.append((len(ids), end))
            last = answer
        return Sample(f"stream-{number}", ids, {"spans": spans, "last": last, "length": length})


def _encoded(tokenizer: PreTrainedTokenizerBase, turns: Iterator[Turn]) -> Iterator[tuple[list[int], list[int]]]:
    """Turns as token ids, encoded in growing batches, so that a stream of a million tokens takes seconds."""
    at_once = 8
    while True:
        batch = list(islice(turns, at_once))
        questions = encode_all(tokenizer, [new for new, _ in batch])
        answers = continuations(tokenizer, [(new[new.rfind("\n") + 1 :], f" {answer}") for new, answer in batch])
        yield from zip(questions, answers, strict=True)
        at_once = min(2 * at_once, 1024)


@dataclass(frozen=True)
class StreamEval(Stream):
    """After every `every` lines, a question for the number `distance` lines back.

    A distance of 0 is the line just read.

    A method can answer as long as its cache contains that many lines. Numbers have `digits` digits.
    """

    every: int = 10
    distance: int = 20
    digits: int = 5

    name: ClassVar[str] = "stream-eval"
    title: ClassVar[str] = "StreamEval, rebuilt"
    measures: ClassVar[str] = "whether lines a fixed distance back are known, however long the stream has become"
    source: ClassVar[str] = (
        "generated, rebuilt from the description in Xiao 2024, arXiv 2309.17453; the original is unreleased"
    )

    def __post_init__(self) -> None:
        self.require(self.every >= 1, f"every must be at least 1 line, not {self.every}")
        self.require(self.distance >= 0, f"distance must be 0 lines or more, not {self.distance}")
        self.require(1 <= self.digits <= 18, f"digits must be from 1 to 18, not {self.digits}")

    def turns(self, rng: random.Random) -> Iterator[Turn]:
        new, numbers = "Remember the number in every line; some will be asked for.", []
        while True:
            numbers.append(rng.randrange(10 ** (self.digits - 1), 10**self.digits))
            line = len(numbers)
            new += f"\nLine {line}: the number is {numbers[-1]}."
            if line % self.every == 0 and line > self.distance:
                target = line - self.distance
                yield f"{new}\nQuestion: What is the number in line {target}? Answer:", f"{numbers[target - 1]}"
                new = "."


@dataclass(frozen=True)
class StreamQA(Stream):
    """Questions one after another, generated or from the JSON-lines file `data`.

    A line has `question`, `answer` and, optionally, `choices`; choices are lettered, and the letter is the answer. When all
    questions are used, they are repeated in another order.
    """

    data: str | None = None

    name: ClassVar[str] = "stream-qa"
    title: ClassVar[str] = "Questions in a stream"
    measures: ClassVar[str] = "whether questions are still answered, however many came before"
    source: ClassVar[str] = "simple questions, generated, or a file of yours; the form is Xiao 2024's, arXiv 2309.17453"

    def __post_init__(self) -> None:
        if self.data is not None:
            read_questions(self.data, self.name)

    def data_digest(self) -> str:
        return "" if self.data is None else hashlib.sha256(Path(self.data).expanduser().read_bytes()).hexdigest()

    def turns(self, rng: random.Random) -> Iterator[Turn]:
        before = ""
        for question in self._questions(rng):
            yield f"{before}Question: {question.text}\nAnswer:", question.answer
            before = "\n\n"

    def _questions(self, rng: random.Random) -> Iterator[Question]:
        if self.data is None:
            while True:
                yield generated(rng)
        known = read_questions(self.data, self.name)
        while True:
            yield from rng.sample(known, len(known))
