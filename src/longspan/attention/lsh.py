"""LSH attention of Reformer: a token sees the tokens of its own hash bucket, at any distance (Kitaev 2020).

Queries and keys are one vector, the key scaled to length 1. A random rotation R maps a vector x to the bucket argmax[xR; -xR]
(section 2); close vectors share a bucket. Tokens are sorted by bucket, by position within a bucket, and split into chunks; a
token sees those of its bucket in its own chunk and in the one before (equation 5). Several rounds with other rotations find
neighbours that one round separates. Their results are joined as one softmax over the union (equations 13-16): a pair found in N
rounds counts 1/N in each. A token sees itself only where it sees no other.

Three forms:
    aligned  longspan's, the default: every bucket begins a chunk. The keys that a token sees depend on earlier tokens alone,
             decoding computes the same as training, and padding and chunks change nothing. It costs empty slots, less than a
             chunk per bucket in use.
    paper    as above. The chunks of the sorted text depend on all tokens, later ones too. No value of a later token is used, but
             where a bucket is longer than a chunk, later tokens change which earlier ones are seen. In a random model (two
             layers, chunk 4, 4 buckets, 40 tokens) they change logits of a prefix by up to 2.4, and decoding differs by up to
             3.0, where the standard deviation of logits is 1.6.
    trax     the authors' code, and transformers': a token sees all tokens of its chunk and the one before, of any bucket, in the
             first chunk of a round the last one of the round before; a pair counts as often as it is found. Later tokens change
             which keys are seen, as in `paper`.

Decoding selects keys from the KV cache: those of the token's buckets, newest first, up to 2·chunk·hashes (in `trax` filled up
with the newest of all). For `paper` and `trax` this approximates what training computes; for `paper` it is exact where no
bucket is longer than a chunk. A chunk of several tokens runs with all tokens before it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache

from longspan.engine.core import expand_heads
from longspan.engine.recorded_choices import decided
from longspan.lm.base import Mixer, MixerCall, MixerModule
from longspan.lm.configuration import LongspanConfig
from longspan.lm.layers import rotated
from longspan.lm.state import state_of
from longspan.positions.scheme import PositionEncoding

HIDDEN = -1e9
"""The score of an invisible key: finite, so that rows of padding, which see no keys, are finite."""
ITSELF = 1e5
"""Subtracted from a token's score with itself (equation 16)."""
ONE_FACTOR = 128
"""The most buckets of one hash; more are numbered by two hashes, as in the authors' code."""


