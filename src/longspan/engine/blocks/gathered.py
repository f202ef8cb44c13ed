"""Attention of blocks of queries to the blocks of keys that a table names.

Keys are gathered, so time and memory grow with the number of entries, and nothing is as long as the text on both sides."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.engine.call import AttentionCall
from longspan.engine.core import expand_heads
from longspan.engine.slices import Slices

ENTRIES_AT_ONCE = 2**24
"""How many elements the gathered keys, or the scores, of one call of SDPA have."""


def block_sparse_attention(call: AttentionCall, table: Tensor, block: int, start: int = 0) -> Tensor:
    """(B, H, T - start, D).

    table (B or 1, H, blocks, slots): the blocks of keys that each block of queries sees, -1 for none; what is named
    twice counts twice. The first `start` tokens belong to no block and are seen by all.
    """
    rows, heads, length, width = call.query.shape
    count, slots = table.shape[2:]
    missing = count * block - (length - start)
    real = torch.ones(rows, length, dtype=torch.bool, device=table.device) if call.padding is None else call.padding
    query, key, value = (
        Slices(F.pad(x[:, :, start:], (0, 0, 0, missing)).unflatten(2, (count, block)))
        for x in (call.query, call.key, call.value)
    )
    early = tuple(Slices(x[:, :, :start]) for x in (call.key, call.value))
    blocks = query, key, value, F.pad(real[:, start:], (0, missing)).unflatten(1, (count, block))
    line = None
    if call.bias is not None:
        end = start + count * block
        line = Slices(call.bias(torch.arange(1 - end, end, device=table.device)))
    many = max(1, ENTRIES_AT_ONCE // (rows * heads * slots * block * max(block, width)))
    out = []
    for begin in range(0, count, many):
        part = table[:, :, begin : begin + many].expand(rows, -1, -1, -1)
        out.append(_attend(call, blocks, early, part, begin, start, line).unflatten(0, (rows, -1)).transpose(1, 2))
    return torch.cat(out, dim=2).flatten(2, 3)[:, :, : length - start]


def _attend(
    call: AttentionCall,
    blocks: tuple[Slices, Slices, Slices, Tensor],
    early: tuple[Slices, ...],
    table: Tensor,
    begin: int,
    start: int,
    line: Slices | None,
) -> Tensor:
    """The blocks of queries from number `begin` on that `table` (B, H, n, slots) has, (B·n, H, block, D)."""
    (queries, keys, values, real), (rows, heads, count) = blocks, table.shape[:3]
    row = torch.arange(rows, device=table.device).view(-1, 1, 1, 1)
    head = torch.arange(heads, device=table.device).view(-1, 1, 1) * keys.shape[1] // heads
    named = table.clamp(min=0)
    query = queries[:, :, begin : begin + count].transpose(1, 2).flatten(0, 1)
    key, value = (x[row, head, named].flatten(3, 4).transpose(1, 2).flatten(0, 1) for x in (keys, values))
    mask = ((table >= 0)[..., None] & real[row, named]).flatten(3, 4).transpose(1, 2).flatten(0, 1)[:, :, None]
    if start:
        first = (expand_heads(x[:, :, :], heads).repeat_interleave(count, dim=0) for x in early)
        key, value = (torch.cat((x, y), dim=2) for x, y in zip(first, (key, value), strict=True))
        shown = real.new_ones(rows, start) if call.padding is None else call.padding[:, :start]
        shown = shown.repeat_interleave(count, dim=0)[:, None, None].expand(-1, heads, 1, -1)
        mask = torch.cat((shown, mask), dim=3)
    if line is None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=call.dropout, scale=call.scale
        )
    bias = _bias(line, named, query.shape[2], begin, start)
    bias = bias.masked_fill(~(mask | ~mask.any(-1, keepdim=True)), float("-inf"))  # rows that see nothing are padding
    out = F.scaled_dot_product_attention(
        query.float(), key.float(), value.float(), attn_mask=bias, dropout_p=call.dropout, scale=call.scale
    )
    return out.to(query.dtype)


def _bias(line: Slices, table: Tensor, block: int, begin: int, start: int) -> Tensor:
    """(B·n, H, block, start + slots · block) out of `line` (H, all distances from the least to the greatest)."""
    rows, heads, count = table.shape[:3]
    inside = torch.arange(block, device=table.device)
    keys = start + (table[..., None] * block + inside).flatten(3, 4)
    early = torch.arange(start, device=table.device).expand(rows, heads, count, -1)
    keys = torch.cat((early, keys), dim=3)[:, :, :, None]
    queries = start + (begin + torch.arange(count, device=table.device))[:, None] * block + inside
    head = torch.arange(heads, device=table.device).view(-1, 1, 1, 1)
    bias = line[head, queries[..., None] - keys + line.shape[1] // 2]
    return bias.transpose(1, 2).flatten(0, 1)
