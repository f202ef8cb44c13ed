"""The tables of blocks against masks of pairs, and FlexAttention over them against the formula."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from longspan.attention.window import Window
from longspan.engine.blocks import tables as module
from longspan.engine.blocks.tables import Blocks, band, block_size, bucket
from longspan.engine.call import AttentionShape
from longspan.lm.base import Full, Pattern

CPU = torch.device("cpu")
PATTERNS = [Full(), *(Window(w, s) for w, s in itertools.product((1, 5, 16, 40, 500), (0, 1, 4, 8, 21)))]


def dense(pattern: Pattern, length: int, *, causal: bool) -> Tensor:
    """(1, length, length) by the pattern's definition."""
    number = torch.arange(length)[None]
    seen = pattern.mask(number, number, AttentionShape(1, length, 0, causal))[:, 0].expand(1, length, length)
    return seen & (number[0] <= number[0][:, None]) if causal else seen


def by_rule(blocks: Blocks, heads: int = 1, batch: int = 0) -> Tensor:
    queries, keys = (torch.arange(n) for n in blocks.lengths)
    pairs = [
        blocks.rule(torch.tensor(batch), torch.tensor(h), queries[:, None], keys).expand(*blocks.lengths)
        for h in range(heads)
    ]
    return torch.stack(pairs)


def listed(count: Tensor, index: Tensor, columns: int) -> Tensor:
    """What a table says, (H, rows, columns); a block listed twice is an error."""
    out = torch.zeros(*count.shape[1:], columns, dtype=torch.int)
    for h, row in itertools.product(*map(range, count.shape[1:])):
        for block in index[0, h, row, : int(count[0, h, row])].tolist():
            out[h, row, block] += 1
    assert out.max() <= 1
    return out.bool()


def check(blocks: Blocks, seen: Tensor, *, strict: bool = True) -> BlockMask:
    """seen (H, queries, keys): every block with a visible pair is visited, those listed as full have no other, and what is
    turned round says the same."""
    size, (queries, keys) = blocks.size, blocks.lengths
    rows, columns = -(-queries // size), -(-keys // size)
    padded = torch.nn.functional.pad(seen, (0, columns * size - keys, 0, rows * size - queries))
    tiles = padded.unflatten(2, (columns, size)).unflatten(1, (rows, size)).transpose(2, 3).flatten(3)
    valid = torch.nn.functional.pad(torch.ones_like(seen), (0, columns * size - keys, 0, rows * size - queries))
    valid = valid.unflatten(2, (columns, size)).unflatten(1, (rows, size)).transpose(2, 3).flatten(3)
    mask = blocks.mask(backward=True)
    partial = listed(mask.kv_num_blocks, mask.kv_indices, columns)
    full = listed(mask.full_kv_num_blocks, mask.full_kv_indices, columns)
    assert mask.kv_indices.shape == mask.full_kv_indices.shape
    assert not (partial & full).any()
    assert not (tiles.any(-1) & ~(partial | full)).any()
    assert not (full & ~(tiles | ~valid).all(-1)).any()
    if strict:  # none that could be full is not
        assert not (tiles.all(-1) & ~full).any()
    assert not ((partial | full) & ~tiles.any(-1)).any()  # none is visited in vain
    turned = listed(mask.q_num_blocks, mask.q_indices, rows), listed(mask.full_q_num_blocks, mask.full_q_indices, rows)
    assert mask.q_indices.shape == mask.full_q_indices.shape
    assert torch.equal(turned[0], partial.mT) and torch.equal(turned[1], full.mT)
    return mask


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: p.spec)
def test_tables_are_the_mask_of_pairs(pattern: Pattern, causal: bool) -> None:
    for length, size in itertools.product((1, 7, 16, 33, 64, 90), (8, 16)):
        blocks = pattern.blocks(AttentionShape(1, length, 0, causal), size, CPU)
        assert blocks is not None and pattern.blocks(AttentionShape(1, length, 3, causal), size, CPU) is blocks
        seen = dense(pattern, length, causal=causal)
        assert torch.equal(by_rule(blocks), seen)
        # A block that is all seen, a part as sinks and a part as window, passes for partial.
        check(blocks, seen, strict=getattr(pattern, "sinks", 0) % size == 0)


