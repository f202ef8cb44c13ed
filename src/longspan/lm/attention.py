"""Attention under a position scheme, for every layer of a model of ours.

A bias by distance runs in the engine's kernels on a GPU, forward and backward. Elsewhere, and for whatever else a scheme says, it
is added to the scores in float32, a block of queries at a time, so that memory grows with the length and not with its square.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from longspan.engine.biased.attention import biased_attention, serves
from longspan.engine.biased.bias import bias_rows
from longspan.engine.call import AttentionCall, AttentionShape
from longspan.engine.core import attention, causal_mask, distances, ending_at, expand_heads, with_zero_key
from longspan.engine.joint import Chunk, Lane, Part, joint_attention
from longspan.engine.patterns import attend, shifted, text_lengths
from longspan.engine.slices import Slices
from longspan.hf.rolling import WindowLayer
from longspan.positions.scheme import PositionEncoding

SCHEME = "longspan_scheme"
"""The attention implementation of models whose scheme takes part in the scores."""
SCORES_AT_ONCE = 2**24
"""How many biases are held at once outside training: 64 MB."""


def scheme_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    position_ids: Tensor | None = None,
    key_positions: Tensor | None = None,
    pair_bias: Tensor | None = None,
    padding: Tensor | None = None,
    always_visible: Tensor | None = None,
    rolling: WindowLayer | None = None,
    in_order: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function registered with transformers. query (B, H, Tq, D), key and value (B, H_kv, Tk, D), mask None or boolean
    (B, 1, Tq, Tk), key_positions (B or 1, Tk) where they do not just end at the queries',
    pair_bias None or (B or 1, H, Tq, Tk); for patterns padding None or boolean (B, tokens so far), shown the keys that all see,
    None or boolean (B, Tk), and rolling the layer of a cache that kept a part of the keys; in_order says that positions run
    without a gap, alike in all rows, and that no mask hides a key; returns (B, Tq, H, D)."""
    encoding = cast(PositionEncoding, module.place)
    assert position_ids is not None, "the model gives positions to every layer"
    queries, keys = position_ids, ending_at(position_ids, key.shape[2]) if key_positions is None else key_positions
    columns, total = (None, key.shape[2]) if rolling is None else (rolling.columns, rolling.seen)
    if columns is not None:
        keys = position_ids[:, -1:] - (total - 1 - columns)
    whole = _Inputs(
        query,
        key,
        value,
        attention_mask,
        queries,
        keys,
        pair_bias,
        padding,
        always_visible,
        columns,
        total,
        in_order=in_order,
    )
    blocks = encoding.query_blocks(queries, value.dtype)
    parts = [whole] if len(blocks) == 1 else [whole.block(start, end, bool(module.is_causal)) for start, end in blocks]
    out = [_attend_block(module, encoding, part, scaling, dropout) for part in parts]
    return torch.cat(out, dim=2).transpose(1, 2).contiguous(), None


