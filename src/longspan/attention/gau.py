"""The gated attention unit and FLASH: attention and feed-forward network in one gated layer (Hua 2022, arXiv 2202.10447).

    U = silu(x W_u), V = silu(x W_v), Z = silu(x W_z); queries and keys are Z·γ + β, each with its own γ and β
    output = (U ⊙ A V) W_o, A = relu(q·k/n + b)²             (section 2.2)

`gau` is quadratic over the whole text, `flash` within chunks, with a linear part between chunks. A unit is a whole layer: with U
and V twice as wide as the model, two units have as many weights as one layer of attention and feed-forward network, so a model
has twice as many layers. Norms (RMSNorm) and positions are those of all `longspan.lm` models: RoPE rotates the unit's head, so
`head_dim` must be `size`; b is T5's bias by distance, with a table per layer.

The paper's n is the length of the text, which a decoder does not know: it grows with every generated token. There `scale=paper`
uses the training length, so training is the paper's and decoding computes the same. As in the paper, there is no attention
dropout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from longspan.engine.linear.gated import Heads, Memory, Rule, mixed_both_ways, mixed_causal, quadratic
from longspan.engine.patterns import text_lengths
from longspan.lm.base import Mixer, MixerCall, MixerModule
from longspan.lm.configuration import LongspanConfig
from longspan.lm.state import state_of
from longspan.positions.scheme import PositionEncoding
from longspan.positions.t5_bias import buckets
from longspan.util.errors import NotSupported


class GatedUnit(MixerModule):
    """Base of both units: gate, values, and one head with `views` pairs of γ and β."""

    def __init__(self, method: GatedMixer, config: LongspanConfig, layer_idx: int, views: int, *, causal: bool):
        super().__init__()
        width, wide = config.hidden_size, int(config.hidden_size * method.expansion)
        self.method, self.layer_idx, self.causal = method, layer_idx, causal
        self.trained_length = config.max_position_embeddings
        self.u_proj = nn.Linear(width, wide, bias=False)
        self.v_proj = nn.Linear(width, wide, bias=False)
        self.z_proj = nn.Linear(width, method.size, bias=False)
        self.o_proj = nn.Linear(wide, width, bias=False)
        self.gamma = nn.Parameter(torch.empty(views, method.size))
        self.beta = nn.Parameter(torch.empty(views, method.size))
        self.table = nn.Parameter(torch.empty(method.buckets))
        self.draw_weights()

    def draw_weights(self) -> None:
        """Draws γ and the table of b normal with standard deviation 0.02, and sets β to 0."""
        nn.init.normal_(self.gamma, std=0.02)
        nn.init.zeros_(self.beta)
        nn.init.normal_(self.table, std=0.02)

    def bias(self, distance: Tensor) -> Tensor:
        """b at `distance` = query's position - key's, integers of any shape, in float32 or wider."""
        table = self.table.to(torch.promote_types(self.table.dtype, torch.float32))[:, None]
        found = buckets(distance, len(table), self.method.far, causal=self.causal)
        return F.embedding(found, table)[..., 0]  # an index's gradient adds up one by one on a GPU

    def mixed(self, call: MixerCall) -> Tensor:
        gate, value, base = (F.silu(p(call.hidden)) for p in (self.u_proj, self.v_proj, self.z_proj))
        views = base[:, None] * self.gamma[:, None].to(base.dtype) + self.beta[:, None].to(base.dtype)
        if call.rotation is not None:
            views = _rotated(views, call.rotation)
        if call.real is not None:
            real = call.real[..., None]
            value, views = value * real.to(value.dtype), views * real[:, None].to(views.dtype)
        with torch.autocast(call.hidden.device.type, enabled=False):  # which would make scores of half precision
            mixed = self.mix(views.to(value.dtype).unbind(1), value, call.padding, call.cache)
        return self.o_proj(gate * mixed)

    def mix(self, views: tuple[Tensor, ...], value: Tensor, padding: Tensor | None, cache: Cache | None) -> Tensor:
        """A V (B, T, e) from views of the head (B, T, s) and values (B, T, e), all zero at padding."""
        raise NotImplementedError


def _rotated(views: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Views (B, views, T, s) with their first W channels rotated."""
    width = rotation[0].shape[-1]
    rotated, _ = apply_rotary_pos_emb(views[..., :width], views[:, :0, :, :width], *rotation)
    return torch.cat((rotated, views[..., width:]), dim=-1)


