"""Attention in which each query sees the keys from some place up to its own: the base of `window` and `bca`.

Queries pass in blocks, each with the keys that its queries can see, so no mask is as long as the input on both sides.
Places are positions, not columns: left-padded rows, chunks and single tokens see what a row alone would.
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
"""How many queries share one call of the model's attention: bounds the mask and the copies of keys."""


class Span(Method):
    """Base of the methods that show a query the `size` last tokens or fewer. The model computes its attention by itself."""

    size: int | None

    slots = frozenset({"attention", "span"})
    cost = "time n, cache n (all keys are kept; streaming:sinks=0 keeps a window of them)"
    why_not_exportable = "it changes what the attention sees, and a checkpoint only holds weights and settings"

    def first(self, positions: Tensor) -> Tensor:
        """The position of the first token that queries at `positions` see."""
        raise NotImplementedError

    def least(self, size: int) -> int:
        """How many tokens every query sees that has so many before it."""
        raise NotImplementedError

    def check(self, facts: ModelFacts) -> None:
        if facts.absolute_positions:
            raise NotSupported(
                f"{self.name} keeps relative distances within the window, and {facts.architecture} adds absolute positions to "
                "its embeddings, which grow all the same; use a model with RoPE (Llama, Mistral, Qwen, Phi-3, Gemma, …)"
            )
        short, least = facts.sliding_window, self.least(self.size or facts.window)
        if short is not None and short <= least and "full_attention" not in facts.layer_types:
            raise NotSupported(
                f"{self.name}: every layer of this model looks back {short:,} tokens only, so size={self.size or facts.window:,} "
                "changes nothing; use none, or a smaller size"
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
        new, held = call.query.shape[2], call.key.shape[2]
        # Layers that cache a sliding window only have fewer keys than the others.
        columns = call.forward.once(f"columns:{held}", lambda: self._first_columns(call))
        if columns is None:
            return site.own_attention(call, call.mask)
        query, key, value = map(Slices, (call.query, call.key, call.value))
        parts = []
        for start, left in zip(range(0, new, QUERIES_AT_ONCE), columns, strict=True):
            end = min(start + QUERIES_AT_ONCE, new)
            right = min(held, held - new + end + call.ahead)  # later keys are invisible to these queries
            rows, seen = slice(start, end), slice(left, right)
            part = call.part(rows, seen)
            part = replace(part, query=query[:, :, rows], key=key[:, :, seen], value=value[:, :, seen])
            parts.append(site.own_attention(part, self._mask(part)))
        return torch.cat(parts, dim=2)

    def _first_columns(self, call: LayerCall) -> list[int] | None:
        """For each block of queries the first column that one of its queries sees; None where all see all before them."""
        first = self.first(call.position_ids)
        if not bool((first > call.key_positions.amin(-1, keepdim=True)).any()):
            return None
        lowest = torch.stack([block.amin(-1) for block in first.split(QUERIES_AT_ONCE, dim=-1)], dim=-1)
        # Padding may carry any positions: the columns before the found one all lie below the lowest, whatever follows.
        rising = call.key_positions.cummax(-1).values
        columns = torch.searchsorted(rising.contiguous(), lowest.contiguous())
        return columns.clamp(max=rising.shape[-1] - 1).amin(0).tolist()

    def _mask(self, part: LayerCall) -> Tensor | None:
        """Which keys of `part`, whose first column is the first that is seen, its queries see: (B or 1, 1, Tq, Tk)."""
        new, held = part.query.shape[2], part.key.shape[2]
        if new == 1 and part.mask is None and part.position_ids.shape[0] == 1:
            return None
        near = part.key_positions[:, None, None, :] >= self.first(part.position_ids)[:, None, :, None]
        if part.mask is not None:
            return near & part.mask
        return near & near.new_ones(new, held).tril(held - new)
