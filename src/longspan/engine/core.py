"""Dense attention: the reference formula, and the form through SDPA that methods call.

Shapes everywhere: query (B, H, Tq, D), key and value (B, H_kv, Tk, D) with H a multiple of H_kv, mask boolean and
broadcastable to (B, H, Tq, Tk) with True where a query sees a key. A query that sees none (padding) gets zeros, as SDPA
gives them: anything but a number would reach the other rows through the next layer's values.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def reference_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, softcap: float | None = None
) -> Tensor:
    """softmax(scale · q kᵀ) v by its formula, every score held at once, in the inputs' dtype."""
    scores = (query @ expand_heads(key, query.shape[1]).mT) * scale
    return reference_mix(scores, expand_heads(value, query.shape[1]), mask, softcap)


def reference_mix(scores: Tensor, value: Tensor, mask: Tensor, softcap: float | None = None) -> Tensor:
    """softmax(scores) v over the visible keys; scores (B, H, Tq, Tk) already scaled."""
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    wide = scores.double() if scores.dtype == torch.float64 else scores.float()
    sees = mask.any(-1, keepdim=True)
    weights = wide.masked_fill(~mask & sees, float("-inf")).softmax(-1) * sees
    return weights.to(value.dtype) @ value


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    *,
    dropout: float = 0.0,
    softcap: float | None = None,
    causal: bool = False,
) -> Tensor:
    """softmax(scale · q kᵀ) v through SDPA: (B, H, Tq, D).

    SDPA has no softcap; with one, the reference runs.

    causal: without a mask, each query sees the keys up to its own, the last query's being the last one.
    """
    queries, keys = query.shape[2], key.shape[2]
    if causal and mask is None and (softcap is not None or queries != keys):  # SDPA's first query has the first key
        mask, causal = causal_mask(queries, keys, query.device), False
    if softcap is not None:
        if mask is None:
            mask = query.new_ones(queries, keys, dtype=torch.bool)
        return reference_attention(query, key, value, mask, scale, softcap)
    grouped = key.shape[1] != query.shape[1]
    if grouped and mask is not None:  # grouped heads keep SDPA from its fused kernels when there is a mask
        key, value, grouped = expand_heads(key, query.shape[1]), expand_heads(value, query.shape[1]), False
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=grouped
    )


def with_zero_key(key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys and values with one more of zeros at their end, and the mask that shows it to every query. Its score is 0 and it adds
    nothing, so softmax over them is exp(x) / (1 + sum of exp(x)) over the others (Miller's softmax-off-by-one; the zero sink
    of Xiao 2024, arXiv 2309.17453, equation 2)."""
    key, value = (F.pad(x, (0, 0, 0, 1)) for x in (key, value))
    return key, value, None if mask is None else F.pad(mask, (0, 1), value=True)


def causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """(queries, keys) boolean, where the queries are the last of the keys."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def expand_heads(x: Tensor, heads: int) -> Tensor:
    """Key or value heads repeated so that there is one for every query head: (B, H_kv, T, D) → (B, heads, T, D)."""
    groups = heads // x.shape[1]
    if groups == 1:
        return x
    batch, kv_heads, length, width = x.shape
    return x[:, :, None].expand(batch, kv_heads, groups, length, width).reshape(batch, heads, length, width)


def distances(q_positions: Tensor, k_positions: Tensor) -> Tensor:
    """(B or 1, Tq, Tk): how far behind each query each key lies; negative for keys that come after it."""
    return q_positions[:, :, None] - k_positions[:, None, :]


def ending_at(positions: Tensor, count: int) -> Tensor:
    """(B or 1, count): of all keys, from those of the queries (B or 1, Tq), which are the last."""
    if count == positions.shape[1]:
        return positions
    return positions[:, -1:] - torch.arange(count - 1, -1, -1, device=positions.device)
