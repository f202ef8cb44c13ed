"""The derivative of `longspan.engine.biased.attention` by the entries of a table: sums of score derivatives along diagonals.

It visits only the tiles between the table's ends, so with few distances there it costs little. What lies past the ends is
summed up by the kernel for keys.
"""

from __future__ import annotations

import triton
import triton.language as tl

from longspan.engine.biased.kernels.forward import UNSPECIALISED, read_clamped, visible
from longspan.engine.kernel_parts import LOG2E, head_of, read_rows, read_sums, read_tile, split_pair


@triton.jit(do_not_specialize=[*UNSPECIALISED, "size"])
def backward_table(
    query, key, value, d_out, d_table, lse, delta, table, starts,
    heads, size, queries, keys, window, span, zero, nearest, farthest, scale,
    query_strides, key_strides, value_strides, d_out_strides,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, STARTS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr,
    PRECISION: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """The derivative by the entries of a table between its ends, added to `d_table` (H, size) float32: S queries of one head
    over the keys at distances between `nearest` and `farthest`. A tile is turned so that its diagonals are columns."""
    pair = tl.program_id(1)
    batch, head = split_pair(pair, heads)
    m = tl.program_id(0) * S
    low_query = keys - queries + m
    start = tl.load(starts + batch) if STARTS else 0
    i = tl.arange(0, S)[:, None]
    j = tl.arange(0, S)[None, :]
    inside = m + tl.arange(0, S) < queries
    q = read_tile(query, query_strides, batch, head, m, queries, S, WIDTH)
    do = read_tile(d_out, d_out_strides, batch, head, m, queries, S, WIDTH)
    lines = pair.to(tl.int64) * queries + m + tl.arange(0, S)
    row, sums = read_sums(lse, delta, lines, inside, True)
    k_base = head_of(key, key_strides, batch, head // GROUP)
    v_base = head_of(value, value_strides, batch, head // GROUP)
    k_row, v_row = key_strides.row, value_strides.row
    band = table + head * span
    begin = tl.maximum(start, low_query - farthest + 1)
    end = tl.minimum(keys, low_query + S - nearest)
    if CAUSAL:
        end = tl.minimum(end, low_query + S)
    if WINDOW:
        begin = tl.maximum(begin, low_query - window + 1)
    for n in range(begin // S * S, end, S):
        k = read_rows(k_base, n, k_row, keys, True, S, WIDTH)
        v = read_rows(v_base, n, v_row, keys, True, S, WIDTH)
        apart = low_query - n
        t = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E) - row[:, None]
        t += read_clamped(band, apart, i, j, zero, nearest, farthest)
        t = tl.where(visible(apart, i, j, n, start, keys, window, CAUSAL, WINDOW), t, float("-inf"))
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        ds = tl.exp2(t) * (dp - sums[:, None])
        turned = tl.gather(ds, (i - j) & (S - 1), 1)
        for side in tl.static_range(2):  # the diagonals from the main one down, then those above it
            distance = apart + tl.arange(0, S) - side * S
            total = tl.sum(tl.where(i >= j if side == 0 else i < j, turned, 0.0), 0)
            counts = (distance > nearest) & (distance < farthest)
            tl.atomic_add(d_table + head * size + distance - nearest, total, mask=counts, sem="relaxed")
