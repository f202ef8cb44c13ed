"""Short instructions with an input and an output, for gist tokens (Mu 2023).

    instructions                  twelve kinds of instruction, generated: `seen`, those to train on
    instructions:split=unseen     five other kinds, which a training on `seen` never contains
    instructions:data=PATH        a file or a folder in Alpaca's format: instruction, input and output

Most generated instructions contain something random (a letter, a number, a word, a tiny dictionary), so that they must be
read and not only recognised. The prompt has gisting's form: "Instruction: …", "Input: …", "Output:". `instruction_tokens`
of a sample is the number of tokens of the first part, after which gist tokens are placed.

Samples are not filled up to the cell's length; a longer cell only admits longer ones from a file. Mu 2023: arXiv
2304.08467.
"""

from __future__ import annotations

import hashlib
import math
import random
from dataclasses import dataclass
from typing import ClassVar, Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longspan.core.facts import text_config
from longspan.core.tokens import encode_all, with_bos
from longspan.meter import Meter
from longspan.tasks.answers import UNSOUND, continuations, judge
from longspan.tasks.base import Outcome, Sample, Task, check_fits
from longspan.tasks.triples import SEEN, UNSEEN, Triple, data_files, draw, read_triples
from longspan.util.errors import SpecError


@dataclass(frozen=True)
class Instructions(Task):
    """`score=nll`: mean loss of the output in nats per token.

    `score=exact`: share of outputs that greedy decoding produces.
    What decoding would produce after the output is ignored.
    """

    split: Literal["seen", "unseen"] | None = None
    data: str | None = None
    score: Literal["nll", "exact"] = "nll"

    name: ClassVar[str] = "instructions"
    title: ClassVar[str] = "Short instructions"
    measures: ClassVar[str] = "whether short instructions are followed"
    source: ClassVar[str] = "generated, or a file of yours in Alpaca's format; the form is Mu 2023's, arXiv 2304.08467"
    default_count: ClassVar[int] = 64
    metric: ClassVar[str] = "NLL (nats a token)"
    higher_is_better: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.require(self.split in (None, "seen", "unseen"), f"split must be seen or unseen, not {self.split!r}")
        self.require(self.score in ("nll", "exact"), f"score must be nll or exact, not {self.score!r}")
        self.require(
            self.data is None or self.split is None, "split belongs to the generated kinds; with data= leave it out"
        )
        if self.data is not None:
            read_triples(self.data, self.name)
        if self.score == "exact":
            object.__setattr__(self, "metric", "share exact")
            object.__setattr__(self, "higher_is_better", True)

    def data_digest(self) -> str:
        if self.data is None:
            return ""
        digest = hashlib.sha256()
        for path in data_files(self.data, self.name):
            digest.update(path.read_bytes())
        return digest.hexdigest()

    def samples(self, tokenizer: PreTrainedTokenizerBase, length: int, count: int, seed: int) -> list[Sample]:
        """Instructions of every generated kind in turn, or `count` different ones of a file.

        Those of a file that do not fit into `length` tokens with their output are skipped; `left_out` of every sample is
        their number. Raises `SpecError` where too few remain.
        """
        if self.data is None:
            rng = random.Random(f"{self.name}/{self.split or 'seen'}/{seed}")
            kinds = list(UNSEEN if self.split == "unseen" else SEEN)
            triples = [draw(kinds[i % len(kinds)], rng) for i in range(count)]
            samples = self._samples(tokenizer, list(enumerate(triples)))
            need = max(len(s.tokens) + len(s.meta["answer"]) for s in samples)
            self.require(need <= length, f"a length of at least {need} tokens is needed, not {length:,}")
        else:
            samples = self._of_file(tokenizer, length, count, seed)
        return check_fits(samples, length)

    def answer(self, tokenizer: PreTrainedTokenizerBase, sample: Sample) -> list[int]:
        return list(sample.meta["answer"])

    def run(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sample: Sample, meter: Meter) -> Outcome:
        judged = judge(model, [*sample.tokens, *sample.meta["answer"]], len(sample.tokens), meter)
        keys = ("kind", "output", "instruction_tokens", "left_out")
        detail = {key: sample.meta[key] for key in keys if key in sample.meta}
        if not judged.sound:
            worst = 0.0 if self.score == "exact" else math.log(text_config(model.config).vocab_size)
            return Outcome(worst, {**detail, "reason": UNSOUND}, failed=True)
        detail |= {"exact": judged.exact, "nll": judged.loss, "output_tokens": len(judged.ids)}
        return Outcome(float(judged.exact) if self.score == "exact" else judged.loss, detail)

    def _of_file(self, tokenizer: PreTrainedTokenizerBase, length: int, count: int, seed: int) -> list[Sample]:
        assert self.data is not None
        known = read_triples(self.data, self.name)
        random.Random(f"{self.name}/{seed}").shuffle(known)
        fitting: list[Sample] = []
        for number, triple in enumerate(known):
            [sample] = self._samples(tokenizer, [(number, triple)])
            if len(sample.tokens) + len(sample.meta["answer"]) <= length:
                fitting.append(sample)
            if len(fitting) == count:
                return [Sample(s.id, s.tokens, s.meta | {"left_out": number + 1 - count}) for s in fitting]
        raise SpecError(
            f"{self.name}: {len(fitting):,} of the {len(known):,} instructions in {self.data} fit into {length:,} tokens, and "
            f"{count:,} are asked for; ask for fewer samples, or a longer length"
        )

    def _samples(self, tokenizer: PreTrainedTokenizerBase, numbered: list[tuple[int, Triple]]) -> list[Sample]:
        """The samples of numbered triples, all tokenised together, since a training has thousands."""
        triples = [triple for _, triple in numbered]
        heads = encode_all(tokenizer, [f"Instruction: {t.instruction}" for t in triples])
        inputs = encode_all(tokenizer, [f"\nInput: {t.input}\nOutput:" if t.input else "\nOutput:" for t in triples])
        answers = continuations(tokenizer, [("Output:", f" {t.output}") for t in triples])
        samples = []
        for (number, triple), ids, input_ids, answer in zip(numbered, heads, inputs, answers, strict=True):
            head = with_bos(tokenizer, ids)
            meta = {"kind": triple.kind, "output": triple.output, "instruction_tokens": len(head)}
            samples.append(Sample(f"{triple.kind}-{number}", [*head, *input_ids], meta | {"answer": list(answer)}))
        return samples
