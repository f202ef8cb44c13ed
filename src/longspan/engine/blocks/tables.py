"""Tables of the blocks that see one another, computed without a mask of pairs.

A pattern says for each block of queries which blocks of keys to visit (`Blocks`); FlexAttention runs it. The tables are as
wide as the longest row, so they cost as many numbers as there are blocks to visit, and a text of millions of tokens has a
mask of megabytes. The transposed table, from keys to queries, is what a backward needs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(batch, head, query, key) → whether they meet, for whole numbers as tensors without dimensions."""
SIZE = 128
"""Tokens of a block: what FlexAttention's kernels are tuned for."""
MOST_ROWS = 2**13
"""Blocks of queries past which blocks grow, where all of them may see one block of keys: a transposed table is square
then, of 2 · 268 MB at this size."""


@dataclass(frozen=True, eq=False)
class Blocks:
    """index (H or 1, rows, width): for each block of `size` queries the numbers of the blocks of keys that it sees, each once,
    in any order; -1 for none. full: the same shape, where every query of the block sees every key. `rule` decides the rest;
    numbers of its own belong into tensors on the device, or every new one compiles anew. lengths: queries and keys. even: tables
    are as wide as a power of two."""

    index: Tensor
    full: Tensor
    rule: Rule
    lengths: tuple[int, int]
    size: int = SIZE
    even: bool = False
    made: dict[bool, BlockMask] = field(default_factory=dict, repr=False)
    longer: dict[int, Blocks] = field(default_factory=dict, repr=False)

    def causal(self) -> Blocks:
        """The same without keys after their query."""
        row = torch.arange(self.index.shape[1], device=self.index.device)[:, None]
        rule = self.rule
        return replace(
            self,
            index=self.index.where(self.index <= row, -1),
            full=self.full & (self.index < row),
            rule=lambda b, h, q, k: (q >= k) & rule(b, h, q, k),
            made={},
            longer={},
        )

    def within(self, ends: Tensor) -> Blocks:
        """The same where row b of the batch has no keys from number ends[b] on; ends (B,)."""
        rule = self.rule
        return replace(
            self,
            full=self.full & ((self.index + 1) * self.size <= ends.min()),
            rule=lambda b, h, q, k: (k < ends[b]) & rule(b, h, q, k),
            made={},
            longer={},
        )

    def padded(self, length: int) -> Blocks:
        """The same for a text that is filled up to `length` tokens: what is filled in is visited by no block of its own and seen
        by none. Tables are even, so those of texts of about one length have one shape. Kept for the next call."""
        if length not in self.longer:
            rows, width = self.index.shape[1:]
            missing = 0, power_of_two(width) - width, 0, -(-length // self.size) - rows
            end, rule = torch.tensor(self.lengths[1], device=self.index.device), self.rule
            self.longer[length] = replace(
                self,
                index=F.pad(self.index, missing, value=-1),
                full=F.pad(self.full & ((self.index + 1) * self.size <= self.lengths[1]), missing, value=False),
                rule=lambda b, h, q, k: (k < end) & rule(b, h, q, k),
                lengths=(length, length),
                even=True,
                made={},
                longer={},
            )
        return self.longer[length]

    def mask(self, *, backward: bool = False) -> BlockMask:
        """For FlexAttention, kept for the next call; `backward`: with the table from keys to queries."""
        if backward not in self.made:
            self.made[backward] = self._mask(backward)
        return self.made[backward]

    def _mask(self, backward: bool) -> BlockMask:
        whole = self.full & ((self.index + 1) * self.size <= self.lengths[1]) & (self.index >= 0)
        partial = (self.index >= 0) & ~whole
        tables: list[Any] = [*_compact(self.index, partial), *_compact(self.index, whole)]
        if backward:
            tables += _turned(self.index, [partial, whole], -(-self.lengths[1] // self.size), even=self.even)
        else:
            tables += [None] * 4
        return BlockMask(*(self.lengths, *tables, (self.size, self.size), self.rule))

    def visited(self) -> int:
        """Pairs in the blocks that are visited, of one head on average."""
        return int((self.index >= 0).sum()) * self.size**2 // self.index.shape[0]


def _compact(index: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Counts (1, H, rows) and the chosen block numbers moved to the front (1, H, rows, width), int32. Both index tensors of a
    mask must have one width: kernels silently read unequal ones wrongly."""
    order = (~chosen).int().argsort(dim=-1, stable=True)
    count = chosen.sum(-1)
    moved = index.gather(-1, order)
    moved = torch.where(torch.arange(index.shape[-1], device=index.device) < count[..., None], moved, 0)
    return count.int()[None], moved.int()[None]


def _turned(index: Tensor, choices: list[Tensor], columns: int, *, even: bool = False) -> list[Tensor]:
    """The tables from blocks of keys to blocks of queries: counts and numbers for each of `choices`, of one width."""
    found, counts = [], []
    for chosen in choices:
        head, row, _ = chosen.nonzero(as_tuple=True)
        place = head * columns + index[chosen]
        order = place.argsort(stable=True)
        found.append((place[order], row[order]))
        counts.append(torch.bincount(place, minlength=index.shape[0] * columns))
    width = max(1, int(torch.stack(counts).max()))
    width = power_of_two(width) if even else width
    tables = []
    for (place, row), count in zip(found, counts, strict=True):
        nth = torch.arange(len(place), device=index.device) - (count.cumsum(0) - count)[place]
        table = torch.zeros(len(count), width, dtype=torch.int32, device=index.device)
        table[place, nth] = row.int()
        shape = 1, index.shape[0], columns
        tables += [count.int().view(shape), table.view(*shape, width)]
    return tables


def power_of_two(count: int) -> int:
    """The least that is not below `count`."""
    return 1 << (count - 1).bit_length()


def bucket(length: int) -> int:
    """What texts of about `length` tokens are filled up to, so that one compiled kernel serves them: SIZE times a power of two
    or one and a half times that. No block visits what is filled in, so it costs memory, half as much again at most, and no
    attention."""
    blocks = -(-length // SIZE)
    whole = power_of_two(blocks)
    return SIZE * (whole // 4 * 3 if whole >= 4 and blocks <= whole // 4 * 3 else whole)


def block_size(length: int, *, backward: bool) -> int:
    """SIZE, or more where a transposed table would grow out of proportion."""
    size = SIZE
    while backward and length > size * MOST_ROWS:
        size *= 2
    return size


@functools.lru_cache(maxsize=32)
def band(
    lengths: tuple[int, int],
    *,
    window: int,
    sinks: int = 0,
    causal: bool = True,
    offset: int = 0,
    size: int = SIZE,
    device: torch.device,
) -> Blocks:
    """Query q, which stands at q + offset among the keys, sees the keys less than `window` from it, and the first `sinks`; if
    `causal`, none after itself. The same object for the same question."""
    queries, keys = lengths
    first = torch.arange(-(-queries // size), device=device)[:, None] * size + offset  # where a block's queries begin
    last = first + size - 1
    ahead = 0 if causal else window - 1
    low = (first - window + 1).clamp(min=0) // size
    high = (last + ahead).clamp(max=keys - 1) // size  # before the first key: -1, no block
    index = low + torch.arange(min((window + ahead + 2 * size - 3) // size + 1, -(-keys // size)), device=device)
    index = index.where(index <= high, -1)
    if sinks:
        early = torch.arange(-(-min(sinks, keys) // size), device=device).expand(len(first), -1)
        seen = (early < low) & (early * size <= last) if causal else (early < low) | (early > high)
        index = torch.cat((early.where(seen, -1), index), dim=1)
    start, end = index * size, index * size + size - 1
    full = (last - start < window) & (end - first < window)
    full = (full | (end < sinks)) & (end <= first) if causal else full | (end < sinks)
    numbers = (torch.tensor(x, device=device) for x in (offset, window, sinks))
    rule = _band_rule(*numbers, with_sinks=sinks > 0, causal=causal)
    return Blocks(index[None], full[None], rule, lengths, size)


def _band_rule(offset: Tensor, window: Tensor, sinks: Tensor, *, with_sinks: bool, causal: bool) -> Rule:
    def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        distance = q + offset - k
        near = distance < window
        if with_sinks:
            near = near | (k < sinks)
        if causal:
            return near & (distance >= 0)
        return (near & (distance > -window)) | (k < sinks) if with_sinks else near & (distance > -window)

    return rule
