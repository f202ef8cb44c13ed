"""Backward kernels of `longspan.engine.window.window_sinks`: gradients of queries, of far sinks, of near keys and values.


All queries are far from the sinks, so what reaches these is added up in a few parts of the text at once, each part in a place
of its own, and no order of programs changes a sum. Keys' tiles are computed transposed from the start, keys by queries, so
that no transposed accumulator is ever an operand: Triton up to 3.7.0 miscompiles that for Hopper GPUs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from longspan.engine.kernel_parts import (
    LOG2E,
    add_query_gradient,
    add_value_gradient,
    head_of,
    read_queries,
    read_rows,
    read_sums,
    read_tile,
    split_pair,
    store_tile,
    tuned,
)
from longspan.engine.window.kernels.forward import UNSPECIALISED, far_end, near_keys, seen


@triton.jit
def query_tiles(
    dq, q, do, row, delta, key_base, value_base, k_row, v_row, scale, begin, end, low, sinks, keys, window,
    MASK: tl.constexpr, FAR: tl.constexpr, WIDTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq over the keys from `begin` to `end`; `row` is each query's log-sum-exp."""
    i = tl.arange(0, BM)[:, None]
    j = tl.arange(0, BN)[None, :]
    for n in range(begin, end, BN):
        k = read_rows(key_base, n, k_row, keys, MASK, BN, WIDTH)
        v = read_rows(value_base, n, v_row, keys, MASK, BN, WIDTH)
        p = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale - row[:, None])
        if MASK:
            p = tl.where(seen(low - n + i - j, n + j, sinks, keys, window, FAR), p, 0.0)
        dq = add_query_gradient(dq, p, do, k, v, delta, PRECISION)
    return dq


