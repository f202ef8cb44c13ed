"""A fact in a long text that says nothing of it, and a question at the end: RMT's three tasks of memory.

    memorize    "Mary went to the kitchen." stands at the very start; where is Mary?
    detect      the same fact stands somewhere
    reasoning   two facts stand somewhere, of three places in a line; what lies on one side of one of them?

Names, actions and places are bAbI's (4, 5 and 6), and the facts of `reasoning` have the form of the published ones: one of
them answers the question, the other is what it is most easily confused with. The paper hides facts in texts of QuALITY; here
the noise is a text that every machine has, or yours, and it begins again where it ends, so any length can be asked for.

The question ends in the beginning of an answer ("Mary is in the"), so that a model that was never tuned to answer goes on
with a place. A guess is right one time in 6. A line's end stands before every fact, the first too: where there is no BOS a model
makes its sink of the first token, and forgets it (SmolLM2-135M then knows 4 of 16 facts at 300 tokens, and 12 with it).
"""

from __future__ import annotations

import random
import re
import weakref
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longspan.core.tokens import encode, with_bos
from longspan.meter import Meter
from longspan.reading.prefill import chunked_prefill, greedy
from longspan.tasks.answers import UNSOUND, check_options, choose, continuation
from longspan.tasks.base import Outcome, Sample, Task, check_fits
from longspan.tasks.text import Ring, check_text, read_text, tokenised

NAMES = ("Daniel", "John", "Mary", "Sandra")
ACTIONS = ("went to", "moved to", "travelled to", "journeyed to", "went back to")
PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}
SEARCHED = 200
"""Tokens of noise within which a sentence's end is looked for, so that a fact does not break into a word."""
_known: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, dict[tuple[int, str], Any]] = weakref.WeakKeyDictionary()
"""Of each tokenizer, by how many tokens it has and by text: facts and questions are few, and a training draws thousands."""


class Story(NamedTuple):
    """Facts, each with its depth in the noise from 0 (before it) to 1; which of them answers; a question up to its answer."""

    facts: tuple[tuple[float, str], ...]
    telling: int
    question: str
    place: str


@dataclass(frozen=True)
class Facts(Task):
    """What the three tasks share. `text` is the noise. `score=choice` takes the place that the model says when it may say
    nothing but one of the six: only the tokens in which they differ count. `score=generation` lets it say what it likes,
    and the first word must be the place."""

    text: str = "prose"
    score: Literal["choice", "generation"] = "choice"

    source: ClassVar[str] = (
        "facts generated, after Bulatov 2023, arXiv 2304.11062, in Python's own texts or a file of yours"
    )
    default_count: ClassVar[int] = 16
    metric: ClassVar[str] = "share right (a guess: 1/6)"

    def __post_init__(self) -> None:
        self.require(self.score in ("choice", "generation"), f"score must be choice or generation, not {self.score!r}")
        check_text(self.text, self.name)

    def data_digest(self) -> str:
        return read_text(self.text, self.name).sha256

    @abstractmethod
    def story(self, rng: random.Random, number: int, count: int) -> Story:
        """What sample `number` of `count` tells and asks."""

    def samples(self, tokenizer: PreTrainedTokenizerBase, length: int, count: int, seed: int) -> list[Sample]:
        """Texts that, with the longest answer, have exactly `length` tokens. Facts, depths and where the noise begins are the
        same at every length. The time is linear in the tokens, and each is held once, as a number shared by all samples."""
        ring = tokenised(tokenizer, read_text(self.text, self.name))
        rng = random.Random(f"{self.name}/{seed}")
        check_options(self._options(tokenizer, " the"), self.name)
        samples = []
        for number in range(count):
            story, start = self.story(rng, number, count), rng.randrange(len(ring.ids))
            samples.append(self._sample(tokenizer, ring, story, start, number, length))
        return check_fits(samples, length)

    def run(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sample: Sample, meter: Meter) -> Outcome:
        options = self._options(tokenizer, sample.meta["asked"])
        read = chunked_prefill(model, sample.tokens, meter=meter)
        detail = {**sample.meta, "score": self.score, "chance": 1 / len(PLACES)}
        if read.logits.isnan().any():
            return Outcome(0.0, {**detail, "reason": UNSOUND}, failed=True)
        if self.score == "choice":
            answer = choose(model, read, options, meter)
        else:
            budget = max(map(len, options.values())) + 1
            tokens = greedy(model, read.cache, read.logits, budget, meter, timing=True)
            answer = str(tokenizer.decode(tokens, skip_special_tokens=True))
        found = first_word(answer) == sample.meta["place"]
        return Outcome(float(found), {**detail, "answer": answer, "found": found})

    def answer(self, tokenizer: PreTrainedTokenizerBase, sample: Sample) -> list[int]:
        return list(self._options(tokenizer, sample.meta["asked"])[sample.meta["place"]])

    def _sample(
        self, tokenizer: PreTrainedTokenizerBase, ring: Ring, story: Story, start: int, number: int, length: int
    ) -> Sample:
        head = _once(tokenizer, "", lambda: with_bos(tokenizer, []))
        question, *facts = (
            _ids(tokenizer, text) for text in (f"\n{story.question}", *(f"\n{fact}\n" for _, fact in story.facts))
        )
        longest = max(map(len, self._options(tokenizer, story.question).values()))
        least = len(head) + sum(map(len, facts)) + len(question) + longest
        self.require(length >= least, f"a length of at least {least} tokens is needed, not {length:,}")
        noise = _noise(ring, start, length - least)
        cuts = [_sentence_end(tokenizer, noise, round(depth * len(noise))) for depth, _ in story.facts]
        tokens, done, places = list(head), 0, []
        for cut, fact in zip(cuts, facts, strict=True):
            tokens += noise[done:cut]
            places.append(len(tokens))
            tokens += fact
            done = cut
        tokens += noise[done:]
        tokens += question
        meta: dict[str, Any] = {"place": story.place, "depth": story.facts[story.telling][0], "fact_tokens": places}
        meta |= {"facts": [fact for _, fact in story.facts], "asked": story.question}
        return Sample(f"story-{number}", tokens, meta | {"text": ring.name, "text_sha256": ring.sha256})

    def _options(self, tokenizer: PreTrainedTokenizerBase, question: str) -> dict[str, list[int]]:
        def made() -> dict[str, list[int]]:
            return {place: continuation(tokenizer, question, f" {place}") for place in PLACES}

        return _once(tokenizer, f"{question} …", made)


