"""Perplexity of long text: how well the model predicts each token from those before it.

`window` reads each window of `length` tokens once, from starts evenly spread over the text, and reports the loss by
position, in which methods differ. The other protocols are those of papers; they slide a shorter window over a sample of
`length` tokens and differ in which tokens they count, so that their figures cannot be compared with each other:

    nonoverlapping  disjoint blocks; early tokens of a block have little context (ALiBi)
    sliding         the window moves by `stride`, its last `stride` tokens count (PI); stride=1 is ALiBi's sliding
    rolling         disjoint, each token once, the last block moved back to be full (lm-evaluation-harness)
    longlora        every window's whole loss, overlaps counted again; the last window is not read (LongLoRA)
    yarn            sliding, but each window's mean weighs the same, and each begins with BOS (YaRN)

A protocol is a pure function from sizes to windows. The score is the mean over all counted tokens, but under `yarn` and
`longlora` the mean of the windows' means (`MEAN_OF`). Perplexity, bits per byte and nats per word are the same score in
other units, by the bytes and words per token of one contiguous span of text.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longspan.core.facts import text_config
from longspan.core.tokens import bos_id
from longspan.meter import Meter
from longspan.reading.prefill import chunked_prefill, forced
from longspan.tasks.answers import UNSOUND
from longspan.tasks.base import Outcome, Sample, Task, check_fits
from longspan.tasks.text import GOLDEN, SHORTEST, TEXT_SOURCES, ReadsText, check_text

BUCKETS = 64
"""Equal parts of a window, for each of which the loss is reported."""
TIMED = 8
"""Tokens at the end of a window that are decoded one by one, so that every cell has a decoding speed."""


class Window(NamedTuple):
    """Tokens start to end - 1 of a sample; those from `first` on are predicted.

    Each is predicted from those before it in the window.
    """

    start: int
    end: int
    first: int


def whole(total: int, length: int, stride: int) -> list[Window]:
    """One window over all `total` tokens."""
    return [Window(0, total, 1)]


def nonoverlapping(total: int, length: int, stride: int) -> list[Window]:
    """Disjoint blocks of `length` tokens, each predicting the next token as well.

    The last block may be shorter.
    """
    return [Window(s, min(s + length + 1, total), s + 1) for s in range(0, total - 1, length)]


def sliding(total: int, length: int, stride: int) -> list[Window]:
    """Windows every `stride` tokens, each but the first counting its last `stride` tokens.

    The remainder at the end is counted by a full window that ends there.
    """
    windows = [Window(0, min(length + 1, total), 1)]
    while (done := windows[-1].end) < total:
        end = min(done + stride, total)
        windows.append(Window(end - 1 - length, end, done))
    return windows


def rolling(total: int, length: int, stride: int) -> list[Window]:
    """`sliding` with a stride of the whole window."""
    return sliding(total, length, length)


def longlora(total: int, length: int, stride: int) -> list[Window]:
    """Full windows every `stride` tokens, all tokens of each counted, without the last window.

    So does eval.py of dvlab-research/LongLoRA (commit 4cbb61b). A single window is kept; the script fails there.
    """
    starts = range(0, max(1, total - length), stride)
    return [Window(s, min(s + length, total), s + 1) for s in starts[: max(1, len(starts) - 1)]]


def yarn(total: int, length: int, stride: int) -> list[Window]:
    """Windows every `stride` tokens, each counted from the end of the one before.

    The last one may be shorter.
    """
    windows: list[Window] = []
    for start in range(0, total, stride):
        end = min(start + length, total)
        windows.append(Window(start, end, windows[-1].end if windows else 1))
        if end == total:
            break
    return windows


Plan = Callable[[int, int, int], list[Window]]
PROTOCOLS: dict[str, Plan] = {
    "window": whole,
    "nonoverlapping": nonoverlapping,
    "sliding": sliding,
    "rolling": rolling,
    "longlora": longlora,
    "yarn": yarn,
}
STRIDED = ("sliding", "longlora", "yarn")
WINDOW_MEANS, TOKENS = "the windows' means", "all counted tokens"
MEAN_OF = dict.fromkeys(PROTOCOLS, TOKENS) | dict.fromkeys(("longlora", "yarn"), WINDOW_MEANS)
"""What a protocol's score is the mean of, in words for the report."""


