"""Landmark attention over retrieved pages (Mohtashami & Jaggi 2023, arXiv 2305.16300, sections 3.2 and 3.3).

Queries are read a chunk of `local` pages at a time. A query sees its chunk up to itself, and `retrieve` of the pages before the
chunk, those whose landmarks score highest, under the grouped softmax.

    slot     0 … k            k + 1 …
             retrieved pages  the chunk         k = retrieve; a slot is block + 1 positions       (stingy positions)

To be scored, the last k pages before the chunk stand in slots 1 … k, where they are in truth if all of them are retrieved, and
all older ones in slot 0. Retrieved pages are put in order of time; the i-th, from 0, goes to slot i, or i + 1 if it is one of the
last k. So no position is ever past (k + 1 + local) (block + 1), however long the text. Where no more than k pages are before
the chunk all distances are true ones, and the result is that of the training form.

Keys are turned once, by their place within their page; a page's slot is given to the query, which is turned once for each slot.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from longspan.engine.retrieval.grouped import capped, grouped_softmax, wide

Pages = tuple[Tensor, Tensor]
"""Keys and values."""
_NONE = torch.iinfo(torch.int64).min
"""The rank of a page that is not there."""


@dataclass(frozen=True)
class Layout:
    """Sizes: tokens of a block, pages of a chunk (`local`), pages that are retrieved.

    `shared`: the queries that are read together in a chunk take the same pages, head by head.
    """

    block: int
    local: int
    retrieve: int
    shared: bool = False

    @property
    def size(self) -> int:
        """Slots of a page: its tokens and its landmark."""
        return self.block + 1

    @property
    def chunk(self) -> int:
        """Slots of a chunk."""
        return self.local * self.size


@dataclass(frozen=True)
class Chosen:
    """Which pages the queries take, all (B, H, T or 1, k) and in order of time: the page's number, the slot it stands in, and
    whether there is one (where less than k pages are before the chunk)."""

    page: Tensor
    slot: Tensor
    real: Tensor

    def last(self, count: int) -> Chosen:
        """The last `count` of them: where there are no more pages than that, the others are none."""
        begin = self.page.shape[-1] - count
        return Chosen(self.page[..., begin:], self.slot[..., begin:], self.real[..., begin:])


def query_positions(offset: Tensor, layout: Layout) -> Tensor:
    """(slots, B, T): where queries stand, seen from the first token of each slot 0 … k + local. offset (B, T): their place in
    the chunk."""
    slots = torch.arange(layout.retrieve + 1 + layout.local, device=offset.device)
    return offset + (layout.retrieve + 1 - slots)[:, None, None] * layout.size


def choose(queries: Tensor, landmarks: Tensor, before: Tensor, layout: Layout, scale: float) -> Chosen:
    """queries (S, B, H, T, D), turned for each slot; landmarks (B, H_kv, P, D) of all pages; before (B,): the number of pages
    before the chunk."""
    k, count = layout.retrieve, landmarks.shape[2]
    group = queries.shape[2] // landmarks.shape[1]
    old = queries[0].unflatten(1, (-1, group)) @ wide(landmarks)[:, :, None].transpose(-1, -2)  # (B, H_kv, group, T, P)
    number = torch.arange(count, device=before.device)
    old = old.masked_fill((number >= before[:, None] - k)[:, None, None, None], -torch.inf)
    last = before[:, None] - k + torch.arange(k, device=before.device)  # (B, k)
    index = last.clamp(min=0)[:, None, :, None].expand(-1, landmarks.shape[1], -1, landmarks.shape[-1])
    near = wide(landmarks.gather(2, index))
    turned = queries[1 : k + 1].unflatten(2, (-1, group))
    recent = torch.einsum("sbhgtd,bhsd->bhgts", turned, near)
    recent = recent.masked_fill((last < 0)[:, None, None, None], -torch.inf)
    scores = torch.cat((old, recent), dim=-1).flatten(1, 2) * scale
    if layout.shared:
        scores = scores.log_softmax(-1).nan_to_num(-torch.inf, neginf=-torch.inf).amax(2, keepdim=True)
    found, at = _ranked(scores).topk(k, dim=-1)
    is_recent, real = at >= count, found > _NONE
    page = torch.where(is_recent, at - count + (before - k)[:, None, None, None], at).masked_fill(~real, -1)
    page, order = page.sort(-1)
    is_recent, real = is_recent.gather(-1, order), real.gather(-1, order)
    slot = torch.arange(k, device=page.device) + is_recent.long()
    return Chosen(page.clamp(min=0), slot, real)


def _ranked(scores: Tensor) -> Tensor:
    """Scores (…, candidates) as integers without ties: of those equal to the 1,024th part the later one is more, and what is not
    there, -inf, is `_NONE`. In a model's first layer the landmarks' keys are all the same, and rounding would choose. Integers,
    since Apple's GPUs have no float64."""
    steps = (scores * 1024).round().masked_fill(scores == -torch.inf, 0).long()
    ranked = steps * 2**22 + torch.arange(scores.shape[-1], device=scores.device)
    return ranked.masked_fill(scores == -torch.inf, _NONE)


def attend(
    queries: Tensor,
    chosen: Chosen,
    fetch: Callable[[Tensor], Callable[[], Pages]],
    here: Pages,
    offset: Tensor,
    layout: Layout,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """Output (B, H, T, D) in the queries' dtype for queries (S, B, H, T, D) in float32 or wider, turned for each slot.

    chosen: as `choose` gives them, or the last of them. fetch: asked for pages (B, H, T or 1, k), gives what waits for their
    keys and values, (B, H, T or 1, k, size, D); the chunk is scored meanwhile. here: keys and values of the
    chunk's pages, (B, H_kv, local, size, D). offset (B, T): each query's place in the chunk.
    """
    size, k = layout.size, chosen.page.shape[-1]
    arriving = fetch(chosen.page)
    keys, values = here
    group = queries.shape[2] // keys.shape[1]
    near = queries[layout.retrieve + 1 :].unflatten(2, (-1, group))
    own = torch.einsum("sbhgtd,bhscd->bhgtsc", near, wide(keys)).flatten(1, 2)
    index = chosen.slot.expand(-1, -1, queries.shape[3], -1).permute(3, 0, 1, 2)[..., None]
    turned = queries.gather(0, index.expand(*index.shape[:-1], queries.shape[-1]))  # (k, B, H, T, D)
    far_keys, far_values = (wide(x[:, :, 0] if layout.shared else x) for x in arriving())
    kind = "bhsc" if layout.shared else "bhtsc"
    far = torch.einsum(f"sbhtd,{kind}d->bhtsc", turned, far_keys)
    scores = capped(torch.cat((far, own), dim=3) * scale, softcap)
    shown = torch.cat((chosen.real, chosen.real.new_ones(*chosen.real.shape[:3], layout.local)), dim=-1)
    weights = grouped_softmax(scores, (offset // size + k)[:, None], (offset % size)[:, None], shown)
    out = torch.einsum(f"bhtsc,{kind}d->bhtd", weights[..., :k, :], far_values)
    local = weights[..., k:, :].unflatten(1, (-1, group))
    return out + torch.einsum("bhgtsc,bhscd->bhgtd", local, wide(values)).flatten(1, 2)
