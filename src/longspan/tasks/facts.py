"""Facts in a long unrelated text, and a question at its end.

RMT's three memory tasks (Bulatov 2023, arXiv 2304.11062):

    memorize    "Mary went to the kitchen." is the first sentence; where is Mary?
    detect      the same fact is at a random depth
    reasoning   two facts about three places in a line, at random depths; what is on one side of one of them?

Names, actions and places are bAbI's (4, 5 and 6), and the facts of `reasoning` have the form of the published ones: one of
them answers the question, the other is the most likely confusion. The paper hides facts in texts of QuALITY; here the noise
is a built-in text or the user's, repeated where it ends, so that every length is possible.

The question ends with the beginning of an answer ("Mary is in the"), so that a model without instruction tuning continues
with a place. A guess is right one time in 6. A newline precedes every fact, the first too: without BOS a model uses its
first token as an attention sink and forgets it (SmolLM2-135M then knows 4 of 16 facts at 300 tokens, and 12 with it).
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
from longspan.tasks.text import ReadsText, Ring, check_text

NAMES = ("Daniel", "John", "Mary", "Sandra")
ACTIONS = ("went to", "moved to", "travelled to", "journeyed to", "went back to")
PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}
SEARCHED = 200
"""Tokens of noise in which the end of a sentence is searched, so that a fact does not split a word."""
_known: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, dict[tuple[int, str], Any]] = weakref.WeakKeyDictionary()
"""Per tokenizer, by its number of tokens and by text: facts and questions are few, and a training draws thousands."""


class Story(NamedTuple):
    """Facts (depth from 0 to 1, text), a question, and its answer.

    telling: index of the fact that answers the question. question: up to where the answer begins. place: the answer.
    """

    facts: tuple[tuple[float, str], ...]
    telling: int
    question: str
    place: str


@dataclass(frozen=True)
class Facts(ReadsText, Task):
    """Base of the three tasks, with `text` as noise.

    The score is the share of right places.

    score: `choice` takes the likeliest of the six places, by the tokens in which they differ; `generation` decodes
    greedily, and the first word must be the place.
    """

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

    @abstractmethod
    def story(self, rng: random.Random, number: int, count: int) -> Story:
        """The facts and the question of sample `number` of `count`."""

    def samples(self, tokenizer: PreTrainedTokenizerBase, length: int, count: int, seed: int) -> list[Sample]:
        """Texts that have exactly `length` tokens with the longest answer.

        Facts, depths and the start of the noise are the same at every length. Raises `SpecError` for too short a length.
        """
        ring = self.ring(tokenizer)
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
        def encoded() -> dict[str, list[int]]:
            return {place: continuation(tokenizer, question, f" {place}") for place in PLACES}

        return _once(tokenizer, f"{question} …", encoded)


@dataclass(frozen=True)
class Memorize(Facts):
    """One fact, before all noise."""

    name: ClassVar[str] = "memorize"
    title: ClassVar[str] = "Memorize a fact"
    measures: ClassVar[str] = "whether the first sentence of a long text is still known at its end"

    def story(self, rng: random.Random, number: int, count: int) -> Story:
        return _whereabouts(rng, 0.0)


@dataclass(frozen=True)
class Detect(Facts):
    """One fact at a random depth, in another of `count` equal parts for each sample."""

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
        order, telling = rng.sample((0, 1), 2), rng.randrange(2)
        facts = tuple((d, _lies(rng, side, row[i], row[i + 1])) for d, i in zip(depths, order, strict=True))
        near, far = row[telling], row[telling + 1]
        if rng.random() < 0.5:
            side, near, far = OPPOSITE[side], far, near
        if rng.random() < 0.5:
            question = f"Question: What is {side} of the {far}?\nAnswer: {side.capitalize()} of the {far} is the"
        else:
            back = OPPOSITE[side]
            question = f"Question: What is the {far} {back} of?\nAnswer: The {far} is {back} of the"
        return Story(facts, order.index(telling), question, near)


def _once(tokenizer: PreTrainedTokenizerBase, text: str, make: Callable[[], Any]) -> Any:
    """The result of `make` for a text, computed once for each tokenizer."""
    known = _known.setdefault(tokenizer, {})
    key = len(tokenizer), text
    if key not in known:
        known[key] = make()
    return known[key]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(_once(tokenizer, text, lambda: encode(tokenizer, text)))


def first_word(answer: str) -> str:
    """The first word of an answer, in lower case; empty where it has none."""
    found = re.search(r"[a-z]+", answer.lower())
    return found[0] if found else ""


def _whereabouts(rng: random.Random, depth: float) -> Story:
    who, place = rng.choice(NAMES), rng.choice(PLACES)
    fact = f"{who} {rng.choice(ACTIONS)} the {place}."
    return Story(((depth, fact),), 0, f"Question: Where is {who}?\nAnswer: {who} is in the", place)


def _lies(rng: random.Random, side: str, one: str, other: str) -> str:
    """A sentence that `one` is on `side` of `other`, from either point of view."""
    if rng.random() < 0.5:
        return f"The {one} is {side} of the {other}."
    return f"The {other} is {OPPOSITE[side]} of the {one}."


def _noise(ring: Ring, start: int, number: int) -> list[int]:
    """`number` tokens of a text from `start` on, repeated where it ends."""
    whole = len(ring.ids)
    if number <= whole:
        return ring.take(start, number, "noise")
    return (ring.take(start, whole, "noise") * (number // whole + 1))[:number]


def _sentence_end(tokenizer: PreTrainedTokenizerBase, ids: list[int], place: int) -> int:
    """The first index from `place` on, within `SEARCHED` tokens, that follows the end of a sentence or line.

    `place` itself where there is none, or where it is 0.
    """
    for end in range(place, min(place + SEARCHED, len(ids))) if place else ():
        if str(tokenizer.decode([ids[end - 1]])).rstrip(" ").endswith((".", "\n")):
            return end
    return place
