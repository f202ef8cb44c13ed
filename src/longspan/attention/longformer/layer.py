"""Longformer's attention module: rows of global tokens have projections of their own."""

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
    """A projection that is initialised as a copy of `source`, also where a checkpoint has only `source`."""

    def __init__(self, source: nn.Linear):
        super().__init__(source.in_features, source.out_features, bias=source.bias is not None)
        self._source = (source,)  # in a tuple: its parameters belong to another module

    def draw_weights(self) -> None:
        """Copies the weights of `source`."""
        for target, source in zip(self.parameters(), self._source[0].parameters(), strict=True):
            initialization.copy_(target, source)


class LongformerAttention(LongspanAttention):
    """Attention under the pattern, in which all rows see the global tokens through the ordinary projections.

    The rows of global tokens are then replaced by softmax(q_g · k_g) v_g over all real tokens, with the second projections.
    """

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
        always_visible = self._global_mask(hidden_states, global_attention_mask, padding)
        out, weights = super().forward(
            hidden_states, attention_mask, rotation, *args, padding=padding, always_visible=always_visible, **kwargs
        )
        if always_visible is not None:
            some = chosen(always_visible)
            out = some.put(out, self._global_rows(hidden_states, some, rotation, padding))
        return out, weights

    def _global_mask(self, hidden: Tensor, mask: Tensor | None, padding: Tensor | None) -> Tensor | None:
        """The global tokens, boolean (B, T), by the caller's mask and the pattern's `globals`; None where there are none."""
        if self.is_causal:
            if mask is not None:
                raise NotSupported(
                    "a decoder has no global tokens, which would see later ones; leave global_attention_mask out"
                )
            return None
        if mask is not None and mask.shape != hidden.shape[:2]:
            raise NotSupported(
                f"global_attention_mask has shape {tuple(mask.shape)}, and the input has {tuple(hidden.shape[:2])}; pass one "
                "value per token"
            )
        no_tokens = torch.zeros(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        always_visible = no_tokens if mask is None else mask.bool()
        if first := cast(Any, self.pattern).globals:
            real = torch.ones_like(always_visible) if padding is None else padding
            always_visible = always_visible | (real.cumsum(1) <= first)
        always_visible = always_visible if padding is None else always_visible & padding
        return always_visible if bool(always_visible.any()) else None

    def _global_rows(
        self, hidden: Tensor, some: Chosen, rotation: tuple[Tensor, Tensor] | None, padding: Tensor | None
    ) -> Tensor:
        """The output (B, G, hidden) of the global tokens."""
        query = self._heads(self.q_global(some.of(hidden)))
        key, value = self._heads(self.k_global(hidden)), self._heads(self.v_global(hidden))
        if rotation is not None:
            cos, sin = (some.of(x.expand(len(hidden), -1, -1)) for x in rotation)
            query, key = rotated(query, (cos, sin)), rotated(key, rotation)
        bias = self.place.bias if self.place.defines("bias") else None
        dropout = self.config.attention_dropout if self.training else 0.0
        call = AttentionCall(query, key, value, self.scaling * self.place.score_scale, padding, bias, dropout)
        return self.o_proj(attend_everywhere(call, some.index).transpose(1, 2).flatten(2))