class QuadraticUnit(GatedUnit):
    """GAU's unit.

    A decoder's KV cache has the keys and values of all tokens, in one head.
    """

    method: GAU

    def mix(self, views: tuple[Tensor, ...], value: Tensor, padding: Tensor | None, cache: Cache | None) -> Tensor:
        query, key = views
        if cache is not None and self.causal:
            key, value = (x[:, 0] for x in cache.update(key[:, None], value[:, None], self.layer_idx))
        numbers = torch.arange(key.shape[1], device=key.device)[None]
        gaps = False
        if padding is not None:
            numbers = padding.long().cumsum(1) - 1
            gaps = not torch.equal(cast(Tensor, text_lengths(padding)), numbers[:, -1] + 1)
        inner, outer = self._scales(numbers, query.shape[1])
        return quadratic(query, key, value, numbers if gaps else None, self.bias, inner, outer, causal=self.causal)

    def _scales(self, numbers: Tensor, new: int) -> tuple[Tensor, Tensor]:
        """The factors on scores and on their squares, each (B or 1, Tq or 1, 1); numbers (B or 1, T) of tokens, new: of them
        queries."""
        wide = torch.promote_types(self.gamma.dtype, torch.float32)
        count = numbers[:, -new:] + 1 if self.causal else numbers[:, -1:] + 1
        if self.causal and self.method.scale == "paper":
            count = torch.full_like(count[:1, :1], self.trained_length)
        share = 1 / count.clamp(min=1).to(wide)[..., None]
        one = torch.ones_like(share)
        return (one * self.method.size**-0.5, share) if self.method.scale == "su" else (share, one)


class ChunkedUnit(GatedUnit):
    """FLASH's unit.

    A decoder's state is the sums over whole chunks and the tokens of the last chunk.
    """

    method: Flash

    def mix(self, views: tuple[Tensor, ...], value: Tensor, padding: Tensor | None, cache: Cache | None) -> Tensor:
        query, key, far_query, far_key = views
        heads, length = Heads(query, key, far_query, far_key, value), value.shape[1]
        real = None if padding is None else padding[:, -length:]
        if not self.causal:
            count = torch.full((1,), length, device=value.device) if real is None else real.sum(1)
            share = 1 / count.clamp(min=1).to(torch.promote_types(value.dtype, torch.float32))
            return mixed_both_ways(heads, self._rule(), share.view(-1, 1, 1, 1), real)
        memory = None if cache is None else state_of(cache, self.layer_idx)
        before = Memory(**memory.tensors) if memory is not None and memory.tensors else None
        mixed, after = mixed_causal(heads, self._rule(), self._share(), real, before)
        if memory is not None:
            memory.keep(length, **after._asdict())
        return mixed

    def _rule(self) -> Rule:
        """The scores within chunks, incomplete ones too."""
        chunk = self.method.chunk
        if self.method.scale == "su":
            return Rule(chunk, self.method.size**-0.5, 1 / chunk, self.bias)
        return Rule(chunk, 1 / chunk, 1.0, self.bias)

    def _share(self) -> Callable[[Tensor], Tensor]:
        """The linear part's factor by the number of chunks before."""
        chunk, linear = self.method.chunk, self.method.linear
        if linear == "count":
            return lambda chunks: 1 / (chunks * chunk).clamp(min=1).to(self._wide)
        share = 1 / (self.trained_length if linear == "paper" else chunk)
        return lambda chunks: torch.full(chunks.shape, share, dtype=self._wide, device=chunks.device)

    @property
    def _wide(self) -> torch.dtype:
        return torch.promote_types(self.gamma.dtype, torch.float32)


