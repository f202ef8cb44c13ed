"""Local attention in disjoint blocks, or in blocks with half a block around them (Xiong 2021).

With blocks of b tokens, token i is in the block that begins at s = floor(i / b)·b. Under `local` it sees keys s … s + b - 1,
under `overlap` keys s - b/2 … s + 3b/2 - 1, which depend on the block and not on the token (the authors' modules `block` and
`blockwise`). The first `globals` tokens see all tokens and all see them, through the same projections, in one softmax over local
and global keys. The authors make more tokens global, by task; token 0 always is, as it is here by default.

The paper has encoders. As an extension, a decoder's token sees those of these keys that are not after it: `local` is then
attention in chunks, and `overlap` adds the half block before.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from longspan.attention.trained import OnTrained
from longspan.core.facts import ModelFacts
from longspan.engine.call import AttentionCall, AttentionShape
from longspan.engine.joint import Chunk, Lane, Part, by_row, joint_attention
from longspan.engine.patterns import masked_attention
from longspan.lm.base import Pattern

TOKENS_AT_ONCE = 2**17
"""Queries whose sums are in memory in float32 at once."""


@dataclass(frozen=True)
class Blockwise(Pattern):
    """Base of both patterns; `block` and `globals` in tokens."""

    block: int
    globals: int

    paper = "Xiong 2021, arXiv 2112.07210"
    runs_zero_key = True

    @property
    def halo(self) -> int:
        """The number of visible tokens on each side of the block."""
        return 0

    def _check(self, most: int) -> None:
        self.require(self.block >= 1, f"block must be at least 1 token, not {self.block}")
        self.require(0 <= self.globals <= most, f"globals must be from 0 to {most} tokens, not {self.globals}")

    def mask(self, queries: Tensor, keys: Tensor, shape: AttentionShape) -> Tensor:
        start = queries[:, None, :, None].div(self.block, rounding_mode="floor") * self.block
        queries, keys = queries[:, None, :, None], keys[:, None, None, :]
        near = (keys >= start - self.halo) & (keys < start + self.block + self.halo)
        return near | (keys < self.globals) | (queries < self.globals)

    def ranges(self, start: int, end: int, shape: AttentionShape) -> list[tuple[int, int]]:
        if start < self.globals and not shape.causal:
            return [(0, shape.length)]
        low = max(self.globals, start // self.block * self.block - self.halo)
        high = min(shape.length, -(-end // self.block) * self.block + self.halo)
        return [(0, self.globals), (low, high)]

    def run(self, call: AttentionCall, shape: AttentionShape) -> Tensor:
        """Attention (B, H, T, D) by dense calls over blocks, half blocks and global tokens, joined in one softmax.

        With a bias on scores or dropout it runs in blocks of queries under a mask.
        """
        if not call.plain:
            return masked_attention(self, call, shape)

        def rows(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            chunks = self.chunks(query.shape[2], shape.causal)
            return joint_attention(query, key, value, chunks, call.scale, zero_key=call.zero_key)

        return by_row(rows, call.query, call.key, call.value, None if shape.causal else call.padding)

    def chunks(self, length: int, causal: bool) -> list[Chunk]:
        """Where the pieces lie in a text of `length` tokens."""
        step = max(1, TOKENS_AT_ONCE // self.block) * self.block
        bounds = [(start, min(start + step, length)) for start in range(0, length, step)]
        return [Chunk(start, end, self._parts(start, end, length, causal)) for start, end in bounds]

    def _parts(self, start: int, end: int, length: int, causal: bool) -> list[Part]:
        parts = []
        if start == 0 and self.globals and not causal:  # the rows of global tokens, and the rest of their block
            first = min(self.globals, length)
            parts.append(_one(0, first, 0, length))
            start = min(self.block, end)
            if first < start:
                parts.append(_one(first, start, 0, min(self.block + self.halo, length)))
        parts += [Part(n, at, at, causal) for n, at in self._blocks(start, end)]
        later = max(start, self.block)  # global tokens lie in the first block's own keys
        if self.globals and later < end:
            parts.append(_one(later, end, 0, self.globals))
        if self.halo:
            parts += [
                Part(n, at, Lane(at.start - self.halo, self.halo, self.block)) for n, at in self._blocks(later, end)
            ]
        return parts if causal or not self.halo else parts + self._after(start, end, length)

    def _blocks(self, start: int, end: int) -> list[tuple[int, Lane]]:
        """The whole blocks of the tokens `start` … `end` - 1, and the incomplete one."""
        whole = max(0, end - start) // self.block
        rest = start + whole * self.block
        found = [(whole, Lane(start, self.block, self.block))] if whole else []
        return found + ([(1, Lane(rest, end - rest))] if rest < end else [])

    def _after(self, start: int, end: int, length: int) -> list[Part]:
        """The half blocks after blocks, the last of which may be cut by the end of the text."""
        whole = min(end - start, length - self.halo - start) // self.block
        rest = start + max(0, whole) * self.block
        parts = []
        if whole > 0:
            keys = Lane(start + self.block, self.halo, self.block)
            parts.append(Part(whole, Lane(start, self.block, self.block), keys))
        if rest + self.block <= end and rest + self.block < length:
            parts.append(_one(rest, rest + self.block, rest + self.block, min(length, rest + self.block + self.halo)))
        return parts


def _one(start: int, end: int, first: int, last: int) -> Part:
    """Queries `start` … `end` - 1 see keys `first` … `last` - 1."""
    return Part(1, Lane(start, end - start), Lane(first, last - first))


@dataclass(frozen=True)
class Local(Blockwise, OnTrained):
    """Attention within blocks of `block` tokens; the first `globals` tokens are global (the authors' form without has
    block=256)."""

    block: int = 512
    globals: int = 1

    name = "local"
    title = "Attention in disjoint blocks (a trained model loses what lies before them)"
    also = ("local-attention", "disjoint-blocks")
    cost = "time n, cache n (all keys are kept)"

    def __post_init__(self) -> None:
        self._check(self.block)

    def reach(self, facts: ModelFacts) -> int | None:
        """No limit where blocks are within the window and there are no global tokens, whose distance grows with the text."""
        return None if self.globals == 0 and self.block <= facts.window else facts.window

    def neutral_length(self) -> int:
        return self.block

    def keys_seen(self, facts: ModelFacts, length: int) -> int:
        return min(length, self.block + self.globals)


@dataclass(frozen=True)
class Overlap(Blockwise):
    """Attention within blocks of `block` tokens, even, and half a block around; the first `globals` tokens are global."""

    block: int = 128
    globals: int = 1

    name = "overlap"
    title = "Attention in overlapping blocks"
    also = ("overlapping-blocks",)
    cost = "time n, cache n"

    def __post_init__(self) -> None:
        self.require(self.block >= 2 and self.block % 2 == 0, f"block must be an even number, not {self.block}")
        self._check(self.block // 2)

    @property
    def halo(self) -> int:
        return self.block // 2
