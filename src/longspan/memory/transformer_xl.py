"""Transformer-XL's recurrence: a text is read in segments, and each sees the states of the tokens before it, kept from the pass
over the segment before (Dai 2019, §3.2).

Token number t of a segment that begins at b sees the `length` tokens before b and its own segment up to itself. No gradient
goes from one segment to another: keys and values of the memory come from states that are cut off, through weights that
learn. Since the memory of a segment is nothing but states that are there anyway, all segments are computed at once, which
gives what one after the other gives. What a cache holds from earlier calls is constant: no gradient goes there. Through its
layers the last token of a segment knows of the segment and of the length·layers tokens before it.

Any relative scheme serves; the paper's is `position=xl`. The reference normalises after each layer, models here before it; the
memory is cut off behind that norm, so the norm's weights learn from the tokens of their own segment alone.

What is read with may differ from what was trained with: load the model with another `memory=`. The paper evaluates with a
longer memory, shorter segments and `same_length=true`, where every token sees just as many: the `length` tokens that end
with itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache

from longspan.engine.call import AttentionShape
from longspan.engine.core import expand_heads
from longspan.engine.patterns import roll, shifted
from longspan.lm.attention import scheme_attention
from longspan.lm.base import Pattern
from longspan.lm.configuration import LongspanConfig
from longspan.lm.layers import LongspanAttention, rotated
from longspan.positions.scheme import PositionEncoding
from longspan.util.errors import NotSupported


@dataclass(frozen=True)
class TransformerXL(Pattern):
    """`segment` tokens are read together, with the states of the `length` tokens before them."""

    segment: int = 150
    length: int = 150
    same_length: bool = False

    name: ClassVar[str] = "transformer-xl"
    title: ClassVar[str] = "Transformer-XL: segments with the memory of those before"
    also: ClassVar[tuple[str, ...]] = ("transfo-xl", "segment-recurrence")
    near: ClassVar[tuple[str, ...]] = ("compressive-transformer",)
    paper: ClassVar[str] = "Dai 2019, arXiv 1901.02860"
    seam: ClassVar[Any] = "memory"
    cost: ClassVar[str] = "time n, cache constant"
    directions: ClassVar[tuple[str, ...]] = ("causal",)

    def __post_init__(self) -> None:
        self.require(self.segment >= 1, f"segment must be at least 1 token, not {self.segment}")
        self.require(self.length >= 0, f"length must not be negative, it is {self.length}")
        self.require(
            not self.same_length or self.length >= 1, "same_length needs a length of at least 1: a token sees itself"
        )

    def check_position_encoding(self, config: LongspanConfig, encoding: PositionEncoding) -> None:
        super().check_position_encoding(config, encoding)
        if encoding.defines("embed"):
            raise NotSupported(
                f"position={config.position} is in the embeddings, so a state is true at one place only and cannot be a memory "
                "of another segment; use position=xl, rope, alibi or another relative scheme"
            )

    def build(self, config: LongspanConfig, layer: int, encoding: PositionEncoding, *, causal: bool) -> nn.Module:
        self.check_direction(causal)
        self.check_position_encoding(config, encoding)
        return SegmentAttention(config, layer, encoding, causal=causal, pattern=self)

    def mask(self, queries: Tensor, keys: Tensor, shape: AttentionShape) -> Tensor:
        far = queries[:, None, :, None] - keys[:, None, None, :]
        if self.same_length:
            return far < self.length
        begin = queries // self.segment * self.segment
        return keys[:, None, None, :] >= (begin - self.length)[:, None, :, None]

    def sinks_and_window(self) -> tuple[int, int] | None:
        return (0, self.length) if self.same_length else None

    def cached(self) -> tuple[int, int]:
        """As many as the last token of a segment sees."""
        return 0, self.length if self.same_length else self.segment + self.length

    def ranges(self, start: int, end: int, shape: AttentionShape) -> list[tuple[int, int]]:
        first = start - self.length + 1 if self.same_length else start // self.segment * self.segment - self.length
        return [(max(0, first), min(shape.length, end))]


class SegmentAttention(LongspanAttention):
    """Where gradients are wanted, segments are cut from one another, with a cache and without; else it is attention under the
    pattern's mask."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotation: tuple[Tensor, Tensor] | None = None,
        past_key_values: Cache | None = None,
        encoder_states: Tensor | None = None,
        padding: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if not torch.is_grad_enabled():
            kwargs.update(padding=padding, position_ids=position_ids)
            return super().forward(hidden_states, attention_mask, rotation, past_key_values, encoder_states, **kwargs)
        assert position_ids is not None
        if past_key_values is not None and past_key_values.get_seq_length(self.layer_idx):
            return self._going_on(hidden_states, rotation, past_key_values, padding, position_ids), None
        if past_key_values is not None:
            with torch.no_grad():
                key, value = self._projected(hidden_states, rotation)
                self._keep(past_key_values, key, value, padding)
        return self._from_the_start(hidden_states, rotation, padding, position_ids), None

    def _from_the_start(
        self,
        hidden_states: Tensor,
        rotation: tuple[Tensor, Tensor] | None,
        padding: Tensor | None,
        position_ids: Tensor,
    ) -> Tensor:
        """All segments of whole texts at once."""
        if padding is None:
            return self._by_segments(hidden_states, rotation, None, position_ids)
        batch, first = len(padding), padding.int().argmax(1)  # every row's first real token begins a segment
        hidden_states = roll(hidden_states, first, 1)
        if rotation is not None:
            cos, sin = (roll(x.expand(batch, -1, -1), first, 1) for x in rotation)
            rotation = cos, sin
        positions = roll(position_ids.expand(batch, -1), first, 1)
        out = self._by_segments(hidden_states, rotation, roll(padding, first, 1), positions)
        return roll(out, -first, 1)

    def _going_on(
        self,
        hidden: Tensor,
        rotation: tuple[Tensor, Tensor] | None,
        cache: Cache,
        padding: Tensor | None,
        positions: Tensor,
    ) -> Tensor:
        """New tokens after those of a cache.

        Each is there twice, for its own segment and cut off for the later ones, and a mask says which of the two a
        query sees.
        """
        pattern, new = cast(TransformerXL, self.pattern), hidden.shape[1]
        query = self._queries(hidden, rotation)
        own, past = self._projected(hidden, rotation), self._projected(hidden.detach(), rotation)
        *cached, columns, total = self._keep(cache, own[0].detach(), own[1].detach(), padding)
        line = torch.arange(total - new, total, device=hidden.device)[None]
        first = line.new_zeros(1, 1) if padding is None else padding.int().argmax(1, keepdim=True)
        rows = line - first  # numbers of the queries' tokens
        batch = max(len(rows), len(columns))
        tokens = torch.cat([x.expand(batch, -1) for x in (columns, line, line)], dim=1)
        numbers = tokens - first
        same = (rows[:, :, None] // pattern.segment) == (rows[:, None] // pattern.segment)
        old = (columns < line[:, :1])[:, None].expand(-1, new, -1)
        shown = torch.cat([x.expand(batch, -1, -1) for x in (old, ~same, same)], dim=2)
        shown = shown & (numbers >= 0)[:, None] & (numbers[:, None] <= rows[:, :, None])
        mask = shown[:, None] & pattern.mask(rows, numbers, AttentionShape(query.shape[1], total, self.layer_idx, True))
        if padding is not None:
            mask = mask & padding.gather(1, tokens.clamp(min=0))[:, None, None]
            mask[..., -new:] |= torch.eye(new, dtype=torch.bool, device=mask.device)  # padding must be a number
        ago = positions[:, -1:] - (total - 1 - columns)
        places = torch.cat([x.expand(max(len(ago), len(positions)), -1) for x in (ago, positions, positions)], dim=1)
        keys, values = (torch.cat(parts, dim=2) for parts in zip(cached, past, own, strict=True))
        module = SimpleNamespace(place=self.place, layer_idx=self.layer_idx, is_causal=False)  # the mask says it all
        out, _ = scheme_attention(
            cast(nn.Module, module),
            query,
            keys,
            values,
            mask,
            self.scaling,
            self.config.attention_dropout if self.training else 0.0,
            positions,
            places,
        )
        return self.o_proj(out.flatten(2))

    def _queries(self, hidden: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        query = self._heads(self.q_proj(hidden))
        return query if rotation is None else rotated(query, rotation)

    def _projected(self, hidden: Tensor, rotation: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """Keys and values."""
        key, value = self._keys(hidden, None, None)
        return key if rotation is None else rotated(key, rotation), value

    def _keep(
        self, cache: Cache, key: Tensor, value: Tensor, padding: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, int]:
        """Puts constant keys and values into the cache.

        Returns those that new tokens may see, which tokens they are, (B or 1, Tk), and how many there are in all.
        """
        given: dict[str, Any] = {"padding": padding}
        key, value = self._update(cache, key, value, given)
        rolling = given["rolling"]
        total = key.shape[2] if rolling is None else rolling.seen
        if rolling is None or rolling.columns is None:
            return key, value, torch.arange(total, device=key.device)[None], total
        return key, value, rolling.columns, total

    def _by_segments(
        self, hidden: Tensor, rotation: tuple[Tensor, Tensor] | None, real: Tensor | None, positions: Tensor
    ) -> Tensor:
        query = self._queries(hidden, rotation)
        own, past = self._projected(hidden, rotation), self._projected(hidden.detach(), rotation)
        factor = self.place.query_scale(positions)
        if factor is None:
            factor = query.new_ones(1, hidden.shape[1])
        cuts = self._cuts
        factor = cuts.own(factor[:, None, :, None].expand(len(hidden), -1, -1, -1))
        keys, values = (torch.cat((cuts.past(p), cuts.own(o)), dim=-2) for p, o in zip(past, own, strict=True))
        if real is None:
            real = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        out = self._attend(cuts.own(query), keys, values, factor, cuts.mask(real))
        out = out.unflatten(0, (len(hidden), -1)).transpose(1, 2).flatten(2, 3)[:, :, : hidden.shape[1]]
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, factor: Tensor, mask: Tensor) -> Tensor:
        """Of all segments side by side: query (B·n, H, S, D), key and value (B·n, H_kv, M + S, D), factor (B·n, 1, S, 1)."""
        encoding, size, heads = self.place, query.shape[2], query.shape[1]
        held = key.shape[2]
        places = torch.arange(held, device=query.device)[None]  # within the memory and its segment
        blocks = encoding.query_blocks(places[:, held - size :], value.dtype)
        if len(blocks) > 1:
            parts = []
            for start, end in blocks:
                rows, last = slice(start, end), held - size + end
                seen = key[:, :, :last], value[:, :, :last]
                parts.append(self._attend(query[:, :, rows], *seen, factor[:, :, rows], mask[:, :, rows, :last]))
            return torch.cat(parts, dim=2)
        dropout = self.config.attention_dropout if self.training else 0.0
        scale = self.scaling * encoding.score_scale
        bias: Tensor | None = None
        if encoding.defines("query_scores"):
            line = torch.arange(1 - size, held, device=query.device)
            bias = scale * factor.float() * shifted(encoding.query_scores(query, line, self.layer_idx), held)
        elif encoding.defines("bias"):
            bias = encoding.bias(places[0, held - size :, None] - places)[None]
        query, key = encoding.rotate_qk(query, key, places[:, held - size :], places)
        query = query * factor.to(query.dtype)
        if bias is not None:
            query, key, value = query.float(), key.float(), value.float()
            mask = bias.masked_fill(~mask, float("-inf"))
        out = F.scaled_dot_product_attention(
            query, expand_heads(key, heads), expand_heads(value, heads), attn_mask=mask, dropout_p=dropout, scale=scale
        )
        return out.to(factor.dtype)

    @property
    def _cuts(self) -> Cuts:
        pattern = cast(TransformerXL, self.pattern)
        return Cuts(pattern.segment, pattern.length, pattern.same_length)


@dataclass(frozen=True)
class Cuts:
    """How columns become segments with the memory before them; x (B, H, T, D), rows beginning at column 0."""

    segment: int
    memory: int
    same_length: bool

    def own(self, x: Tensor) -> Tensor:
        """(B·n, H, segment, D)."""
        x = F.pad(x, (0, 0, 0, -x.shape[2] % self.segment))
        return x.unflatten(2, (-1, self.segment)).transpose(1, 2).flatten(0, 1)

    def past(self, x: Tensor) -> Tensor:
        """(B·n, H, memory, D): of every segment the columns before it, zeros before the first."""
        count = -(-x.shape[2] // self.segment)
        if self.memory == 0:
            return x.new_zeros(len(x) * count, x.shape[1], 0, x.shape[3])
        x = F.pad(x, (0, 0, self.memory, -x.shape[2] % self.segment))
        windows = x.unfold(2, self.memory, self.segment)[:, :, :count]
        return windows.transpose(1, 2).flatten(0, 1).mT

    def mask(self, real: Tensor) -> Tensor:
        """(B·n, 1, segment, memory + segment): what is real, not later, and with `same_length` not too far. What is padding sees
        itself, since it must be a number."""
        columns, device = real[:, None, :, None], real.device
        there = torch.cat((self.past(columns), self.own(columns)), dim=-2)[..., 0][:, :, None]
        row = torch.arange(self.segment, device=device)[:, None] + self.memory
        column = torch.arange(self.memory + self.segment, device=device)
        seen = column <= row
        if self.same_length:
            seen = seen & (row - column < self.memory)
        return (there & seen) | (row == column)