@dataclass(frozen=True)
class GatedMixer(Mixer):
    """Base of both mixers.

    `expansion`: width of gate and values over the model's; `size`: channels of the head; `buckets` of distances, of
    which those of `far` tokens and more share the last.
    """

    expansion: float = 2.0
    size: int = 128
    buckets: int = 32
    far: int = 128

    positions = frozenset({"embed", "rotation"})
    knows_order = True
    replaces_mlp = True

    def __post_init__(self) -> None:
        self.require(self.expansion > 0, f"expansion must be above 0, not {self.expansion}")
        self.require(self.size >= 1, f"size must be at least 1, not {self.size}")
        self.require(self.buckets == 1 or self.buckets >= 4, f"buckets must be 1, or 4 and more, not {self.buckets}")
        self.require(
            self.far > self.buckets // 2, f"far must be above {self.buckets // 2}, half the buckets, not {self.far}"
        )

    def build(self, config: LongspanConfig, layer: int, encoding: PositionEncoding, *, causal: bool) -> nn.Module:
        self.check_direction(causal)
        self.check_position_encoding(config, encoding)
        self.check_dropout(config)
        self.require(causal or self.buckets % 4 == 0, f"an encoder needs buckets divisible by 4, not {self.buckets}")
        if config.rope_parameters is not None and config.head_dim != self.size:
            raise NotSupported(
                f"position={config.position} rotates heads of {config.head_dim} channels, and the head of attention={self.spec} "
                f"has {self.size}; use head_dim={self.size}, or attention={self.name}:size={config.head_dim}"
            )
        return self.unit(config, layer, causal=causal)

    def unit(self, config: LongspanConfig, layer: int, *, causal: bool) -> GatedUnit:
        """The module of one layer. Raises `SpecError` for settings that the direction excludes."""
        raise NotImplementedError


@dataclass(frozen=True)
class GAU(GatedMixer):
    """Gated attention over the whole text.

    `scale`: how scores are normalised. `paper`: relu(qk/n + b)² with n the tokens of the text in an encoder and the
    training length in a decoder; `count`: the same with n the tokens that a query sees; `su`: relu(qk/sqrt(size) +
    b)²/n with the same n (Su 2022, kexue.fm/archives/8934).
    """

    scale: Literal["paper", "count", "su"] = "paper"

    name = "gau"
    title = "GAU: gated attention unit"
    also = ("gated-attention-unit", "flash-quad")
    paper = "Hua 2022, arXiv 2202.10447"
    cost = "time n², cache n"

    def unit(self, config: LongspanConfig, layer: int, *, causal: bool) -> GatedUnit:
        self.require(
            causal or self.scale != "count",
            "scale=count is scale=paper in an encoder, where a query sees all tokens; use that, or kind=decoder",
        )
        return QuadraticUnit(self, config, layer, 2, causal=causal)


@dataclass(frozen=True)
class Flash(GatedMixer):
    """Gated attention within chunks of `chunk` tokens, linear between them.

    `scale` within chunks: `paper`, relu(qk/c + b)²; `su`, relu(qk/sqrt(size) + b)²/c. `linear`: the divisor of sums
    between chunks: `paper`, the tokens of the text in an encoder and the training length in a decoder; in a decoder
    also `chunk`, the tokens of a chunk, or Su's `count`, those of all chunks before.
    """

    chunk: int = 256
    scale: Literal["paper", "su"] = "paper"
    linear: Literal["paper", "chunk", "count"] = "paper"

    name = "flash"
    title = "FLASH: gated attention in chunks"
    also = ("mixed-chunk-attention",)
    paper = "Hua 2022, arXiv 2202.10447"
    cost = "time n, state of one size"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.chunk >= 1, f"chunk must be at least 1 token, not {self.chunk}")

    def unit(self, config: LongspanConfig, layer: int, *, causal: bool) -> GatedUnit:
        self.require(
            causal or self.linear == "paper",
            f"linear={self.linear} counts the chunks before a query's, and in an encoder it sees all; use linear=paper, or "
            "kind=decoder",
        )
        return ChunkedUnit(self, config, layer, 4, causal=causal)
