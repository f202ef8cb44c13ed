"""Passkey retrieval: a number is hidden in filler text and asked for at the end.

The prompt is Landmark Attention's (Mohtashami 2023, arXiv 2305.16300), which PI's paper (Chen 2023, arXiv 2306.15595) uses
too. They differ in the rest:

    landmark  a key of 1 to 50,000 at a random depth
    pi        a key of five digits at evenly spaced depths, several trials each, from which the effective window follows
              (`compare.statistics.effective_window`); reports compute it for both

Both papers measure the filler in characters. Here the length is in tokens: the filler is as long as fits.
"""

from __future__ import annotations

import random
import re
from bisect import bisect_right
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longspan.core.chat_template import encode_rendered, render
from longspan.core.tokens import encode, with_bos
from longspan.meter import Meter
from longspan.reading.prefill import chunked_prefill, greedy
from longspan.tasks.base import Outcome, Sample, Task, check_fits
from longspan.util.errors import NotSupported

# The benchmark's own words, from llama/run_test.py of epfml/landmark-attention (commit d963e50), Apache-2.0.
TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key? The pass key is"


class Prompt(NamedTuple):
    """A prompt, its key, and the share of filler before the key (0 to 1)."""

    text: str
    key: int
    depth: float


def build_prompt(key: int, before: int, after: int) -> Prompt:
    """Landmark's prompt with `before` and `after` characters of filler around the key.

    Both parts start at the beginning of the filler, and may end within a word.
    """
    filler = " ".join([FILLER] * (max(before, after) // len(FILLER) + 1))
    text = "\n".join((TASK, filler[:before], NEEDLE.format(key=key), filler[:after], QUESTION))
    return Prompt(text, key, before / (before + after) if before + after else 0.0)


def landmark_prompt(n_chars: int, rng: random.Random) -> Prompt:
    """A random prompt with `n_chars` characters of filler, drawn as Landmark's script does."""
    before = rng.randint(0, n_chars)
    return build_prompt(rng.randint(1, 50_000), before, n_chars - before)


def read_key(answer: str) -> int | None:
    """The first whole number in an answer; None where it has none."""
    found = re.search(r"\d+", answer)
    return int(found[0]) if found else None


@dataclass(frozen=True)
class Passkey(Task):
    """The score is the share of answers whose first number is the key.

    depths, trials: PI's number of evenly spaced depths, and of keys at each; without them every sample has another depth.
    template: `chat` puts the prompt into the model's chat template; the papers use plain text. answer_tokens: longest
    answer; Landmark's 10 by default, and 24 with a template.
    """

    protocol: Literal["landmark", "pi"] = "landmark"
    depths: int | None = None
    trials: int | None = None
    template: Literal["none", "chat"] = "none"
    answer_tokens: int | None = None

    name: ClassVar[str] = "passkey"
    title: ClassVar[str] = "Passkey retrieval"
    measures: ClassVar[str] = "whether a number hidden at some depth of a long filler text is found"
    source: ClassVar[str] = "generated; Mohtashami 2023, arXiv 2305.16300, and Chen 2023, arXiv 2306.15595"
    default_count: ClassVar[int] = 10
    metric: ClassVar[str] = "share found"

    def __post_init__(self) -> None:
        for field, choices in (("protocol", ("landmark", "pi")), ("template", ("none", "chat"))):
            value = getattr(self, field)
            self.require(value in choices, f"{field} must be one of {', '.join(choices)}, not {value!r}")
        self.require(1 <= self.budget <= 256, f"answer_tokens must be from 1 to 256, not {self.budget}")
        spread = self.depths is not None or self.trials is not None
        self.require(
            not spread or self.protocol == "pi", "depths and trials belong to protocol=pi; landmark draws depths"
        )
        self.require(self.trials is None or self.depths is not None, "trials needs depths, as in depths=32,trials=10")
        self.require(self.depths is None or self.depths >= 2, f"depths must be at least 2, not {self.depths}")
        self.require(self.trials is None or self.trials >= 1, f"trials must be at least 1, not {self.trials}")
        if self.depths is not None:
            object.__setattr__(self, "default_count", self.depths * (self.trials or 1))

    @property
    def budget(self) -> int:
        """The longest answer, in tokens."""
        return self.answer_tokens if self.answer_tokens is not None else 24 if self.template == "chat" else 10

    def samples(self, tokenizer: PreTrainedTokenizerBase, length: int, count: int, seed: int) -> list[Sample]:
        """Prompts as near to `length` tokens, answer included, as the filler allows.

        Keys and depths are the same at every length. Raises `SpecError` for too short a length, and `NotSupported` where
        the model has no chat template to use.
        """
        rng = random.Random(f"passkey/{self.protocol}/{seed}")
        draws = [(depth, self._key(rng)) for depth in self._depths(count, rng)]
        samples = [self._sample(tokenizer, i, depth, key, length) for i, (depth, key) in enumerate(draws)]
        return check_fits(samples, length - self.budget)

    def run(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sample: Sample, meter: Meter) -> Outcome:
        read = chunked_prefill(model, sample.tokens, meter=meter)
        tokens = greedy(model, read.cache, read.logits, self.budget, meter, timing=True)
        answer = str(tokenizer.decode(tokens, skip_special_tokens=True))
        broken = bool(read.logits.isnan().any())
        found = not broken and read_key(answer) == sample.meta["key"]
        return Outcome(float(found), {**sample.meta, "answer": answer, "found": found}, failed=broken)

    def answer(self, tokenizer: PreTrainedTokenizerBase, sample: Sample) -> list[int]:
        space = " " if self.template == "none" else ""
        return encode(tokenizer, f"{space}{sample.meta['key']}")

    def _key(self, rng: random.Random) -> int:
        return rng.randint(10_000, 99_999) if self.protocol == "pi" else rng.randint(1, 50_000)

    def _depths(self, count: int, rng: random.Random) -> list[float]:
        """The depths of the keys, from 0 at the start of the filler to 1 at its end.

        For `landmark` random, one in each of `count` equal parts; for `pi` evenly spaced, all depths before a second
        trial of any.
        """
        if self.protocol == "landmark":
            return [(i + rng.random()) / count for i in range(count)]
        places = self.depths or count
        step = max(1.0, (places - 1) / max(1, count - 1))  # fewer samples than places: spread over all the same
        return [round(i * step) % places / (places - 1) if places > 1 else 0.5 for i in range(count)]

    def _sample(self, tokenizer: PreTrainedTokenizerBase, number: int, depth: float, key: int, length: int) -> Sample:
        text = self._render(tokenizer, self._fit(tokenizer, depth, key, length).text)
        ids = with_bos(tokenizer, encode_rendered(tokenizer, text))
        needle = len(with_bos(tokenizer, encode_rendered(tokenizer, text[: text.index(NEEDLE.format(key=key))])))
        meta = {
            "protocol": self.protocol,
            "template": self.template,
            "key": key,
            "depth": depth,
            "k": len(ids) - needle,
            "prompt_tokens": len(ids),
            "needle_token": needle,
        }
        return Sample(f"key-{number}", ids, meta)

    def _fit(self, tokenizer: PreTrainedTokenizerBase, depth: float, key: int, length: int) -> Prompt:
        """The prompt with as much filler as fits.

        The filler is periodic, so tokens are counted on a prompt without most periods; the whole prompt is then checked.
        """
        period, room = len(FILLER) + 1, length - self.budget

        def split(n: int) -> tuple[int, int]:
            return round(depth * n), n - round(depth * n)

        def count(n: int) -> int:
            left_out = [max(0, part // period - 2) for part in split(n)]
            short = [part - period * k for part, k in zip(split(n), left_out, strict=True)]
            return self._count(tokenizer, build_prompt(key, *short)) + repeat * sum(left_out)

        repeat = self._count(tokenizer, build_prompt(key, 2 * period, 0))
        repeat -= self._count(tokenizer, build_prompt(key, period, 0))
        least = count(0)
        self.require(least <= room, f"a length of at least {least + self.budget} tokens is needed, not {length:,}")
        most = period
        while count(most) <= room:
            most *= 2
        n = bisect_right(range(most), room, key=count) - 1
        while self._count(tokenizer, build_prompt(key, *split(n))) > room:  # the repeats are not all alike
            n -= 1
        return build_prompt(key, *split(n))

    def _count(self, tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> int:
        return len(with_bos(tokenizer, encode_rendered(tokenizer, self._render(tokenizer, prompt.text))))

    def _render(self, tokenizer: PreTrainedTokenizerBase, text: str) -> str:
        """The text of the prompt, in the chat template if one is used.

        Raises `NotSupported` where there is none.
        """
        if self.template == "none":
            return text
        if not tokenizer.chat_template:
            raise NotSupported("passkey: this model's tokenizer has no chat template; use template=none")
        try:
            return render(tokenizer, [{"role": "user", "content": text}])
        except NotSupported as error:
            raise NotSupported(f"passkey: {error}; use template=none") from error
