"""The first word of a text of unrelated words is asked for at its end."""

import random
from dataclasses import dataclass
from typing import ClassVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longspan.core.tokens import encode, with_bos
from longspan.meter import Meter
from longspan.tasks.answers import WORDS, continuation, judge
from longspan.tasks.base import Outcome, Sample, Task, check_fits


@dataclass(frozen=True)
class Template(Task):
    """It has no settings."""

    name: ClassVar[str] = "template"
    title: ClassVar[str] = "The first word"
    measures: ClassVar[str] = "whether the first word of a text is known at its end"
    source: ClassVar[str] = "generated"
    metric: ClassVar[str] = "share right"

    def samples(self, tokenizer: PreTrainedTokenizerBase, length: int, count: int, seed: int) -> list[Sample]:
        drawn = []
        for number in range(count):
            word, *others = random.Random(f"{seed}/{number}").choices(WORDS, k=length)
            begin = with_bos(tokenizer, encode(tokenizer, f"The first word is {word}."))
            end = encode(tokenizer, "\nThe first word was")
            answer = continuation(tokenizer, "was", f" {word}")
            room = length - len(begin) - len(end) - len(answer)
            self.require(room >= 0, f"a length of at least {length - room} tokens is needed, not {length:,}")
            ids = [*begin, *encode(tokenizer, " ".join(others))[:room], *end]
            drawn.append(Sample(f"text-{number}", ids, {"answer": answer}))
        return check_fits(drawn, length)

    def run(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sample: Sample, meter: Meter) -> Outcome:
        judged = judge(model, [*sample.tokens, *sample.meta["answer"]], len(sample.tokens), meter)
        return Outcome(float(judged.exact), {"nll": judged.loss}, failed=not judged.sound)

    def answer(self, tokenizer: PreTrainedTokenizerBase, sample: Sample) -> list[int]:
        return list(sample.meta["answer"])
