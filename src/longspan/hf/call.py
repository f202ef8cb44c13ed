"""One call of attention by a layer of a Hugging Face decoder."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from longspan.engine.call import AttentionCall as AttentionCall
from longspan.engine.core import ending_at
from longspan.hf.forward import Forward


@dataclass(frozen=True, kw_only=True)
class LayerCall(AttentionCall):
    """Queries, keys and values of one layer, as its model calls its attention.

    query (B, H, Tq, D); key and value (B, H_kv, Tk, D), as the cache returned them; mask None or boolean (B, 1, Tq, Tk);
    position_ids (B or 1, Tq); extra: the model's other keyword arguments for its attention.
    """

    module: nn.Module
    position_ids: Tensor
    mask: Tensor | None = None
    sliding_window: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    forward: Forward = field(default_factory=Forward)
    """The record of the forward that this call is part of."""
    keys_at: Tensor | None = None
    """Positions (B or 1, Tk) of the keys, where they are not those that `key_positions` derives."""

    @property
    def key_positions(self) -> Tensor:
        """Positions (B or 1, Tk) of the keys: the queries' own without a cache; with one, consecutive up to the last query's."""
        if self.keys_at is not None:
            return self.keys_at
        return ending_at(self.position_ids, self.key.shape[2])

    @property
    def ahead(self) -> int:
        """How many keys after its own a query may see: 0, unless tokens of an image see one another."""
        if self.forward.causal or self.mask is None:
            return 0
        return self.forward.once(f"ahead:{self.mask.shape}", self._ahead)

    def _ahead(self) -> int:
        assert self.mask is not None
        new, total = self.mask.shape[-2:]
        columns = torch.arange(total, device=self.mask.device)
        last = torch.where(self.mask, columns, 0).amax(-1)
        return max(0, int((last - columns[total - new :]).max()))

    def part(self, queries: slice, keys: slice | Tensor) -> LayerCall:
        """The same call for some of the queries and some of the keys."""
        return replace(
            self,
            query=self.query[:, :, queries],
            key=self.key[:, :, keys],
            value=self.value[:, :, keys],
            mask=None if self.mask is None else self.mask[:, :, queries, keys],
            position_ids=self.position_ids[:, queries],
            keys_at=self.key_positions[:, keys],
        )
