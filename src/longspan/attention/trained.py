"""Patterns on a trained model, whose attention then sees only the keys that the pattern shows.

A whole text runs on the pattern's fastest backend where the model's attention is plain SDPA. Everything else (chunks, decoding,
padding, softcaps) runs the model's own attention under the pattern's mask, a block of queries at a time. Tokens are numbered by
position.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from longspan.core.facts import ModelFacts
from longspan.engine.call import AttentionCall, AttentionShape
from longspan.engine.slices import Slices
from longspan.hf.call import LayerCall
from longspan.hf.site import Site, layer_number
from longspan.lm.base import Pattern
from longspan.util.errors import NotSupported

QUERIES_AT_ONCE = 512
"""Queries that share one mask."""


@dataclass(frozen=True)
class OnTrained(Pattern):
    """Base of the patterns that can be applied to trained models."""

    works_on = "pretrained, from scratch"
    why_not_exportable = "it changes what the attention sees, and a checkpoint only holds weights and settings"

    def check(self, facts: ModelFacts) -> None:
        if facts.absolute_positions:
            raise NotSupported(
                f"{self.name} is for texts past the window, and the absolute positions that {facts.architecture} adds to its "
                "embeddings end there; use a model with RoPE (Llama, Mistral, Qwen, Phi-3, Gemma, …)"
            )

    def attach(self, site: Site) -> None:
        site.attention(partial(self.attend, site))

    def attend(self, site: Site, call: LayerCall) -> Tensor:
        """Attention (B, H, Tq, D) of the call's queries to the keys that the pattern shows."""
        heads, new, total = call.query.shape[1], call.query.shape[2], call.key.shape[2]
        end = call.forward.once("end", lambda: int(call.position_ids.max()) + 1)
        shape = AttentionShape(heads, end, layer_number(call.module), causal=True)
        if self._is_whole(site, call):
            return self.run(AttentionCall(call.query, call.key, call.value, call.scale), shape)
        columns = call.forward.once(f"columns:{total}", lambda: self._columns(call, shape))
        query, key, value = map(Slices, (call.query, call.key, call.value))
        parts = []
        for start, visible in zip(range(0, new, QUERIES_AT_ONCE), columns, strict=True):
            rows = slice(start, min(start + QUERIES_AT_ONCE, new))
            part = call.part(rows, visible)
            part = replace(part, query=query[:, :, rows], key=key[:, :, visible], value=value[:, :, visible])
            queries, keys = part.position_ids, part.key_positions
            mask = self.mask(queries, keys, shape)
            if part.mask is None:
                numbers = torch.arange(total - new, total, device=visible.device)[rows]
                mask = mask & (visible <= numbers[:, None])
            else:
                mask = mask & part.mask
            parts.append(site.own_attention(part, mask, self.multiplicity(queries, keys, shape)))
        return torch.cat(parts, dim=2)

    def _is_whole(self, site: Site, call: LayerCall) -> bool:
        """Whether the call is plain self-attention of tokens 0, 1, 2 … by SDPA."""
        if call.query.shape[2] != call.key.shape[2] or call.mask is not None or call.softcap is not None:
            return False
        if call.dropout or call.sliding_window is not None or not site.plain_attention:
            return False
        numbers = torch.arange(call.query.shape[2], device=call.query.device)
        return call.forward.once("in order", lambda: bool((call.position_ids == numbers).all()))

    def _columns(self, call: LayerCall, shape: AttentionShape) -> list[Tensor]:
        """The columns of the keys that each block of queries sees, ascending."""
        blocks = call.position_ids.split(QUERIES_AT_ONCE, dim=-1)
        lowest, highest = (torch.stack(x).tolist() for x in ([b.min() for b in blocks], [b.max() for b in blocks]))
        keys, found = call.key_positions, []
        for low, high in zip(lowest, highest, strict=True):
            visible = torch.zeros(keys.shape[-1], dtype=torch.bool, device=keys.device)
            for first, last in self.ranges(low, high + 1, shape):
                visible |= ((keys >= first) & (keys < last)).any(0)
            found.append(visible.nonzero()[:, 0])
        return found
