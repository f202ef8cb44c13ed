"""Attention to the keys from a first position up to the query's own: the base of `window` and `bca` on trained models.

Queries run in blocks, each with the keys that its queries see, so no mask is as long as the input in both dimensions. Keys are
selected by position and not by column: left-padded rows, chunks and single tokens see the same keys as one row alone.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from longspan.core.facts import ModelFacts
from longspan.core.method import Method
from longspan.engine.slices import Slices
from longspan.hf.call import LayerCall
from longspan.hf.site import Site
from longspan.util.errors import NotSupported

QUERIES_AT_ONCE = 512
"""Queries in one call of the model's attention, which bounds the mask and the copies of keys."""


class Span(Method):
    """Base of the methods in which a query sees at most the last `size` tokens, under the model's own attention."""

    size: int | None

    slots = frozenset({"attention", "span"})
    cost = "time n, cache n (all keys are kept; streaming:sinks=0 keeps a window of them)"
    why_not_exportable = "it changes what the attention sees, and a checkpoint only holds weights and settings"

    def first(self, positions: Tensor) -> Tensor:
        """The position of the first key that each query sees; `positions` (B or 1, T) are the queries'."""
        raise NotImplementedError

    def least(self, size: int) -> int:
        """The number of keys, at least, that a query with `size` or more tokens before it sees."""
        raise NotImplementedError

    def check(self, facts: ModelFacts) -> None:
        if facts.absolute_positions:
            raise NotSupported(
                f"{self.name} bounds relative distances, and {facts.architecture} adds absolute positions to its embeddings, "
                "which grow with the text; use a model with RoPE (Llama, Mistral, Qwen, Phi-3, Gemma, …)"
            )
        short, least = facts.sliding_window, self.least(self.size or facts.window)
        if short is not None and short <= least and "full_attention" not in facts.layer_types:
            raise NotSupported(
                f"{self.name}: every layer of {facts.architecture} sees the last {short:,} tokens only, so "
                f"size={self.size or facts.window:,} changes nothing; use none, or a smaller size"
            )

    def reach(self, facts: ModelFacts) -> int | None:
        return None

    def neutral_length(self) -> int:
        return self.size or 0

    def keys_seen(self, facts: ModelFacts, length: int) -> int:
        return min(length, self.size or facts.window)

    def attach(self, site: Site) -> None:
        site.attention(partial(self.attend, site))

    def attend(self, site: Site, call: LayerCall) -> Tensor:
        """Attention (B, H, Tq, D) of the call's queries to the keys that each of them sees."""
        new, total = call.query.shape[2], call.key.shape[2]
        # Layers whose cache keeps a sliding window have fewer keys than the others.
        columns = call.forward.once(f"columns:{total}", lambda: self._first_columns(call))
        if columns is None:
            return site.own_attention(call, call.mask)
        query, key, value = map(Slices, (call.query, call.key, call.value))
        parts = []
        for start, left in zip(range(0, new, QUERIES_AT_ONCE), columns, strict=True):
            end = min(start + QUERIES_AT_ONCE, new)
            right = min(total, total - new + end + call.ahead)  # later keys are invisible to these queries
            rows, visible = slice(start, end), slice(left, right)
            part = call.part(rows, visible)
            part = replace(part, query=query[:, :, rows], key=key[:, :, visible], value=value[:, :, visible])
            parts.append(site.own_attention(part, self._mask(part)))
        return torch.cat(parts, dim=2)

    def _first_columns(self, call: LayerCall) -> list[int] | None:
        """The first column of keys that each block of queries sees; None where every query sees all keys before it."""
        first = self.first(call.position_ids)
        if not bool((first > call.key_positions.amin(-1, keepdim=True)).any()):
            return None
        lowest = torch.stack([block.amin(-1) for block in first.split(QUERIES_AT_ONCE, dim=-1)], dim=-1)
        # Padding may have any positions: all columns before the one that is found are below the lowest, whatever follows.
        rising = call.key_positions.cummax(-1).values
        columns = torch.searchsorted(rising.contiguous(), lowest.contiguous())
        return columns.clamp(max=rising.shape[-1] - 1).amin(0).tolist()

    def _mask(self, part: LayerCall) -> Tensor | None:
        """The mask (B or 1, 1, Tq, Tk) of `part`; None where its one query sees all its keys."""
        new, total = part.query.shape[2], part.key.shape[2]
        if new == 1 and part.mask is None and part.position_ids.shape[0] == 1:
            return None
        near = part.key_positions[:, None, None, :] >= self.first(part.position_ids)[:, None, :, None]
        if part.mask is not None:
            return near & part.mask
        return near & near.new_ones(new, total).tril(total - new)
