"""Longformer: a window around every token, in some heads with gaps, and in an encoder tokens that see all and are seen by all.

A token sees `window` others, half of them before it and half after; in a decoder all of them before it (section 3.1).
Through the layers it reads window · layers tokens, and `dilation` times as many in the heads that look only at every
`dilation`-th. A global token is seen by all tokens as any other key is, in the same softmax and once, though it may be in the
window too. Its own row is attention to all tokens with projections of its own, which begin as copies of the others
(sections 3.1 and 3.2). Windows and dilations that differ by layer are a list in `attention=`; the paper's grow with the
layer, and only two heads of the upper layers are dilated.

A decoder that looks at such an encoder is the paper's LED: kind=encoder-decoder with decoder_attention=full.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from longspan.attention.longformer.layer import LongformerAttention
from longspan.engine import backends
from longspan.engine.blocks.tables import Blocks, band
from longspan.engine.call import AttentionCall, AttentionShape
from longspan.engine.patterns import masked_attention, some_heads
from longspan.engine.window.banded import banded_attention
from longspan.lm.base import Pattern
from longspan.lm.configuration import LongspanConfig
from longspan.lm.layers import LongspanAttention
from longspan.positions.scheme import PositionEncoding
from longspan.util.errors import NotSupported


@dataclass(frozen=True)
class Longformer(Pattern):
    """window: tokens that one sees besides itself, even in an encoder. dilated: in how many heads, the last ones, they are
    `dilation` apart. globals: how many tokens at the beginning of a text are global, besides those that a call names with
    `global_attention_mask` (B, T); in an encoder only, as in the paper."""

    window: int = 512
    dilated: int = 0
    dilation: int = 1
    globals: int = 0

    name: ClassVar[str] = "longformer"
    title: ClassVar[str] = "Longformer: window, dilated heads, global tokens"
    also: ClassVar[tuple[str, ...]] = ("led", "longformer-encoder-decoder")
    works_on: ClassVar[str] = "from scratch, trained encoders (longspan apply)"
    converts_encoders: ClassVar[bool] = True
    paper: ClassVar[str] = "Beltagy 2020, arXiv 2004.05150"
    cost: ClassVar[str] = "time n, cache constant"
    takes_globals: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.require(self.window >= 1, f"window must be at least 1 token, not {self.window}")
        self.require(self.globals >= 0, f"globals must be 0 or more tokens, not {self.globals}")
        self.require(self.dilated >= 0, f"dilated must be 0 or more heads, not {self.dilated}")
        self.require(self.dilation >= 1, f"dilation must be 1 or more, not {self.dilation}")
        self.require(
            (self.dilated == 0) == (self.dilation == 1),
            f"dilated={self.dilated} heads with dilation={self.dilation} say different things; give both, such as "
            "dilated=2,dilation=2, or neither",
        )

    def build(self, config: LongspanConfig, layer: int, place: PositionEncoding, *, causal: bool) -> nn.Module:
        heads = config.num_attention_heads
        self.require(self.dilated <= heads, f"{self.dilated} heads are to be dilated, and there are {heads}")
        if causal and self.globals:
            raise NotSupported(
                f"attention={self.spec}: what a global token sees lies ahead of those that see it, so a decoder has none; leave "
                "globals out, or use kind=encoder, or kind=encoder-decoder with decoder_attention=full"
            )
        if not causal and self.window % 2:
            raise NotSupported(
                f"attention={self.spec}: an encoder sees half of the window on either side; use window={self.window + 1}"
            )
        return super().build(config, layer, place, causal=causal)

    def module_class(self) -> type[LongspanAttention]:
        return LongformerAttention

    def mask(self, queries: Tensor, keys: Tensor, grid: AttentionShape) -> Tensor:
        apart = torch.ones(grid.heads, 1, 1, dtype=torch.long, device=queries.device)
        apart[grid.heads - self.dilated :] = self.dilation
        distance = queries[:, None, :, None] - keys[:, None, None, :]
        before, after = self._sides(grid)
        return (distance % apart == 0) & (distance <= before * apart) & (distance >= -after * apart)

    def ranges(self, start: int, end: int, grid: AttentionShape) -> list[tuple[int, int]]:
        before, after = (side * self.dilation for side in self._sides(grid))
        return [(max(0, start - before), min(grid.length, end + after))]

    def blocks(self, grid: AttentionShape, size: int, device: torch.device) -> Blocks | None:
        if self.dilated:
            return None
        lengths, window = (grid.length, grid.length), min(self._sides(grid)[0] + 1, grid.length)
        return band(lengths, window=window, causal=grid.causal, size=size, device=device)

    def sinks_and_window(self) -> tuple[int, int] | None:
        return None if self.dilated else (0, self.window + 1)

    def cached(self) -> tuple[int, int]:
        return 0, self.window * self.dilation + 1

    def run(self, call: AttentionCall, grid: AttentionShape) -> Tensor:
        if call.query_scores is not None:
            return masked_attention(self, call, grid)
        if not self.dilated and call.always_visible is None and backends.choose(self, call, grid).backend != "masks":
            return backends.run(self, call, grid)
        before, after = self._sides(grid)
        plain = grid.heads - self.dilated
        if plain == grid.heads:
            return banded_attention(call, before, after)
        dilated = banded_attention(some_heads(call, plain, grid.heads), before, after, self.dilation)
        if not plain:
            return dilated
        return torch.cat((banded_attention(some_heads(call, 0, plain), before, after), dilated), dim=1)

    def _sides(self, grid: AttentionShape) -> tuple[int, int]:
        """How many tokens are seen before and after a token's own."""
        return (self.window, 0) if grid.causal else (self.window // 2, self.window // 2)
