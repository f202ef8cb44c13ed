"""xPos: RoPE whose pairs also fade with distance, the fast ones more, so that attention keeps its resolution far away.

Pair i of the query is scaled by zeta_i^(n/512), that of the key by its inverse, zeta_i = (2i/d + 0.4) / 1.4; a score then
carries zeta^(distance/512), which is at most 1 as long as queries look back. Scales of far places leave the range of any
float. Only distances matter, so positions are counted from the middle of the queries, a block of queries at a time: within a
block scales are bounded, and a key that lies far behind it is scaled towards zero, as its scores are. With the default
settings a block is 26,157 tokens, and 2,043 in float16. Keys are cached unturned.
The constants 0.4 and 512 (`scale_base`) stand in the authors' code alone. At test time the authors add blockwise causal
attention, which is a method of its own here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import rotate_half

from longspan.positions.scheme import PositionEncoding, Scheme, Shape

_EXPONENTS = {torch.float16: 2.5}
"""How far the logarithms of a block's scales go to both sides of zero, 32 for dtypes with float32's range. Products of masked
pairs reach the square of e to this, which must still be a number."""


class XPosEncoding(PositionEncoding):
    def __init__(self, width: int, theta: float, scale_base: float, gamma: float):
        super().__init__()
        self.width, self.theta, self.scale_base, self.gamma = width, theta, scale_base, gamma

    def query_blocks(self, positions: Tensor, dtype: torch.dtype) -> list[tuple[int, int]]:
        """Halves of the text, and halves of these, until no position is further than `_half_block` from its block's middle."""
        length, most = positions.shape[1], 2 * self._half_block(dtype)
        if length == 1 or positions.is_meta or _spread(positions) <= most:
            return [(0, length)]
        positions, done, waiting = positions.cpu(), [], [(0, length)]
        while waiting:
            start, end = waiting.pop()
            if end - start == 1 or _spread(positions[:, start:end]) <= most:
                done.append((start, end))
            else:
                middle = (start + end) // 2
                waiting += [(middle, end), (start, middle)]
        return done

    def _half_block(self, dtype: torch.dtype) -> int:
        """Tokens from a block's middle to its end, over which the fastest pair's scale grows to its bound."""
        return int(min(2.0**30, _EXPONENTS.get(dtype, 32.0) * self.scale_base / math.log1p(1 / self.gamma)))

    def rotate_qk(self, query: Tensor, key: Tensor, q_positions: Tensor, k_positions: Tensor) -> tuple[Tensor, Tensor]:
        middle = (q_positions.amin(-1, keepdim=True) + q_positions.amax(-1, keepdim=True)) // 2
        return self._turned(query, q_positions - middle, 1.0), self._turned(key, k_positions - middle, -1.0)

    def _turned(self, x: Tensor, positions: Tensor, sign: float) -> Tensor:
        i = torch.arange(0, self.width, 2, device=x.device, dtype=torch.float32) / self.width
        place = positions.float()[:, None, :, None]
        angle = place * self.theta**-i
        # Keys past the block's end belong to other texts of a packed row: no query sees them, but they must be numbers.
        past = place if sign > 0 else place.clamp(max=self._half_block(x.dtype))
        scale = ((i + self.gamma) / (1 + self.gamma)) ** (sign * past / self.scale_base)
        angle, scale = (torch.cat((t, t), dim=-1) for t in (angle, scale))
        wide = x.float()
        return ((wide * angle.cos() + rotate_half(wide) * angle.sin()) * scale).to(x.dtype)


def _spread(positions: Tensor) -> int:
    """How far apart the positions of a row are at most."""
    return int((positions.amax(-1) - positions.amin(-1)).max())


@dataclass(frozen=True)
class XPos(Scheme):
    """`scale_base` is the distance over which a pair fades by its zeta, in tokens; endless, xPos is RoPE."""

    theta: float = 10_000.0
    scale_base: float = 512.0
    gamma: float = 0.4

    name = "xpos"
    title = "xPos: extrapolatable rotary positions"
    paper = "Sun 2023, arXiv 2212.10554"

    def __post_init__(self) -> None:
        self.require(self.theta > 1, f"theta must be above 1, not {self.theta}")
        self.require(self.scale_base > 0, f"scale_base must be above 0, not {self.scale_base}")
        self.require(self.gamma > 0, f"gamma must be above 0, not {self.gamma}")

    def build(self, shape: Shape) -> PositionEncoding:
        self.require(shape.causal, "keys after the query would grow without bound; an encoder can have rope or t5")
        self.require(shape.head_dim % 2 == 0, f"the head size must be even, not {shape.head_dim}")
        return XPosEncoding(shape.head_dim, self.theta, self.scale_base, self.gamma)
