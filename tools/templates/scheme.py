"""Every score falls with the square root of the distance, at a learned rate for each head."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from longspan.positions.scheme import PositionEncoding, Scheme, Shape


class TemplateEncoding(PositionEncoding):
    """The scheme's parameters, shared by all layers: `rates` (H,)."""

    def __init__(self, heads: int):
        super().__init__()
        self.rates = nn.Parameter(torch.empty(heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.rates, 0, 1)

    def bias(self, distance: Tensor) -> Tensor:
        return -self.rates.float().view(-1, *(1,) * distance.ndim) * distance.abs().sqrt()


@dataclass(frozen=True)
class Template(Scheme):
    """It has no settings."""

    name: ClassVar[str] = "template"
    title: ClassVar[str] = "Decay with the root of the distance"
    paper: ClassVar[str] = "Author year, arXiv number"

    def build(self, shape: Shape) -> PositionEncoding:
        return TemplateEncoding(shape.heads)