@dataclass(frozen=True)
class _Inputs:
    """Queries and the keys that they meet, as `scheme_attention` is given them. queries (B or 1, Tq) and keys (B or 1, Tk) are
    positions; columns the tokens that keys of a rolling cache are; total how many tokens there are up to the last query."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    queries: Tensor
    keys: Tensor
    pair_bias: Tensor | None
    padding: Tensor | None
    always_visible: Tensor | None
    columns: Tensor | None
    total: int
    in_order: bool = False

    def block(self, start: int, end: int, causal: bool) -> _Inputs:
        """The queries `start` … `end` - 1 and, `causal`, the keys up to the last of them."""
        later = self.query.shape[2] - end if causal else 0
        held, rows = self.key.shape[2] - later, slice(start, end)

        def ending(x: Tensor | None) -> Tensor | None:
            return x if x is None else x[..., : x.shape[-1] - later]

        def cut(x: Tensor | None) -> Tensor | None:
            return ending(x if x is None or x.shape[2] == 1 else x[:, :, rows])

        return _Inputs(
            self.query[:, :, rows],
            self.key[:, :, :held],
            self.value[:, :, :held],
            cut(self.mask),
            self.queries[:, rows],
            self.keys[:, :held],
            cut(self.pair_bias),
            ending(self.padding),
            ending(self.always_visible),
            ending(self.columns),
            self.total - later,
        )


def _attend_block(
    module: nn.Module, encoding: PositionEncoding, given: _Inputs, scaling: float, dropout: float
) -> Tensor:
    """Attention (B, H, Tq, D) of queries and keys that meet in one call of the scheme's `rotate_qk`."""
    query, key, value, queries, keys = given.query, given.key, given.value, given.queries, given.keys
    attention_mask, pair_bias = given.mask, given.pair_bias
    layer = cast(int, getattr(module, "layer_idx", 0))
    asking = query_scores(encoding, query, queries, layer)
    query, key = (x.to(value.dtype) for x in encoding.rotate_qk(query, key, queries, keys))
    scale = encoding.query_scale(queries)
    if scale is not None:
        query = query * scale[:, None, :, None].to(query.dtype)
    scaling *= encoding.score_scale
    zero_key = bool(getattr(module, "zero_key", False))
    if pattern := getattr(module, "pattern", None):
        by_distance = encoding.bias if encoding.defines("bias") else None
        call = AttentionCall(
            query,
            key,
            value,
            scaling,
            given.padding,
            by_distance,
            dropout,
            asking,
            given.columns,
            given.always_visible,
            zero_key,
        )
        grid = AttentionShape(query.shape[1], given.total, layer, bool(module.is_causal), text_lengths(given.padding))
        return attend(pattern, call, grid)
    causal = bool(module.is_causal) and attention_mask is None and query.shape[2] > 1
    if pair_bias is None and asking is None and not encoding.defines("bias"):
        return _plain_attention(
            query, key, value, attention_mask, scaling, dropout=dropout, causal=causal, zero_key=zero_key
        )
    if given.in_order and pair_bias is None and asking is None and not zero_key and not dropout and query.shape[2] > 1:
        law = encoding.distance_bias(key.shape[2] - 1, 0 if causal else key.shape[2] - 1, query.device)
        if serves(query, key, law):
            return biased_attention(query, key, value, law, scale=scaling, causal=causal)
    heads, total = query.shape[1], key.shape[2]
    wide = query.float(), expand_heads(key, heads).float(), expand_heads(value, heads).float()
    q_slices, k_slices, v_slices = map(Slices, wide)
    pairs = None if pair_bias is None else Slices(pair_bias)
    blocks = []
    for start, end in _blocks(query, key):
        seen = total - query.shape[2] + end if causal else total
        asked, offered = queries[:, start:end], keys[:, :seen]
        if pairs is not None:
            extra = pairs[:, :, start:end, :seen]
        elif asking is not None:
            extra = scaling * relative_scores(asking, slice(start, end), asked, offered)
        else:
            extra = relative_bias(encoding, asked, offered)
        mask = causal_mask(end - start, seen, query.device) if causal else _rows(attention_mask, start, end)
        if mask is not None:  # rows that see nothing are padding: what they get is never read, but must be numbers
            extra = extra.masked_fill(~(mask | ~mask.any(-1, keepdim=True)), float("-inf"))
        q, k, v = q_slices[:, :, start:end], k_slices[:, :, :seen], v_slices[:, :, :seen]
        if zero_key:
            k, v, _ = with_zero_key(k, v, None)
            extra = F.pad(extra, (0, 1))
        block = F.scaled_dot_product_attention(q, k, v, attn_mask=extra, dropout_p=dropout, scale=scaling)
        blocks.append(block.to(query.dtype))
    return torch.cat(blocks, dim=2)


