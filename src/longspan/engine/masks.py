"""Attention under a pattern by its definition, made affordable: the way that always works.

Queries pass a block at a time, with the keys that they can see and a mask made for them, so that no mask is as long as the
text on both sides. A block is about as long as what one query sees, so that under a window time and memory grow with
length · window, in the backward too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.engine.core import attention, expand_heads, with_zero_key

if TYPE_CHECKING:
    from longspan.attention.base import Grid, Pattern
    from longspan.engine.patterns import Call

BLOCKS = (64, 512)
"""The fewest and the most queries that share one mask."""
Piece = tuple[tuple[int, int], Tensor, Tensor, Tensor, Tensor | None]
"""A block of queries: its first token and the one after its last, the keys that some of them see, which tokens those are
(B or 1, keys), the mask between them, and how often keys count, None for once."""


def masked_attention(pattern: Pattern, call: Call, grid: Grid) -> Tensor:
    """The definition, made affordable: `pattern.visible` for one block of queries and the keys in its `ranges`."""
    return torch.cat([_block(call, grid, *piece) for piece in pieces(pattern, call, grid)], dim=2)


def pieces(pattern: Pattern, call: Call, grid: Grid) -> Iterator[Piece]:
    """All blocks of queries, one after another."""
    total, new, device = call.key.shape[2], call.query.shape[2], call.query.device
    first = _first(call)
    lead, least = int(first.max()), int(first.min())
    for start, end in _blocks(pattern, grid, total - new, total):
        # Rows begin at columns 0 … lead, so a range of token numbers lies in columns that are up to `lead` further on.
        wanted = pattern.ranges(max(0, start - lead), end - least, grid)
        last = end if grid.causal else total
        columns = _columns([(low, min(high + lead, last)) for low, high in wanted], device)
        yield _piece(pattern, call, grid, (start, end), columns, columns[None], first)


def rolled_attention(pattern: Pattern, call: Call, grid: Grid) -> Tensor:
    """New tokens of a text of `grid.length`, with the keys that a rolling cache still has."""
    cached, columns, new, device = pattern.cached(), call.columns, call.query.shape[2], call.query.device
    assert cached is not None and columns is not None
    exact = pattern.kept() == cached  # then a ring holds what its query sees, and nothing else
    if exact and new == 1 and call.padding is None and _plain(call):
        key, value = call.key, call.value
        if call.zero_key:
            key, value, _ = with_zero_key(key, value, None)
        return attention(call.query, key, value, None, call.scale, dropout=call.dropout)
    first, blocks, (sinks, window) = _first(call), [], cached
    sinks = min(sinks, columns.shape[1])
    for start, end in _blocks(pattern, grid, grid.length - new, grid.length):
        slots = torch.arange(columns.shape[1], device=device)
        if new > 1:  # past the sinks the keys are the last tokens in order
            low = max(0, columns.shape[1] - (grid.length - start) - window + 1)
            slots = slots[(slots < sinks) | ((slots >= low) & (slots < columns.shape[1] - (grid.length - end)))]
        piece = _piece(pattern, call, grid, (start, end), slots, columns[:, slots], first)
        blocks.append(_block(call, grid, *piece))
    return torch.cat(blocks, dim=2)


def _first(call: Call) -> Tensor:
    """Each row's first real token, (B or 1, 1)."""
    if call.padding is None:
        return torch.zeros(1, 1, dtype=torch.long, device=call.query.device)
    return call.padding.int().argmax(1, keepdim=True)


def _blocks(pattern: Pattern, grid: Grid, start: int, end: int) -> list[tuple[int, int]]:
    """Where blocks of queries begin and end: powers of two about as long as what a query at the end sees."""
    seen = sum(high - low for low, high in pattern.ranges(end - 1, end, grid))
    size = min(max(1 << max(seen, 1).bit_length() - 1, BLOCKS[0]), BLOCKS[1])
    return [(low, min(low + size, end)) for low in range(start, end, size)]


def _piece(
    pattern: Pattern, call: Call, grid: Grid, queries: tuple[int, int], slots: Tensor, columns: Tensor, first: Tensor
) -> Piece:
    numbers, keys = torch.arange(*queries, device=slots.device)[None] - first, columns - first
    mask = _mask(pattern, call, grid, numbers, columns, first)
    return queries, slots, columns, mask, pattern.counts(numbers, keys, grid)


def _block(
    call: Call,
    grid: Grid,
    queries: tuple[int, int],
    slots: Tensor,
    columns: Tensor,
    mask: Tensor,
    counts: Tensor | None,
) -> Tensor:
    """Attention of one block, as in `Piece`."""
    heads, early = call.query.shape[1], grid.length - call.query.shape[2]
    query = call.query[:, :, queries[0] - early : queries[1] - early]
    key, value = (expand_heads(x[:, :, slots], heads) for x in (call.key, call.value))
    allowed: Tensor | None = mask
    if call.zero_key:
        key, value, allowed = with_zero_key(key, value, mask)
    if _plain(call) and counts is None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=allowed, dropout_p=call.dropout, scale=call.scale
        )
    numbers = torch.arange(*queries, device=query.device)
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    rows = slice(queries[0] - early, queries[1] - early)
    bias = _bias(call, rows, numbers[:, None] - columns[:, None]).to(wide)
    if counts is not None:  # what is invisible counts as one here and is hidden below
        bias = bias + counts.clamp(min=1).to(wide).log()
    bias = bias.masked_fill(~(mask | ~mask.any(-1, keepdim=True)), float("-inf"))  # rows that see nothing are padding
    if call.zero_key:
        bias = F.pad(bias, (0, 1))
    out = F.scaled_dot_product_attention(
        query.to(wide), key.to(wide), value.to(wide), attn_mask=bias, dropout_p=call.dropout, scale=call.scale
    )
    return out.to(query.dtype)


def _plain(call: Call) -> bool:
    return call.bias is None and call.query_scores is None


def _bias(call: Call, rows: slice, far: Tensor) -> Tensor:
    """(B or 1, H, rows, keys) of the distances (B or 1, rows, keys)."""
    bias = torch.zeros(1, 1, 1, 1, device=far.device)
    if call.bias is not None:
        bias = call.bias(far).transpose(0, 1)
    if call.query_scores is not None:
        low, high = int(far.min()), int(far.max())
        line = call.query_scores(rows, torch.arange(low, high + 1, device=far.device))
        bias = bias + call.scale * line.gather(-1, (far - low)[:, None].expand(*line.shape[:3], -1))
    return bias


def _mask(pattern: Pattern, call: Call, grid: Grid, queries: Tensor, columns: Tensor, first: Tensor) -> Tensor:
    keys = columns - first
    mask = pattern.visible(queries, keys, grid) & (keys >= 0)[:, None, None]
    if grid.causal:
        mask = mask & (keys[:, None, None, :] <= queries[:, None, :, None])
    if call.padding is None:
        return mask
    real = call.padding.gather(1, columns.clamp(min=0).expand(len(call.padding), -1))
    return mask & real[:, None, None]


def _columns(ranges: list[tuple[int, int]], device: torch.device) -> Tensor:
    """Ascending, each once, though padding may have made ranges overlap."""
    parts, done = [], 0
    for low, high in ranges:
        low = max(low, done)
        if low < high:
            parts.append(torch.arange(low, high, device=device))
            done = high
    return torch.cat(parts)
