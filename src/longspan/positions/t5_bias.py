"""T5's relative bias: a trained number per head and bucket of distances, shared by all layers (Raffel 2020, §2.1).

Half of the buckets are single distances; the others grow logarithmically up to `far`, and larger distances share the last. In a
decoder all buckets are for keys before the query; in an encoder each direction has half of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longspan.engine.biased.bias import Bias
from longspan.positions.scheme import PositionEncoding, Scheme, Shape


def buckets(distance: Tensor, count: int, far: int, *, causal: bool) -> Tensor:
    """The bucket, 0 … count - 1, of each distance = query's position - key's, as T5 numbers them; any shape."""
    start = torch.zeros_like(distance)
    if not causal:
        count //= 2
        start = torch.where(distance < 0, count, 0)  # keys after the query have the second half
        distance = distance.abs()
    distance = distance.clamp(min=0)
    exact = count // 2
    if exact == 0:
        return start
    # float32 throughout, as in the trained T5 models: at the edges another precision gives another bucket.
    logarithmic = torch.log(distance.clamp(min=1).float() / exact) / math.log(far / exact) * (count - exact)
    return start + torch.where(distance < exact, distance, (exact + logarithmic.long()).clamp(max=count - 1))


class T5Encoding(PositionEncoding):
    """T5's table (count, H) of `count` buckets."""

    def __init__(self, heads: int, count: int, far: int, causal: bool):
        super().__init__()
        self.count, self.far, self.causal = count, far, causal
        self.table = nn.Parameter(torch.empty(count, heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.table, std=0.02)

    def distance_bias(self, past: int, ahead: int, device: torch.device) -> Bias:
        # Beyond `far` the last bucket continues.
        return super().distance_bias(min(past, self.far), min(ahead, self.far), device)

    def bias(self, distance: Tensor) -> Tensor:
        found = buckets(distance, self.count, self.far, causal=self.causal)
        # Not an index, whose gradient adds up one by one on a GPU.
        return F.embedding(found, self.table.float()).movedim(-1, 0)


@dataclass(frozen=True)
class T5Bias(Scheme):
    """A trained bias by distance in `buckets` buckets; distances of `far` tokens and more share the last."""

    buckets: int = 32
    far: int = 128

    name = "t5"
    title = "T5's relative position bias"
    also = ("t5-relative-bias", "relative-position-bias")
    paper = "Raffel 2020, arXiv 1910.10683"

    def __post_init__(self) -> None:
        self.require(self.buckets == 1 or self.buckets >= 4, f"buckets must be 1, or 4 and more, not {self.buckets}")
        self.require(
            self.far > self.buckets // 2, f"far must be above {self.buckets // 2}, half the buckets, not {self.far}"
        )

    def build(self, shape: Shape) -> PositionEncoding:
        self.require(
            shape.causal or self.buckets % 4 == 0, f"an encoder needs buckets divisible by 4, not {self.buckets}"
        )
        return T5Encoding(shape.heads, self.buckets, self.far, shape.causal)
