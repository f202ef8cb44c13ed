"""BigBird: blocks of tokens that see their neighbours, a few blocks drawn at random, and some that all see; encoders only.

ITC, the default (section 2, appendix E): the first and the last block of a text see all and are seen by all; every other
block sees itself, its two neighbours, those two and `random` blocks drawn for each head. ETC: `globals` tokens at the
beginning of a text see all and are seen by all in place of the two blocks, and blocks are counted after them; the paper's
base model has globals=256, random=0, block=84. The tokens are the text's own first ones, such as tokens of no meaning put
before it; that their place among the others is learned apart from the usual distances is left out: what distance means is
the position scheme's.

Which blocks are drawn follows from the settings, the layer and the text's number of blocks alone, so a saved model has them,
in training as in evaluation: with raw 64-bit numbers of numpy's PCG64 seeded with (seed, layer), in the order block, head,
draw, each draw takes the block number (raw modulo n) of the n, in ascending order, that the block does not see yet. The
authors' code draws others for lengths up to 4,096 from the first 1,024 tokens only: `among=1024`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from longspan.engine.blocks.gathered import block_sparse_attention
from longspan.engine.blocks.lists import BlockLists, block_lists, listed_attention, refusal
from longspan.engine.call import AttentionCall, AttentionShape
from longspan.engine.global_tokens import Chosen, attend_everywhere
from longspan.engine.joint import by_row
from longspan.lm.base import Pattern
from longspan.util.errors import NotSupported


@dataclass(frozen=True)
class BigBird(Pattern):
    """block and globals in tokens; among: the first tokens of a text, from whose blocks random ones are drawn, all where it is
    left out. A text of few blocks is seen whole."""

    block: int = 64
    random: int = 3
    globals: int = 0
    seed: int = 0
    among: int | None = None

    name = "bigbird"
    title = "BigBird: window, random and global blocks"
    works_on = "from scratch, trained encoders (longspan apply)"
    converts_encoders = True
    paper = "Zaheer 2020, arXiv 2007.14062"
    cost = "time n, encoders only"
    directions = ("bidirectional",)

    def __post_init__(self) -> None:
        self.require(self.block >= 1, f"block must be at least 1 token, not {self.block}")
        for name in ("random", "globals", "seed"):
            value = getattr(self, name)
            self.require(value >= 0, f"{name} must be 0 or more, not {value}")
        if self.among is not None:
            self.require(
                self.among >= self.block, f"among={self.among} holds no block of {self.block} tokens; take more tokens"
            )
        self.require(
            self.random > 0 or (self.seed == 0 and self.among is None),
            "with random=0 nothing is drawn; leave seed and among out",
        )

    def check_direction(self, causal: bool) -> None:
        if causal:
            raise NotSupported(
                f"attention={self.spec}: blocks that all tokens see lie ahead of most of them, so BigBird is not causal; use it "
                "with kind=encoder, or kind=encoder-decoder with decoder_attention=full"
            )

    def mask(self, queries: Tensor, keys: Tensor, grid: AttentionShape) -> Tensor:
        table, counts = self._tables(grid, queries.device)
        q, k = (torch.div(x - self.globals, self.block, rounding_mode="floor") for x in (queries, keys))
        row = torch.arange(len(table), device=queries.device)[:, None]
        named = table.transpose(1, 2)[row, q.clamp(0, table.shape[2] - 1)].transpose(1, 2)  # (B or 1, H, Tq, slots)
        q, k = q[:, None, :, None], k[:, None, None, :]
        mask = (named[..., None, :] == k[..., None]).any(-1)
        if self.globals:
            return mask | (q < 0) | (k < 0)
        last = counts.view(-1, 1, 1, 1) - 1
        return mask | (q == 0) | (k == 0) | (q == last) | (k == last)

    def visited(self, grid: AttentionShape, device: torch.device) -> float | None:
        """Of the lists that the kernels go by; global tokens have none."""
        if self.globals:
            return None
        lists = _lists(self, -(-grid.length // self.block), grid.heads, grid.layer, device)
        return float(lists.visited())

    def run(self, call: AttentionCall, grid: AttentionShape) -> Tensor:
        """Kernels of our own where they can, a row at a time where rows differ in length; else keys are gathered."""
        refused = refusal(call.query, call.key, call.value, self.block)
        if self.globals or not call.plain or call.zero_key or refused is not None:
            return self._gathered(call, grid)

        def rows(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            count = -(-query.shape[2] // self.block)
            return listed_attention(
                query, key, value, _lists(self, count, grid.heads, grid.layer, query.device), call.scale
            )

        return by_row(rows, call.query, call.key, call.value, call.padding)

    def _gathered(self, call: AttentionCall, grid: AttentionShape) -> Tensor:
        length = call.query.shape[2]
        table, counts = self._tables(grid, call.query.device)
        if length <= self.globals:
            out = torch.zeros_like(call.query)
        else:
            out = block_sparse_attention(call, table, self.block, self.globals)
            out = torch.cat((torch.zeros_like(call.query[:, :, : self.globals]), out), dim=2)
        some = self._everywhere(length, counts.expand(len(out)))
        queries = some.of(call.query.transpose(1, 2)).transpose(1, 2)
        rows = attend_everywhere(
            AttentionCall(queries, call.key, call.value, call.scale, call.padding, call.bias, call.dropout), some.index
        )
        return some.put(out.transpose(1, 2), rows.transpose(1, 2)).transpose(1, 2)

    def _everywhere(self, length: int, counts: Tensor) -> Chosen:
        """The tokens that see all; counts (B): how many blocks each row has."""
        device = counts.device
        if self.globals:
            index = torch.arange(min(self.globals, length), device=device).expand(len(counts), -1)
            return Chosen(index, torch.ones_like(index, dtype=torch.bool))
        inside = torch.arange(self.block, device=device).expand(len(counts), -1)
        last = (counts[:, None] - 1) * self.block + inside
        index = torch.cat((inside, last), dim=1)
        real = torch.cat((inside >= 0, last >= self.block), dim=1) & (index < length)
        return Chosen(index.clamp(0, length - 1), real)

    def _tables(self, grid: AttentionShape, device: torch.device) -> tuple[Tensor, Tensor]:
        """(B or 1, H, blocks, slots) and how many blocks each row has, (B or 1)."""
        lengths = torch.tensor([grid.length]) if grid.lengths is None else grid.lengths.cpu()
        counts = (-((self.globals - lengths) // self.block)).clamp(min=0)
        most = max(1, -((self.globals - grid.length) // self.block))
        table = torch.full((len(counts), grid.heads, most, self._slots), -1)
        for row, count in enumerate(counts.tolist()):
            table[row, :, :count] = _table(self, count, grid.heads, grid.layer)
        return table.to(device), counts.to(device)

    @property
    def _slots(self) -> int:
        return 3 + (0 if self.globals else 2) + self.random


@functools.lru_cache(maxsize=256)
def _table(pattern: BigBird, count: int, heads: int, layer: int) -> Tensor:
    """(H, count, slots): the blocks that each block sees, each once, -1 where there are fewer."""
    blocks = np.arange(count)
    seen = [blocks - 1, blocks, np.where(blocks + 1 < count, blocks + 1, -1)]
    if not pattern.globals:
        seen += [np.zeros_like(blocks), np.full_like(blocks, count - 1)]
    table = np.broadcast_to(np.stack(seen, axis=1), (heads, count, len(seen)))
    bound = count if pattern.among is None else min(count, pattern.among // pattern.block)
    raw = np.random.PCG64([pattern.seed, layer]).random_raw(count * heads * pattern.random)
    raw = raw.reshape(count, heads, pattern.random).transpose(1, 0, 2)
    table = _once(table, count)
    for draw in range(pattern.random):
        table = _once(np.concatenate((table, _drawn(table, raw[..., draw], bound)[..., None]), axis=2), count)
    return torch.from_numpy(np.where(table == count, -1, table))


@functools.lru_cache(maxsize=64)
def _lists(pattern: BigBird, count: int, heads: int, layer: int, device: torch.device) -> BlockLists:
    """Who sees whom, of a text of `count` blocks without tokens before them."""
    table = _table(pattern, count, heads, layer).to(device).clone()
    table[:, [0, count - 1]] = -1
    head, row, slot = (table >= 0).nonzero(as_tuple=True)
    column = table[head, row, slot]
    every = range(heads), sorted({0, count - 1}), range(count)
    whole = torch.cartesian_prod(*(torch.tensor(x, device=device) for x in every))
    head, row, column = torch.cat((torch.stack((head, row, column), dim=1), whole)).unbind(1)
    return block_lists(head, row, column, heads, count, pattern.block)


def _drawn(table: np.ndarray, raw: np.ndarray, bound: int) -> np.ndarray:
    """For each row one of the blocks below `bound` that are not in it, -1 where all are. table: ascending along its end."""
    left = bound - (table < bound).sum(-1)
    pick = (raw % np.maximum(left, 1).astype(np.uint64)).astype(np.int64)
    for slot in range(table.shape[2]):
        pick += pick >= table[..., slot]
    return np.where(left > 0, pick, -1)


def _once(table: np.ndarray, count: int) -> np.ndarray:
    """Ascending, each block once; `count` stands where there is none."""
    table = np.sort(np.where(table < 0, count, table), axis=-1)
    twice = np.concatenate((np.zeros_like(table[..., :1], dtype=bool), table[..., 1:] == table[..., :-1]), axis=-1)
    return np.sort(np.where(twice, count, table), axis=-1)
