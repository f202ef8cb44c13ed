"""Dictionary look-up: many keys with values, then questions for some values.

The task of Focused Transformer's paper (Tworkowski 2023, arXiv 2307.03170, appendix): keys and values are four symbols
each out of 64, a definition is `<k> k1 k2 k3 k4 <v> v1 v2 v3 v4`, a question the same with `<q>`, and the last 256 tokens
of a document, 25 questions, ask for values defined before, however long it is. There symbols and markers are tokens of
their own; here they are words, since a pretrained model knows no others, of as many tokens as the tokenizer needs.

The paper leaves open, and here: keys are all different, no key is asked for twice, and a value counts as found when all
four symbols are right, each after the right ones before it. The right value follows each question, as in the paper's
documents, whatever the model would have produced.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longspan.core.tokens import encode, with_bos
from longspan.meter import Meter
from longspan.tasks.answers import UNSOUND, WORDS, EarlierAnswers, Span, by_position, continuation, judge
from longspan.tasks.base import Outcome, Sample, Task, check_fits

Symbols = tuple[int, ...]


@dataclass(frozen=True)
class Signs:
    """Token ids of markers, of a newline, and of every symbol.

    Markers precede a key, a value and a question.
    """

    key: list[int]
    value: list[int]
    question: list[int]
    end: list[int]
    symbols: list[list[int]]

    def spelled(self, symbols: Symbols) -> list[int]:
        """Token ids of a sequence of symbols."""
        return [i for s in symbols for i in self.symbols[s]]

    def definition(self, key: Symbols, value: Symbols) -> list[int]:
        """Token ids of a whole definition."""
        return [*self.key, *self.spelled(key), *self.value, *self.spelled(value), *self.end]


@dataclass(frozen=True)
class Lookup(EarlierAnswers, Task):
    """The score is the share of values found, among as many pairs as fit.

    questions: values asked for. width: symbols of a key and of a value. symbols: how many different ones there are.
    """

    questions: int = 25
    width: int = 4
    symbols: int = 64

    name: ClassVar[str] = "lookup"
    title: ClassVar[str] = "Dictionary look-up"
    measures: ClassVar[str] = "whether values are found by their keys, among as many pairs as fit"
    source: ClassVar[str] = "generated, after Tworkowski 2023, arXiv 2307.03170"
    default_count: ClassVar[int] = 4
    metric: ClassVar[str] = "share found"

    def __post_init__(self) -> None:
        self.require(1 <= self.questions <= 10_000, f"questions must be from 1 to 10,000, not {self.questions}")
        self.require(1 <= self.width <= 16, f"width must be from 1 to 16 symbols, not {self.width}")
        self.require(2 <= self.symbols <= len(WORDS), f"symbols must be from 2 to {len(WORDS)}, not {self.symbols}")

    def samples(self, tokenizer: PreTrainedTokenizerBase, length: int, count: int, seed: int) -> list[Sample]:
        """Documents of at most `length` tokens with the last value.

        Shorter ones define the first pairs of longer ones.
        Raises `SpecError` where fewer pairs fit than there are questions, or more than there are keys.
        """
        signs = self._signs(tokenizer)
        samples = []
        for number in range(count):
            rng = random.Random(f"{self.name}/{self.symbols}/{self.width}/{seed}/{number}")
            samples.append(self._sample(tokenizer, signs, rng, number, length))
        return check_fits(samples, length)

    def run(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sample: Sample, meter: Meter) -> Outcome:
        spans, ids = sample.meta["spans"], [*sample.tokens, *sample.meta["last"]]
        first = spans[0][0]
        judged = judge(model, ids, first, meter)
        values = [judged.part(start - first, end - first) for start, end in spans]
        found = [v.exact for v in values]
        detail = {"pairs": sample.meta["pairs"], "questions": len(spans), "tokens": len(ids)}
        if not judged.sound:
            return Outcome(0.0, {**detail, "reason": UNSOUND}, failed=True)
        tokens = [a == b for v in values for a, b in zip(v.likeliest, v.ids, strict=True)]
        detail |= {"tokens_right": sum(tokens) / len(tokens), "nll": sum(v.loss for v in values) / len(values)}
        return Outcome(sum(found) / len(found), detail | by_position(sample.meta["places"], found, len(ids)))

    def _signs(self, tokenizer: PreTrainedTokenizerBase) -> Signs:
        key, question = (encode(tokenizer, sign) for sign in ("Key:", "Question:"))
        value = continuation(tokenizer, WORDS[0], " Value:")
        symbols = [continuation(tokenizer, "Key:", f" {word}") for word in WORDS[: self.symbols]]
        return Signs(key, value, question, continuation(tokenizer, WORDS[0], "\n"), symbols)

    def _sample(
        self, tokenizer: PreTrainedTokenizerBase, signs: Signs, rng: random.Random, number: int, length: int
    ) -> Sample:
        widest = self.width * max(map(len, signs.symbols))
        asking = self.questions * (len(signs.question) + len(signs.value) + len(signs.end) + 2 * widest)
        tokens, places = with_bos(tokenizer, []), []
        pairs: dict[Symbols, Symbols] = {}
        while True:
            key, value = self._new_key(rng, pairs), self._draw(rng)
            record = signs.definition(key, value)
            if len(tokens) + len(record) + asking > length:
                break
            places.append(len(tokens))
            pairs[key] = value
            tokens += record
        self._check(len(pairs), length, len(record), asking, len(tokens))
        chosen, known = rng.sample(range(len(pairs)), self.questions), list(pairs.items())
        spans, last = _ask(tokens, signs, [known[at] for at in chosen])
        meta = {"pairs": len(pairs), "places": [places[at] for at in chosen], "spans": spans, "last": last}
        return Sample(f"dictionary-{number}", tokens, meta)

    def _draw(self, rng: random.Random) -> Symbols:
        return tuple(rng.randrange(self.symbols) for _ in range(self.width))

    def _new_key(self, rng: random.Random, known: dict[Symbols, Symbols]) -> Symbols:
        """A key that is not in `known`.

        At most half of all keys are used, so that one is found quickly.
        """
        self.require(
            2 * len(known) < self.symbols**self.width,
            f"there are only {self.symbols**self.width:,} keys, too few for this length; use a larger width, such as "
            f"width={self.width + 1}, or a shorter length",
        )
        while (key := self._draw(rng)) in known:
            pass
        return key

    def _check(self, pairs: int, length: int, record: int, asking: int, used: int) -> None:
        need = used + asking + (self.questions - pairs) * record
        self.require(
            pairs >= self.questions,
            f"{pairs} pairs fit into {length:,} tokens beside {self.questions} questions; about {need:,} tokens are needed for "
            "as many pairs, or ask fewer questions, as in lookup:questions=4",
        )


def _ask(tokens: list[int], signs: Signs, pairs: list[tuple[Symbols, Symbols]]) -> tuple[list[Span], list[int]]:
    """Appends questions with their values to `tokens`, without the last value.

    Returns the values' spans, and the last one.
    """
    spans: list[Span] = []
    last: list[int] = []
    for key, value in pairs:
        tokens += last + (signs.end if last else [])
        tokens += [*signs.question, *signs.spelled(key), *signs.value]
        last = signs.spelled(value)
        spans.append((len(tokens), len(tokens) + len(last)))
    return spans, last
