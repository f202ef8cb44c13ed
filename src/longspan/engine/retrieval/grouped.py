"""Grouped softmax of Landmark Attention (Mohtashami & Jaggi 2023, arXiv 2305.16300, section 3.1) over dense pages.

A page is `block` tokens and the landmark that stands for them. Two softmaxes and a product are one softmax over moved scores:

    weight(token j of an earlier page p) = S(l_p | top group) · S(s_j | page p)          (the paper's form)
                                         = exp(s_j + l_p - logsumexp(page p)) / sum      (this one)

with the tokens of the query's own page, as they are, in the same sum. So there is no scatter and no limit on the number of
pages. Queries go a few at a time, and in training their scores are made again in the backward pass.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from longspan.engine.slices import Slices

QUERIES_AT_ONCE = 256
"""Queries whose scores are held at once."""


def grouped_softmax(scores: Tensor, own: Tensor, offset: Tensor, shown: Tensor | None = None) -> Tensor:
    """Weights (…, pages, block + 1) in the dtype of scaled scores of that shape: they sum to 1, landmarks weigh 0.

    own (…): which page is the query's own; pages after it are not seen. offset (…): the query's place in its page; tokens of the
    page after it are not seen. shown (…, pages), boolean: which earlier pages are seen, where not all are. All broadcast.
    """
    pages, size = scores.shape[-2:]
    number = torch.arange(pages, device=scores.device)
    earlier = number < own[..., None]
    if shown is not None:
        earlier = earlier & shown
    inside = scores[..., :-1]
    moved = scores[..., -1:] - inside.logsumexp(-1, keepdim=True)
    place = torch.arange(size - 1, device=scores.device)
    mine = (number == own[..., None])[..., None] & (place <= offset[..., None, None])
    logits = (inside + torch.where(earlier[..., None], moved, 0.0)).masked_fill(
        ~(earlier[..., None] | mine), -torch.inf
    )
    return F.pad(logits.flatten(-2).softmax(-1).unflatten(-1, (pages, size - 1)), (0, 1))


def grouped_weights(scores: Tensor, block: int, first: int = 0) -> Tensor:
    """Weights (…, queries, keys) in float32 or wider from scaled scores of that shape.

    Key i is a landmark where i % (block + 1) == block, and query i is key first + i.
    """
    count, keys, size = *scores.shape[-2:], block + 1
    scores = F.pad(wide(scores), (0, -keys % size))
    at = torch.arange(first, first + count, device=scores.device)
    return grouped_softmax(scores.unflatten(-1, (-1, size)), at // size, at % size).flatten(-2)[..., :keys]


def grouped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block: int,
    scale: float,
    *,
    dropout: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """Output (B, H, n, D) in query's dtype for query (B, H, n, D), key and value (B, H_kv, n, D), all pages seen: the form in
    which a model is trained. Memory grows with n times `QUERIES_AT_ONCE`, in the backward pass too."""
    again = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    made, (queries, keys, values) = [], map(Slices, (query, key, value))
    for first in range(0, query.shape[2], QUERIES_AT_ONCE):
        end = min(first + QUERIES_AT_ONCE, query.shape[2])
        given = queries[:, :, first:end], keys[:, :, :end], values[:, :, :end], block, scale, first, dropout, softcap
        made.append(checkpoint(_some_queries, *given, use_reentrant=False) if again else _some_queries(*given))
    return torch.cat(made, dim=2)


def _some_queries(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block: int,
    scale: float,
    first: int,
    dropout: float,
    softcap: float | None,
) -> Tensor:
    with torch.autocast(query.device.type, enabled=False):
        grouped = wide(query).unflatten(1, (key.shape[1], -1))  # (B, H_kv, group, q, D)
        scores = capped((grouped * scale) @ wide(key)[:, :, None].transpose(-1, -2), softcap)
        weights = grouped_weights(scores, block, first)
        if dropout:  # with none it would be a copy of all weights
            weights = F.dropout(weights, dropout)
        return (weights @ wide(value)[:, :, None]).flatten(1, 2).to(query.dtype)


def wide(x: Tensor) -> Tensor:
    """In float32 or wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def capped(scores: Tensor, softcap: float | None) -> Tensor:
    """Scores pressed into -softcap … softcap, where a model does so."""
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)
