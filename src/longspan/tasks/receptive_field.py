"""How far back a model really looks: the receptive field by the cumulative normalised gradient.

The last position's state, seen through random directions, is differentiated by every input embedding. The norms of these
gradients, scaled to sum to one and added up from the newest token backwards, say which share of what moves the output lies
within a distance; the field is the shortest distance that holds `share` of it. It tells what a model uses, not whether that
helps: a model whose field is no longer than its training length loses nothing beyond it, and gains nothing either.

The measure is Chi 2023's (arXiv 2212.10556); the paper's full text was not at hand, so directions are drawn as here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longspan.core.tokens import bos_id
from longspan.meter import Meter
from longspan.tasks.base import Outcome, Sample, Task, check_fits
from longspan.tasks.perplexity import _GOLDEN, SHORTEST
from longspan.tasks.text import check_text, read_text, tokenised
from longspan.util.errors import NotSupported

POINTS = 64
"""Distances at which the cumulative share is told."""


@dataclass(frozen=True)
class ReceptiveField(Task):
    """The score is a distance in tokens. `share` of the gradient lies within it; `directions` random ones are averaged."""

    share: float = 0.99
    directions: int = 4
    text: str = "prose"

    name: ClassVar[str] = "field"
    title: ClassVar[str] = "Receptive field"
    measures: ClassVar[str] = "how far back lie the tokens that move the last one's state"
    source: ClassVar[str] = (
        "Python's own help texts or library sources, a novel that comes along, or a text file of yours"
    )
    default_count: ClassVar[int] = 4
    metric: ClassVar[str] = "tokens back"
    rates: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.require(0 < self.share < 1, f"share must be between 0 and 1, not {self.share}")
        self.require(self.directions >= 1, f"directions must be at least 1, not {self.directions}")
        check_text(self.text, self.name)

    def data_digest(self) -> str:
        return read_text(self.text, self.name).sha256

    def samples(self, tokenizer: PreTrainedTokenizerBase, length: int, count: int, seed: int) -> list[Sample]:
        """Windows of exactly `length` tokens that end at places evenly spread over the text, the same for every length."""
        return windows(self, tokenizer, self.text, length, count, seed)

    def run(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sample: Sample, meter: Meter) -> Outcome:
        with meter.prefill(len(sample.tokens)):
            norms = gradient_norms(model, sample.tokens, self.directions)
        total = norms.sum()
        if not bool(total.isfinite()) or total == 0:
            return Outcome(0.0, {**sample.meta, "reason": "the gradient is not a number, or nothing"}, failed=True)
        within = (norms.flip(0) / total).cumsum(0)
        places = torch.linspace(0, len(norms) - 1, min(POINTS, len(norms))).long()
        curve = {"distances": places.tolist(), "share_within": within[places].tolist()}
        return Outcome(float(field(within, self.share)), {**sample.meta, "share": self.share, **curve})


def windows(
    task: Task, tokenizer: PreTrainedTokenizerBase, source: str, length: int, count: int, seed: int
) -> list[Sample]:
    """`count` windows of exactly `length` tokens of one text; where they end does not depend on their length."""
    task.require(length >= SHORTEST, f"a length of at least {SHORTEST} tokens is needed, not {length:,}")
    text = tokenised(tokenizer, read_text(source, task.name))
    begin = bos_id(tokenizer)
    before = [] if begin is None else [begin]
    samples = []
    for number in range(count):
        end = int((0.5 + seed / 7 + number * _GOLDEN) % 1 * len(text.ids))
        start = end - (length - len(before))
        meta = {"text": text.name, "text_sha256": text.sha256, "text_tokens": len(text.ids)}
        ids = before + text.take(start, length - len(before), task.name)
        samples.append(Sample(f"end-{number}", ids, meta | {"start": start % len(text.ids), "end": end}))
    return check_fits(samples, length)


def gradient_norms(model: PreTrainedModel, ids: list[int], directions: int = 4) -> Tensor:
    """Norm of the gradient of the last position's state by each input embedding, (T,), float64 on the CPU, averaged over
    random directions of that state. Raises `NotSupported` for a model on which no gradient passes."""
    tokens = torch.tensor([ids], device=model.device)
    generator = torch.Generator().manual_seed(0)
    with torch.enable_grad():
        embeds = model.get_input_embeddings()(tokens).detach().requires_grad_()
        state = model.base_model(inputs_embeds=embeds, use_cache=False)[0][0, -1].float()
        if not state.requires_grad:
            raise NotSupported("field: no gradient passes through this model with this method; leave it out")
        norms = torch.zeros(len(ids), dtype=torch.float64)
        for number in range(directions):
            direction = torch.randn(state.shape, generator=generator).to(state)
            (slope,) = torch.autograd.grad(state @ direction, embeds, retain_graph=number + 1 < directions)
            norms += slope[0].double().norm(dim=-1).cpu()
    return norms / directions


def field(within: Tensor, share: float) -> int:
    """How many tokens, the newest among them, hold `share` of the gradient; within (T,) is the cumulative share by distance
    from the newest."""
    return int((within < share).sum()) + 1