@dataclass(frozen=True)
class Lsh(Mixer):
    """Attention within hash buckets.

    `chunk` in tokens (section 5 names 128 as typical). `hashes`: rounds (2 in the authors' enwik8 settings; a model
    can run with more than in training). `buckets`: even, or 1 for no hashing, by default 2·L/chunk for the training
    length L. `form`: `aligned` depends on earlier tokens alone and decodes as it was trained; in `paper` and `trax`,
    the publication's and its code's, later tokens change which keys are seen where a bucket is longer than a chunk,
    and decoding is an approximation. `scaled`: scores are divided by sqrt(d), besides the key's length 1. `seed` of
    the rotations.
    """

    chunk: int = 128
    hashes: int = 2
    buckets: int | None = None
    form: Literal["aligned", "paper", "trax"] = "aligned"
    scaled: bool = False
    seed: int = 0

    name = "lsh"
    title = "LSH attention (Reformer)"
    also = ("reformer", "lsh-attention")
    near = ("routing-transformer", "sinkhorn-transformer")
    paper = "Kitaev 2020, arXiv 2001.04451"
    cost = "time n log n, cache n"
    positions = frozenset({"embed", "rotation"})
    former_defaults = {"form": "paper"}

    def __post_init__(self) -> None:
        self.require(self.chunk >= 1, f"chunk must be at least 1 token, not {self.chunk}")
        self.require(self.hashes >= 1, f"hashes must be at least 1, not {self.hashes}")
        buckets = self.buckets
        self.require(
            buckets is None or buckets == 1 or (buckets > 1 and buckets % 2 == 0),
            f"buckets must be even, or 1 for no hashing, not {buckets}",
        )
        self.require(
            buckets != 1 or (self.hashes == 1 and self.seed == 0),
            f"buckets=1 has no hashes, so hashes={self.hashes} and seed={self.seed} have no effect; leave them out",
        )

    def factors(self, length: int) -> tuple[int, ...]:
        """The number of buckets of each hash of a round, for a training length of `length` tokens.

        Their product is the number of buckets. Above 128 there are two hashes, the first with a power of 2.
        """
        if self.buckets == 1:
            return ()
        buckets = self.buckets or 2 * max(1, length // self.chunk)
        if buckets <= ONE_FACTOR:
            return (buckets,)
        first = 2 ** math.ceil(math.log2(buckets) / 2)
        return first, 2 * math.ceil(buckets / (2 * first))

    def build(self, config: LongspanConfig, layer: int, encoding: PositionEncoding, *, causal: bool) -> nn.Module:
        self.check_position_encoding(config, encoding)
        return LshAttention(config, self, layer, causal=causal)


class LshAttention(MixerModule):
    """LSH attention with one projection for queries and keys; groups of heads may share values."""

    rotations: Tensor

    def __init__(self, config: LongspanConfig, method: Lsh, layer_idx: int, *, causal: bool):
        super().__init__()
        assert config.head_dim is not None and config.num_key_value_heads is not None
        self.method, self.layer_idx, self.is_causal = method, layer_idx, causal
        self.heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.dropout = config.attention_dropout
        self.factors = method.factors(config.max_position_embeddings)
        width, inner = config.hidden_size, self.heads * self.head_dim
        self.qk_proj = nn.Linear(width, inner, bias=config.attention_bias)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * self.head_dim, bias=config.attention_bias)
        self.o_proj = nn.Linear(inner, width, bias=config.attention_bias)
        self.register_buffer("rotations", self._draw())

    def _draw(self) -> Tensor:
        """The rotations (H, rounds, D, sum of factors / 2).

        Each round has its own seed, so more rounds begin with the same ones.
        """
        shape = self.heads, self.head_dim, sum(self.factors) // 2
        rounds = []
        for number in range(self.method.hashes):
            seed = (self.method.seed * 1_000_003 + self.layer_idx) * 1_000_003 + number
            draw = torch.Generator().manual_seed(seed % 2**63)
            rounds.append(torch.randn(shape, generator=draw, dtype=torch.float32, device="cpu"))
        return torch.stack(rounds, dim=1)

    def mixed(self, call: MixerCall) -> Tensor:
        qk, value = self._heads(self.qk_proj(call.hidden)), self._heads(self.v_proj(call.hidden))
        if call.rotation is not None:  # before the hash: tokens that attend to each other shall fall into one bucket
            qk = rotated(qk, call.rotation)
        buckets = decided(lambda: self.buckets_of(qk))
        new, past = call.hidden.shape[1], 0
        if call.cache is not None:
            qk, value, buckets = self._with_past(call.cache, qk, value, buckets)
            past = qk.shape[2] - new
        attend = newest_attention if past > 0 and new == 1 else hashed_attention
        dropout = self.dropout if self.training else 0.0
        out = attend(qk, expand_heads(value, self.heads), buckets, self.method, self.is_causal, call.padding, dropout)
        return self.o_proj(out[:, :, -new:].transpose(1, 2).reshape(*call.hidden.shape[:-1], -1))

    @torch.no_grad()
    def buckets_of(self, qk: Tensor) -> Tensor:
        """Bucket numbers (B, H, rounds, T) of qk (B, H, T, D), computed in float32 for every dtype."""
        batch, heads, length, _ = qk.shape
        number = torch.zeros(batch, heads, self.method.hashes, length, dtype=torch.long, device=qk.device)
        begin, step = 0, 1
        with torch.autocast(qk.device.type, enabled=False):
            for buckets in self.factors:
                part = self.rotations[..., begin : begin + buckets // 2].float()
                rotated_qk = torch.einsum("bhtd,hrdn->bhrtn", qk.float(), part)
                number += step * torch.cat((rotated_qk, -rotated_qk), dim=-1).argmax(-1)
                begin, step = begin + buckets // 2, step * buckets
        return number.to(torch.int16 if step < 2**15 else torch.int32)

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, self.head_dim).transpose(1, 2)

    def _with_past(self, cache: Cache, *new: Tensor) -> tuple[Tensor, ...]:
        """qk, value and buckets of the cached and the new tokens; the cache keeps them."""

        state = state_of(cache, self.layer_idx)
        names = ("qk", "value", "buckets")
        if state.seen:
            cached = (state.tensors[name] for name in names)
            new = tuple(
                torch.cat(pair, dim=i) for pair, i in zip(zip(cached, new, strict=True), (2, 2, 3), strict=True)
            )
        state.keep(new[0].shape[2] - state.seen, **dict(zip(names, new, strict=True)))
        return new