@dataclass(frozen=True)
class Memorize(Facts):
    """One fact, before everything else."""

    name: ClassVar[str] = "memorize"
    title: ClassVar[str] = "Memorize a fact"
    measures: ClassVar[str] = "whether the first sentence of a long text is still known at its end"

    def story(self, rng: random.Random, number: int, count: int) -> Story:
        return _whereabouts(rng, 0.0)


@dataclass(frozen=True)
class Detect(Facts):
    """One fact, at a random depth within one of `count` equal parts, so that all depths are asked for."""

    name: ClassVar[str] = "detect"
    title: ClassVar[str] = "Detect and memorize a fact"
    measures: ClassVar[str] = "whether one sentence somewhere in a long text is still known at its end"

    def story(self, rng: random.Random, number: int, count: int) -> Story:
        return _whereabouts(rng, (number + rng.random()) / count)


@dataclass(frozen=True)
class Reasoning(Facts):
    """Two facts, each at a random depth, in either order."""

    name: ClassVar[str] = "reasoning"
    title: ClassVar[str] = "Reasoning over two facts"
    measures: ClassVar[str] = "whether the right one of two sentences in a long text is used at its end"

    def story(self, rng: random.Random, number: int, count: int) -> Story:
        side = rng.choice(sorted(OPPOSITE))
        row = rng.sample(PLACES, 3)  # each lies on `side` of the next
        depths = sorted((rng.random(), rng.random()))
        order, asked = rng.sample((0, 1), 2), rng.randrange(2)
        facts = tuple((d, _lies(rng, side, row[i], row[i + 1])) for d, i in zip(depths, order, strict=True))
        near, far = row[asked], row[asked + 1]
        if rng.random() < 0.5:
            side, near, far = OPPOSITE[side], far, near
        if rng.random() < 0.5:
            question = f"Question: What is {side} of the {far}?\nAnswer: {side.capitalize()} of the {far} is the"
        else:
            back = OPPOSITE[side]
            question = f"Question: What is the {far} {back} of?\nAnswer: The {far} is {back} of the"
        return Story(facts, order.index(asked), question, near)


def _once(tokenizer: PreTrainedTokenizerBase, text: str, make: Callable[[], Any]) -> Any:
    """What `make` gives for a text, made once for each tokenizer."""
    known = _known.setdefault(tokenizer, {})
    key = len(tokenizer), text
    if key not in known:
        known[key] = make()
    return known[key]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(_once(tokenizer, text, lambda: encode(tokenizer, text)))


def first_word(answer: str) -> str:
    """The first word of an answer, in small letters; empty where it has none."""
    found = re.search(r"[a-z]+", answer.lower())
    return found[0] if found else ""


def _whereabouts(rng: random.Random, depth: float) -> Story:
    who, place = rng.choice(NAMES), rng.choice(PLACES)
    fact = f"{who} {rng.choice(ACTIONS)} the {place}."
    return Story(((depth, fact),), 0, f"Question: Where is {who}?\nAnswer: {who} is in the", place)


def _lies(rng: random.Random, side: str, one: str, other: str) -> str:
    """That `one` lies on `side` of `other`, said from either end."""
    if rng.random() < 0.5:
        return f"The {one} is {side} of the {other}."
    return f"The {other} is {OPPOSITE[side]} of the {one}."


def _noise(ring: Ring, start: int, number: int) -> list[int]:
    """`number` tokens of a text from `start` on, from its beginning again wherever it ends."""
    whole = len(ring.ids)
    if number <= whole:
        return ring.take(start, number, "noise")
    return (ring.take(start, whole, "noise") * (number // whole + 1))[:number]


def _sentence_end(tokenizer: PreTrainedTokenizerBase, ids: list[int], place: int) -> int:
    """The first place from `place` on, at most `SEARCHED` tokens further, before which a sentence or a line ends; `place`
    itself where there is none, or where it is the start."""
    for end in range(place, min(place + SEARCHED, len(ids))) if place else ():
        if str(tokenizer.decode([ids[end - 1]])).rstrip(" ").endswith((".", "\n")):
            return end
    return place
