"""How tokens mix in a model of ours: what `attention=` of its configuration names.

A pattern is softmax attention in which a query sees some of the keys; it says which (`mask`, the definition), and may
bring a faster way to the same result (`run`). A mixer is anything else; it builds a module that takes attention's place.
Both are methods with settings. `docs/adding-a-method.md` shows a pattern.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NoReturn

import torch
from torch import Tensor, nn

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
"""The keyword under which what a method's modules need of one forward travels to them: a dictionary by method."""
SAMPLED = 256
"""Queries whose keys are counted in a text that has more."""


class Attention(AttentionMethod):
    """Base of patterns and mixers. What `build` returns is called as

        module(hidden_states, attention_mask, rotation, past_key_values, position_ids=, padding=, **what the model was given)

    hidden_states (B, T, hidden), already normed; rotation (cos, sin) of the new tokens or None; position_ids (B or 1, T);
    past_key_values the caller's cache or None; padding boolean (B, all tokens so far), True where a token is real, or None
    where all are. attention_mask is what transformers makes for full attention, and None where `takes_mask` is false.
    The module returns its output (B, T, hidden), before the residual, and None or the weights of attention.
    """


class Pattern(Attention):
    """Softmax attention over some of the keys.

    Tokens are known by their number, 0 for a row's first real token, so padding and the cut into chunks change nothing.
    """

    runs_zero_key: ClassVar[bool] = False
    """Whether its own `run` knows `AttentionCall.zero_key`; masks do otherwise."""

    def mask(self, queries: Tensor, keys: Tensor, grid: AttentionShape) -> Tensor:
        """Which keys each query sees: boolean (B or 1, H or 1, Tq, Tk); queries (B or 1, Tq), keys (B or 1, Tk) token numbers.
        Causality and padding are added by the caller, and need not be in the answer."""
        raise NotImplementedError

    def multiplicity(self, queries: Tensor, keys: Tensor, grid: AttentionShape) -> Tensor | None:
        """How often a visible key counts in the softmax: whole numbers, asked for and answered as `mask` is. None: once."""
        return None

    def ranges(self, start: int, end: int, grid: AttentionShape) -> list[tuple[int, int]]:
        """Where the keys are that some query of start … end - 1 sees: ascending, disjoint (first, last + 1)."""
        return [(0, grid.length)]

    def blocks(self, grid: AttentionShape, size: int, device: torch.device) -> Blocks | None:
        """The same as `mask` in blocks of `size` tokens, causality with it, for FlexAttention; None where there are no such
        blocks. The same object for the same question, made without a mask of pairs."""
        return None

    def pairs(self, grid: AttentionShape) -> float:
        """How many pairs of a query and a key that it sees there are, of all heads together; in a long text estimated from one
        query out of each of SAMPLED parts."""
        count = min(grid.length, SAMPLED)
        draw = torch.Generator().manual_seed(0)
        edges = torch.linspace(0, grid.length, count + 1).long()
        chosen = edges[:-1] + (torch.rand(count, generator=draw) * edges.diff()).long()
        seen = 0.0
        for query in chosen.tolist():
            keys = torch.cat([torch.arange(low, high) for low, high in self.ranges(query, query + 1, grid)])
            keys = keys[keys <= query] if grid.causal else keys
            mask = self.mask(torch.tensor([[query]]), keys[None], grid)
            seen += float(mask.expand(1, grid.heads, 1, len(keys)).sum())
        return seen * grid.length / count

    def visited(self, grid: AttentionShape, device: torch.device) -> float | None:
        """Pairs of the blocks that are gone through, of all heads together: those of `blocks`, or a pattern's own. A pair that
        two of its blocks hold counts twice. None where it has no blocks."""
        blocks = self.blocks(grid, SIZE, device)
        return None if blocks is None else float(grid.heads * blocks.visited())

    def sinks_and_window(self) -> tuple[int, int] | None:
        """(sinks, window) where a token of a decoder sees the first `sinks` tokens and the last `window`, itself among them,
        and no others. None where it sees less of them, or others."""
        return None

    def cached(self) -> tuple[int, int] | None:
        """(sinks, window) of the tokens that a decoder's cache keeps: the first `sinks` and the last `window`, itself among them.

        No later token sees another, though it may see fewer. None where any token may be seen again.
        """
        return self.sinks_and_window()

    def run(self, call: AttentionCall, grid: AttentionShape) -> Tensor:
        """Attention of all tokens of a text on themselves, (B, H, T, D), the fastest way that can run it
        (`longspan.engine.backends`) unless a pattern has one of its own. Rows are aligned at their first real token."""
        return backends.run(self, call, grid)

    def check_position_encoding(self, config: LongspanConfig, place: PositionEncoding) -> None:
        """Refuses a scheme that cannot be joined with the pattern."""
        if place.defines("pair_bias"):
            raise NotSupported(
                f"position={config.position} scores every pair of places, which {self.spec} is there to avoid; "
                "use attention=full, or another scheme such as rope, alibi or kerple"
            )

    def module_class(self) -> type[LongspanAttention]:
        """What it is part of: ordinary attention, unless it has weights of its own."""
        return LongspanAttention

    def build(self, config: LongspanConfig, layer: int, place: PositionEncoding, *, causal: bool) -> nn.Module:
        self.check_direction(causal)
        self.check_position_encoding(config, place)
        return self.module_class()(config, layer, place, causal=causal, pattern=self)


