"""The backward kernels of `longspan.engine.biased.attention`: for queries, and for keys, values and parameters.

The kernel for keys computes its tiles transposed from the start, keys by queries, so that no transposed accumulator is ever
an operand: Triton up to 3.7.0 miscompiles that for Hopper GPUs. The derivative by a parameter is a sum of score derivatives
times a function of the distance; every program adds up its own part, in float32, and no two write to one place.
"""

from __future__ import annotations

import triton
import triton.language as tl

from longspan.engine.biased.kernels.forward import (
    UNSPECIALISED,
    distances,
    key_ranges,
    read_band,
    read_clamped,
    visible,
)
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


@triton.jit
def _bias(
    t, table, number, apart, i, j, zero, nearest, farthest, BIAS: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """The scores `t` with the part of the bias added that differs from score to score. `number` is a slope, or what a
    curve's numbers are multiplied by."""
    if BIAS == "slope":
        t += number * (j - apart if TURNED else j).to(tl.float32)
    elif BIAS == "absolute":
        t -= number * distances(apart, i, j, TURNED)
    elif BIAS == "band" or BIAS == "curve":
        numbers = read_band(table, zero - apart, j if TURNED else i, i if TURNED else j, TURNED)
        t += numbers if BIAS == "band" else number * numbers
    elif BIAS == "clamped":
        t += read_clamped(table, apart, i, j, zero, nearest, farthest)
    return t


@triton.jit
def _query_tiles(
    dq, q, do, row, delta, key_base, value_base, k_row, v_row, table, number, scale, begin, end, low_query, start,
    keys, window, zero, nearest, farthest, BIAS: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, WIDTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq over the keys from `begin` to `end`.

    `row` is what every score of a row gets: minus its log-sum-exp, and any part of the bias that is one number for
    these tiles.
    """
    i = tl.arange(0, BM)[:, None]
    j = tl.arange(0, BN)[None, :]
    for n in range(begin, end, BN):
        k = read_rows(key_base, n, k_row, keys, MASK, BN, WIDTH)
        v = read_rows(value_base, n, v_row, keys, MASK, BN, WIDTH)
        apart = low_query - n
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        whole = row
        if BIAS == "slope":
            whole = row - number * (apart + tl.arange(0, BM)).to(tl.float32)
        t = _bias(s * scale + whole[:, None], table, number, apart, i, j, zero, nearest, farthest, BIAS, False)
        if MASK:
            t = tl.where(visible(apart, i, j, n, start, keys, window, CAUSAL, WINDOW), t, float("-inf"))
        p = tl.exp2(t)
        dq = add_query_gradient(dq, p, do, k, v, delta, PRECISION)
    return dq


@tuned(narrow=[(64, 64, 4, 3), (128, 64, 8, 3)], wide=[(128, 64, 8, 2), (64, 64, 4, 2)])
@triton.jit(do_not_specialize=[*UNSPECIALISED, "bucket"])
def backward_queries(
    query, key, value, out, d_out, d_query, lse, delta, table, factors, starts,
    heads, queries, keys, window, span, zero, nearest, farthest, scale,
    query_strides, key_strides, value_strides, out_strides, d_out_strides, d_query_strides,
    bucket,
    KIND: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, STARTS: tl.constexpr, GROUP: tl.constexpr,
    WIDTH: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The derivative by BM queries of one head; and `delta`, each row's sum of
    out · d_out, for the other kernels. `factors` (H,) is what a curve's numbers are multiplied by."""
    pair = tl.program_id(1)
    batch, head = split_pair(pair, heads)
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    m = block * BM
    low_query = keys - queries + m
    start = tl.load(starts + batch) if STARTS else 0
    rows = m + tl.arange(0, BM)
    inside = rows < queries
    q, do, row, sums = read_queries(
        query, query_strides, out, out_strides, d_out, d_out_strides, lse, delta, batch, head, pair, m, queries, BM, WIDTH,
    )  # fmt: skip
    row = -row
    k_base = head_of(key, key_strides, batch, head // GROUP)
    v_base = head_of(value, value_strides, batch, head // GROUP)
    k_row, v_row = key_strides.row, value_strides.row
    dq = tl.zeros([BM, WIDTH], tl.float32)
    first, full, near, ahead, ragged, end = key_ranges(
        low_query, start, keys, window, nearest, farthest, CAUSAL, WINDOW, BM, BN
    )
    by = scale * LOG2E
    number = tl.load(factors + head) if KIND == "linear" or KIND == "curve" else 0.0
    band = table + head * span
    past = tl.load(band + (zero - farthest)) if KIND == "table" else 0.0
    future = tl.load(band + (zero - nearest)) if KIND == "table" else 0.0
    EACH: tl.constexpr = "absolute" if KIND == "linear" else "clamped" if KIND == "table" else KIND
    FAR: tl.constexpr = "slope" if KIND == "linear" else "none"
    NEAR: tl.constexpr = "absolute" if KIND == "linear" else "band" if KIND == "table" else KIND
    if WINDOW or STARTS:
        dq = _query_tiles(
            dq, q, do, row, sums, k_base, v_base, k_row, v_row, band, number, by, first, tl.minimum(full, end), low_query,
            start, keys, window, zero, nearest, farthest, EACH, True, CAUSAL, WINDOW, WIDTH, BM, BN, PRECISION,
        )  # fmt: skip
    if KIND == "linear" or KIND == "table":
        dq = _query_tiles(
            dq, q, do, row + past, sums, k_base, v_base, k_row, v_row, band, number, by, full, near, low_query,
            start, keys, window, zero, nearest, farthest, FAR, False, CAUSAL, WINDOW, WIDTH, BM, BN, PRECISION,
        )  # fmt: skip
    if KIND != "linear" or not CAUSAL:
        dq = _query_tiles(
            dq, q, do, row, sums, k_base, v_base, k_row, v_row, band, number, by, near, ahead, low_query,
            start, keys, window, zero, nearest, farthest, NEAR, False, CAUSAL, WINDOW, WIDTH, BM, BN, PRECISION,
        )  # fmt: skip
    if not CAUSAL and (KIND == "linear" or KIND == "table"):
        dq = _query_tiles(
            dq, q, do, row + future, sums, k_base, v_base, k_row, v_row, band, -number, by, ahead, ragged, low_query,
            start, keys, window, zero, nearest, farthest, FAR, False, CAUSAL, WINDOW, WIDTH, BM, BN, PRECISION,
        )  # fmt: skip
    dq = _query_tiles(
        dq, q, do, row, sums, k_base, v_base, k_row, v_row, band, number, by, ragged, end, low_query,
        start, keys, window, zero, nearest, farthest, EACH, True, CAUSAL, WINDOW, WIDTH, BM, BN, PRECISION,
    )  # fmt: skip
    store_tile(d_query, d_query_strides, batch, head, rows, dq * scale, inside, WIDTH)


@triton.jit
def _key_tiles(
    dk, dv, first_sum, second_sum, k, v, query_base, d_out_base, q_row, g_row, lse, delta, table, slopes, number,
    constant, scale, begin, end, shift, n, start, queries, keys, window, zero, nearest, farthest, BIAS: tl.constexpr,
    GRAD: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, WIDTH: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv over the queries from `begin` to `end`, and for each key the sums that the bias's parameters need. Query r is
    at position `shift` + r; `constant` is added to every score of these tiles."""
    i = tl.arange(0, BM)[None, :]
    j = tl.arange(0, BN)[:, None]
    for m in range(begin, end, BM):
        q = read_rows(query_base, m, q_row, queries, MASK, BM, WIDTH)
        do = read_rows(d_out_base, m, g_row, queries, MASK, BM, WIDTH)
        rows = m + tl.arange(0, BM)
        log_sum, sums = read_sums(lse, delta, rows, rows < queries, MASK)
        row = constant - log_sum
        apart = shift + m - n
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        if GRAD == "linear":
            far = i.to(tl.float32) + (apart - j).to(tl.float32)
        if BIAS == "slope" and GRAD == "linear":
            t = s * scale + row[None, :] - number * far
        else:
            if BIAS == "slope":
                row -= number * tl.arange(0, BM).to(tl.float32)
            t = _bias(s * scale + row[None, :], table, number, apart, i, j, zero, nearest, farthest, BIAS, True)
        if MASK:
            t = tl.where(visible(apart, i, j, n, start, keys, window, CAUSAL, WINDOW), t, float("-inf"))
        p = tl.exp2(t)
        dv, ds = add_value_gradient(dv, p, do, v, sums, PRECISION)
        if GRAD == "linear":
            first_sum += tl.sum(ds * (far if CAUSAL else tl.abs(far)), 1)
        elif GRAD == "curve":
            first_sum += tl.sum(ds * read_band(table, zero - apart, j, i, True), 1)
            second_sum += tl.sum(ds * read_band(slopes, zero - apart, j, i, True), 1)
        if GRAD == "past" or GRAD == "ends":
            past = ds if GRAD == "past" else tl.where(apart + i - j >= farthest, ds, 0.0)
            first_sum += tl.sum(past, 1)
        if GRAD == "future" or GRAD == "ends":
            future = ds if GRAD == "future" else tl.where(apart + i - j <= nearest, ds, 0.0)
            second_sum += tl.sum(future, 1)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv, first_sum, second_sum


@triton.jit
def _query_ranges(
    n, shift, start, queries, keys, window, nearest, farthest, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The queries that see the keys n ..

    n + BN - 1, cut at multiples of BM: from `first` masked, from `full` on every score counts and distances are at
    most `nearest`, from `near` between, from `past` at least `farthest`, from `ragged` to `end` masked again.
    """
    first = tl.maximum(start - shift, 0)
    full = first
    end = queries
    whole = queries
    if CAUSAL:
        first = tl.maximum(first, n - shift)
        full = tl.maximum(full, n + BN - 1 - shift)
    if WINDOW:
        end = tl.minimum(end, n + BN - 1 + window - shift)
        whole = tl.minimum(whole, n + window - shift)
    end = tl.where(n + BN <= start, first, tl.maximum(end, first))
    full = tl.where((n + BN > keys) | (start > n), end, full)
    first = first // BM * BM
    full = tl.minimum((full + BM - 1) // BM, (end + BM - 1) // BM) * BM
    ragged = tl.maximum(tl.minimum(whole, end) // BM * BM, full)
    near = full
    if not CAUSAL:
        near = tl.maximum(nearest + n - shift + 1, 0) // BM * BM
        near = tl.minimum(tl.maximum(near, full), ragged)
    past = (tl.maximum(farthest + n + BN - 1 - shift, 0) + BM - 1) // BM * BM
    past = tl.minimum(tl.maximum(past, near), ragged)
    return first, full, near, past, ragged, end


@triton.jit
def _head_tiles(
    dk, dv, k, v, query_base, d_out_base, q_row, g_row, lse, delta, table, slopes, factor, scale, first, full, near, past,
    ragged, end, shift, n, start, queries, keys, window, zero, nearest, farthest, KIND: tl.constexpr, GRAD: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, WIDTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv over all queries of one head, and the two sums of each key that the bias's parameters need; the limits of
    ranges are those of `_query_ranges`, `table`, `slopes` and `factor` are the head's."""
    EACH: tl.constexpr = "absolute" if KIND == "linear" else "clamped" if KIND == "table" else KIND
    FAR: tl.constexpr = "slope" if KIND == "linear" else "none"
    NEAR: tl.constexpr = "absolute" if KIND == "linear" else "band" if KIND == "table" else KIND
    PAST: tl.constexpr = "past" if GRAD == "ends" else GRAD
    FUTURE: tl.constexpr = "future" if GRAD == "ends" else GRAD
    number = tl.load(factor) if KIND == "linear" or KIND == "curve" else 0.0
    last = tl.load(table + (zero - farthest)) if KIND == "table" else 0.0
    closest = tl.load(table + (zero - nearest)) if KIND == "table" else 0.0
    a = tl.zeros([BN], tl.float32)
    b = tl.zeros([BN], tl.float32)
    dk, dv, a, b = _key_tiles(
        dk, dv, a, b, k, v, query_base, d_out_base, q_row, g_row, lse, delta, table, slopes, number, 0.0, scale, first,
        tl.minimum(full, end), shift, n, start, queries, keys, window, zero, nearest, farthest, EACH, GRAD, True, CAUSAL,
        WINDOW, WIDTH, BM, BN, PRECISION,
    )  # fmt: skip
    if not CAUSAL and (KIND == "linear" or KIND == "table"):
        dk, dv, a, b = _key_tiles(
            dk, dv, a, b, k, v, query_base, d_out_base, q_row, g_row, lse, delta, table, slopes, -number, closest, scale, full,
            near, shift, n, start, queries, keys, window, zero, nearest, farthest, FAR, FUTURE, False, CAUSAL,
            WINDOW, WIDTH, BM, BN, PRECISION,
        )  # fmt: skip
    if KIND != "linear" or not CAUSAL:
        dk, dv, a, b = _key_tiles(
            dk, dv, a, b, k, v, query_base, d_out_base, q_row, g_row, lse, delta, table, slopes, number, 0.0, scale, near,
            past, shift, n, start, queries, keys, window, zero, nearest, farthest, NEAR, GRAD, False, CAUSAL,
            WINDOW, WIDTH, BM, BN, PRECISION,
        )  # fmt: skip
    if KIND == "linear" or KIND == "table":
        dk, dv, a, b = _key_tiles(
            dk, dv, a, b, k, v, query_base, d_out_base, q_row, g_row, lse, delta, table, slopes, number, last, scale, past,
            ragged, shift, n, start, queries, keys, window, zero, nearest, farthest, FAR, PAST, False, CAUSAL,
            WINDOW, WIDTH, BM, BN, PRECISION,
        )  # fmt: skip
    return _key_tiles(
        dk, dv, a, b, k, v, query_base, d_out_base, q_row, g_row, lse, delta, table, slopes, number, 0.0, scale, ragged,
        end, shift, n, start, queries, keys, window, zero, nearest, farthest, EACH, GRAD, True, CAUSAL,
        WINDOW, WIDTH, BM, BN, PRECISION,
    )  # fmt: skip


@tuned(narrow=[(64, 128, 8, 3), (32, 64, 4, 3)], wide=[(32, 128, 8, 3), (32, 64, 4, 3)])
@triton.jit(do_not_specialize=[*UNSPECIALISED, "bucket"])
def backward_keys(
    query, key, value, d_out, d_key, d_value, lse, delta, table, slopes, factors, sums, starts,
    heads, queries, keys, window, span, zero, nearest, farthest, scale,
    query_strides, key_strides, value_strides, d_out_strides, d_key_strides, d_value_strides,
    bucket,
    KIND: tl.constexpr, GRAD: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, STARTS: tl.constexpr,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The derivative by BN keys and values of one key head, over all query heads that share it.
    GRAD: which sums of score derivatives go to `sums` (2, B · H, keys / 16), a block's in the first of its places:
    times |distance| (linear), times a curve's numbers and their `slopes` (curve), past either end (ends), or none."""
    pair = tl.program_id(1)
    kv_heads = heads // GROUP
    batch, kv_head = split_pair(pair, kv_heads)
    n = tl.program_id(0) * BN
    shift = keys - queries
    start = tl.load(starts + batch) if STARTS else 0
    k = read_tile(key, key_strides, batch, kv_head, n, keys, BN, WIDTH)
    v = read_tile(value, value_strides, batch, kv_head, n, keys, BN, WIDTH)
    dk = tl.zeros([BN, WIDTH], tl.float32)
    dv = tl.zeros([BN, WIDTH], tl.float32)
    first, full, near, past, ragged, end = _query_ranges(
        n, shift, start, queries, keys, window, nearest, farthest, CAUSAL, WINDOW, BM, BN
    )
    for member in range(GROUP):
        head = kv_head * GROUP + member
        lines = batch * heads + head
        q_base = head_of(query, query_strides, batch, head)
        g_base = head_of(d_out, d_out_strides, batch, head)
        dk, dv, a, b = _head_tiles(
            dk, dv, k, v, q_base, g_base, query_strides.row, d_out_strides.row, lse + lines * queries, delta + lines * queries,
            table + head * span, slopes + head * span, factors + head, scale * LOG2E, first, full, near, past, ragged, end,
            shift, n, start, queries, keys, window, zero, nearest, farthest, KIND, GRAD, CAUSAL, WINDOW, WIDTH, BM, BN, PRECISION,
        )  # fmt: skip
        if GRAD != "none":
            blocks = tl.cdiv(keys, 16)
            at = tl.arange(0, BN // 16)
            place = sums + lines * blocks + n // 16 + at
            tl.store(place, tl.where(at == 0, tl.sum(a, 0), 0.0), mask=n // 16 + at < blocks)
            place += tl.num_programs(1).to(tl.int64) * GROUP * blocks
            tl.store(place, tl.where(at == 0, tl.sum(b, 0), 0.0), mask=n // 16 + at < blocks)
    rows = n + tl.arange(0, BN)
    store_tile(d_key, d_key_strides, batch, kv_head, rows, dk * scale, rows < keys, WIDTH)
    store_tile(d_value, d_value_strides, batch, kv_head, rows, dv, rows < keys, WIDTH)
