"""Tasks whose right answers are known: how a model does on them.

Exact match needs no generation. Greedy decoding says the right answer if, and only if, at every token of it the right one
is the likeliest after the right ones before; so the answer is read like a text, and its losses come with it.
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
from longspan.util.errors import LongspanError

PARTS = 32
"""Parts of a length, of equal size, for which the share right is given apart."""
TIMED = 8
"""Tokens of an answer, its last, that are read one by one, so that a cell has a decoding speed."""
UNSOUND = "the model gave logits that are not numbers"

Span = tuple[int, int]
"""Places start … end - 1 in a list of tokens."""

# Nouns of one token each, with a space before them, in the vocabularies of SmolLM2 and its like.
_NOUNS = (
    "apple arm baby bag ball band bank bat bed bell bird boat book bone bowl box boy bread bus cake car card cat chair city "
    "coat corn cow cup desk dog door ear egg eye farm fish flag foot girl gold hand hat horse house ice iron key king lake "
    "lamp leaf leg map milk moon nail nest nose paper pen pig pin rain"
)
WORDS = tuple(_NOUNS.split())


def continuation(tokenizer: PreTrainedTokenizerBase, before: str, text: str) -> list[int]:
    """Ids of `text` as it goes on after `before`, since a tokenizer may begin a text otherwise than it goes on. Where the
    two would share a token, the ids of `text` alone."""
    return continuations(tokenizer, [(before, text)])[0]


def continuations(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]]) -> list[list[int]]:
    """`continuation` of many pairs of `before` and `text` at once, which is far quicker."""
    different = list(dict.fromkeys(pairs))
    heads = encode_all(tokenizer, [before for before, _ in different])
    wholes = encode_all(tokenizer, [before + text for before, text in different])
    found = {}
    for pair, head, whole in zip(different, heads, wholes, strict=True):
        goes_on = whole[: len(head)] == head and len(whole) > len(head)
        found[pair] = whole[len(head) :] if goes_on else encode(tokenizer, pair[1])
    return [found[pair] for pair in pairs]


@dataclass
class Judged:
    """Known tokens as a model sees them: the likeliest token in the place of each, and the loss of each in nats."""

    ids: list[int]
    likeliest: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def add(self, logits: Tensor) -> None:
        """Takes fp32 logits (T, vocabulary) for the next T of the tokens."""
        at = len(self.likeliest)
        right = torch.tensor(self.ids[at : at + len(logits)], device=logits.device)
        self.likeliest += logits.argmax(-1).tolist()
        self.losses += F.cross_entropy(logits, right, reduction="none").tolist()

    @property
    def sound(self) -> bool:
        """Whether all losses are numbers."""
        return all(map(math.isfinite, self.losses))

    @property
    def exact(self) -> bool:
        """Whether greedy decoding says just these tokens."""
        return self.sound and self.likeliest == self.ids

    @property
    def loss(self) -> float:
        """Mean loss, in nats a token."""
        return math.fsum(self.losses) / len(self.losses)

    def part(self, start: int, end: int) -> Judged:
        """Places start … end - 1 of it."""
        return Judged(self.ids[start:end], self.likeliest[start:end], self.losses[start:end])


def judge(model: PreTrainedModel, ids: list[int], first: int, meter: Meter) -> Judged:
    """Reads `ids` in one prefill, but for its last `TIMED` tokens, and judges ids[first:]; `first` is 1 at least."""
    judged = Judged(ids[first:])
    end = len(ids) - 1 - min(TIMED, len(ids) - 1 - first)
    read = chunked_prefill(model, ids[:end], meter=meter, logits=lambda rows, at: judged.add(rows), first=first - 1)
    if end < len(ids) - 1:
        judged.add(forced(model, read, ids[end:-1], meter))
    else:
        meter.cache(read.cache)
    return judged


def judge_stream(model: PreTrainedModel, ids: list[int], spans: Sequence[Span], meter: Meter) -> list[Judged]:
    """Reads `ids` turn by turn on one cache and judges each of `spans`, in order: what stands before an answer is a prefill,
    and the answer, the right one whatever the model would have said, goes in token by token as while decoding."""
    cache: Cache | None = None
    done, said = 0, []
    with meter.together():
        for start, end in spans:
            read = chunked_prefill(model, ids[done:start], meter=meter, cache=cache)
            judged = Judged(ids[start:end])
            judged.add(read.logits[None])
            after = forced(model, read, ids[start:end], meter)
            if end - start > 1:
                judged.add(after[:-1])
            said.append(judged)
            cache, done = read.cache, end
    return said


def check_options(options: Mapping[str, list[int]], task: str) -> None:
    """Raises `LongspanError` where one option begins with all tokens of another, which no choice could tell apart."""
    for name, ids in options.items():
        for other, longer in options.items():
            if name != other and longer[: len(ids)] == ids:
                raise LongspanError(f"{task}: this tokenizer does not tell {name!r} from {other!r}; use another model")


def choose(model: PreTrainedModel, read: Prefilled, options: Mapping[str, list[int]], meter: Meter) -> str:
    """The option that the model says when it may say nothing else: at the first token in which options differ the likeliest
    of theirs wins, then the next among those that are left. So only tokens that tell options apart count, and an option
    of many tokens has no disadvantage. `read` has gone on to the end of the chosen option afterwards."""
    left, place = dict(options), 0
    while len(left) > 1:
        tokens = sorted({ids[place] for ids in left.values()})
        best = tokens[int(read.logits[tokens].argmax())]
        left = {name: ids for name, ids in left.items() if ids[place] == best}
        if len(left) > 1:
            forced(model, read, [best], meter)
            place += 1
    [(name, ids)] = left.items()
    forced(model, read, ids[place:], meter)
    return name


def by_position(places: Sequence[int], right: Sequence[bool], length: int) -> dict[str, Any]:
    """The share right in each of `PARTS` equal parts of [0, length), by the place of each question; None where none lies."""
    asked, hits = [0] * PARTS, [0] * PARTS
    for place, hit in zip(places, right, strict=True):
        part = min(place * PARTS // length, PARTS - 1)
        asked[part] += 1
        hits[part] += hit
    shares = [h / n if n else None for h, n in zip(hits, asked, strict=True)]
    return {"right_by_position": shares, "asked_by_position": asked}