@dataclass(frozen=True)
class Full(Pattern):
    """Every key: transformers' own implementations run it."""

    name: ClassVar[str] = "full"
    title: ClassVar[str] = "Full attention"
    also: ClassVar[tuple[str, ...]] = ("full-attention", "dense-attention", "softmax-attention")
    paper: ClassVar[str] = "Vaswani 2017, arXiv 1706.03762"
    cost: ClassVar[str] = "time n², cache n"
    takes_mask: ClassVar[bool] = True

    def mask(self, queries: Tensor, keys: Tensor, grid: AttentionShape) -> Tensor:
        return torch.ones(1, 1, queries.shape[1], keys.shape[1], dtype=torch.bool, device=queries.device)

    def blocks(self, grid: AttentionShape, size: int, device: torch.device) -> Blocks:
        lengths = grid.length, grid.length
        return band(lengths, window=grid.length, causal=grid.causal, size=size, device=device)

    def build(self, config: LongspanConfig, layer: int, place: PositionEncoding, *, causal: bool) -> nn.Module:
        return LongspanAttention(config, layer, place, causal=causal)

    def _refuse(self, facts: ModelFacts) -> NoReturn:
        raise NotSupported("full attention is what a trained model has; use none")


class Mixer(Attention):
    """Mixing that is no softmax over keys. Its module keeps what it must remember in a `longspan.lm.state.MixerState`, got
    from the caller's cache by `state_of`; the recurrent form and the parallel form give the same."""

    positions: ClassVar[frozenset[str]] = frozenset({"embed"})
    """The parts of a position scheme that it has a use for, besides `rotation` for RoPE."""

    def check_position_encoding(self, config: LongspanConfig, place: PositionEncoding) -> None:
        """Refuses a scheme whose part would be lost."""
        parts = {
            p for p in ("embed", "rotate_qk", "query_scale", "bias", "pair_bias", "query_scores") if place.defines(p)
        }
        if config.rope_parameters is not None:
            parts.add("rotation")
        if lost := parts - self.positions:
            fitting = "rope" if "rotation" in self.positions else "sinusoidal or learned"
            if "rotation" not in self.positions and (self.knows_order or "causal" in self.directions):
                fitting = "sinusoidal, learned or nope"
            raise NotSupported(
                f"position={config.position} acts on {', '.join(sorted(lost))}, which attention={self.spec} has not; "
                f"use position={fitting}"
            )

    def check_dropout(self, config: LongspanConfig) -> None:
        """For what has no weights of attention to drop."""
        if config.attention_dropout:
            raise NotSupported(
                f"attention_dropout={config.attention_dropout} drops weights of attention, which attention={self.spec} does not; "
                "use hidden_dropout"
            )
