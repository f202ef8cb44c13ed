"""One line for each pattern and mixer: the spec, the scheme it is tried with, and where it is full attention."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from schemes import SIZES
from torch import nn
from transformers import PreTrainedModel

from longspan.lm import LongspanConfig, LongspanForCausalLM


@dataclass(frozen=True)
class Line:
    """`position` is a scheme that it works with. `full`: settings under which it equals full attention, None where there
    are none; `causal` and `bidirectional`: what it is defined for; `exact`: whether it computes the same however a text is cut
    and padded; `settings`: of the model around it."""

    spec: str
    position: str = "rope"
    full: str | None = None
    causal: bool = True
    bidirectional: bool = True
    exact: bool = True
    settings: dict[str, Any] = field(default_factory=dict)


LINES = (
    Line("window:size=9", full="window:size=64"),
    Line("window:size=9", position="alibi", full="window:size=64"),
    Line("longformer:window=8", full="longformer:window=128"),
    Line("longformer:window=6,dilated=2,dilation=3", full="longformer:window=128"),
    Line("longformer:window=6,dilated=4,dilation=2", position="kerple"),
    Line("bigbird:block=3,random=1", causal=False),
    Line("bigbird:block=4,random=2,among=12,seed=5", position="alibi", causal=False),
    Line("bigbird:block=4,globals=3,random=1", position="kerple", causal=False),
)
"""A new pattern or mixer is one more line."""


def build(line: Line, spec: str | None = None, cls: type[PreTrainedModel] = LongspanForCausalLM, **more: Any) -> Any:
    """A tiny model with projections large enough for attention to matter; the same for every line, but for its own parts."""
    settings = {**SIZES, "position": line.position, "attention": spec or line.spec, **line.settings, **more}
    torch.manual_seed(1)
    model = cls(LongspanConfig(**settings)).eval()
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                draw = torch.Generator().manual_seed(sum(name.encode()))
                width = module.weight.shape[1]
                module.weight.copy_(torch.randn(module.weight.shape, generator=draw) * 1.5 * width**-0.5)
    return model
