"""Attention under a position scheme, for every layer of a model of ours.

The plain form computes scores in float32, adds what the scheme says, and takes the softmax, a block of queries at a time,
so that memory grows with the length and not with its square. It runs everywhere, trains everywhere and says what is right.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from longspan.engine.core import attention, expand_heads, reference_mix
from longspan.positions.scheme import Place, distances

SCHEME = "longspan_scheme"
"""The attention implementation of models whose scheme takes part in the scores."""
SCORES_AT_ONCE = 2**26
"""How many scores of a batch are held at once outside training: 256 MB in float32."""


def scheme_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    position_ids: Tensor | None = None,
    pair_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function registered with transformers. query (B, H, Tq, D), key and value (B, H_kv, Tk, D), mask None or boolean
    (B, 1, Tq, Tk), pair_bias None or (B or 1, H, Tq, Tk); returns (B, Tq, H, D)."""
    place = cast(Place, module.place)
    assert position_ids is not None, "the model gives positions to every layer"
    queries, keys = position_ids, key_positions(position_ids, key.shape[2])
    query, key = place.turn(query, key, queries, keys)
    scale = place.query_scale(queries)
    if scale is not None:
        query = query * scale[:, None, :, None].to(query.dtype)
    scaling *= place.score_scale
    causal = bool(module.is_causal) and attention_mask is None and query.shape[2] > 1
    if pair_bias is None and not place.has("bias"):
        if causal and query.shape[2] != key.shape[2]:
            attention_mask, causal = _causal(query, 0, query.shape[2], key.shape[2]), False
        out = attention(query, key, value, attention_mask, scaling, dropout=dropout, causal=causal)
        return out.transpose(1, 2).contiguous(), None
    blocks = []
    for start, end in _blocks(query, key):
        mask = _causal(query, start, end, key.shape[2]) if causal else attention_mask
        if mask is None:
            mask = query.new_ones(1, 1, 1, 1, dtype=torch.bool)
        elif mask.shape[2] == query.shape[2] and not causal:
            mask = mask[:, :, start:end]
        asked = queries[:, start:end]
        bias = relative_bias(place, asked, keys) if pair_bias is None else pair_bias[:, :, start:end]
        scores = query[:, :, start:end].float() @ expand_heads(key, query.shape[1]).float().mT
        mixed = _mix(scores * scaling + bias, value, mask, dropout, query.dtype)
        blocks.append(mixed)
    return torch.cat(blocks, dim=2).transpose(1, 2).contiguous(), None


def relative_bias(place: Place, queries: Tensor, keys: Tensor) -> Tensor:
    """(B or 1, H, Tq, Tk) from a scheme that knows distances; queries (B or 1, Tq), keys (B or 1, Tk) positions. Where both
    run without a gap, as they mostly do, each distance is asked for once and the rows are views of one another."""
    apart = distances(queries, keys)
    if _consecutive(queries) and _consecutive(keys):
        first = int(apart[0, 0, -1])
        line = torch.arange(first, first + queries.shape[1] + keys.shape[1] - 1, device=keys.device)
        return place.bias(line).unfold(-1, keys.shape[1], 1).flip(-1)[None]
    return place.bias(apart).transpose(0, 1)


def key_positions(positions: Tensor, count: int) -> Tensor:
    """(B or 1, count): of all keys, from those of the queries (B or 1, Tq), which are the last."""
    if count == positions.shape[1]:
        return positions
    return positions[:, -1:] - torch.arange(count - 1, -1, -1, device=positions.device)


def _consecutive(positions: Tensor) -> bool:
    if positions.shape[0] > 1 and not bool((positions == positions[:1]).all()):
        return False
    return positions.shape[1] < 2 or bool((positions[0].diff() == 1).all())


def _blocks(query: Tensor, key: Tensor) -> list[tuple[int, int]]:
    """Where blocks of queries begin and end. With gradients all scores are kept anyway, so there is one block."""
    total = query.shape[2]
    size = total
    if not (torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)):
        size = max(1, SCORES_AT_ONCE // (query.shape[0] * query.shape[1] * key.shape[2]))
    return [(start, min(start + size, total)) for start in range(0, total, size)]


def _causal(query: Tensor, start: int, end: int, keys: int) -> Tensor:
    """(1, 1, end - start, keys), for queries that are the last of the keys."""
    rows = torch.arange(start, end, device=query.device)[:, None] + keys - query.shape[2]
    return (torch.arange(keys, device=query.device) <= rows)[None, None]


def _mix(scores: Tensor, value: Tensor, mask: Tensor, dropout: float, dtype: torch.dtype) -> Tensor:
    values = expand_heads(value, scores.shape[1])
    if not dropout:
        return reference_mix(scores, values, mask)
    weights = reference_mix(scores, torch.eye(scores.shape[-1], device=scores.device, dtype=dtype), mask)
    return torch.nn.functional.dropout(weights, dropout) @ values


AttentionInterface.register(SCHEME, scheme_attention)
AttentionMaskInterface.register(SCHEME, AttentionMaskInterface()["sdpa"])
