"""Scores known answers: exact match and loss in one forward, and choice among options.

Exact match needs no generation. Greedy decoding produces the right answer if, and only if, each of its tokens is the
likeliest after the right ones before it; so the answer is read like a text, which gives its losses as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from longspan.core.tokens import encode, encode_all
from longspan.meter import Meter
from longspan.reading.prefill import Prefilled, chunked_prefill, forced
from longspan.tasks.base import Sample
from longspan.util.errors import LongspanError

PARTS = 32
"""Equal parts of a length, for each of which the share right is reported."""
TIMED = 8
"""Last tokens of an answer that are decoded one by one, so that a cell has a decoding speed."""
UNSOUND = "the model gave logits that are not numbers"

Span = tuple[int, int]
"""Indices start … end - 1 of a list of tokens."""

# Nouns of one token each, with a space before them, in the vocabularies of SmolLM2 and its like.
_NOUNS = (
    "apple arm baby bag ball band bank bat bed bell bird boat book bone bowl box boy bread bus cake car card cat chair city "
    "coat corn cow cup desk dog door ear egg eye farm fish flag foot girl gold hand hat horse house ice iron key king lake "
    "lamp leaf leg map milk moon nail nest nose paper pen pig pin rain"
)
WORDS = tuple(_NOUNS.split())


def continuation(tokenizer: PreTrainedTokenizerBase, before: str, text: str) -> list[int]:
    """Token ids of `text` as the continuation of `before`.

    Of `text` alone where the two would share a token.
    A tokenizer may encode the beginning of a text otherwise than its continuation.
    """
    return continuations(tokenizer, [(before, text)])[0]


def continuations(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]]) -> list[list[int]]:
    """`continuation` of many pairs (before, text) at once, which is much faster."""
    different = list(dict.fromkeys(pairs))
    heads = encode_all(tokenizer, [before for before, _ in different])
    wholes = encode_all(tokenizer, [before + text for before, text in different])
    found = {}
    for pair, head, whole in zip(different, heads, wholes, strict=True):
        continues = whole[: len(head)] == head and len(whole) > len(head)
        found[pair] = whole[len(head) :] if continues else encode(tokenizer, pair[1])
    return [found[pair] for pair in pairs]


@dataclass
class Judged:
    """Known tokens, with the model's likeliest token and the loss in nats for each."""

    ids: list[int]
    likeliest: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def add(self, logits: Tensor) -> None:
        """Scores the next T tokens by their fp32 logits (T, vocabulary)."""
        at = len(self.likeliest)
        right = torch.tensor(self.ids[at : at + len(logits)], device=logits.device)
        self.likeliest += logits.argmax(-1).tolist()
        self.losses += F.cross_entropy(logits, right, reduction="none").tolist()

    @property
    def sound(self) -> bool:
        """True where all losses are finite."""
        return all(map(math.isfinite, self.losses))

    @property
    def exact(self) -> bool:
        """True where greedy decoding produces exactly these tokens."""
        return self.sound and self.likeliest == self.ids

    @property
    def loss(self) -> float:
        """Mean loss, in nats per token."""
        return math.fsum(self.losses) / len(self.losses)

    def part(self, start: int, end: int) -> Judged:
        """The part for tokens start … end - 1."""
        return Judged(self.ids[start:end], self.likeliest[start:end], self.losses[start:end])


def judge(model: PreTrainedModel, ids: list[int], first: int, meter: Meter) -> Judged:
    """Scores ids[first:] (first ≥ 1) in one prefill.

    Its last `TIMED` tokens are decoded one by one.
    """
    judged = Judged(ids[first:])
    end = len(ids) - 1 - min(TIMED, len(ids) - 1 - first)
    read = chunked_prefill(model, ids[:end], meter=meter, logits=lambda rows, at: judged.add(rows), first=first - 1)
    if end < len(ids) - 1:
        judged.add(forced(model, read, ids[end:-1], meter))
    else:
        meter.cache(read.cache)
    return judged


def judge_stream(model: PreTrainedModel, ids: list[int], spans: Sequence[Span], meter: Meter) -> list[Judged]:
    """Scores each of `spans` in order on one cache; nothing is read twice.

    The tokens before an answer are a prefill; the right answer, whatever the model would have produced, is then fed token
    by token, as in decoding.
    """
    cache: Cache | None = None
    done, answers = 0, []
    with meter.together():
        for start, end in spans:
            read = chunked_prefill(model, ids[done:start], meter=meter, cache=cache)
            judged = Judged(ids[start:end])
            judged.add(read.logits[None])
            after = forced(model, read, ids[start:end], meter)
            if end - start > 1:
                judged.add(after[:-1])
            answers.append(judged)
            cache, done = read.cache, end
    return answers


def check_options(options: Mapping[str, list[int]], task: str) -> None:
    """Raises `LongspanError` where one option starts with all tokens of another."""
    for name, ids in options.items():
        for other, longer in options.items():
            if name != other and longer[: len(ids)] == ids:
                raise LongspanError(f"{task}: this tokenizer does not tell {name!r} from {other!r}; use another model")


def choose(model: PreTrainedModel, read: Prefilled, options: Mapping[str, list[int]], meter: Meter) -> str:
    """The option that greedy decoding produces where only `options` (token ids by name) are allowed.

    At the first token in which options differ the likeliest of theirs wins, then the next among the remaining ones. So
    only tokens that separate options count, and an option of many tokens has no disadvantage. Afterwards `read` has read
    the chosen option too.
    """
    remaining, index = dict(options), 0
    while len(remaining) > 1:
        tokens = sorted({ids[index] for ids in remaining.values()})
        best = tokens[int(read.logits[tokens].argmax())]
        remaining = {name: ids for name, ids in remaining.items() if ids[index] == best}
        if len(remaining) > 1:
            forced(model, read, [best], meter)
            index += 1
    [(name, ids)] = remaining.items()
    forced(model, read, ids[index:], meter)
    return name


def by_position(places: Sequence[int], right: Sequence[bool], length: int) -> dict[str, Any]:
    """The share right, and the number of questions, in `PARTS` equal parts of [0, length).

    places: the token index of each question. A part without questions has the share None.
    """
    questions, hits = [0] * PARTS, [0] * PARTS
    for place, hit in zip(places, right, strict=True):
        part = min(place * PARTS // length, PARTS - 1)
        questions[part] += 1
        hits[part] += hit
    shares = [h / n if n else None for h, n in zip(hits, questions, strict=True)]
    return {"right_by_position": shares, "asked_by_position": questions}


class EarlierAnswers:
    """Mix-in of tasks whose samples contain answered questions.

    `meta` has `spans`, of all answers, and `last`, the ids of the last one.
    """

    def answer(self, tokenizer: PreTrainedTokenizerBase, sample: Sample) -> list[int]:
        """Token ids of the last answer, which follows the sample."""
        return list(sample.meta["last"])

    def answered(self, sample: Sample) -> list[Span]:
        """Spans of all answers but the last, which are within the sample."""
        return [(start, end) for start, end in sample.meta["spans"][:-1]]
