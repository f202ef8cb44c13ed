"""The forward kernel of `longspan.engine.window.window_sinks`, and what it shares with the backward ones.

Every score belongs to one of two kinds: near, 0 ≤ distance < window, and far, a sink at a distance of window or more. A block
of queries has its near keys in one run of tiles, of which only those at the two ends need a mask, and its far keys in a tile
or two of their own, so nothing is looked up. Everything is in powers of two: scores are multiplied by log₂ e.
"""

from __future__ import annotations

import triton
import triton.language as tl

from longspan.engine.kernel_parts import (
    LOG2E,
    add_values,
    empty_softmax,
    head_of,
    read_rows,
    read_tile,
    softmax_weights,
    split_pair,
    store_tile,
    tuned,
)

UNSPECIALISED = ["heads", "queries", "keys", "window", "sinks"]
"""Numbers that say nothing about alignment: a kernel compiled for one length serves all."""


@triton.jit
def near_keys(low, keys, window, BM: tl.constexpr, BN: tl.constexpr):
    """The keys near the queries at positions low ..

    low + BM - 1, cut at multiples of BN: from `first` masked, from `full` on every score counts, from `ragged` to
    `end` masked again.
    """
    end = tl.minimum(keys, low + BM)
    first = tl.maximum(low - window + 1, 0) // BN * BN
    full = (tl.maximum(low + BM - window, 0) + BN - 1) // BN * BN
    ragged = tl.minimum(keys, low + 1) // BN * BN
    full = tl.minimum(full, (end + BN - 1) // BN * BN)
    return first, full, tl.maximum(ragged, full), end


@triton.jit
def far_end(low, window, sinks, BM: tl.constexpr):
    """How many keys are sinks that some of the queries at positions low ..

    low + BM - 1 are far from.
    """
    return tl.minimum(sinks, tl.maximum(low + BM - window, 0))


@triton.jit
def seen(apart, key, sinks, keys, window, FAR: tl.constexpr):
    """Which scores of a tile count; `apart` is each one's distance, `key` each key's number."""
    if FAR:
        return (apart >= window) & (key < sinks)
    return (apart >= 0) & (apart < window) & (key < keys)


@triton.jit
def softmax_tiles(
    acc, total, top, q, key_base, value_base, k_row, v_row, scale, begin, end, low, sinks, keys, window,
    MASK: tl.constexpr, FAR: tl.constexpr, WIDTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The softmax carried over the keys from `begin` to `end`."""
    i = tl.arange(0, BM)[:, None]
    j = tl.arange(0, BN)[None, :]
    for n in range(begin, end, BN):
        k = read_rows(key_base, n, k_row, keys, MASK, BN, WIDTH)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if MASK:
            t = tl.where(seen(low - n + i - j, n + j, sinks, keys, window, FAR), s * scale, float("-inf"))
            new_top, p, shrink = softmax_weights(t, top, True)
        else:  # the scale is positive, so that the largest score stays the largest
            new_top = tl.maximum(top, tl.max(s, 1) * scale)
            p = tl.exp2(s * scale - new_top[:, None])
            shrink = tl.exp2(top - new_top)
        acc, total = add_values(acc, total, p, shrink, value_base, n, v_row, keys, MASK, BN, WIDTH, PRECISION)
        top = new_top
    return acc, total, top


@tuned(
    narrow=[(128, 64, 4, 3), (64, 64, 4, 3), (128, 128, 8, 2)],
    wide=[(128, 64, 8, 3), (64, 64, 4, 3), (128, 128, 8, 2), (64, 128, 4, 2)],
)
@triton.jit(do_not_specialize=[*UNSPECIALISED, "bucket"])
def forward(
    query, key, value, out, lse,
    heads, queries, keys, window, sinks, scale,
    query_strides, key_strides, value_strides, out_strides,
    bucket,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, SINK: tl.constexpr, ZERO: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """BM queries of one head over all keys that they see; SINK is how many sinks make a tile, 0 where there are none. ZERO: each
    also sees a key and a value of zeros. The log-sum-exp is to base 2."""
    pair = tl.program_id(1)
    batch, head = split_pair(pair, heads)
    m = tl.program_id(0) * BM
    low = keys - queries + m
    q = read_tile(query, query_strides, batch, head, m, queries, BM, WIDTH)
    k_base = head_of(key, key_strides, batch, head // GROUP)
    v_base = head_of(value, value_strides, batch, head // GROUP)
    k_row, v_row = key_strides.row, value_strides.row
    acc, total, top = empty_softmax(ZERO, BM, WIDTH)
    scale *= LOG2E
    first, full, ragged, end = near_keys(low, keys, window, BM, BN)
    if SINK:
        acc, total, top = softmax_tiles(
            acc, total, top, q, k_base, v_base, k_row, v_row, scale, 0, far_end(low, window, sinks, BM), low, sinks,
            keys, window, True, True, WIDTH, BM, SINK, PRECISION,
        )  # fmt: skip
    acc, total, top = softmax_tiles(
        acc, total, top, q, k_base, v_base, k_row, v_row, scale, first, tl.minimum(full, end), low, sinks,
        keys, window, True, False, WIDTH, BM, BN, PRECISION,
    )  # fmt: skip
    acc, total, top = softmax_tiles(
        acc, total, top, q, k_base, v_base, k_row, v_row, scale, full, ragged, low, sinks,
        keys, window, False, False, WIDTH, BM, BN, PRECISION,
    )  # fmt: skip
    acc, total, top = softmax_tiles(
        acc, total, top, q, k_base, v_base, k_row, v_row, scale, ragged, end, low, sinks,
        keys, window, True, False, WIDTH, BM, BN, PRECISION,
    )  # fmt: skip
    rows = m + tl.arange(0, BM)
    total = tl.where(total > 0.0, total, 1.0)  # rows past the last query may see nothing
    store_tile(out, out_strides, batch, head, rows, acc / total[:, None], rows < queries, WIDTH)
    tl.store(lse + pair.to(tl.int64) * queries + rows, top + tl.log2(total), mask=rows < queries)
