"""The forward kernel of `longspan.engine.window.window_sinks` for wide heads on Hopper and newer GPUs.

It is the kernel of `forward.py` with keys and values read through tensor descriptors, by the GPU's own engine for copies: no
registers hold addresses, so that two programs fit on a multiprocessor and one multiplies while the other takes exponentials.
Near keys pass in one loop. ALWAYS masks all its tiles; without it a tile is masked if it lies at one of the two ends.
"""

from __future__ import annotations

import triton
import triton.language as tl

from longspan.engine.kernel_parts import LOG2E, empty_softmax, head_of, read_tile, store_tile
from longspan.engine.window.kernels.forward import UNSPECIALISED, far_end, near_keys, softmax_tiles

HIDDEN = tl.constexpr(-(2.0**100))
"""A masked score: finite, so that no row needs a care of its own; a row's first real score makes what it left nothing. A power of
two, so that multiplying it by the scale is exact: a row that sees nothing yet takes the product, fused with a subtraction, from
the product, and what rounding left of another number would be its exponential's undoing."""


@triton.jit(do_not_specialize=UNSPECIALISED)
def forward(
    query, key, value, keys_described, values_described, out, lse,
    pairs, heads, queries, keys, window, sinks, scale,
    query_strides, key_strides, value_strides, out_strides,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, SINK: tl.constexpr, ZERO: tl.constexpr, PRECISION: tl.constexpr,
    ALWAYS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """BM queries of one head over all keys that they see; descriptors are of blocks (1, 1, BN, WIDTH). The last queries come
    first: those that see the fewest keys fill the gaps at the end."""
    pair = (tl.program_id(0) % pairs).to(tl.int32)
    batch = pair // heads
    head = pair % heads
    m = (tl.cdiv(queries, BM) - 1 - tl.program_id(0) // pairs) * BM
    low = keys - queries + m
    q = read_tile(query, query_strides, batch.to(tl.int64), head.to(tl.int64), m, queries, BM, WIDTH)
    acc, total, top = empty_softmax(ZERO, BM, WIDTH)
    scale *= LOG2E
    if SINK:
        k_base = head_of(key, key_strides, batch.to(tl.int64), (head // GROUP).to(tl.int64))
        v_base = head_of(value, value_strides, batch.to(tl.int64), (head // GROUP).to(tl.int64))
        acc, total, top = softmax_tiles(
            acc, total, top, q, k_base, v_base, key_strides.row, value_strides.row, scale, 0,
            far_end(low, window, sinks, BM), low, sinks, keys, window, True, True, WIDTH, BM, SINK, PRECISION,
        )  # fmt: skip
    first, full, ragged, end = near_keys(low, keys, window, BM, BN)
    i = tl.arange(0, BM)[:, None]
    j = tl.arange(0, BN)[None, :]
    for n in range(first, end, BN):
        k = keys_described.load([batch, head // GROUP, n, 0]).reshape([BN, WIDTH])
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        apart = low - n + i - j
        if ALWAYS:
            s = tl.where((apart >= 0) & (apart < window), s, HIDDEN)
        else:
            if (n < full) | (n >= ragged):
                s = tl.where((apart >= 0) & (apart < window), s, HIDDEN)
        new_top = tl.maximum(top, tl.max(s, 1) * scale)
        p = tl.exp2(s * scale - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        v = values_described.load([batch, head // GROUP, n, 0]).reshape([BN, WIDTH])
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        top = new_top
    rows = m + tl.arange(0, BM)
    total = tl.where(total > 0.0, total, 1.0)
    store_tile(
        out, out_strides, batch.to(tl.int64), head.to(tl.int64), rows, acc / total[:, None], rows < queries, WIDTH
    )
    tl.store(lse + pair.to(tl.int64) * queries + rows, top + tl.log2(total), mask=rows < queries)