@tuned(narrow=[(64, 64, 4, 3), (128, 64, 8, 3)], wide=[(128, 64, 8, 2), (64, 64, 4, 2)])
@triton.jit(do_not_specialize=[*UNSPECIALISED, "bucket"])
def backward_queries(
    query, key, value, out, d_out, d_query, lse, delta,
    heads, queries, keys, window, sinks, scale,
    query_strides, key_strides, value_strides, out_strides, d_out_strides, d_query_strides,
    bucket,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, SINK: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """The derivative by BM queries of one head; and `delta`, each row's sum of out · d_out, for the other kernels."""
    pair = tl.program_id(1)
    batch, head = split_pair(pair, heads)
    m = tl.program_id(0) * BM
    low = keys - queries + m
    rows = m + tl.arange(0, BM)
    inside = rows < queries
    q, do, row, sums = read_queries(
        query, query_strides, out, out_strides, d_out, d_out_strides, lse, delta, batch, head, pair, m, queries, BM, WIDTH,
    )  # fmt: skip
    k_base = head_of(key, key_strides, batch, head // GROUP)
    v_base = head_of(value, value_strides, batch, head // GROUP)
    k_row, v_row = key_strides.row, value_strides.row
    dq = tl.zeros([BM, WIDTH], tl.float32)
    by = scale * LOG2E
    first, full, ragged, end = near_keys(low, keys, window, BM, BN)
    if SINK:
        dq = query_tiles(
            dq, q, do, row, sums, k_base, v_base, k_row, v_row, by, 0, far_end(low, window, sinks, BM), low, sinks,
            keys, window, True, True, WIDTH, BM, SINK, PRECISION,
        )  # fmt: skip
    dq = query_tiles(
        dq, q, do, row, sums, k_base, v_base, k_row, v_row, by, first, tl.minimum(full, end), low, sinks, keys, window,
        True, False, WIDTH, BM, BN, PRECISION,
    )  # fmt: skip
    dq = query_tiles(
        dq, q, do, row, sums, k_base, v_base, k_row, v_row, by, full, ragged, low, sinks, keys, window,
        False, False, WIDTH, BM, BN, PRECISION,
    )  # fmt: skip
    dq = query_tiles(
        dq, q, do, row, sums, k_base, v_base, k_row, v_row, by, ragged, end, low, sinks, keys, window,
        True, False, WIDTH, BM, BN, PRECISION,
    )  # fmt: skip
    store_tile(d_query, d_query_strides, batch, head, rows, dq * scale, inside, WIDTH)


@triton.jit
def _key_tiles(
    dk, dv, k, v, query_base, d_out_base, q_row, g_row, lse, delta, scale, begin, end, shift, n, sinks, queries, keys,
    window, MASK: tl.constexpr, FAR: tl.constexpr, WIDTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv over the queries from `begin` to `end`.

    Query r is at position `shift` + r.
    """
    i = tl.arange(0, BM)[None, :]
    j = tl.arange(0, BN)[:, None]
    for m in range(begin, end, BM):
        q = read_rows(query_base, m, q_row, queries, MASK, BM, WIDTH)
        do = read_rows(d_out_base, m, g_row, queries, MASK, BM, WIDTH)
        rows = m + tl.arange(0, BM)
        row, sums = read_sums(lse, delta, rows, rows < queries, MASK)
        p = tl.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale - row[None, :])
        if MASK:
            p = tl.where(seen(shift + m - n + i - j, n + j, sinks, keys, window, FAR), p, 0.0)
        dv, ds = add_value_gradient(dv, p, do, v, sums, PRECISION)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=[*UNSPECIALISED, "part"])
def backward_sinks(
    query, key, value, d_out, sums, lse, delta,
    heads, queries, keys, window, sinks, part, scale,
    query_strides, key_strides, value_strides, d_out_strides,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, SINK: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """What `part` queries of one head give to SINK sinks that they are far from, into sums (2, parts, B · H, sinks, WIDTH)."""
    pair = tl.program_id(1)
    batch, head = split_pair(pair, heads)
    n = tl.program_id(2) * SINK
    begin = tl.program_id(0) * part
    shift = keys - queries
    k = read_tile(key, key_strides, batch, head // GROUP, n, sinks, SINK, WIDTH)
    v = read_tile(value, value_strides, batch, head // GROUP, n, sinks, SINK, WIDTH)
    dk = tl.zeros([SINK, WIDTH], tl.float32)
    dv = tl.zeros([SINK, WIDTH], tl.float32)
    lines = (batch * heads + head) * queries
    dk, dv = _key_tiles(
        dk, dv, k, v, head_of(query, query_strides, batch, head), head_of(d_out, d_out_strides, batch, head),
        query_strides.row, d_out_strides.row, lse + lines, delta + lines, scale * LOG2E, begin,
        tl.minimum(begin + part, queries), shift, n, sinks, queries, keys, window, True, True, WIDTH, BM, SINK, PRECISION,
    )  # fmt: skip
    line = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + pair
    rows = n + tl.arange(0, SINK)
    place = sums + (line * sinks + rows)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    tl.store(place, dk, mask=(rows < sinks)[:, None])
    place += tl.num_programs(0).to(tl.int64) * tl.num_programs(1) * sinks * WIDTH
    tl.store(place, dv, mask=(rows < sinks)[:, None])


@triton.jit
def near_queries(n, shift, queries, window, BM: tl.constexpr, BN: tl.constexpr):
    """The queries near the keys n ..

    n + BN - 1, cut at multiples of BM: from `first` masked, from `full` on every score counts, from `ragged` to `end`
    masked again.
    """
    first = tl.maximum(n - shift, 0) // BM * BM
    end = tl.maximum(tl.minimum(queries, n + BN - 1 + window - shift), first)
    full = (tl.maximum(n + BN - 1 - shift, 0) + BM - 1) // BM * BM
    full = tl.minimum(full, (end + BM - 1) // BM * BM)
    ragged = tl.maximum(tl.minimum(queries, n + window - shift) // BM * BM, full)
    return first, full, ragged, end


@tuned(
    narrow=[(64, 128, 8, 3), (32, 64, 4, 3), (64, 64, 4, 3)], wide=[(32, 128, 8, 3), (64, 128, 8, 2), (32, 64, 4, 3)]
)
@triton.jit(do_not_specialize=[*UNSPECIALISED, "bucket"])
def backward_keys(
    query, key, value, d_out, d_key, d_value, far, lse, delta,
    heads, queries, keys, window, sinks, scale,
    query_strides, key_strides, value_strides, d_out_strides, d_key_strides, d_value_strides,
    bucket,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, SINK: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """The derivative by BN keys and values of one key head, over all query heads that share it. `far` (2, B · H_kv, sinks,
    WIDTH) float32 holds what distant queries give."""
    pair = tl.program_id(1)
    kv_heads = heads // GROUP
    batch, kv_head = split_pair(pair, kv_heads)
    n = tl.program_id(0) * BN
    shift = keys - queries
    k = read_tile(key, key_strides, batch, kv_head, n, keys, BN, WIDTH)
    v = read_tile(value, value_strides, batch, kv_head, n, keys, BN, WIDTH)
    dk = tl.zeros([BN, WIDTH], tl.float32)
    dv = tl.zeros([BN, WIDTH], tl.float32)
    if SINK:
        line = pair.to(tl.int64) * sinks * WIDTH
        dk = read_rows(far + line, n, WIDTH, sinks, True, BN, WIDTH)
        dv = read_rows(far + line + tl.num_programs(1).to(tl.int64) * sinks * WIDTH, n, WIDTH, sinks, True, BN, WIDTH)
    first, full, ragged, end = near_queries(n, shift, queries, window, BM, BN)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        q_base = head_of(query, query_strides, batch, head)
        g_base = head_of(d_out, d_out_strides, batch, head)
        lines = (batch * heads + head) * queries
        dk, dv = _key_tiles(
            dk, dv, k, v, q_base, g_base, query_strides.row, d_out_strides.row, lse + lines, delta + lines, scale * LOG2E, first,
            tl.minimum(full, end), shift, n, sinks, queries, keys, window, True, False, WIDTH, BM, BN, PRECISION,
        )  # fmt: skip
        dk, dv = _key_tiles(
            dk, dv, k, v, q_base, g_base, query_strides.row, d_out_strides.row, lse + lines, delta + lines, scale * LOG2E, full,
            ragged, shift, n, sinks, queries, keys, window, False, False, WIDTH, BM, BN, PRECISION,
        )  # fmt: skip
        dk, dv = _key_tiles(
            dk, dv, k, v, q_base, g_base, query_strides.row, d_out_strides.row, lse + lines, delta + lines, scale * LOG2E, ragged,
            end, shift, n, sinks, queries, keys, window, True, False, WIDTH, BM, BN, PRECISION,
        )  # fmt: skip
    rows = n + tl.arange(0, BN)
    store_tile(d_key, d_key_strides, batch, kv_head, rows, dk * scale, rows < keys, WIDTH)
    store_tile(d_value, d_value_strides, batch, kv_head, rows, dv, rows < keys, WIDTH)
