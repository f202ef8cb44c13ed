"""Attention over the highest-scoring states of a long text, in bounded memory.

A query meets the states themselves, (N, d), not keys made of them: whoever calls has moved the keys' projection to the query
and does the values' projection afterwards. So one store serves every layer and every head. `nearest` finds the highest scores
exactly, a block of states at a time; `FaissIndex` asks faiss for them. `attend` goes over blocks of queries, and where
gradients are wanted each block is computed again in the backward pass, so neither keeps what it gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from longspan.util.errors import NotSupported

SCORES_AT_ONCE = 2**26
"""Scores held at one time while searching."""
GATHERED_AT_ONCE = 2**26
"""Elements of states gathered at one time for the queries that picked them."""

Pick = Callable[[Tensor], Tensor]
"""From queries (Q, d) to the numbers (Q, k) of the states that each of them meets; -1 for a place left empty."""
Kind = Literal["faiss", "ivf"]


def attend(queries: Tensor, states: Tensor, pick: Pick | None, k: int, dropout: float = 0.0) -> Tensor:
    """Softmax attention of scaled queries (Q, d) over the states (N, d) that `pick` names for them, k a query, as (Q, d);
    over all states where `pick` is None. Scores and sums are float32 at least. dropout: of the weights."""
    size = max(1, SCORES_AT_ONCE // (4 * k))
    blocks = _picked(queries, states, pick, k, size) if pick else ((q, None) for q in queries.split(size))
    again = torch.is_grad_enabled() and (queries.requires_grad or states.requires_grad)
    parts = [
        checkpoint(_over, some, states, picks, dropout, use_reentrant=False)
        if again
        else _over(some, states, picks, dropout)
        for some, picks in blocks
    ]
    return torch.cat(parts)


def nearest(queries: Tensor, states: Tensor, k: int) -> Tensor:
    """The numbers (Q, k) of the states (N, d) with the highest inner products with each of queries (Q, d), highest first.
    Exact. Needs k ≤ N. Of the scores no more than about `SCORES_AT_ONCE` exist at one time."""
    with torch.no_grad():
        blocks = queries.split(max(1, SCORES_AT_ONCE // (4 * k)))
        return torch.cat([_nearest(some, states, k) for some in blocks])


def nearest_among(queries: Tensor, parts: Iterable[Tensor], k: int) -> Tensor:
    """As `nearest`, for states that come in parts (n, d), one after another: the best k so far are kept beside each part."""
    best, where = queries.new_empty(len(queries), 0), queries.new_empty(len(queries), 0, dtype=torch.long)
    start = 0
    with torch.no_grad():
        for part in parts:
            scores, index = (queries @ part.mT).topk(min(k, len(part)), dim=1)
            best, order = torch.cat((best, scores), dim=1).topk(min(k, best.shape[1] + scores.shape[1]), dim=1)
            where = torch.cat((where, index + start), dim=1).gather(1, order)
            start += len(part)
    return where


class FaissIndex:
    """Inner-product search by faiss, on the CPU.

    `faiss` is exact; `ivf` looks into `probes` of N / 128 lists, and then only the search is approximate: `attend`
    takes exact scores of what was found. Raises `NotSupported` without faiss.
    """

    def __init__(self, states: Tensor, kind: Kind, probes: int):
        faiss = need_faiss()
        count, width = states.shape
        lists = max(1, count // 128)
        recipe = "Flat" if kind == "faiss" else f"IVF{lists},Flat"
        self.index = faiss.index_factory(width, recipe, faiss.METRIC_INNER_PRODUCT)
        vectors = states.detach().float().cpu().numpy()
        self.index.train(vectors)
        self.index.add(vectors)
        if kind == "ivf":
            self.index.nprobe = min(probes, lists)

    def add(self, states: Tensor) -> None:
        """More states (n, d), numbered after those that are there.

        Of `faiss`, whose search stays exact.
        """
        self.index.add(states.detach().float().cpu().numpy())

    def __call__(self, queries: Tensor, k: int) -> Tensor:
        """As `nearest`; -1 where the lists that were looked into hold fewer than k."""
        _, found = self.index.search(queries.detach().float().cpu().numpy(), k)
        return torch.from_numpy(found).to(queries.device)


def need_faiss() -> Any:
    """The module faiss. Raises `NotSupported` where it is not installed."""
    try:
        import faiss
    except ImportError as error:
        raise NotSupported(
            "faiss is not installed: pip install 'longspan[knn]', or use search=torch, which is exact and runs everywhere"
        ) from error
    return faiss


def _picked(queries: Tensor, states: Tensor, pick: Pick, k: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Queries with their picks: searched for in large blocks, handed on in small ones, whose states are then gathered."""
    few = max(1, GATHERED_AT_ONCE // (k * states.shape[1]))
    for some in queries.split(size):
        picks = pick(some.detach()).to(torch.int32)
        yield from zip(some.split(few), picks.split(few), strict=True)


def _over(queries: Tensor, states: Tensor, picks: Tensor | None, dropout: float) -> Tensor:
    wide = torch.promote_types(states.dtype, torch.float32)
    query = queries.to(wide)
    if picks is None:
        every = states.to(wide)
        return (F.dropout((query @ every.mT).softmax(-1), dropout) @ every).to(queries.dtype)
    found = states.index_select(0, picks.clamp(min=0).flatten()).unflatten(0, picks.shape).to(wide)
    scores = (found @ query[:, :, None]).squeeze(-1).masked_fill(picks < 0, float("-inf"))
    weights = F.dropout(scores.softmax(-1), dropout)
    return (weights[:, None] @ found).squeeze(1).to(queries.dtype)


def _nearest(queries: Tensor, states: Tensor, k: int) -> Tensor:
    return nearest_among(queries, states.split(max(1, SCORES_AT_ONCE // len(queries))), k)
