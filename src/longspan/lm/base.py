"""Base classes of what `attention=` of a `longspan.lm` configuration names: patterns and mixers.

A pattern is softmax attention in which a query sees some of the keys: `mask` defines which, and `run` may compute the same result
faster. A mixer is anything else: it builds a module in the place of attention. Both are methods with settings.
`docs/adding-a-method.md` shows a pattern.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn
from transformers import Cache

from longspan.core.facts import ModelFacts
from longspan.engine import backends
from longspan.engine.blocks.tables import SIZE, Blocks, band
from longspan.engine.call import AttentionCall, AttentionShape
from longspan.lm.attention_method import AttentionMethod
from longspan.lm.configuration import LongspanConfig
from longspan.lm.layers import LongspanAttention
from longspan.positions.scheme import PositionEncoding
from longspan.util.errors import NotSupported

HANDED = "longspan_handed"
"""The keyword argument that carries what a method's modules need of one forward: a dictionary by method."""
SAMPLED = 256
"""The number of queries whose keys are counted in a longer text."""


class Attention(AttentionMethod):
    """Base of patterns and mixers. The module that `build` returns is called as

        module(hidden_states, attention_mask, rotation, past_key_values, position_ids=, padding=, **the model's other arguments)

    hidden_states (B, T, hidden), already normed; rotation: (cos, sin) of the new tokens, or None; position_ids (B or 1, T);
    past_key_values: the caller's cache, or None; padding: boolean (B, tokens so far), True where a token is real, or None where
    all are; attention_mask: transformers' mask for full attention, None where `takes_mask` is false. The module returns its
    output (B, T, hidden), before the residual, and the attention weights or None.
    """


class Pattern(Attention):
    """Softmax attention over some of the keys.

    Tokens are numbered from 0 at a row's first real token, so padding and chunks change nothing. `shape` is the shape of a call.
    """

    runs_zero_key: ClassVar[bool] = False
    """Whether its own `run` handles `AttentionCall.zero_key`; otherwise such calls run under its mask."""

    def mask(self, queries: Tensor, keys: Tensor, shape: AttentionShape) -> Tensor:
        """The keys that each query sees: boolean (B or 1, H or 1, Tq, Tk), for token numbers queries (B or 1, Tq), keys (B or
        1, Tk).

        The caller adds causality and padding, so the mask may leave them out.
        """
        raise NotImplementedError

    def multiplicity(self, queries: Tensor, keys: Tensor, shape: AttentionShape) -> Tensor | None:
        """How often each visible key counts in the softmax: integers, of the shape of `mask`.

        None: once.
        """
        return None

    def ranges(self, start: int, end: int, shape: AttentionShape) -> list[tuple[int, int]]:
        """Ranges (first, last + 1) of all keys that the queries start … end - 1 see, ascending and disjoint."""
        return [(0, shape.length)]

    def blocks(self, shape: AttentionShape, size: int, device: torch.device) -> Blocks | None:
        """`mask` and causality as blocks of `size` tokens, for FlexAttention; None where the pattern has no blocks.

        The same arguments give the same object. No mask of pairs is computed for it.
        """
        return None

    def pairs(self, shape: AttentionShape) -> float:
        """The number of visible pairs of a query and a key, summed over heads.

        In texts of more than SAMPLED tokens it is estimated from one random query in each of SAMPLED parts.
        """
        count = min(shape.length, SAMPLED)
        draw = torch.Generator().manual_seed(0)
        edges = torch.linspace(0, shape.length, count + 1).long()
        chosen = edges[:-1] + (torch.rand(count, generator=draw) * edges.diff()).long()
        visible = 0.0
        for query in chosen.tolist():
            keys = torch.cat([torch.arange(low, high) for low, high in self.ranges(query, query + 1, shape)])
            keys = keys[keys <= query] if shape.causal else keys
            mask = self.mask(torch.tensor([[query]]), keys[None], shape)
            visible += float(mask.expand(1, shape.heads, 1, len(keys)).sum())
        return visible * shape.length / count

    def visited(self, shape: AttentionShape, device: torch.device) -> float | None:
        """The number of pairs in the blocks that kernels visit, summed over heads: of `blocks`, or of a pattern's own lists.

        A pair in two blocks counts twice. None where the pattern has no blocks.
        """
        blocks = self.blocks(shape, SIZE, device)
        return None if blocks is None else float(shape.heads * blocks.visited())

    def sinks_and_window(self) -> tuple[int, int] | None:
        """(sinks, window) where a decoder's token sees exactly the first `sinks` tokens and the last `window`, itself included.

        None where it sees other tokens.
        """
        return None

    def cached(self) -> tuple[int, int] | None:
        """(sinks, window) of the tokens that a decoder's KV cache keeps: the first `sinks` and the last `window`.

        Later tokens see no others, though they may see fewer. None where any token may be seen again.
        """
        return self.sinks_and_window()

    def run(self, call: AttentionCall, shape: AttentionShape) -> Tensor:
        """Self-attention (B, H, T, D) of whole texts, whose rows begin at their first real token.

        It runs on the fastest backend that can compute it (`longspan.engine.backends`), unless a pattern overrides this.
        """
        return backends.run(self, call, shape)

    def check_position_encoding(self, config: LongspanConfig, encoding: PositionEncoding) -> None:
        """Raises `NotSupported` for a scheme that cannot be combined with the pattern."""
        if encoding.defines("pair_bias"):
            raise NotSupported(
                f"position={config.position} computes a score for every pair of positions, which {self.spec} avoids; "
                "use attention=full, or another scheme such as rope, alibi or kerple"
            )

    def module_class(self) -> type[LongspanAttention]:
        """The class of the module that `build` returns: `LongspanAttention`, unless the pattern has weights of its own."""
        return LongspanAttention

    def build(self, config: LongspanConfig, layer: int, encoding: PositionEncoding, *, causal: bool) -> nn.Module:
        """The attention module of one layer.

        Raises `NotSupported` and `SpecError` for a configuration that it cannot be in.
        """
        self.check_direction(causal)
        self.check_position_encoding(config, encoding)
        return self.module_class()(config, layer, encoding, causal=causal, pattern=self)