def hashed_attention(
    qk: Tensor, value: Tensor, buckets: Tensor, method: Lsh, causal: bool, padding: Tensor | None, dropout: float
) -> Tensor:
    """Self-attention (B, H, T, D) of whole texts.

    qk and value (B, H, T, D), buckets (B, H, rounds, T); padding: boolean (B, T), True where a token is real, or None. Memory
    grows with T · rounds · chunk.
    """
    length, size = qk.shape[2], method.chunk
    groups = int(buckets.max()) + 1
    buckets = buckets.long()
    if padding is not None:  # padding comes last, behind every bucket
        buckets = buckets.masked_fill(~padding[:, None, None], groups)
    slot, slots = _slots(buckets, groups + 1, size, method.form == "aligned")
    order = torch.full((*slot.shape[:3], slots), length, device=qk.device)  # token numbers; `length` is an empty slot
    order.scatter_(3, slot, torch.arange(length, device=qk.device).expand_as(slot))
    queries = order.unflatten(3, (-1, size))
    before = _roll(queries)
    if method.form != "trax":
        before[:, :, :, 0] = length  # before a round's first chunk there is nothing
    keys = torch.cat((before, queries), dim=-1)
    query, values = _rows(qk, queries), _rows(value, queries)
    key = _unit(query)
    key, values = (torch.cat((_roll(x), x), dim=-2) for x in (key, values))
    scores = _wide(query @ key.mT) * _scale(method, qk)
    with torch.no_grad():
        visible = _visible(queries, keys, length, padding, causal)
        counted: Tensor | float = 0.0
        if method.form != "trax":
            found, times = _found(buckets, slot // size, queries, keys)
            visible &= found
            counted = times.to(scores.dtype).log_()
    scores = (scores - counted).masked_fill(~visible, HIDDEN) - ITSELF * (queries[..., None] == keys[..., None, :])
    total = scores.logsumexp(-1)
    weights = F.dropout((scores - total[..., None]).exp(), dropout, training=dropout > 0)
    out = weights.to(values.dtype) @ values
    index = slot[..., None].expand(*slot.shape, out.shape[-1])
    out, total = out.flatten(3, 4).gather(3, index), total.flatten(3, 4).gather(3, slot)
    return (total.softmax(2)[..., None] * out).sum(2).to(value.dtype)


def newest_attention(
    qk: Tensor, value: Tensor, buckets: Tensor, method: Lsh, causal: bool, padding: Tensor | None, dropout: float
) -> Tensor:
    """Attention (B, H, 1, D) of the last token; arguments as for `hashed_attention`.

    Time and memory grow with T · rounds, of small integers, and with the number of candidates.
    """
    length = qk.shape[2]
    same = buckets == buckets[..., -1:]
    if padding is not None:
        same &= padding[:, None, None]
    if method.form == "aligned":
        rank = same.cumsum(-1) - 1  # within the bucket, where it counts
        same &= rank >= (rank[..., -1:] // method.chunk - 1) * method.chunk
    found = same.any(2)[..., :-1]
    real = torch.ones_like(found) if padding is None else padding[:, None, :-1].expand_as(found)
    newest = torch.arange(length - 1, device=qk.device) + length * (found.long() + real)
    chosen = newest.topk(min(length - 1, 2 * method.chunk * method.hashes), dim=-1).indices
    always_visible = (real if method.form == "trax" else found).gather(2, chosen)
    index = chosen[..., None].expand(*chosen.shape, qk.shape[-1])
    query = qk[:, :, -1:]
    key = _unit(torch.cat((qk.gather(2, index), query), dim=2))
    scores = _wide(query @ key.mT) * _scale(method, qk)
    scores = torch.cat(
        (scores[..., :-1].masked_fill(~always_visible[:, :, None], HIDDEN), scores[..., -1:] - ITSELF), dim=-1
    )
    weights = F.dropout(scores.softmax(-1), dropout, training=dropout > 0)
    return weights.to(value.dtype) @ torch.cat((value.gather(2, index), value[:, :, -1:]), dim=2)


def _slots(buckets: Tensor, groups: int, size: int, aligned: bool) -> tuple[Tensor, int]:
    """The slot of each token (B, H, rounds, T), sorted by bucket and position, and the number of slots, a multiple of `size`.

    Slots have no gaps or, `aligned`, every bucket begins a chunk.
    """
    order = buckets.argsort(dim=-1, stable=True)
    rank = torch.empty_like(order)
    rank.scatter_(-1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order))
    if not aligned:
        return rank, -(-order.shape[-1] // size) * size
    count = buckets.new_zeros(*buckets.shape[:-1], groups).scatter_add_(-1, buckets, torch.ones_like(buckets))
    room = -(-count // size) * size
    moved = (room.cumsum(-1) - room) - (count.cumsum(-1) - count)
    return rank + moved.gather(-1, buckets), int(room.sum(-1).max())


def _roll(x: Tensor) -> Tensor:
    """x (B, H, rounds, chunks, ...) shifted by one chunk, across the ends of rounds."""
    return x.flatten(2, 3).roll(1, 2).view_as(x)


def _visible(queries: Tensor, keys: Tensor, length: int, padding: Tensor | None, causal: bool) -> Tensor:
    """Boolean (B, H, rounds, chunks, size, 2·size): pairs of real tokens that causality allows, of any buckets."""
    real_keys = keys < length
    if padding is not None:
        real = F.pad(padding, (0, 1), value=False)[:, None, None, None].expand(*keys.shape[:-1], -1)
        real_keys = real_keys & real.gather(-1, keys)
    real_keys = real_keys[..., None, :]
    if causal:
        return real_keys & (keys[..., None, :] <= queries[..., None])
    return real_keys.expand(*queries.shape, -1).clone()


def _found(buckets: Tensor, chunk: Tensor, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Whether the tokens of a pair share a bucket in its round, and the number of rounds, at least 1, that find the pair.

    A round finds it in one bucket of the same or of neighbouring chunks. buckets and chunk (B, H, rounds, T).
    """
    # The code below another by 1 is the same bucket's chunk before.
    code = F.pad(buckets * (int(chunk.max()) + 2) + chunk, (0, 1), value=-9)
    found, times = None, torch.zeros(*queries.shape, keys.shape[-1], dtype=torch.int16, device=keys.device)
    rounds = torch.arange(code.shape[2], device=code.device).view(-1, 1, 1, 1)
    for number in range(code.shape[2]):
        each = code[:, :, number, None, None].expand(*queries.shape[:-1], -1)
        ahead = each.gather(-1, queries)[..., None] - each.gather(-1, keys)[..., None, :]
        together = (ahead == 0) | (ahead == 1)
        times += together
        here = together & (rounds == number)
        found = here if found is None else found | here
    assert found is not None
    return found, times.clamp_(min=1)


def _rows(x: Tensor, order: Tensor) -> Tensor:
    """x (B, H, T, D) in the order of token numbers (B, H, ...), zeros where a number is T."""
    index = order.flatten(2)[..., None].expand(-1, -1, -1, x.shape[-1])
    return F.pad(x, (0, 0, 0, 1)).gather(2, index).view(*order.shape, -1)


def _unit(x: Tensor) -> Tensor:
    """x / |x|, with the authors' code's 1e-6 of the mean square under the root."""
    wide = _wide(x)
    return (wide * (wide.square().sum(-1, keepdim=True) + 1e-6 * x.shape[-1]).rsqrt()).to(x.dtype)


def _scale(method: Lsh, x: Tensor) -> float:
    return x.shape[-1] ** -0.5 if method.scaled else 1.0


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
