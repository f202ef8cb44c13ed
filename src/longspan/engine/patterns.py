"""Attention under a pattern, sent to what computes it.

A text that attends to itself goes to the pattern's own `run`, with rows aligned at their first real token. Tokens that come after
others (decoding, chunks) go to masks, or to a kernel for the keys of a rolling cache.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from longspan.engine import backends
from longspan.engine.call import AttentionCall, AttentionShape, Pattern
from longspan.engine.core import expand_heads
from longspan.engine.masks import masked_attention


def some_heads(call: AttentionCall, start: int, end: int) -> AttentionCall:
    """The call for the query heads from `start` to `end` - 1, each with keys and values of its own."""
    heads, bias = call.query.shape[1], call.bias
    key, value = (expand_heads(x, heads)[:, start:end] for x in (call.key, call.value))
    part = None if bias is None else lambda distance: bias(distance)[start:end]
    return replace(call, query=call.query[:, start:end], key=key, value=value, bias=part)


def text_lengths(padding: Tensor | None) -> Tensor | None:
    """From each row's first real token to its last, (B,)."""
    if padding is None:
        return None
    return padding.shape[1] - padding.flip(1).int().argmax(1) - padding.int().argmax(1)


def attend(pattern: Pattern, call: AttentionCall, shape: AttentionShape) -> Tensor:
    """Attention of the call under the pattern: (B, H, Tq, D).

    Padding tokens get numbers that no other token reads.
    """
    if call.columns is not None:
        return backends.run_rolled(pattern, call, shape)
    padded_left = call.padding is not None and not bool((call.padding[:, 1:] <= call.padding[:, :-1]).all())
    unlike = call.zero_key and not pattern.runs_zero_key
    if unlike or call.query.shape[2] != call.key.shape[2] or (padded_left and call.query_scores is not None):
        return masked_attention(pattern, call, shape)
    if not padded_left:
        return pattern.run(call, shape)
    assert call.padding is not None
    shift = call.padding.int().argmax(1)
    query, key, value = (roll(x, shift, 2) for x in (call.query, call.key, call.value))
    always_visible = None if call.always_visible is None else roll(call.always_visible, shift, 1)
    aligned = replace(
        call, query=query, key=key, value=value, padding=roll(call.padding, shift, 1), always_visible=always_visible
    )
    out = pattern.run(aligned, shape)
    return roll(out, -shift, 2)


def shifted(line: Tensor, keys: int) -> Tensor:
    """Scores of each query by distance, lined up with the keys: (B, H, Tq, Tq + keys - 1) → (B, H, Tq, keys), where distances
    rise by one and the last query has the least one to the last key (the shift of Transformer-XL, appendix B)."""
    batch, heads, rows, width = line.shape
    back = line.flip(-1).contiguous()  # row r begins at rows - 1 - r
    strides = (*back.stride()[:2], width - 1, 1)
    return back.as_strided((batch, heads, rows, keys), strides, rows - 1)


def roll(x: Tensor, shift: Tensor, dim: int) -> Tensor:
    """Each row of the batch moved left by its own `shift` (B,) along `dim`, what leaves coming back on the other side."""
    length = x.shape[dim]
    index = (torch.arange(length, device=x.device)[None] + shift[:, None]) % length
    return x.gather(dim, index.view(len(x), *[1] * (dim - 1), length, *[1] * (x.ndim - dim - 1)).expand_as(x))
