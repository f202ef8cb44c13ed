"""Receptive field: how far back tokens influence the last state, by gradients.

Projections of the last position's hidden state on random directions are differentiated by every input embedding. The norms
of these gradients, scaled to sum to one and added up from the newest token backwards, are the share of the influence within
a distance; the field is the shortest distance that contains `share` of it. It describes what a model uses, not whether that
helps: a model whose field is no longer than its training length loses nothing beyond it, and gains nothing either.

The measure is that of Chi 2023 (arXiv 2212.10556); how directions are drawn is this package's choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longspan.meter import Meter
from longspan.tasks.base import Outcome, Sample
from longspan.tasks.text import check_text
from longspan.tasks.windows import POINTS, TextWindows
from longspan.util.errors import NotSupported


@dataclass(frozen=True)
class ReceptiveField(TextWindows):
    """The score is the distance in tokens that contains `share` of the gradient.

    Gradients are averaged over `directions` random directions.
    """

    share: float = 0.99
    directions: int = 4
    text: str = "prose"

    name: ClassVar[str] = "field"
    title: ClassVar[str] = "Receptive field"
    measures: ClassVar[str] = "how far back lie the tokens that move the last one's state"
    metric: ClassVar[str] = "tokens back"

    def __post_init__(self) -> None:
        self.require(0 < self.share < 1, f"share must be between 0 and 1, not {self.share}")
        self.require(self.directions >= 1, f"directions must be at least 1, not {self.directions}")
        check_text(self.text, self.name)

    def run(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sample: Sample, meter: Meter) -> Outcome:
        with meter.prefill(len(sample.tokens)):
            norms = gradient_norms(model, sample.tokens, self.directions)
        total = norms.sum()
        if not bool(total.isfinite()) or total == 0:
            return Outcome(0.0, {**sample.meta, "reason": "the gradient is not a number, or zero"}, failed=True)
        within = (norms.flip(0) / total).cumsum(0)
        places = torch.linspace(0, len(norms) - 1, min(POINTS, len(norms))).long()
        curve = {"distances": places.tolist(), "share_within": within[places].tolist()}
        return Outcome(float(field(within, self.share)), {**sample.meta, "share": self.share, **curve})


def gradient_norms(model: PreTrainedModel, ids: list[int], directions: int = 4) -> Tensor:
    """Norms (T,) of the last state's gradient by each input embedding, float64 on the CPU.

    Averaged over random directions of that state. Raises `NotSupported` for a model without gradients.
    """
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
    """The number of newest tokens that contain `share` of the gradient.

    within: (T,), the cumulative share by distance from the newest token.
    """
    return int((within < share).sum()) + 1
