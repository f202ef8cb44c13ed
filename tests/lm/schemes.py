"""One line for each position scheme: the spec, the same scheme where it must be another, and what it is then."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

import checks
from longspan.core.method import catalogue
from longspan.lm import LongspanConfig, LongspanForCausalLM
from longspan.positions.scheme import Scheme

WINDOW = 64
SIZES = {**checks.SIZES, "hidden_size": 64, "intermediate_size": 96, "num_key_value_heads": 2, "eos_token_id": 1}


@dataclass(frozen=True)
class Line:
    """`limit` equals `baseline`, a scheme that is nothing special any more; None where there is no such limit. `relative`
    says whether moving all positions by as much changes nothing, `encoder` whether the scheme is defined for one."""

    spec: str
    limit: str | None = None
    baseline: str = "nope"
    relative: bool = True
    encoder: bool = True
    endless: bool = True


LISTED = (
    Line("nope", encoder=False),
    Line("rope"),
    Line("rope:share=0.5"),
    Line("sinusoidal", relative=False),
    Line("learned", relative=False, endless=False),
    Line("alibi"),
    Line("kerple"),
    Line("kerple:scale=before"),
    Line("kerple:kind=power"),
    Line("sandwich"),
    Line("t5", "t5:buckets=1"),
    Line("xpos", "xpos:scale_base=1e30", "rope", encoder=False),
    Line("rope + logn", relative=False, encoder=False),
    Line("kerple + logn", relative=False, encoder=False),
    Line("xl", encoder=False),
    Line("xl:clamp=8", encoder=False),
    Line("tupe", relative=False, endless=False),
    Line("tupe:relative=true", relative=False, endless=False),
)
"""Schemes with settings, and what is special about some. Any other is taken to be relative, endless, and for encoders too."""


def _own_lines() -> tuple[Line, ...]:
    """A line for each scheme of the package that is not listed."""
    listed = {part.strip().partition(":")[0] for line in LISTED for part in line.spec.split("+")}
    return tuple(
        Line(name)
        for name, cls in catalogue().items()
        if issubclass(cls, Scheme) and name not in listed and cls.__module__.startswith("longspan.")
    )


LINES = LISTED + _own_lines()


def build(position: str, cls: type[PreTrainedModel] = LongspanForCausalLM, **settings: object) -> PreTrainedModel:
    """A tiny model with weights large enough for attention to matter; the same for every scheme, but for the scheme's own."""
    torch.manual_seed(1)
    model = cls(LongspanConfig(position=position, **{**SIZES, **settings})).eval()
    torch.manual_seed(2)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "place" not in name:
                weight.normal_(0, 1.5 * weight.shape[1] ** -0.5)
        for name, weight in model.named_parameters():
            if "place" in name and weight.ndim == 2:
                weight.normal_(0, 0.5)
    return model


def tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randint(2, SIZES["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(3))