def mean_loss(protocol: str, losses: Sequence[Tensor]) -> float:
    """A protocol's score in nats per token, from the losses (tokens,) of each window."""
    if MEAN_OF[protocol] == WINDOW_MEANS:
        return math.fsum(float(x.mean()) for x in losses) / len(losses)
    return float(torch.cat(list(losses)).mean())


def by_position(
    windows: Sequence[Window], losses: Sequence[Tensor], length: int
) -> tuple[list[float | None], list[int]]:
    """Mean loss and number of tokens in each of `BUCKETS` equal parts of a window.

    The loss of a part without tokens is None.
    """
    place = torch.cat([torch.arange(w.first - w.start, w.end - w.start) for w in windows])
    bucket = (place * BUCKETS // length).clamp(max=BUCKETS - 1)
    counts = torch.bincount(bucket, minlength=BUCKETS)
    sums = torch.zeros(BUCKETS, dtype=torch.float64).index_add(0, bucket, torch.cat(list(losses)))
    return [float(s / n) if n else None for s, n in zip(sums, counts, strict=True)], counts.tolist()


@dataclass(frozen=True)
class Perplexity(ReadsText, Task):
    """The score is the mean negative log-likelihood in nats per token; `bits_per_byte` compares across tokenizers.

    window, stride: of the protocols other than `window`, in tokens; the window is the longest context, and the length is
    the amount of text in a sample.
    """

    protocol: Literal["window", "nonoverlapping", "sliding", "rolling", "longlora", "yarn"] = "window"
    window: int | None = None
    stride: int | None = None
    text: str = "prose"

    name: ClassVar[str] = "ppl"
    version: ClassVar[int] = 2
    title: ClassVar[str] = "Perplexity of long text"
    measures: ClassVar[str] = "how well each token is predicted, by its position in the window"
    source: ClassVar[str] = TEXT_SOURCES
    default_count: ClassVar[int] = 6
    metric: ClassVar[str] = "NLL (nats a token)"
    higher_is_better: ClassVar[bool] = False

    def __post_init__(self) -> None:
        one, example = self.protocol == "window", f"ppl:protocol={self.protocol},window=2k"
        self.require(
            self.protocol in PROTOCOLS, f"protocol must be one of {', '.join(PROTOCOLS)}, not {self.protocol!r}"
        )
        self.require(
            not one or self.window is None, "protocol=window reads the whole length at once; leave out window="
        )
        self.require(one or self.window is not None, f"{self.protocol} needs the window that it moves, as in {example}")
        most = SHORTEST if self.window is None else self.window
        self.require(most >= SHORTEST, f"window must be at least {SHORTEST} tokens, not {most:,}")
        if self.stride is not None:
            self.require(self.protocol in STRIDED, f"stride has no effect on protocol={self.protocol}; leave it out")
            self.require(
                1 <= self.stride <= most, f"stride must be from 1 to the window of {most:,}, not {self.stride:,}"
            )
        check_text(self.text, self.name)

    def samples(self, tokenizer: PreTrainedTokenizerBase, length: int, count: int, seed: int) -> list[Sample]:
        """Windows of exactly `length` tokens, BOS included; `length` does not change where they start.

        Starts follow the golden ratio, which spreads any number of them evenly, so shorter windows are prefixes of longer
        ones. Raises `SpecError` for too short a length, or too short a text.
        """
        self.require(length >= SHORTEST, f"a length of at least {SHORTEST} tokens is needed, not {length:,}")
        text, begin = self.ring(tokenizer), self._begin(tokenizer)
        meta = {**text.describe(), "begins_with": str(tokenizer.decode(begin)) if begin else None}
        place, samples = random.Random(f"ppl/{seed}").random(), []
        for number in range(count):
            start = int((place + number * GOLDEN) % 1 * len(text.ids))
            ids = begin + text.take(start, length - len(begin), self.name)
            samples.append(Sample(f"window-{number}", ids, meta | {"start": start}))
        return check_fits(samples, length)

    def _begin(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Ids before the text: BOS where the tokenizer uses it.

        `rolling` has BOS or EOS in any case.
        """
        begin = bos_id(tokenizer)
        if self.protocol == "rolling" and begin is None:
            begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        return [] if begin is None else [begin]

    def run(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sample: Sample, meter: Meter) -> Outcome:
        length = min(self.window or len(sample.tokens), len(sample.tokens))
        stride = self.stride or min(256, length)
        windows = PROTOCOLS[self.protocol](len(sample.tokens), length, stride)
        losses = [
            self._losses(model, self._inputs(sample, w), w.first - w.start, meter, timed=w is windows[0])
            for w in windows
        ]
        detail: dict[str, Any] = {**sample.meta, "protocol": self.protocol, "mean_of": MEAN_OF[self.protocol]}
        detail |= {"window": length, "windows": len(windows)}
        if self.protocol in STRIDED:
            detail["stride"] = stride
        if not all(bool(x.isfinite().all()) for x in losses):
            detail["reason"] = UNSOUND
            return Outcome(math.log(text_config(model.config).vocab_size), detail, failed=True)
        return Outcome(
            mean_loss(self.protocol, losses), detail | self._figures(tokenizer, sample, windows, losses, length)
        )

    def _inputs(self, sample: Sample, window: Window) -> list[int]:
        """The tokens of a window; YaRN's evaluation replaces the first token of each by BOS."""
        ids = sample.tokens[window.start : window.end]
        return [sample.tokens[0], *ids[1:]] if self.protocol == "yarn" and sample.meta["begins_with"] else ids

    def _losses(self, model: PreTrainedModel, ids: list[int], first: int, meter: Meter, timed: bool) -> Tensor:
        """Loss (tokens,) of ids[first:] in nats, float64 on the CPU.

        With `timed`, the last `TIMED` inputs are decoded.
        """
        end = len(ids) - 1 - (TIMED if timed else 0)
        losses: list[Tensor] = []

        def score(logits: Tensor, position: int) -> None:
            targets = torch.tensor(ids[position + 1 : position + 1 + len(logits)], device=logits.device)
            losses.append(F.cross_entropy(logits, targets, reduction="none").double().cpu())

        read = chunked_prefill(model, ids[:end], meter=meter, logits=score, first=first - 1)
        if timed:
            score(forced(model, read, ids[end:-1], meter), end)
        return torch.cat(losses)

    def _figures(
        self,
        tokenizer: PreTrainedTokenizerBase,
        sample: Sample,
        windows: Sequence[Window],
        losses: Sequence[Tensor],
        length: int,
    ) -> dict[str, Any]:
        """The score in other units, the loss by position, and the number of tokens.

        Bytes and words per token are those of the text from the first counted token to the last, decoded in one piece: the
        tokens of a single window may begin or end within a character or a word.
        """
        positions, counts = by_position(windows, losses, length)
        mean = mean_loss(self.protocol, losses)
        span = sample.tokens[windows[0].first : windows[-1].end]
        text = str(tokenizer.decode(span, clean_up_tokenization_spaces=False))
        return {
            "tokens": sum(counts),
            "ppl": math.exp(mean) if mean < 700 else None,
            "bits_per_byte": mean * len(span) / max(1, len(text.encode())) / math.log(2),
            "nll_per_word": mean * len(span) / max(1, len(text.split())),
            "nll_by_position": positions,
            "tokens_by_position": counts,
        }
