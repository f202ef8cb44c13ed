"""Causal attention over a rolling window on a GPU, by FlexAttention with a computed block mask.

Only blocks that the window touches are visited, and the mask is never materialised. The log-sum-exp comes back with the
output, so that other keys (sinks) can join the softmax.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from longspan.engine.blocks.tables import SIZE as BLOCK
from longspan.engine.blocks.tables import band
from longspan.engine.call import AttentionCall
from longspan.engine.compiling import compiled
from longspan.engine.core import expand_heads

QUERIES = 4096
"""Queries of one kernel call. One number, so that any prompt compiles once for each window."""
MOST_SHAPES = 32
"""Shapes compiled in one process, of some seconds each; further ones go through SDPA in blocks."""


_shapes: set[tuple] = set()


def serves(call: AttentionCall, key: Tensor, reach: int) -> bool:
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
        and _may_compile((reach, call.query.shape[:2], width, call.query.dtype, call.query.device))
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
        mask = band((QUERIES, span), window=window, offset=row + offset - left, device=query.device).mask()
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
    return compiled(flex_attention, 4 * MOST_SHAPES)
