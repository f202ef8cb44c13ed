"""A layer of a `longspan.lm` model: attention under a position scheme, then a gated feed-forward network, each after a norm.

Norm, feed-forward network and rotation are transformers' own; a pattern or a mixer may have an attention module of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, EncoderDecoderCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaMLP, eager_attention_forward, rotate_half

from longspan.engine.call import Pattern
from longspan.engine.chunked import in_chunks
from longspan.lm.attention import SCHEME
from longspan.lm.configuration import LongspanConfig
from longspan.lm.reversible import Branch
from longspan.lm.state import rolling_of
from longspan.positions.scheme import PositionEncoding
from longspan.util.errors import NotSupported


class LongspanAttention(nn.Module):
    """Self-attention, under a pattern where there is one, or cross-attention (`cross`), which has no positions."""

    def __init__(
        self,
        config: LongspanConfig,
        layer_idx: int,
        encoding: PositionEncoding,
        *,
        causal: bool,
        cross: bool = False,
        pattern: Pattern | None = None,
    ):
        super().__init__()
        self.pattern = pattern
        assert config.head_dim is not None and config.num_key_value_heads is not None
        self.config, self.layer_idx, self.head_dim = config, layer_idx, config.head_dim
        self.is_causal, self.cross = causal, cross
        self.zero_key = config.sink == "zero" and not cross
        self.scaling = self.head_dim**-0.5
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self._place = (encoding,)  # in a tuple: its parameters belong to the model, once
        width, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(width, config.num_attention_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, width, bias=bias)

    @property
    def place(self) -> PositionEncoding:
        """The position encoding, whose parameters belong to the model."""
        return self._place[0]

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotation: tuple[Tensor, Tensor] | None = None,
        past_key_values: Cache | None = None,
        encoder_states: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """The output (B, T, hidden) before the residual, and the attention weights where the implementation returns them.

        hidden_states (B, T, hidden); rotation: (cos, sin), each (B or 1, T, W); encoder_states (B, Tk, hidden) of
        cross-attention.
        """
        query = self._heads(self.q_proj(hidden_states))
        key, value = self._keys(hidden_states, encoder_states, past_key_values)
        if rotation is not None:
            query, key = rotated(query, rotation), rotated(key, rotation)
        if past_key_values is not None and not self.cross:
            key, value = self._update(past_key_values, key, value, kwargs)
        out, weights = self._interface()(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), weights

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (B, H, T, D) rotated by cos and sin (B or 1, T, W), for methods that are applied to the model."""
        return rotated(x, (cos, sin))

    def _heads(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        return x.view(batch, length, -1, self.head_dim).transpose(1, 2)

    def _keys(self, hidden: Tensor, encoder_states: Tensor | None, cache: Cache | None) -> tuple[Tensor, Tensor]:
        if not self.cross:
            return self._heads(self.k_proj(hidden)), self._heads(self.v_proj(hidden))
        if isinstance(cache, EncoderDecoderCache) and cache.is_updated.get(self.layer_idx):
            layer: Any = cache.cross_attention_cache.layers[self.layer_idx]
            return layer.keys, layer.values
        assert encoder_states is not None
        key, value = self._heads(self.k_proj(encoder_states)), self._heads(self.v_proj(encoder_states))
        if isinstance(cache, EncoderDecoderCache):
            key, value = cache.cross_attention_cache.update(key, value, self.layer_idx)
            cache.is_updated[self.layer_idx] = True
        return key, value

    def _update(self, cache: Cache, key: Tensor, value: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The cached keys and values, to which the new ones are added.

        Where the pattern sees a window only, the cache keeps no more of them, unless gradients must reach what it keeps.
        """
        window = self.pattern.cached() if self.pattern is not None else None
        learns = torch.is_grad_enabled() and key.requires_grad
        rolling = None
        if window and self.config._attn_implementation == SCHEME and not learns:
            rolling = rolling_of(cache, self.layer_idx, *window)
        if rolling is not None:
            rolling.see_padding(kwargs.get("padding"), key.shape[2])
        key, value = cache.update(key, value, self.layer_idx)
        kwargs["rolling"] = rolling
        return key, value

    def _interface(self) -> Any:
        name = self.config._attn_implementation
        if self.cross:
            return ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", eager_attention_forward)
        if self.pattern is not None or not self.place.plain or self.zero_key:
            self._refuse_others(str(name))
        return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)

    def _refuse_others(self, name: str) -> None:
        if not name.startswith("longspan"):
            what = f"position={self.config.position} changes the scores"
            if self.pattern is not None:
                what = f"attention={self.pattern.spec} hides keys"
            elif self.zero_key:
                what = "sink=zero changes the softmax"
            raise NotSupported(
                f"{what}, which attn_implementation={name!r} does not compute; leave attn_implementation out, or use {SCHEME!r}"
            )


def rotated(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """x (B, H, T, D) whose first W channels are rotated by (cos, sin), each (B or 1, T, W)."""
    cos, sin = rotation[0].unsqueeze(1), rotation[1].unsqueeze(1)
    width = cos.shape[-1]
    if width < x.shape[-1]:
        return torch.cat((rotated(x[..., :width], rotation), x[..., width:]), dim=-1)
    return (x * cos + rotate_half(x) * sin).to(x.dtype)  # tables are float32 under autocast


class LongspanLayer(GradientCheckpointingLayer):
    """Attention, cross-attention where there is any, and a feed-forward network, each a branch of the residual stream."""

    def __init__(
        self, config: LongspanConfig, layer_idx: int, encoding: PositionEncoding, *, causal: bool, cross: bool = False
    ):
        super().__init__()
        attentions = config.attentions_of(causal=causal)
        attention = attentions[layer_idx % len(attentions)]
        self.self_attn = attention.build(config, layer_idx, encoding, causal=causal)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if not attention.replaces_mlp:
            self.mlp = LlamaMLP(config)
            self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if cross:
            self.cross_attn = LongspanAttention(config, layer_idx, encoding, causal=False, cross=True)
            self.cross_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.mlp_chunk = config.mlp_chunk

    def dropped(self, x: Tensor) -> Tensor:
        """x after dropout, which is skipped where its rate is 0."""
        return self.dropout(x) if self.dropout.p and self.training else x

    def branches(self) -> list[Branch]:
        """The branches in order: each takes the residual stream and `forward`'s keyword arguments, and returns what is added to
        it."""
        branches: list[Branch] = [self.attend]
        if hasattr(self, "cross_attn"):
            branches.append(self.look)
        if hasattr(self, "mlp"):
            branches.append(self.feed)
        return branches

    def attend(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotation: tuple[Tensor, Tensor] | None = None,
        past_key_values: Cache | None = None,
        encoder_states: Tensor | None = None,
        encoder_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The self-attention branch (B, T, hidden)."""
        if isinstance(past_key_values, EncoderDecoderCache):
            past_key_values = past_key_values.self_attention_cache
        states = self.input_layernorm(hidden_states)
        out, _ = self.self_attn(states, attention_mask, rotation, past_key_values, **kwargs)
        return self.dropped(out)

    def look(
        self,
        hidden_states: Tensor,
        past_key_values: Cache | None = None,
        encoder_states: Tensor | None = None,
        encoder_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The cross-attention branch (B, T, hidden)."""
        states = self.cross_layernorm(hidden_states)
        out, _ = self.cross_attn(states, encoder_mask, None, past_key_values, encoder_states)
        return self.dropped(out)

    def feed(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """The feed-forward branch (B, T, hidden)."""

        def network(states: Tensor) -> Tensor:
            return self.dropped(self.mlp(self.post_attention_layernorm(states)))

        return network(hidden_states) if self.mlp_chunk is None else in_chunks(network, hidden_states, self.mlp_chunk)

    def forward(
        self, hidden_states: Tensor, twin: Tensor | None = None, **inputs: Any
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """The residual stream (B, T, hidden) after the layer; with a reversible stack's `twin`, the mean of both streams, and
        both."""
        if twin is None:
            for branch in self.branches():
                hidden_states = hidden_states + branch(hidden_states, **inputs)
            return hidden_states
        for branch in self.branches():
            hidden_states, twin = twin, hidden_states + branch(twin, **inputs)
        return (hidden_states + twin) / 2, hidden_states, twin
