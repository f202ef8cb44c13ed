"""Attention with global tokens: rows of their own, from projections of their own."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import initialization

from longspan.engine.call import AttentionCall
from longspan.engine.global_tokens import Chosen, attend_everywhere, chosen
from longspan.lm.layers import LongspanAttention, rotated
from longspan.util.errors import NotSupported


class LinearCopy(nn.Linear):
    """A projection that begins as a copy of `source`, also where a checkpoint holds only that."""

    def __init__(self, source: nn.Linear):
        super().__init__(source.in_features, source.out_features, bias=source.bias is not None)
        self._source = (source,)  # in a tuple: its parameters belong to another module

    def draw_weights(self) -> None:
        for target, source in zip(self.parameters(), self._source[0].parameters(), strict=True):
            initialization.copy_(target, source)


class LongformerAttention(LongspanAttention):
    """Local rows under the pattern, which all see the global tokens through the ordinary projections; the rows of global
    tokens are written over them: softmax(q_g · k_g) v_g over all real tokens. Only those rows use the second projections."""

    q_global: LinearCopy
    k_global: LinearCopy
    v_global: LinearCopy

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **settings)
        if not self.is_causal:
            for name in ("q", "k", "v"):
                setattr(self, f"{name}_global", LinearCopy(getattr(self, f"{name}_proj")))

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotation: tuple[Tensor, Tensor] | None = None,
        *args: Any,
        padding: Tensor | None = None,
        global_attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        always_visible = self._shown(hidden_states, global_attention_mask, padding)
        out, weights = super().forward(
            hidden_states, attention_mask, rotation, *args, padding=padding, always_visible=always_visible, **kwargs
        )
        if always_visible is not None:
            some = chosen(always_visible)
            out = some.put(out, self._global_rows(hidden_states, some, rotation, padding))
        return out, weights

    def _shown(self, hidden: Tensor, given: Tensor | None, padding: Tensor | None) -> Tensor | None:
        """Which tokens are global, boolean (B, T); None where none is."""
        if self.is_causal:
            if given is not None:
                raise NotSupported(
                    "a decoder has no global tokens: what they see lies ahead; leave global_attention_mask out"
                )
            return None
        if given is not None and given.shape != hidden.shape[:2]:
            raise NotSupported(
                f"global_attention_mask says for every token whether it is global, {tuple(hidden.shape[:2])}; this one is "
                f"{tuple(given.shape)}"
            )
        always_visible = (
            torch.zeros(hidden.shape[:2], dtype=torch.bool, device=hidden.device) if given is None else given.bool()
        )
        if first := cast(Any, self.pattern).globals:
            real = torch.ones_like(always_visible) if padding is None else padding
            always_visible = always_visible | (real.cumsum(1) <= first)
        always_visible = always_visible if padding is None else always_visible & padding
        return always_visible if bool(always_visible.any()) else None

    def _global_rows(
        self, hidden: Tensor, some: Chosen, rotation: tuple[Tensor, Tensor] | None, padding: Tensor | None
    ) -> Tensor:
        """(B, G, hidden): what the chosen tokens get."""
        query = self._heads(self.q_global(some.of(hidden)))
        key, value = self._heads(self.k_global(hidden)), self._heads(self.v_global(hidden))
        if rotation is not None:
            cos, sin = (some.of(x.expand(len(hidden), -1, -1)) for x in rotation)
            query, key = rotated(query, (cos, sin)), rotated(key, rotation)
        bias = self.place.bias if self.place.defines("bias") else None
        dropout = self.config.attention_dropout if self.training else 0.0
        call = AttentionCall(query, key, value, self.scaling * self.place.score_scale, padding, bias, dropout)
        return self.o_proj(attend_everywhere(call, some.index).transpose(1, 2).flatten(2))