def test_heads_of_their_own_and_made_causal() -> None:
    """A pattern that differs by head and knows nothing of causality: every other block in one head, all in the other."""
    index = torch.full((2, 4, 4), -1)
    index[0, :, ::2] = torch.tensor([0, 2])
    index[1] = torch.arange(4)
    blocks = Blocks(index, index >= 0, lambda b, h, q, k: (h == 1) | (k // 8 % 2 == 0), (32, 32), 8)
    check(blocks, by_rule(blocks, 2))
    causal = blocks.causal()
    check(causal, by_rule(blocks, 2) & torch.ones(32, 32, dtype=torch.bool).tril())
    assert torch.equal(by_rule(causal, 2), by_rule(blocks, 2) & torch.ones(32, 32, dtype=torch.bool).tril())


def test_rows_that_end_early() -> None:
    blocks, ends = band((64, 64), window=20, sinks=3, causal=False, size=8, device=CPU), torch.tensor([64, 30])
    cut = blocks.within(ends)
    mask = cut.mask()
    for row in range(2):
        wanted = by_rule(blocks) & (torch.arange(64) < ends[row])
        assert torch.equal(by_rule(cut, batch=row), wanted)
    full = listed(mask.full_kv_num_blocks, mask.full_kv_indices, 8)
    assert full.any() and not full[:, :, 3:].any()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("pattern", [Full(), Window(5), Window(16, 3), Window(500, 8)], ids=lambda p: p.spec)
def test_a_text_that_is_filled_up(pattern: Pattern, causal: bool) -> None:
    """Tables of texts of about one length have one shape, and nothing that is filled in is visited or seen."""
    shapes = set()
    for length in (33, 37, 40, 47, 48):
        blocks = pattern.blocks(AttentionShape(1, length, 0, causal), 8, CPU)
        assert blocks is not None
        padded = blocks.padded(48)
        assert padded is blocks.padded(48) and padded.lengths == (48, 48)
        mask = padded.mask(backward=True)
        shapes.add((mask.kv_indices.shape, mask.full_kv_indices.shape))
        seen, real = by_rule(padded), dense(pattern, length, causal=causal)
        assert torch.equal(seen[:, :length, :length], real) and not seen[:, :, length:].any()
        visited = listed(mask.kv_num_blocks, mask.kv_indices, 6) | listed(
            mask.full_kv_num_blocks, mask.full_kv_indices, 6
        )
        full = listed(mask.full_kv_num_blocks, mask.full_kv_indices, 6)[0]
        assert not visited[:, -(-length // 8) :].any() and not visited[:, :, -(-length // 8) :].any()
        tiles = (
            torch.nn.functional.pad(real, (0, 48 - length, 0, 48 - length)).unflatten(2, (6, 8)).unflatten(1, (6, 8))
        )
        assert not (tiles.transpose(2, 3).flatten(3).any(-1) & ~visited).any()
        keys = torch.nn.functional.pad(real.any(1) | (length > 0), (0, 48 - length)).unflatten(1, (6, 8)).all(-1)
        assert not (full & ~keys).any()
        rows = listed(mask.q_num_blocks, mask.q_indices, 6) | listed(mask.full_q_num_blocks, mask.full_q_indices, 6)
        assert torch.equal(rows, visited.mT)
    assert len(shapes) == 1


def test_buckets_are_few_and_near() -> None:
    sizes = [bucket(length) for length in range(1, 2**15 + 1)]
    assert all(length <= size <= max(128, 1.5 * length + 128) for length, size in enumerate(sizes, 1))
    assert sizes == sorted(sizes) and sizes[-1] == 2**15 and len(set(sizes)) == 16
    assert bucket(2**20 + 1) % 256 == 0


@pytest.mark.parametrize("length", [2**20, 2**22])
@pytest.mark.parametrize("sinks", [0, 4])
def test_tables_of_millions_of_tokens(length: int, sinks: int) -> None:
    blocks = Window(1024, sinks).blocks(AttentionShape(1, length, 0, True), 128, CPU)
    mask = blocks.mask(backward=not sinks)
    assert mask.kv_indices.shape == mask.full_kv_indices.shape == (1, 1, length // 128, 10 + bool(sinks))
    assert sinks or mask.q_indices.shape == (1, 1, length // 128, 7)
    assert blocks.visited() < 1.3 * length * 1024


def test_blocks_grow_where_a_table_would_be_square(monkeypatch: pytest.MonkeyPatch) -> None:
    assert block_size(2**30, backward=False) == 128 == block_size(2**20, backward=True)
    assert block_size(2**20 + 1, backward=True) == 256 and block_size(2**22, backward=True) == 512
    monkeypatch.setattr(module, "MOST_ROWS", 4)
    assert block_size(1024, backward=True) == 256
