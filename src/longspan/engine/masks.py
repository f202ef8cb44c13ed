"""Attention under a pattern by its mask, one block of queries at a time: the backend that always works.

Each block of queries meets the keys that it can see under a mask of its own, so that no mask is as long as the text on both
sides. A block is about as long as what one query sees, so that under a window time and memory grow with
length · window, in the backward too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.engine.biased.bias import bias_rows
from longspan.engine.call import AttentionCall, AttentionShape, Pattern
from longspan.engine.core import attention, expand_heads, with_zero_key
from longspan.engine.slices import Slices

BLOCKS = (64, 512)
"""The fewest and the most queries that share one mask."""


@dataclass(frozen=True)
class Piece:
    """A block of queries, from the first token to the one after the last, and the keys that some of them see: `ranges` of those
    held, and which tokens they are, (B or 1, keys); in_order: whether these are the text's own columns, so that distances run
    without a gap. The mask is (B or 1, H or 1, queries, keys); multiplicity says how often a key counts, None for once."""

    queries: tuple[int, int]
    ranges: list[tuple[int, int]]
    columns: Tensor
    in_order: bool
    mask: Tensor
    multiplicity: Tensor | None


def masked_attention(pattern: Pattern, call: AttentionCall, shape: AttentionShape) -> Tensor:
    """Attention under `pattern.mask`, a block of queries at a time over the keys in its `ranges`: (B, H, Tq, D)."""
    return _all_blocks(call, shape, pieces(pattern, call, shape))


def pieces(pattern: Pattern, call: AttentionCall, shape: AttentionShape) -> Iterator[Piece]:
    """All blocks of queries, one after another."""
    total, new, device = call.key.shape[2], call.query.shape[2], call.query.device
    first = _first(call)
    lead, least = int(first.max()), int(first.min())
    for start, end in _blocks(pattern, shape, total - new, total):
        # Rows begin at columns 0 … lead, so a range of token numbers lies in columns that are up to `lead` further on.
        visible = pattern.ranges(max(0, start - lead), end - least, shape)
        last = end if shape.causal else total
        ranges = _disjoint([(low, min(high + lead, last)) for low, high in visible])
        columns = torch.cat([torch.arange(*span, device=device) for span in ranges])[None]
        yield _piece(pattern, call, shape, (start, end), ranges, columns, first, in_order=True)


def rolled_attention(pattern: Pattern, call: AttentionCall, shape: AttentionShape) -> Tensor:
    """Attention of a text's last tokens over the keys that a rolling cache still holds: (B, H, Tq, D)."""
    cached, columns, new = pattern.cached(), call.columns, call.query.shape[2]
    assert cached is not None and columns is not None
    exact = pattern.sinks_and_window() == cached  # then a ring holds what its query sees, and nothing else
    if exact and new == 1 and call.padding is None and _plain(call):
        key, value = call.key, call.value
        if call.zero_key:
            key, value, _ = with_zero_key(key, value, None)
        return attention(call.query, key, value, None, call.scale, dropout=call.dropout)
    return _all_blocks(call, shape, _rolled_pieces(pattern, call, shape, cached, columns))


def _rolled_pieces(
    pattern: Pattern, call: AttentionCall, shape: AttentionShape, cached: tuple[int, int], columns: Tensor
) -> Iterator[Piece]:
    (sinks, window), count, new, first = cached, columns.shape[1], call.query.shape[2], _first(call)
    for start, end in _blocks(pattern, shape, shape.length - new, shape.length):
        ranges = [(0, count)]
        if new > 1:  # past the sinks the keys are the last tokens in order
            low = max(0, count - (shape.length - start) - window + 1)
            ranges = _disjoint([(0, min(sinks, count)), (low, count - (shape.length - end))])
        visible = torch.cat([columns[:, low:high] for low, high in ranges], dim=1)
        yield _piece(pattern, call, shape, (start, end), ranges, visible, first, in_order=False)


def _all_blocks(call: AttentionCall, shape: AttentionShape, pieces: Iterator[Piece]) -> Tensor:
    heads = Slices(call.query), Slices(call.key), Slices(call.value)
    return torch.cat([_block(call, shape, *heads, piece) for piece in pieces], dim=2)


def _first(call: AttentionCall) -> Tensor:
    """Each row's first real token, (B or 1, 1)."""
    if call.padding is None:
        return torch.zeros(1, 1, dtype=torch.long, device=call.query.device)
    return call.padding.int().argmax(1, keepdim=True)