def _plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    *,
    dropout: float,
    causal: bool,
    zero_key: bool,
) -> Tensor:
    """As `attention`, with `zero_key` over a key and a value of zeros too, which every query sees. Without a mask, queries go
    through flash kernels also where there are keys before the first of them."""
    new, before = query.shape[2], key.shape[2] - query.shape[2]
    if causal and (zero_key or before) and not dropout:
        rows = Lane(0, new)
        parts = [Part(1, rows, Lane(before, new), True)]
        if before:
            parts.append(Part(1, rows, Lane(0, before)))
        return joint_attention(query, key, value, [Chunk(0, new, parts)], scale, zero_key=zero_key)
    if causal and zero_key:
        mask, causal = causal_mask(new, key.shape[2], query.device), False
    if zero_key:
        key, value, mask = with_zero_key(key, value, mask)
    return attention(query, key, value, mask, scale, dropout=dropout, causal=causal)


def relative_bias(encoding: PositionEncoding, queries: Tensor, keys: Tensor) -> Tensor:
    """(B or 1, H, Tq, Tk) from a scheme that knows distances; queries (B or 1, Tq), keys (B or 1, Tk) positions. Where both
    run without a gap, as they mostly do, each distance is asked for once and the rows are views of one another."""
    if consecutive(queries) and consecutive(keys):
        first, last = int(queries[0, 0]), int(keys[0, -1])
        asked = range(first, first + queries.shape[1])
        return bias_rows(encoding.bias, asked, range(last + 1 - keys.shape[1], last + 1), keys.device)[None]
    return encoding.bias(distances(queries, keys)).transpose(0, 1)


Asking = Callable[[slice, Tensor], Tensor]
"""Some of the queries and distances (N,) to scores (B, H, rows, N), before the scale."""


def query_scores(encoding: PositionEncoding, query: Tensor, queries: Tensor, layer: int) -> Asking | None:
    """What the scheme's `query_scores` says of these queries (B, H, Tq, D) at positions (B or 1, Tq), with the scheme's
    `query_scale`; None where it says nothing."""
    if not encoding.defines("query_scores"):
        return None
    scale, some = encoding.query_scale(queries), Slices(query)

    def ask(rows: slice, far: Tensor) -> Tensor:
        scores = encoding.query_scores(some[:, :, rows], far, layer)
        return scores if scale is None else scores * scale[:, None, rows, None]

    return ask


def relative_scores(asking: Asking, rows: slice, queries: Tensor, keys: Tensor) -> Tensor:
    """(B, H, rows, Tk) of the queries `rows`, which are at positions queries (B or 1, rows), with keys (B or 1, Tk)."""
    far = distances(queries, keys)
    low, high = int(far.min()), int(far.max())
    line = asking(rows, torch.arange(low, high + 1, device=keys.device))
    if consecutive(queries) and consecutive(keys):
        return shifted(line, keys.shape[1])
    return line.gather(-1, (far - low)[:, None].expand(line.shape[0], line.shape[1], -1, -1))


def consecutive(positions: Tensor) -> bool:
    """Whether positions (B or 1, T) are the same in every row and each is one more than the one before."""
    if positions.shape[0] > 1 and not bool((positions == positions[:1]).all()):
        return False
    return positions.shape[1] < 2 or bool((positions[0].diff() == 1).all())


def _blocks(query: Tensor, key: Tensor) -> list[tuple[int, int]]:
    """Where blocks of queries begin and end. With gradients all biases are kept anyway, so there is one block."""
    total = query.shape[2]
    size = total
    if not (torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)):
        size = max(1, SCORES_AT_ONCE // (query.shape[1] * key.shape[2]))
    return [(start, min(start + size, total)) for start in range(0, total, size)]


def _rows(mask: Tensor | None, start: int, end: int) -> Tensor | None:
    return mask if mask is None or mask.shape[2] == 1 else mask[:, :, start:end]


AttentionInterface.register(SCHEME, scheme_attention)
AttentionMaskInterface.register(SCHEME, AttentionMaskInterface()["sdpa"])
