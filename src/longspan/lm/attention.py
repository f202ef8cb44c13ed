"""Attention under a position scheme, for the layers of `longspan.lm` models.

A bias by distance runs in the engine's kernels on a GPU, forward and backward. Elsewhere, and for every other term of a scheme,
it is added to the scores in float32, a block of queries at a time, so that memory grows with the length and not its square.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
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
"""The attention implementation of models whose scheme changes the scores."""
SCORES_AT_ONCE = 2**24
"""How many float32 biases are in memory at once outside training: 64 MB."""
Scores = Callable[[slice, Tensor], Tensor]
"""(some of the queries, distances (N,)) -> scores (B, H, rows, N), before the scale."""


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
    """The attention function registered with transformers: attention under the scheme of `module.place`, (B, Tq, H, D).

    query (B, H, Tq, D), key and value (B, H_kv, Tk, D); attention_mask None or boolean (B, 1, Tq, Tk); position_ids (B or 1, Tq);
    key_positions (B or 1, Tk) where keys do not just end where queries end; pair_bias None or (B or 1, H, Tq, Tk).
    For patterns: padding None or boolean (B, tokens so far), always_visible None or boolean (B, Tk), rolling the cache layer that
    kept a part of the keys. in_order: positions run without a gap, alike in all rows, and no mask hides a key.
    """
    encoding = cast(PositionEncoding, module.place)
    assert position_ids is not None, "the model passes positions to every layer"
    k_positions = ending_at(position_ids, key.shape[2]) if key_positions is None else key_positions
    columns, total = (None, key.shape[2]) if rolling is None else (rolling.columns, rolling.seen)
    if columns is not None:
        k_positions = position_ids[:, -1:] - (total - 1 - columns)
    inputs = _Inputs(
        query=query,
        key=key,
        value=value,
        mask=attention_mask,
        q_positions=position_ids,
        k_positions=k_positions,
        pair_bias=pair_bias,
        padding=padding,
        always_visible=always_visible,
        columns=columns,
        total=total,
        in_order=in_order,
    )
    blocks = encoding.query_blocks(position_ids, value.dtype)
    parts = [inputs]
    if len(blocks) > 1:
        parts = [inputs.block(start, end, bool(module.is_causal)) for start, end in blocks]
    out = [_attend_block(module, encoding, part, scaling, dropout) for part in parts]
    return torch.cat(out, dim=2).transpose(1, 2).contiguous(), None


@dataclass(frozen=True, kw_only=True)
class _Inputs:
    """Queries and keys of one call of `scheme_attention`, whose shapes these are.

    q_positions (B or 1, Tq) and k_positions (B or 1, Tk); columns: the token numbers of a rolling cache's keys;
    total: the number of tokens up to the last query.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    q_positions: Tensor
    k_positions: Tensor
    pair_bias: Tensor | None
    padding: Tensor | None
    always_visible: Tensor | None
    columns: Tensor | None
    total: int
    in_order: bool = False

    def block(self, start: int, end: int, causal: bool) -> _Inputs:
        """The queries `start` … `end` - 1 and, `causal`, the keys up to the last of them."""
        later = self.query.shape[2] - end if causal else 0
        keys, rows = self.key.shape[2] - later, slice(start, end)

        def ending(x: Tensor | None) -> Tensor | None:
            return x if x is None else x[..., : x.shape[-1] - later]

        def cut(x: Tensor | None) -> Tensor | None:
            return ending(x if x is None or x.shape[2] == 1 else x[:, :, rows])

        return _Inputs(
            query=self.query[:, :, rows],
            key=self.key[:, :, :keys],
            value=self.value[:, :, :keys],
            mask=cut(self.mask),
            q_positions=self.q_positions[:, rows],
            k_positions=self.k_positions[:, :keys],
            pair_bias=cut(self.pair_bias),
            padding=ending(self.padding),
            always_visible=ending(self.always_visible),
            columns=ending(self.columns),
            total=self.total - later,
        )


def _attend_block(
    module: nn.Module, encoding: PositionEncoding, inputs: _Inputs, scaling: float, dropout: float
) -> Tensor:
    """Attention (B, H, Tq, D) of queries and keys that one call of the scheme's `rotate_qk` can take."""
    layer = cast(int, getattr(module, "layer_idx", 0))
    scores = query_scores(encoding, inputs.query, inputs.q_positions, layer)
    inputs = _rotated(encoding, inputs)
    query, key, value = inputs.query, inputs.key, inputs.value
    scaling *= encoding.score_scale
    zero_key = bool(getattr(module, "zero_key", False))
    if pattern := getattr(module, "pattern", None):
        bias = encoding.bias if encoding.defines("bias") else None
        optional = (inputs.padding, bias, dropout, scores, inputs.columns, inputs.always_visible, zero_key)
        shape = AttentionShape(
            query.shape[1], inputs.total, layer, bool(module.is_causal), text_lengths(inputs.padding)
        )
        return attend(pattern, AttentionCall(query, key, value, scaling, *optional), shape)
    causal = bool(module.is_causal) and inputs.mask is None and query.shape[2] > 1
    if inputs.pair_bias is None and scores is None:
        if not encoding.defines("bias"):
            options: Any = {"dropout": dropout, "causal": causal, "zero_key": zero_key}
            return _plain_attention(query, key, value, inputs.mask, scaling, **options)
        if inputs.in_order and not zero_key and not dropout and query.shape[2] > 1:
            ahead = 0 if causal else key.shape[2] - 1
            distance_bias = encoding.distance_bias(key.shape[2] - 1, ahead, query.device)
            if serves(query, key, distance_bias):
                return biased_attention(query, key, value, distance_bias, scale=scaling, causal=causal)
    return _scored_attention(encoding, inputs, scores, scaling, dropout, causal=causal, zero_key=zero_key)