def _blocks(pattern: Pattern, shape: AttentionShape, start: int, end: int) -> list[tuple[int, int]]:
    """Where blocks of queries begin and end: powers of two about as long as what a query at the end sees."""
    visible = sum(high - low for low, high in pattern.ranges(end - 1, end, shape))
    size = min(max(1 << max(visible, 1).bit_length() - 1, BLOCKS[0]), BLOCKS[1])
    return [(low, min(low + size, end)) for low in range(start, end, size)]


def _piece(
    pattern: Pattern,
    call: AttentionCall,
    shape: AttentionShape,
    queries: tuple[int, int],
    ranges: list[tuple[int, int]],
    columns: Tensor,
    first: Tensor,
    *,
    in_order: bool,
) -> Piece:
    numbers, keys = torch.arange(*queries, device=columns.device)[None] - first, columns - first
    mask = _mask(pattern, call, shape, numbers, columns, first)
    return Piece(queries, ranges, columns, in_order, mask, pattern.multiplicity(numbers, keys, shape))


def _block(
    call: AttentionCall, shape: AttentionShape, queries: Slices, keys: Slices, values: Slices, piece: Piece
) -> Tensor:
    """Attention of one block."""
    heads, early = call.query.shape[1], shape.length - call.query.shape[2]
    rows = slice(piece.queries[0] - early, piece.queries[1] - early)
    query = queries[:, :, rows]
    key, value = (expand_heads(_ranges(x, piece.ranges), heads) for x in (keys, values))
    allowed: Tensor | None = piece.mask
    if call.zero_key:
        key, value, allowed = with_zero_key(key, value, piece.mask)
    if _plain(call) and piece.multiplicity is None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=allowed, dropout_p=call.dropout, scale=call.scale
        )
    mask, wide = piece.mask, torch.promote_types(query.dtype, torch.float32)
    bias = _bias(call, rows, piece).to(wide)
    if piece.multiplicity is not None:  # what is invisible counts as one here and is hidden below
        bias = bias + piece.multiplicity.clamp(min=1).to(wide).log()
    bias = bias.masked_fill(~(mask | ~mask.any(-1, keepdim=True)), float("-inf"))  # rows that see nothing are padding
    if call.zero_key:
        bias = F.pad(bias, (0, 1))
    out = F.scaled_dot_product_attention(
        query.to(wide), key.to(wide), value.to(wide), attn_mask=bias, dropout_p=call.dropout, scale=call.scale
    )
    return out.to(query.dtype)


def _ranges(x: Slices, ranges: list[tuple[int, int]]) -> Tensor:
    """The keys or values in `ranges`, one after another."""
    parts = [x[:, :, low:high] for low, high in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _plain(call: AttentionCall) -> bool:
    return call.bias is None and call.query_scores is None


def _bias(call: AttentionCall, rows: slice, piece: Piece) -> Tensor:
    """(B or 1, H, rows, keys) of what is added to the scores of one block."""
    device = piece.columns.device
    bias = torch.zeros(1, 1, 1, 1, device=device)
    far = torch.arange(*piece.queries, device=device)[:, None] - piece.columns[:, None]
    if call.bias is not None and piece.in_order:
        spans = [bias_rows(call.bias, range(*piece.queries), range(*span), device) for span in piece.ranges]
        bias = torch.cat(spans, dim=-1)[None]
    elif call.bias is not None:
        bias = call.bias(far).transpose(0, 1)
    if call.query_scores is not None:
        low, high = int(far.min()), int(far.max())
        line = call.query_scores(rows, torch.arange(low, high + 1, device=device))
        bias = bias + call.scale * line.gather(-1, (far - low)[:, None].expand(*line.shape[:3], -1))
    return bias


def _mask(
    pattern: Pattern, call: AttentionCall, shape: AttentionShape, queries: Tensor, columns: Tensor, first: Tensor
) -> Tensor:
    keys = columns - first
    mask = pattern.mask(queries, keys, shape) & (keys >= 0)[:, None, None]
    if shape.causal:
        mask = mask & (keys[:, None, None, :] <= queries[:, None, :, None])
    if call.padding is None:
        return mask
    real = call.padding.gather(1, columns.clamp(min=0).expand(len(call.padding), -1))
    return mask & real[:, None, None]


def _disjoint(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same columns, each once, though padding may have made the ranges overlap."""
    parts: list[tuple[int, int]] = []
    for low, high in ranges:
        low = max(low, parts[-1][1]) if parts else low
        if low < high:
            parts.append((low, high))
    return parts