@dataclass(frozen=True)
class Full(Pattern):
    """Attention to every key, by transformers' own implementations."""

    name = "full"
    title = "Full attention"
    also = ("full-attention", "dense-attention", "softmax-attention")
    paper = "Vaswani 2017, arXiv 1706.03762"
    cost = "time n², cache n"
    takes_mask = True

    def mask(self, queries: Tensor, keys: Tensor, shape: AttentionShape) -> Tensor:
        return torch.ones(1, 1, queries.shape[1], keys.shape[1], dtype=torch.bool, device=queries.device)

    def blocks(self, shape: AttentionShape, size: int, device: torch.device) -> Blocks:
        lengths = shape.length, shape.length
        return band(lengths, window=shape.length, causal=shape.causal, size=size, device=device)

    def build(self, config: LongspanConfig, layer: int, encoding: PositionEncoding, *, causal: bool) -> nn.Module:
        return LongspanAttention(config, layer, encoding, causal=causal)

    def _refuse(self, facts: ModelFacts) -> NoReturn:
        raise NotSupported("full: a trained model has full attention already; use none")


@dataclass(frozen=True)
class MixerCall:
    """One call of a mixer's module.

    hidden (B, T, width): normed hidden states. rotation: cos and sin of the new tokens, each (B or 1, T, W), or None. cache: the
    caller's, or None. padding: boolean (B, tokens so far), True where a token is real, or None where all are. extra: the other
    keyword arguments.
    """

    hidden: Tensor
    rotation: tuple[Tensor, Tensor] | None
    cache: Cache | None
    padding: Tensor | None
    extra: dict[str, Any]

    @property
    def real(self) -> Tensor | None:
        """Which of the new tokens are real, boolean (B, T); None where all are."""
        return None if self.padding is None else self.padding[:, -self.hidden.shape[1] :]


class MixerModule(nn.Module):
    """Base of the modules that mixers build: takes the arguments that every layer passes, and asks `mixed` for the output."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotation: tuple[Tensor, Tensor] | None = None,
        past_key_values: Cache | None = None,
        encoder_states: Tensor | None = None,
        padding: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """The output (B, T, width), before the residual, and None in the place of attention weights."""
        return self.mixed(MixerCall(hidden_states, rotation, past_key_values, padding, kwargs)), None

    def mixed(self, call: MixerCall) -> Tensor:
        """The output (B, T, width) for the call's hidden states."""
        raise NotImplementedError


class Mixer(Attention):
    """Mixing of tokens other than softmax over keys.

    Its module keeps its state in a `longspan.lm.state.MixerState` of the caller's cache (`state_of`); the recurrent form and the
    parallel form compute the same.
    """

    positions: ClassVar[frozenset[str]] = frozenset({"embed"})
    """The methods of a position encoding that it uses, and `rotation` where it uses RoPE."""

    def check_position_encoding(self, config: LongspanConfig, encoding: PositionEncoding) -> None:
        """Raises `NotSupported` for a scheme that defines what the mixer does not use."""
        parts = {
            p for p in ("embed", "rotate_qk", "query_scale", "bias", "pair_bias", "query_scores") if encoding.defines(p)
        }
        if config.rope_parameters is not None:
            parts.add("rotation")
        if lost := parts - self.positions:
            fitting = "rope" if "rotation" in self.positions else "sinusoidal or learned"
            if "rotation" not in self.positions and (self.knows_order or "causal" in self.directions):
                fitting = "sinusoidal, learned or nope"
            raise NotSupported(
                f"position={config.position} defines {', '.join(sorted(lost))}, which attention={self.spec} does not use; "
                f"use position={fitting}"
            )

    def check_dropout(self, config: LongspanConfig) -> None:
        """Raises `NotSupported` for `attention_dropout`, where there are no attention weights to drop."""
        if config.attention_dropout:
            raise NotSupported(
                f"attention_dropout={config.attention_dropout} drops attention weights, and attention={self.spec} computes none; "
                "use hidden_dropout"
            )
