"""Linear attention: weights φ(q)·φ(k) with φ = elu + 1 in the place of e^(q·k) (Katharopoulos 2020).

Time is linear, and the state of a decoder is one matrix per head. Projections are those of softmax attention. RoPE rotates
queries and keys before φ, so weights are positive and sum to the denominator; but a weight depends on both positions, not only
on the distance. (RoFormer's section on linear attention rotates φ(q) and φ(k) and not the denominator, so its weights may be
negative and have any sum.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from longspan.core.method import Method
from longspan.engine.linear.attention import Kernel, State, bidirectional, causal
from longspan.lm.base import HANDED, Mixer, MixerCall, MixerModule
from longspan.lm.configuration import LongspanConfig
from longspan.lm.layers import LongspanAttention, rotated
from longspan.lm.state import state_of
from longspan.positions.scheme import PositionEncoding


class KernelAttention(MixerModule, LongspanAttention):
    """Attention by the features that `kernel` computes, with the heads and projections of softmax attention."""

    def kernel(self, handed: dict[Method, Any]) -> Kernel:
        """The features of one forward. handed: what belongs to that forward, by method."""
        raise NotImplementedError

    def mixed(self, call: MixerCall) -> Tensor:
        query = self._heads(self.q_proj(call.hidden))
        key, value = self._keys(call.hidden, None, None)
        if call.rotation is not None:
            query, key = rotated(query, call.rotation), rotated(key, call.rotation)
        kernel = self.kernel(call.extra.get(HANDED, {}))
        if not self.is_causal:
            out = bidirectional(query, key, value, kernel, call.real)
        elif call.cache is None:
            out, _ = causal(query, key, value, kernel, real=call.real)
        else:
            memory = state_of(call.cache, self.layer_idx)
            before = State(**memory.tensors) if memory.tensors else None
            out, after = causal(query, key, value, kernel, before, call.real)
            memory.keep(query.shape[2], **after._asdict())
        return self.o_proj(out.transpose(1, 2).reshape(*call.hidden.shape[:-1], -1))


class KernelMixer(Mixer):
    """Base of the mixers whose attention weights are products of features."""

    cost = "time n, state of one size"
    positions = frozenset({"embed", "rotation"})

    def check_config(self, config: LongspanConfig, encoding: PositionEncoding, *, causal: bool) -> None:
        """Raises `NotSupported` for a configuration that the mixer cannot be in."""
        self.check_direction(causal)
        self.check_position_encoding(config, encoding)
        self.check_dropout(config)


def elu_plus_one(x: Tensor) -> Tensor:
    """elu(x) + 1 (Katharopoulos 2020, eq. 7), computed as e^x below zero, where the sum would round to 0.

    The slope at 0 is 1 from both sides. Values above are filled with 0 and not clamped, since the gradient of `clamp` at its
    bound differs between versions of torch.
    """
    above = x > 0
    return torch.where(above, x + 1, x.masked_fill(above, 0).exp())


class LinearAttention(KernelAttention):
    """Attention with the features elu + 1."""

    def kernel(self, handed: dict[Method, Any]) -> Kernel:
        return Kernel(elu_plus_one)


@dataclass(frozen=True)
class Linear(KernelMixer):
    """Attention weights φ(q)·φ(k) with φ = elu + 1, in linear time; no settings."""

    name = "linear"
    title = "Linear attention"
    also = ("linear-attention", "linear-transformer")
    paper = "Katharopoulos 2020, arXiv 2006.16236"

    def build(self, config: LongspanConfig, layer: int, encoding: PositionEncoding, *, causal: bool) -> nn.Module:
        self.check_config(config, encoding, causal=causal)
        return LinearAttention(config, layer, encoding, causal=causal)
