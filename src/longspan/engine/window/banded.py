"""Attention within a band: token i sees i - before·d, …, i, …, i + after·d in steps of d, and keys that all tokens see.

Queries go in blocks, each with the stretch of keys around it, many blocks in one call of SDPA, so time and memory grow with
length · band and nothing is as long as the text on both sides. With d > 1 tokens are sorted by their number modulo d: what
a token sees lies within its own class, where the band is an ordinary one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.engine.call import AttentionCall
from longspan.engine.core import expand_heads
from longspan.engine.global_tokens import Chosen, chosen
from longspan.engine.slices import Slices

SHORTEST_BLOCK = 64
"""Queries of a block at least; half the band where that is more."""
SCORES_AT_ONCE = 2**24
"""How many entries of masks, or of biases, one call of SDPA is given."""


@dataclass(frozen=True)
class _Shared:
    """Keys that every query sees: key and value (N, H_kv, G, D), number and real (N, G)."""

    key: Tensor
    value: Tensor
    number: Tensor
    real: Tensor


@dataclass(frozen=True)
class _Band:
    """Every `step`-th token of a text, from number `first` (N) on, with its band.

    seen (N, L): which may be seen in it.
    """

    call: AttentionCall
    seen: Tensor
    first: Tensor
    before: int
    after: int
    step: int
    shared: _Shared | None


def banded_attention(call: AttentionCall, before: int, after: int, dilation: int = 1) -> Tensor:
    """(B, H, T, D) for a text that attends to itself, with its first real token in column 0. before, after: how many tokens
    are seen on either side, `dilation` apart. A row of `call.always_visible` is seen by all, and counts once."""
    rows, length, device = call.query.shape[0], call.query.shape[2], call.query.device
    seen, shared = torch.ones(rows, length, dtype=torch.bool, device=device), None
    if call.padding is not None:
        seen = call.padding
    if call.always_visible is not None:
        shared = _shared(call, chosen(call.always_visible & seen))
        seen = seen & ~call.always_visible
    first = torch.zeros(rows, dtype=torch.long, device=device)
    if dilation == 1:
        return _attend(_Band(call, seen, first, before, after, 1, shared))
    classes = torch.arange(dilation, device=device).repeat(rows)
    query, key, value = (_fold(x, dilation, 2) for x in (call.query, call.key, call.value))
    folded = replace(call, query=query, key=key, value=value)
    if shared is not None:
        parts = (x.repeat_interleave(dilation, dim=0) for x in (shared.key, shared.value, shared.number, shared.real))
        shared = _Shared(*parts)
    out = _attend(_Band(folded, _fold(seen, dilation, 1), classes, before, after, dilation, shared))
    return out.unflatten(0, (rows, dilation)).permute(0, 2, 3, 1, 4).flatten(2, 3)[:, :, :length]


def _shared(call: AttentionCall, some: Chosen) -> _Shared | None:
    if not some.index.shape[1]:
        return None
    key, value = (some.of(x.transpose(1, 2)).transpose(1, 2) for x in (call.key, call.value))
    return _Shared(key, value, some.index, some.real)


def _fold(x: Tensor, parts: int, dim: int) -> Tensor:
    """The tokens along `dim` by their number modulo `parts`, the classes of a row beside one another in the batch; where
    the length is no multiple, zeros follow."""
    missing = -x.shape[dim] % parts
    x = F.pad(x, (0, 0) * (x.ndim - dim - 1) + (0, missing))
    return x.unflatten(dim, (-1, parts)).movedim(dim + 1, 1).flatten(0, 1)


def _attend(band: _Band) -> Tensor:
    call, (rows, heads, length) = band.call, band.call.query.shape[:3]
    width = band.before + band.after
    size = min(length, max(SHORTEST_BLOCK, width // 2))
    count = -(-length // size)
    ends = band.before, band.after + count * size - length
    keys, values = (Slices(F.pad(x, (0, 0, *ends))) for x in (call.key, call.value))
    seen = F.pad(band.seen, ends)
    queries = Slices(F.pad(call.query, (0, 0, 0, count * size - length)).unflatten(2, (count, size)))
    entries = rows * size * (size + width) * (heads if call.bias is not None else 1)
    many = max(1, SCORES_AT_ONCE // entries)
    out = []
    for begin in range(0, count, many):
        end = min(begin + many, count)
        stretch = slice(begin * size, end * size + width)
        key, value = (_stretches(x[:, :, stretch], size, width) for x in (keys, values))
        visible = seen[:, stretch].unfold(1, size + width, size).flatten(0, 1)
        query = queries[:, :, begin:end].transpose(1, 2).flatten(0, 1)
        block = _blocks(band, query, key, value, visible, begin)
        out.append(block.unflatten(0, (rows, end - begin)).transpose(1, 2).flatten(2, 3))
    return torch.cat(out, dim=2)[:, :, :length]


def _stretches(x: Tensor, size: int, width: int) -> Tensor:
    """(N, H, n·size + width, D) → (N·n, H, size + width, D): the keys of each block, neighbours' overlapping."""
    return x.unfold(2, size + width, size).permute(0, 2, 1, 4, 3).flatten(0, 1)


def _blocks(band: _Band, query: Tensor, key: Tensor, value: Tensor, seen: Tensor, begin: int) -> Tensor:
    """query (N·n, H, size, D) for the blocks from number `begin` on, key and value (N·n, H_kv, size + width, D)."""
    call, heads, size = band.call, query.shape[1], query.shape[2]
    blocks = len(query) // len(band.first)
    offset = torch.arange(key.shape[2], device=query.device)[None] - torch.arange(size, device=query.device)[:, None]
    mask = ((offset >= 0) & (offset <= band.before + band.after)) & seen[:, None, None, :]
    bias = None if call.bias is None else call.bias((band.before - offset) * band.step)[None]
    if (shared := band.shared) is not None:
        key, value = (
            torch.cat((x.repeat_interleave(blocks, dim=0), y), dim=2)
            for x, y in ((shared.key, key), (shared.value, value))
        )
        real = shared.real.repeat_interleave(blocks, dim=0)[:, None, None].expand(-1, 1, size, -1)
        mask = torch.cat((real, mask), dim=3)
        if bias is not None:
            bias = torch.cat((_shared_bias(band, begin, blocks, size), bias.expand(len(query), -1, -1, -1)), dim=3)
    key, value = expand_heads(key, heads), expand_heads(value, heads)
    if bias is None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=call.dropout, scale=call.scale
        )
    bias = bias.masked_fill(~(mask | ~mask.any(-1, keepdim=True)), float("-inf"))  # rows that see nothing are padding
    out = F.scaled_dot_product_attention(
        query.float(), key.float(), value.float(), attn_mask=bias, dropout_p=call.dropout, scale=call.scale
    )
    return out.to(query.dtype)


def _shared_bias(band: _Band, begin: int, blocks: int, size: int) -> Tensor:
    """What the scores of the shared keys get, (N·n, H, size, G), for the blocks from number `begin` on."""
    assert band.shared is not None and band.call.bias is not None
    place = torch.arange(begin * size, (begin + blocks) * size, device=band.first.device).view(1, blocks, size)
    number = band.first[:, None, None] + place * band.step
    bias = band.call.bias(number[..., None] - band.shared.number[:, None, None])
    return bias.permute(1, 2, 0, 3, 4).flatten(0, 1)
