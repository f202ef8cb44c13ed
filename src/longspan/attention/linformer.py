"""Linformer: attention to k projections of the n keys and values, in linear time and memory (Wang 2020).

    head = softmax(Q (E K)ᵀ / sqrt(d)) F V,   E, F of (k, n)                                          (eq. 7)

E and F are trained for one length: a shorter text uses their first columns, a longer one is refused. Every projected key is a sum
over the whole text, so there is no causal form: a mask over the projected keys would not hide later tokens. Columns are counted
from a row's first real token, and padding is set to zero before the projection, so padding changes nothing.

Layers with fewer projected keys further up, as the paper proposes, are a list: attention=[linformer:k=256, linformer:k=128].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from longspan.engine.core import attention
from longspan.lm.base import Mixer, MixerCall, MixerModule
from longspan.lm.configuration import LongspanConfig
from longspan.lm.layers import LongspanAttention
from longspan.lm.modeling import LongspanModel
from longspan.positions.scheme import PositionEncoding
from longspan.util.errors import NotSupported


class Projection(nn.Module):
    """E and, where it differs, F: (heads or 1, k, n).

    Entries are drawn normal with variance 1 / k, as in the paper's Theorem 2; the paper does not say how its trained
    models were initialised.
    """

    def __init__(self, method: Linformer, heads: int, length: int):
        super().__init__()
        self.method, self.length = method, length
        shape = heads if method.share == "none" else 1, method.k, length
        self.keys = nn.Parameter(torch.empty(shape))
        self.values = nn.Parameter(torch.empty(shape)) if method.share in ("none", "headwise") else None
        self.draw_weights()

    def draw_weights(self) -> None:
        """Draws E and F, normal with variance 1 / k."""
        for weight in self.parameters():
            nn.init.normal_(weight, std=self.method.k**-0.5)

    def forward(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H, k, D), projected from (B, H, T, D).

        Raises `NotSupported` for more tokens than E has columns.
        """
        new = key.shape[2]
        if new > self.length:
            raise NotSupported(
                f"attention={self.method.spec} was built for texts of {self.length:,} tokens, and this one has {new:,}; "
                f"shorten it, or train with max_position_embeddings={new} or more"
            )
        values = self.keys if self.values is None else self.values
        return self.keys[..., :new].to(key.dtype) @ key, values[..., :new].to(value.dtype) @ value


class LinformerAttention(MixerModule, LongspanAttention):
    """Attention to projected keys and values.

    With share=layerwise the first layer with this method has the projection, and the others use it.
    """

    def __init__(self, config: LongspanConfig, layer: int, encoding: PositionEncoding, *, method: Linformer):
        super().__init__(config, layer, encoding, causal=False)
        assert config.num_key_value_heads is not None
        self.method = method
        self._shared: tuple[Projection, ...] = ()  # in a tuple: its parameters belong to another layer, once
        if method.share != "layerwise":
            self.projection = Projection(method, config.num_key_value_heads, config.max_position_embeddings)

    @property
    def projection_in_use(self) -> Projection:
        """This layer's projection, or the one that it shares with another layer."""
        return self._shared[0] if self._shared else self.projection

    def mixed(self, call: MixerCall) -> Tensor:
        query = self._heads(self.q_proj(call.hidden))
        key, value = self._keys(call.hidden, None, None)
        if call.padding is not None:
            key, value = _aligned(key, call.padding), _aligned(value, call.padding)
        key, value = self.projection_in_use(key, value)
        dropout = float(self.config.attention_dropout) if self.training else 0.0
        out = attention(query, key, value, None, self.scaling, dropout=dropout)
        return self.o_proj(out.transpose(1, 2).reshape(*call.hidden.shape[:-1], -1))

    def share(self, projection: Projection) -> None:
        """Uses another layer's projection from now on."""
        self._shared = (projection,)


def _aligned(x: Tensor, padding: Tensor) -> Tensor:
    """x (B, H, T, D) with padding set to zero and each row's first real token in front."""
    length = x.shape[2]
    column = torch.arange(length, device=x.device)[None] + padding.int().argmax(1, keepdim=True)
    zeroed = x.masked_fill(~padding[:, None, :, None], 0)
    return zeroed.gather(2, (column % length)[:, None, :, None].expand_as(x))


@dataclass(frozen=True)
class Linformer(Mixer):
    """Attention to `k` projected keys.

    `share`: none (E and F of each head), headwise (E and F of each layer), kv (E = F in each layer) or layerwise (one
    matrix for the whole model).
    """

    k: int = 256
    share: Literal["none", "headwise", "kv", "layerwise"] = "headwise"

    name = "linformer"
    title = "Linformer"
    near = ("nystromformer",)
    paper = "Wang 2020, arXiv 2006.04768"
    cost = "time n, no decoding"
    directions = ("bidirectional",)

    def __post_init__(self) -> None:
        self.require(self.k >= 1, f"k must be at least 1, not {self.k}")

    def check_direction(self, causal: bool) -> None:
        if causal:
            raise NotSupported(
                f"attention={self.spec} cannot be causal, since each projected key is a sum over the whole text; use it with "
                "kind=encoder, or linear or performer in a decoder"
            )

    def build(self, config: LongspanConfig, layer: int, encoding: PositionEncoding, *, causal: bool) -> nn.Module:
        self.check_direction(causal)
        self.check_position_encoding(config, encoding)
        length = config.max_position_embeddings
        self.require(self.k <= length, f"k={self.k} exceeds max_position_embeddings={length}; use k={length // 4}")
        return LinformerAttention(config, layer, encoding, method=self)

    def join(self, stack: LongspanModel) -> None:
        layers = [m for m in stack.modules() if isinstance(m, LinformerAttention) and m.method == self]
        if self.share != "layerwise" or not layers:
            return
        shared = layers[0].projection = Projection(self, 1, stack.config.max_position_embeddings)
        for module in layers[1:]:
            module.share(shared)
