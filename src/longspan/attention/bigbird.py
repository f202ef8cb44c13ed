"""BigBird: block-sparse attention to neighbours, random blocks and global blocks, in encoders (Zaheer 2020).

ITC, the default (section 2, appendix E): the first and the last block of a text are global, they see all blocks and all see them;
every other block sees itself, its two neighbours, the global blocks and `random` blocks drawn per head. ETC: in their place
`globals` tokens at the beginning of a text are global, and blocks are counted after them; the paper's base model has globals=256,
random=0, block=84. The global tokens are the first of the text, for example tokens without meaning that are put before it. The
paper trains their distances separately; here distance is left to the position scheme.

The random blocks follow from the settings, the layer and the number of blocks of the text, and are the same in training and
evaluation. With raw 64-bit numbers of numpy's PCG64 seeded with (seed, layer), in the order block, head, draw, each draw takes
block (raw modulo n) of the n blocks, ascending, that the block does not see yet. The authors' code draws random blocks from the
first 1,024 tokens only, for lengths up to 4,096: `among=1024`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from longspan.engine.blocks.gathered import block_sparse_attention
from longspan.engine.blocks.lists import BlockLists, block_lists, listed_attention, refusal
from longspan.engine.call import AttentionCall, AttentionShape
from longspan.engine.global_tokens import Chosen, attend_everywhere
from longspan.engine.joint import by_row
from longspan.hf.encoder_form import EncoderForm
from longspan.lm.base import Pattern
from longspan.util.errors import NotSupported, SpecError


@dataclass(frozen=True)
class BigBird(Pattern):
    """Block-sparse attention of encoders.

    `block`, `globals` and `among` in tokens; `random`: random blocks of each block and head; `among`: how many first
    tokens of a text they are drawn from, by default all. Every token of a text of few blocks sees all.
    """

    block: int = 64
    random: int = 3
    globals: int = 0
    seed: int = 0
    among: int | None = None

    name = "bigbird"
    title = "BigBird: window, random and global blocks"
    works_on = "from scratch, trained encoders (longspan apply)"
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
                self.among >= self.block, f"among={self.among} is less than a block of {self.block} tokens; use more"
            )
        self.require(
            self.random > 0 or (self.seed == 0 and self.among is None),
            f"seed={self.seed} and among={self.among} have no effect with random=0; leave them out",
        )

    def encoder_form(self) -> EncoderForm:
        return EncoderForm(
            encoder=transformers.BigBirdModel,
            masked=transformers.BigBirdForMaskedLM,
            check=self._check_encoder,
            config=self._encoder_config,
            bert_names=True,
            note="transformers draws random blocks in training only; in evaluation the first block stands in their place",
        )

    def _check_encoder(self, length: int) -> None:
        if self != (known := BigBird(self.block, self.random)):
            hint = " and name global tokens in each call with global_attention_mask" if self.globals else ""
            raise NotSupported(f"{self.spec}: transformers' BigBird has no such settings; use {known.spec}{hint}")
        if length % self.block:
            raise SpecError(f"length={length:,} must be a multiple of block={self.block}")

    def _encoder_config(
        self, old: transformers.PreTrainedConfig, settings: dict[str, Any], length: int
    ) -> transformers.BigBirdConfig:
        return transformers.BigBirdConfig(
            **settings, block_size=self.block, num_random_blocks=self.random, max_position_embeddings=length
        )

    def check_direction(self, causal: bool) -> None:
        if causal:
            raise NotSupported(
                f"attention={self.spec} is not causal, since tokens see global blocks after them; use it with kind=encoder, or "
                "with kind=encoder-decoder and decoder_attention=full"
            )

    def mask(self, queries: Tensor, keys: Tensor, shape: AttentionShape) -> Tensor:
        table, counts = self._tables(shape, queries.device)
        q, k = (torch.div(x - self.globals, self.block, rounding_mode="floor") for x in (queries, keys))
        row = torch.arange(len(table), device=queries.device)[:, None]
        listed = table.transpose(1, 2)[row, q.clamp(0, table.shape[2] - 1)].transpose(1, 2)  # (B or 1, H, Tq, slots)
        q, k = q[:, None, :, None], k[:, None, None, :]
        mask = (listed[..., None, :] == k[..., None]).any(-1)
        if self.globals:
            return mask | (q < 0) | (k < 0)
        last = counts.view(-1, 1, 1, 1) - 1
        return mask | (q == 0) | (k == 0) | (q == last) | (k == last)

    def visited(self, shape: AttentionShape, device: torch.device) -> float | None:
        """The pairs of the lists that the kernels visit; None with global tokens, for which there are no lists."""
        if self.globals:
            return None
        lists = visible_lists(self, -(-shape.length // self.block), shape.heads, shape.layer, device)
        return float(lists.visited())

    def run(self, call: AttentionCall, shape: AttentionShape) -> Tensor:
        """Attention (B, H, T, D) in longspan's kernels, a row at a time where lengths differ; otherwise over gathered keys."""
        refused = refusal(call.query, call.key, call.value, self.block)
        if self.globals or not call.plain or call.zero_key or refused is not None:
            return self._gathered(call, shape)

        def rows(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            count = -(-query.shape[2] // self.block)
            return listed_attention(
                query, key, value, visible_lists(self, count, shape.heads, shape.layer, query.device), call.scale
            )

        return by_row(rows, call.query, call.key, call.value, call.padding)

    def _gathered(self, call: AttentionCall, shape: AttentionShape) -> Tensor:
        length = call.query.shape[2]
        table, counts = self._tables(shape, call.query.device)
        if length <= self.globals:
            out = torch.zeros_like(call.query)
        else:
            out = block_sparse_attention(call, table, self.block, self.globals)
            out = torch.cat((torch.zeros_like(call.query[:, :, : self.globals]), out), dim=2)
        some = self._global_tokens(length, counts.expand(len(out)))
        queries = some.of(call.query.transpose(1, 2)).transpose(1, 2)
        rows = attend_everywhere(
            AttentionCall(queries, call.key, call.value, call.scale, call.padding, call.bias, call.dropout), some.index
        )
        return some.put(out.transpose(1, 2), rows.transpose(1, 2)).transpose(1, 2)

    def _global_tokens(self, length: int, counts: Tensor) -> Chosen:
        """The global tokens; counts (B,): the number of blocks of each row."""
        device = counts.device
        if self.globals:
            index = torch.arange(min(self.globals, length), device=device).expand(len(counts), -1)
            return Chosen(index, torch.ones_like(index, dtype=torch.bool))
        inside = torch.arange(self.block, device=device).expand(len(counts), -1)
        last = (counts[:, None] - 1) * self.block + inside
        index = torch.cat((inside, last), dim=1)
        real = torch.cat((inside >= 0, last >= self.block), dim=1) & (index < length)
        return Chosen(index.clamp(0, length - 1), real)

    def _tables(self, shape: AttentionShape, device: torch.device) -> tuple[Tensor, Tensor]:
        """(B or 1, H, blocks, slots) and how many blocks each row has, (B or 1)."""
        lengths = torch.tensor([shape.length]) if shape.lengths is None else shape.lengths.cpu()
        counts = (-((self.globals - lengths) // self.block)).clamp(min=0)
        most = max(1, -((self.globals - shape.length) // self.block))
        table = torch.full((len(counts), shape.heads, most, self._slots), -1)
        for row, count in enumerate(counts.tolist()):
            table[row, :, :count] = _table(self, count, shape.heads, shape.layer)
        return table.to(device), counts.to(device)

    @property
    def _slots(self) -> int:
        return 3 + (0 if self.globals else 2) + self.random


@functools.lru_cache(maxsize=256)
def _table(pattern: BigBird, count: int, heads: int, layer: int) -> Tensor:
    """(H, count, slots): the blocks that each block sees, each once, -1 where there are fewer."""
    blocks = np.arange(count)
    visible = [blocks - 1, blocks, np.where(blocks + 1 < count, blocks + 1, -1)]
    if not pattern.globals:
        visible += [np.zeros_like(blocks), np.full_like(blocks, count - 1)]
    table = np.broadcast_to(np.stack(visible, axis=1), (heads, count, len(visible)))
    bound = count if pattern.among is None else min(count, pattern.among // pattern.block)
    raw = np.random.PCG64([pattern.seed, layer]).random_raw(count * heads * pattern.random)
    raw = raw.reshape(count, heads, pattern.random).transpose(1, 0, 2)
    table = _once(table, count)
    for draw in range(pattern.random):
        table = _once(np.concatenate((table, _drawn(table, raw[..., draw], bound)[..., None]), axis=2), count)
    return torch.from_numpy(np.where(table == count, -1, table))


@functools.lru_cache(maxsize=64)
def visible_lists(pattern: BigBird, count: int, heads: int, layer: int, device: torch.device) -> BlockLists:
    """The visible blocks of each block in a text of `count` blocks, without global tokens before them."""
    table = _table(pattern, count, heads, layer).to(device).clone()
    table[:, [0, count - 1]] = -1
    head, row, slot = (table >= 0).nonzero(as_tuple=True)
    column = table[head, row, slot]
    every = range(heads), sorted({0, count - 1}), range(count)
    whole = torch.cartesian_prod(*(torch.tensor(x, device=device) for x in every))
    head, row, column = torch.cat((torch.stack((head, row, column), dim=1), whole)).unbind(1)
    return block_lists(head, row, column, heads, count, pattern.block)


def _drawn(table: np.ndarray, raw: np.ndarray, bound: int) -> np.ndarray:
    """One block below `bound` that is not in each row of `table`, chosen by `raw`; -1 where all are. Rows are ascending."""
    left = bound - (table < bound).sum(-1)
    pick = (raw % np.maximum(left, 1).astype(np.uint64)).astype(np.int64)
    for slot in range(table.shape[2]):
        pick += pick >= table[..., slot]
    return np.where(left > 0, pick, -1)


def _once(table: np.ndarray, count: int) -> np.ndarray:
    """The table with rows ascending and without repeats, filled up with `count`."""
    table = np.sort(np.where(table < 0, count, table), axis=-1)
    twice = np.concatenate((np.zeros_like(table[..., :1], dtype=bool), table[..., 1:] == table[..., :-1]), axis=-1)
    return np.sort(np.where(twice, count, table), axis=-1)
