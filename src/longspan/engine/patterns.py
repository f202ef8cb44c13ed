"""Attention under a pattern: which way a call goes, and the way that always works.

A text that attends to itself goes to the pattern's own `run`, with rows aligned at their first real token. Tokens that
come after others (decoding, chunks) go through masks made for the keys that they can see, a block of queries at a time,
so that no mask is as long as the text on both sides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.engine.core import expand_heads

if TYPE_CHECKING:
    from longspan.attention.base import Grid, Pattern

QUERIES_AT_ONCE = 512
"""Queries that share one mask."""


@dataclass(frozen=True)
class Call:
    """One call. query (B, H, Tq, D), key and value (B, H_kv, Tk, D), ready to meet; the queries are the last of the keys."""

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    padding: Tensor | None = None
    """Boolean (B, Tk), True where a key is real; None where all are."""
    bias: Callable[[Tensor], Tensor] | None = None
    """What a score gets at a distance in tokens: (H, *shape) float32 for whole numbers of any shape."""
    dropout: float = 0.0
    shown: Tensor | None = None
    """Boolean (B, Tk), True for keys that every query sees whatever the pattern says; of the patterns only some know it."""


def some_heads(call: Call, start: int, end: int) -> Call:
    """The call for the query heads from `start` to `end` - 1, each with keys and values of its own."""
    heads, bias = call.query.shape[1], call.bias
    key, value = (expand_heads(x, heads)[:, start:end] for x in (call.key, call.value))
    own = None if bias is None else lambda distance: bias(distance)[start:end]
    return replace(call, query=call.query[:, start:end], key=key, value=value, bias=own)


def text_lengths(padding: Tensor | None) -> Tensor | None:
    """From each row's first real token to its last, (B,)."""
    if padding is None:
        return None
    return padding.shape[1] - padding.flip(1).int().argmax(1) - padding.int().argmax(1)


def attend(pattern: Pattern, call: Call, grid: Grid) -> Tensor:
    """(B, H, Tq, D). What padding tokens get is never read by others, but is a number."""
    if call.query.shape[2] != call.key.shape[2]:
        return masked_attention(pattern, call, grid)
    if call.padding is None or bool((call.padding[:, 1:] <= call.padding[:, :-1]).all()):  # none, or on the right
        return pattern.run(call, grid)
    shift = call.padding.int().argmax(1)
    query, key, value = (_roll(x, shift, 2) for x in (call.query, call.key, call.value))
    shown = None if call.shown is None else _roll(call.shown, shift, 1)
    aligned = replace(call, query=query, key=key, value=value, padding=_roll(call.padding, shift, 1), shown=shown)
    out = pattern.run(aligned, grid)
    return _roll(out, -shift, 2)


def masked_attention(pattern: Pattern, call: Call, grid: Grid) -> Tensor:
    """The definition, made affordable: `pattern.visible` for one block of queries and the keys in its `ranges`."""
    total, new, device = call.key.shape[2], call.query.shape[2], call.query.device
    first = torch.zeros(1, 1, dtype=torch.long, device=device)
    if call.padding is not None:
        first = call.padding.int().argmax(1, keepdim=True)  # each row's first real token
    lead = int(first.max())
    blocks = []
    for start in range(total - new, total, QUERIES_AT_ONCE):
        end = min(start + QUERIES_AT_ONCE, total)
        # Rows begin at columns 0 … lead, so a range of token numbers lies in columns that are up to `lead` further on.
        wanted = pattern.ranges(max(0, start - lead), end - int(first.min()), grid)
        last = end if grid.causal else total
        columns = _columns([(low, min(high + lead, last)) for low, high in wanted], device)
        mask = _mask(pattern, call, grid, torch.arange(start, end, device=device)[None] - first, columns, first)
        rows = slice(start - (total - new), end - (total - new))
        blocks.append(_block(call, rows, columns, mask, first))
    return torch.cat(blocks, dim=2)


def _mask(pattern: Pattern, call: Call, grid: Grid, queries: Tensor, columns: Tensor, first: Tensor) -> Tensor:
    keys = columns[None] - first
    mask = pattern.visible(queries, keys, grid) & (keys >= 0)[:, None, None]
    if grid.causal:
        mask = mask & (keys[:, None, None, :] <= queries[:, None, :, None])
    return mask if call.padding is None else mask & call.padding[:, columns][:, None, None]


def _block(call: Call, rows: slice, columns: Tensor, mask: Tensor, first: Tensor) -> Tensor:
    heads = call.query.shape[1]
    query, key, value = call.query[:, :, rows], call.key[:, :, columns], call.value[:, :, columns]
    key, value = expand_heads(key, heads), expand_heads(value, heads)
    if call.bias is None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=call.dropout, scale=call.scale
        )
    total, new = call.key.shape[2], call.query.shape[2]
    numbers = torch.arange(total - new, total, device=query.device)[rows]
    bias = call.bias(numbers[:, None] - columns[None])[None]
    bias = bias.masked_fill(~(mask | ~mask.any(-1, keepdim=True)), float("-inf"))  # rows that see nothing are padding
    out = F.scaled_dot_product_attention(
        query.float(), key.float(), value.float(), attn_mask=bias, dropout_p=call.dropout, scale=call.scale
    )
    return out.to(query.dtype)


def _columns(ranges: list[tuple[int, int]], device: torch.device) -> Tensor:
    """Ascending, each once, though padding may have made ranges overlap."""
    parts, done = [], 0
    for low, high in ranges:
        low = max(low, done)
        if low < high:
            parts.append(torch.arange(low, high, device=device))
            done = high
    return torch.cat(parts)


def _roll(x: Tensor, shift: Tensor, dim: int) -> Tensor:
    """Each row of the batch moved left by its own `shift` (B,) along `dim`, what leaves coming back on the other side."""
    length = x.shape[dim]
    index = (torch.arange(length, device=x.device)[None] + shift[:, None]) % length
    return x.gather(dim, index.view(len(x), *[1] * (dim - 1), length, *[1] * (x.ndim - dim - 1)).expand_as(x))
