"""Streams: questions without end on one cache, to see where a model stops answering.

    stream-eval   numbered lines, each with a number; every 10 lines the number of the line 20 lines back is asked for
    stream-qa     one question after another, each with an answer of its own

Both are of StreamingLLM's paper. A stream is read as a chat is: what is new goes to the model with the cache that it has, a
method that bounds its cache forgets, and nothing is fed again. After every question the right answer goes on into the stream,
whatever the model would have said, so all methods read the same tokens; a question counts as answered where greedy decoding
would say just the right answer. The share right is told by position, since a method that breaks past its cache or its window
answers well up to there.

The data and the code of StreamEval were never released: this is rebuilt from the paper's description, in words of our own, and
its figures cannot be compared with published ones. It takes a model that can read lines by their numbers at all: SmolLM2-135M
answered none of 8 questions well within its window. The questions of the paper's other stream are ARC's; give
`stream-qa:data=FILE` a JSON line of question, answer and choices for each of them. The default's are generated.
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
from longspan.tasks.answers import UNSOUND, Span, by_position, continuations, judge_stream
from longspan.tasks.base import Outcome, Sample, Task, check_fits
from longspan.tasks.questions import Question, generated, read_questions

Turn = tuple[str, str]
"""What is new up to where the answer begins, and the answer."""


@dataclass(frozen=True)
class Stream(Task):
    """What both tasks are. The score of a stream is the share of its questions that are answered exactly."""

    default_count: ClassVar[int] = 4
    metric: ClassVar[str] = "share right"

    @abstractmethod
    def turns(self, rng: random.Random) -> Iterator[Turn]:
        """Turns without end; each begins where the answer before it ended."""

    def samples(self, tokenizer: PreTrainedTokenizerBase, length: int, count: int, seed: int) -> list[Sample]:
        """Streams of as many whole turns as fit, the last answer included. A shorter one is the beginning of a longer."""
        samples = [self._sample(tokenizer, length, i, random.Random(f"{self.name}/{seed}/{i}")) for i in range(count)]
        return check_fits(samples, length)

    def answer(self, tokenizer: PreTrainedTokenizerBase, sample: Sample) -> list[int]:
        return list(sample.meta["last"])

    def answered(self, sample: Sample) -> list[Span]:
        return [(start, end) for start, end in sample.meta["spans"][:-1]]

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
        ids, spans, last = with_bos(tokenizer, []), [], []  # type: tuple[list[int], list[Span], list[int]]
        for asked, said in _encoded(tokenizer, self.turns(rng)):
            end = len(ids) + len(last) + len(asked) + len(said)
            if end > length:
                self.require(
                    bool(spans), f"a length of at least {end} tokens is needed for one question, not {length:,}"
                )
                break
            ids += last + asked
            spans.append((len(ids), end))
            last = said
        return Sample(f"stream-{number}", ids, {"spans": spans, "last": last, "length": length})


def _encoded(tokenizer: PreTrainedTokenizerBase, turns: Iterator[Turn]) -> Iterator[tuple[list[int], list[int]]]:
    """Turns as ids; more and more of them are encoded at once, so that a stream of a million tokens takes seconds."""
    at_once = 8
    while True:
        batch = list(islice(turns, at_once))
        asked = encode_all(tokenizer, [new for new, _ in batch])
        said = continuations(tokenizer, [(new[new.rfind("\n") + 1 :], f" {answer}") for new, answer in batch])
        yield from zip(asked, said, strict=True)
        at_once = min(2 * at_once, 1024)


@dataclass(frozen=True)
class StreamEval(Stream):
    """After every `every` lines the number of the line `distance` lines back is asked for, 0 being the line just read. As
    long as that many lines fit into what a method keeps, it can be known. Numbers have `digits` digits."""

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
                asked = line - self.distance
                yield f"{new}\nQuestion: What is the number in line {asked}? Answer:", f"{numbers[asked - 1]}"
                new = "."


@dataclass(frozen=True)
class StreamQA(Stream):
    """Questions after one another. `data` is a JSON-lines file with `question`, `answer` and, where there are some, `choices`;
    these are lettered, and the letter is the answer. Where the questions are used up they come again in another order."""

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
