"""Causal attention over a rolling window on a GPU: FlexAttention with a block mask built from the window's own arithmetic.

Only blocks that the window touches are visited, and the mask is never materialised: its block indices are computed in
O(queries/128 · window/128). The log-sum-exp comes back with the output, so that other keys (sinks) can join the softmax.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from longspan.engine.core import expand_heads

if TYPE_CHECKING:
    from longspan.apply import Attend

BLOCK = 128
QUERIES = 4096
"""Queries of one kernel call. One number, so that any prompt compiles once for each window."""
MOST_SHAPES = 6
"""Shapes compiled in one process: past torch's limit of eight it would fall back to holding every score, without a word."""


_shapes: set[tuple] = set()


def serves(call: Attend, key: Tensor, reach: int) -> bool:
    """Whether this path can run the call; what it cannot run goes through SDPA in blocks, with the same result."""
    new, width = call.query.shape[2], call.query.shape[3]
    return (
        call.query.is_cuda
        and new % QUERIES == 0
        and key.shape[2] > 0
        and width in (16, 32, 64, 128, 256)
        and call.softcap is None
        and call.dropout == 0
        and not (torch.is_grad_enabled() and call.query.requires_grad)
        and _may_compile((reach, call.query.shape[:2], width, call.query.dtype))
    )


def _may_compile(shape: tuple) -> bool:
    if shape not in _shapes and len(_shapes) < MOST_SHAPES:
        _shapes.add(shape)
    return shape in _shapes


def window_attention(
    query: Tensor, key: Tensor, value: Tensor, offset: int, window: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention in which query row r sees the columns c with 0 <= r + offset - c < window.

    query (B, H, Tq, D), key and value (B, H_kv, Tk, D). Returns the output (B, H, Tq, D) and the natural logarithm of each
    row's sum of exponentials (B, H, Tq), float32; a row that sees nothing has zeros and -inf.
    """
    key, value = expand_heads(key, query.shape[1]), expand_heads(value, query.shape[1])
    span = -(-(window - 1 + QUERIES) // BLOCK) * BLOCK  # keys that one call's queries can see, in whole blocks
    parts = []
    for row in range(0, query.shape[2], QUERIES):
        left = max(0, row + offset - window + 1)
        near = [x[:, :, left : left + span] for x in (key, value)]
        if (short := span - near[0].shape[2]) > 0:  # columns past the last query: never seen
            near = [F.pad(x, (0, 0, 0, short)) for x in near]
        mask = _block_mask(QUERIES, span, row + offset - left, window, query.device)
        rows = query[:, :, row : row + QUERIES]
        parts.append(_compiled()(rows, *near, block_mask=mask, scale=scale, return_aux=AuxRequest(lse=True)))
    return torch.cat([out for out, _ in parts], dim=2), torch.cat([aux.lse for _, aux in parts], dim=2)


def join(out: Tensor, lse: Tensor, scores: Tensor, values: Tensor) -> Tensor:
    """Adds a few more keys to a finished softmax: `scores` (B, H, Tq, S) float32, scaled, -inf where unseen; `values`
    (B, H_kv, S, D)."""
    total = torch.logsumexp(torch.cat((lse[..., None], scores), dim=-1), dim=-1, keepdim=True)
    mine = torch.exp(lse[..., None] - total)
    others = torch.exp(scores - total).to(values.dtype) @ expand_heads(values, out.shape[1])
    return torch.where(mine > 0, out * mine.to(out.dtype), 0) + others


@functools.lru_cache(maxsize=1)
def _compiled() -> Callable:
    return torch.compile(flex_attention, dynamic=False)


@functools.lru_cache(maxsize=32)
def _block_mask(queries: int, keys: int, offset: int, window: int, device: torch.device) -> BlockMask:
    """Blocks that the window touches, those inside it marked as full so that the kernel skips the mask there."""
    blocks = torch.arange(queries // BLOCK, device=device)
    first_row = blocks * BLOCK + offset
    last_row = first_row + BLOCK - 1
    low = (first_row - window + 1).clamp(min=0) // BLOCK
    high = last_row.clamp(max=keys - 1) // BLOCK  # before the first key: -1, no block
    width = min(-(-(window + 2 * BLOCK) // BLOCK) + 1, -(-keys // BLOCK))
    index = low[:, None] + torch.arange(width, device=device)
    touched = index <= high[:, None]
    start, end = index * BLOCK, index * BLOCK + BLOCK - 1
    full = touched & (end <= first_row[:, None]) & (start >= (last_row - window + 1)[:, None]) & (end < keys)
    parts = [_compact(index, chosen) for chosen in (touched & ~full, full)]
    (partial_count, partial), (full_count, full_index) = parts
    shift, reach = torch.tensor(offset, device=device), torch.tensor(window, device=device)

    def visible(b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        distance = row + shift - column
        return (distance >= 0) & (distance < reach)

    return BlockMask.from_kv_blocks(
        partial_count,
        partial,
        full_count,
        full_index,
        BLOCK_SIZE=BLOCK,
        mask_mod=visible,
        seq_lengths=(queries, keys),
        compute_q_blocks=False,
    )


def _compact(index: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Counts (1, 1, rows) and the chosen block numbers moved to the front (1, 1, rows, width), int32. Both index tensors
    of a mask must have one width: kernels silently read narrower ones wrongly."""
    order = (~chosen).int().argsort(dim=-1, stable=True)
    moved = index.gather(1, order).clamp(min=0)
    count = chosen.sum(-1)
    moved = torch.where(torch.arange(index.shape[1], device=index.device) < count[:, None], moved, 0)
    return count.int()[None, None], moved.int()[None, None]
