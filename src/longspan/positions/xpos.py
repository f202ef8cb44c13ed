"""xPos: RoPE whose channel pairs decay with the distance, fast pairs more than slow ones (Sun 2023).

Pair i of the query at position n is scaled by zeta_i^(n/512), that of the key by the inverse, with zeta_i = (2i/d + 0.4) / 1.4.
So a score has the factor zeta^(distance/512), at most 1 for keys before the query. Scales at large positions exceed the range
of any float. Since only distances matter, positions are counted from the middle of a block of queries: within a block scales are
bounded, and keys far before it are scaled towards 0, as their scores are. With the default settings a block is 26,157 tokens,
and 2,043 in float16. The KV cache holds keys unrotated.

The constants 0.4 and 512 (`scale_base`) are from the authors' code. At test time the authors add blockwise causal attention, here
the method `bca`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import rotate_half

from longspan.positions.scheme import PositionEncoding, Scheme, Shape

_EXPONENTS = {torch.float16: 2.5}
"""Bounds on |log(scale)| within a block, 32 for dtypes with float32's range. Products of masked pairs reach e to the double of
it, which must be finite."""


class XPosEncoding(PositionEncoding):
    """xPos in one model, without parameters; width: channels of a head."""

    def __init__(self, width: int, theta: float, scale_base: float, gamma: float):
        super().__init__()
        self.width, self.theta, self.scale_base, self.gamma = width, theta, scale_base, gamma

    def query_blocks(self, positions: Tensor, dtype: torch.dtype) -> list[tuple[int, int]]:
        """The text, halved until no position of a block is further than `_half_block` from its middle."""
        length, most = positions.shape[1], 2 * self._half_block(dtype)
        if length == 1 or positions.is_meta or _spread(positions) <= most:
            return [(0, length)]
        positions, blocks, pending = positions.cpu(), [], [(0, length)]
        while pending:
            start, end = pending.pop()
            if end - start == 1 or _spread(positions[:, start:end]) <= most:
                blocks.append((start, end))
            else:
                middle = (start + end) // 2
                pending += [(middle, end), (start, middle)]
        return blocks

    def _half_block(self, dtype: torch.dtype) -> int:
        """Tokens from the middle of a block to its end, where the fastest pair's scale reaches its bound."""
        return int(min(2.0**30, _EXPONENTS.get(dtype, 32.0) * self.scale_base / math.log1p(1 / self.gamma)))

    def rotate_qk(self, query: Tensor, key: Tensor, q_positions: Tensor, k_positions: Tensor) -> tuple[Tensor, Tensor]:
        middle = (q_positions.amin(-1, keepdim=True) + q_positions.amax(-1, keepdim=True)) // 2
        return self._rotated(query, q_positions - middle, 1.0), self._rotated(key, k_positions - middle, -1.0)

    def _rotated(self, x: Tensor, positions: Tensor, sign: float) -> Tensor:
        i = torch.arange(0, self.width, 2, device=x.device, dtype=torch.float32) / self.width
        at = positions.float()[:, None, :, None]
        angle = at * self.theta**-i
        # Keys past the block's end belong to other texts of a packed row: no query sees them, but they must be finite.
        bounded = at if sign > 0 else at.clamp(max=self._half_block(x.dtype))
        scale = ((i + self.gamma) / (1 + self.gamma)) ** (sign * bounded / self.scale_base)
        angle, scale = (torch.cat((t, t), dim=-1) for t in (angle, scale))
        wide = x.float()
        return ((wide * angle.cos() + rotate_half(wide) * angle.sin()) * scale).to(x.dtype)


def _spread(positions: Tensor) -> int:
    """The largest difference of two positions of a row."""
    return int((positions.amax(-1) - positions.amin(-1)).max())


@dataclass(frozen=True)
class XPos(Scheme):
    """RoPE with decay.

    `scale_base`: the distance in tokens over which a pair decays by its zeta; with an infinite one xPos is RoPE.
    """

    theta: float = 10_000.0
    scale_base: float = 512.0
    gamma: float = 0.4

    name = "xpos"
    title = "xPos: extrapolatable rotary positions"
    paper = "Sun 2023, arXiv 2212.10554"
    read_with = "bca"

    def __post_init__(self) -> None:
        self.require(self.theta > 1, f"theta must be above 1, not {self.theta}")
        self.require(self.scale_base > 0, f"scale_base must be above 0, not {self.scale_base}")
        self.require(self.gamma > 0, f"gamma must be above 0, not {self.gamma}")

    def build(self, shape: Shape) -> PositionEncoding:
        self.require(
            shape.causal, "scores of keys after the query would grow without bound; use rope or t5 in an encoder"
        )
        self.require(shape.head_dim % 2 == 0, f"the head size must be even, not {shape.head_dim}")
        return XPosEncoding(shape.head_dim, self.theta, self.scale_base, self.gamma)
