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
    """key and value (B, H_kv, Tk, D) are as the cache returned them, mask is None or boolean (B, 1, Tq, Tk), position_ids are
    (B or 1, Tq). `extra` is what else the model says to its attention."""

    module: nn.Module
    position_ids: Tensor
    mask: Tensor | None = None
    sliding_window: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    forward: Forward = field(default_factory=Forward)
    """What belongs to the forward that this call is part of."""
    keys_at: Tensor | None = None
    """(B or 1, Tk), where the positions of the keys are known to be others than the usual."""

    @property
    def key_positions(self) -> Tensor:
        """(B or 1, Tk). Without a cache they are the queries' own, whatever these are; with one, keys end where queries end."""
        if self.keys_at is not None:
            return self.keys_at
        return ending_at(self.position_ids, self.key.shape[2])

    @property
    def ahead(self) -> int:
        """How many keys past its own place a query may see: none, unless tokens of an image see one another."""
        if self.forward.causal or self.mask is None:
            return 0
        return self.forward.once(f"ahead:{self.mask.shape}", self._ahead)

    def _ahead(self) -> int:
        assert self.mask is not None
        new, held = self.mask.shape[-2:]
        columns = torch.arange(held, device=self.mask.device)
        last = torch.where(self.mask, columns, 0).amax(-1)
        return max(0, int((last - columns[held - new :]).max()))

    def part(self, queries: slice, keys: slice | Tensor) -> LayerCall:
        """The same for some queries and some keys."""
        return replace(
            self,
            query=self.query[:, :, queries],
            key=self.key[:, :, keys],
            value=self.value[:, :, keys],
            mask=None if self.mask is None else self.mask[:, :, queries, keys],
            position_ids=self.position_ids[:, queries],
            keys_at=self.key_positions[:, keys],
        )