def _rotated(encoding: PositionEncoding, inputs: _Inputs) -> _Inputs:
    """The inputs with queries and keys as the scheme's `rotate_qk` and `query_scale` make them."""
    pair = encoding.rotate_qk(inputs.query, inputs.key, inputs.q_positions, inputs.k_positions)
    query, key = (x.to(inputs.value.dtype) for x in pair)
    scale = encoding.query_scale(inputs.q_positions)
    if scale is not None:
        query = query * scale[:, None, :, None].to(query.dtype)
    return replace(inputs, query=query, key=key)


def _scored_attention(
    encoding: PositionEncoding,
    inputs: _Inputs,
    scores: Scores | None,
    scaling: float,
    dropout: float,
    *,
    causal: bool,
    zero_key: bool,
) -> Tensor:
    """Attention (B, H, Tq, D) in float32 with what the scheme adds to scores, a block of queries at a time."""
    heads, total, new = inputs.query.shape[1], inputs.key.shape[2], inputs.query.shape[2]
    query = Slices(inputs.query.float())
    key, value = (Slices(expand_heads(x, heads).float()) for x in (inputs.key, inputs.value))
    pairs = None if inputs.pair_bias is None else Slices(inputs.pair_bias)
    outputs = []
    for start, end in _blocks(inputs.query, inputs.key):
        last = total - new + end if causal else total
        q_positions, k_positions = inputs.q_positions[:, start:end], inputs.k_positions[:, :last]
        if pairs is not None:
            added = pairs[:, :, start:end, :last]
        elif scores is not None:
            added = scaling * relative_scores(scores, slice(start, end), q_positions, k_positions)
        else:
            added = relative_bias(encoding, q_positions, k_positions)
        mask = causal_mask(end - start, last, added.device) if causal else _rows(inputs.mask, start, end)
        if mask is not None:  # rows that see nothing are padding: what they get is never read, but must be numbers
            added = added.masked_fill(~(mask | ~mask.any(-1, keepdim=True)), float("-inf"))
        q, k, v = query[:, :, start:end], key[:, :, :last], value[:, :, :last]
        if zero_key:
            k, v, _ = with_zero_key(k, v, None)
            added = F.pad(added, (0, 1))
        block = F.scaled_dot_product_attention(q, k, v, attn_mask=added, dropout_p=dropout, scale=scaling)
        outputs.append(block.to(inputs.query.dtype))
    return torch.cat(outputs, dim=2)


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
    """Attention without a bias, (B, H, Tq, D); with `zero_key` over one more key and value of zeros, which every query sees.

    Without a mask, queries that follow cached keys run in flash kernels too.
    """
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


def relative_bias(encoding: PositionEncoding, q_positions: Tensor, k_positions: Tensor) -> Tensor:
    """The scheme's `bias` of every pair, (B or 1, H, Tq, Tk).

    q_positions (B or 1, Tq), k_positions (B or 1, Tk). Where both run without a gap, as they mostly do, each distance is
    computed once and the rows are views of one another.
    """
    if consecutive(q_positions) and consecutive(k_positions):
        first, last = int(q_positions[0, 0]), int(k_positions[0, -1])
        queries = range(first, first + q_positions.shape[1])
        keys = range(last + 1 - k_positions.shape[1], last + 1)
        return bias_rows(encoding.bias, queries, keys, k_positions.device)[None]
    return encoding.bias(distances(q_positions, k_positions)).transpose(0, 1)


def query_scores(encoding: PositionEncoding, query: Tensor, positions: Tensor, layer: int) -> Scores | None:
    """The scheme's `query_scores` of queries (B, H, Tq, D) at positions (B or 1, Tq), times its `query_scale`; None without."""
    if not encoding.defines("query_scores"):
        return None
    scale, slices = encoding.query_scale(positions), Slices(query)

    def scores(rows: slice, distance: Tensor) -> Tensor:
        found = encoding.query_scores(slices[:, :, rows], distance, layer)
        return found if scale is None else found * scale[:, None, rows, None]

    return scores


def relative_scores(scores: Scores, rows: slice, q_positions: Tensor, k_positions: Tensor) -> Tensor:
    """Scores (B, H, rows, Tk) of the queries `rows` with all keys.

    q_positions (B or 1, rows), of these queries; k_positions (B or 1, Tk).
    """
    distance = distances(q_positions, k_positions)
    low, high = int(distance.min()), int(distance.max())
    line = scores(rows, torch.arange(low, high + 1, device=k_positions.device))
    if consecutive(q_positions) and consecutive(k_positions):
        return shifted(line, k_positions.shape[1])
    return line.gather(-1, (distance - low)[:, None].expand(line.shape[0], line.shape[1], -1, -1))


def consecutive(positions: Tensor) -> bool:
    """Whether positions (B or 1, T) are equal in all rows and rise by one."""
    if positions.shape[0] > 1 and not bool((positions == positions[:1]).all()):
        return False
    return positions.shape[1] < 2 or bool((positions[0].diff() == 1).all())


def _blocks(query: Tensor, key: Tensor) -> list[tuple[int, int]]:
    """(start, end) of blocks of queries.

    With gradients every bias is kept anyway, so there is one block.
    """
    total = query.shape[2]
    size = total
    if not (torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)):
        size = max(1, SCORES_AT_ONCE // (query.shape[1] * key.shape[2]))
    return [(start, min(start + size, total)) for start in range(0, total, size)]


def _rows(mask: Tensor | None, start: int, end: int) -> Tensor | None:
    return mask if mask is None or mask.shape[2] == 1 else mask[:, :, start:end]


AttentionInterface.register(SCHEME, scheme_attention)
AttentionMaskInterface.register(SCHEME, AttentionMaskInterface()["sdpa"])
