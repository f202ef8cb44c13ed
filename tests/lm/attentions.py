"""One line for each pattern and mixer: the spec, the scheme it is tried with, and where it is full attention."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from schemes import SIZES
from torch import nn
from transformers import PreTrainedModel

from longspan.core.method import catalogue
from longspan.lm import LongspanConfig, LongspanForCausalLM
from longspan.lm.base import Attention


@dataclass(frozen=True)
class Line:
    """`position` is a scheme that it works with. `full`: settings under which it equals full attention, None where there
    are none; `seam`: the word of the configuration that takes it;
    `causal` and `bidirectional`: what it is defined for; `exact`: whether it computes the same however a text is cut
    and padded; `sealed`: whether no later token has a part in what an earlier one sees; `settings`: of the model around it;
    `leak`: what rounding may carry back from later tokens, as the Fourier transforms of a convolution do; `own`: by how much
    parameters that are no linear layer's are made larger, so that they matter; `grows`: whether what a mixer keeps grows
    with the text."""

    spec: str
    position: str = "rope"
    full: str | None = None
    causal: bool = True
    bidirectional: bool = True
    exact: bool = True
    sealed: bool = True
    grows: bool = False
    seam: str = "attention"
    settings: dict[str, Any] = field(default_factory=dict)
    leak: float = 0.0
    own: float = 1.0


LISTED = (
    Line("window:size=9", full="window:size=64"),
    Line("window:size=9", position="alibi", full="window:size=64"),
    Line("longformer:window=8", full="longformer:window=128"),
    Line("longformer:window=6,dilated=2,dilation=3", full="longformer:window=128"),
    Line("longformer:window=6,dilated=4,dilation=2", position="kerple"),
    Line("longformer:window=6,dilated=2,dilation=2", position="xl", bidirectional=False),
    Line("bigbird:block=3,random=1", causal=False),
    Line("bigbird:block=4,random=2,among=12,seed=5", position="alibi", causal=False),
    Line("bigbird:block=4,globals=3,random=1", position="kerple", causal=False),
    Line("window:size=7,sinks=3", full="window:size=64,sinks=3"),
    Line("window:size=7,sinks=3", position="kerple", full="window:size=64,sinks=3"),
    Line("local:block=8", full="local:block=64"),
    Line("local:block=12,globals=0"),
    Line("local:block=7,globals=3", position="alibi", full="local:block=64"),
    Line("overlap:block=8", full="overlap:block=64"),
    Line("overlap:block=6,globals=0", position="t5"),
    Line("overlap:block=6", position="xl", bidirectional=False),
    Line("longnet:segments=8/16/24,dilations=1/2/3", full="longnet:segments=64,dilations=1"),
    Line("longnet:segments=9/20,dilations=1/5", position="alibi", full="longnet:segments=64,dilations=1"),
    Line("lsh:chunk=4,buckets=4", grows=True),
    Line("lsh:chunk=8,buckets=4", position="sinusoidal", grows=True),
    Line("lsh:chunk=8,buckets=4,form=paper", position="sinusoidal", exact=False, sealed=False, grows=True),
    Line(
        "lsh:chunk=64,buckets=4,form=paper", position="sinusoidal", sealed=False, grows=True
    ),  # no bucket outgrows a chunk
    Line("transformer-xl:segment=7,length=9", "xl", "transformer-xl:segment=64", bidirectional=False, seam="memory"),
    Line("transformer-xl:segment=7,length=9,same_length=true", "rope", bidirectional=False, seam="memory"),
    Line("s4:states=16", "nope", leak=1e-5),
    Line("s4:states=8,systems=4,length=20", "sinusoidal", leak=1e-5),
    Line("s4d:states=16", "nope", leak=1e-5),
    Line("s4d:states=8,init=inv,rule=bilinear,mlp=true", "sinusoidal", leak=1e-5),
    Line("gau:size=16", own=100, grows=True),
    Line("gau:size=8,scale=su,expansion=1.5", "sinusoidal", own=20, grows=True),
    Line("flash:size=16,chunk=8", own=100),
    Line(
        "flash:size=8,chunk=8,scale=su,linear=count",
        "learned",
        own=20,
        bidirectional=False,
        settings={"max_position_embeddings": 128},
    ),
    Line("linear"),
    Line("linear", position="sinusoidal"),
    Line("performer:features=32"),
    Line("performer:features=24,kernel=relu,norms=sqrt,redraw=3", position="sinusoidal"),
    Line("linformer:k=16", position="sinusoidal", causal=False),
    Line("linformer:k=16,share=layerwise", position="learned", causal=False),
)
"""Patterns and mixers with settings of several kinds. Any other is tried with its own `examples`."""


def _own_lines() -> tuple[Line, ...]:
    """A line for each pattern or mixer of the package that is not listed; its second example equals full attention."""
    listed = {line.spec.partition(":")[0] for line in LISTED}
    return tuple(
        Line(
            cls.examples[0],
            full=cls.examples[1],
            causal="causal" in cls.directions,
            bidirectional="bidirectional" in cls.directions,
        )
        for name, cls in catalogue().items()
        if issubclass(cls, Attention)
        and name not in {*listed, "full"}
        and cls.__module__.startswith("longspan.")
        and cls.examples
    )


LINES = LISTED + _own_lines()


def build(line: Line, spec: str | None = None, cls: type[PreTrainedModel] = LongspanForCausalLM, **more: Any) -> Any:
    """A tiny model with projections large enough for attention to matter; the same for every line, but for its own parts."""
    settings = {**SIZES, "position": line.position, line.seam: spec or line.spec, **line.settings, **more}
    if spec == "full":
        settings.pop("memory", None)
    torch.manual_seed(1)
    model = cls(LongspanConfig(**settings)).eval()
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                draw = torch.Generator().manual_seed(sum(name.encode()))
                width = module.weight.shape[1]
                module.weight.copy_(torch.randn(module.weight.shape, generator=draw) * 1.5 * width**-0.5)
        for layer in (m for m in model.modules() if hasattr(m, "self_attn")):
            for weight in layer.self_attn.parameters(recurse=False):
                weight.mul_(line.own)
    return model
