"""The backward kernels of `longspan.engine.biased.attention`: one for the queries, one for keys, values and a bias's parameters.

The kernel for keys computes its tiles transposed from the start, keys by queries, so that no transposed accumulator is ever
an operand: Triton up to 3.7.0 miscompiles that for Hopper GPUs. The derivative by a parameter is a sum of score derivatives
times a function of the distance; every program adds up its own part, in float32, and no two write to one place.
"""

from __future__ import annotations

import triton
import triton.language as tl

from longspan.engine.biased.kernels.forward import (
    LOG2E,
    UNSPECIALISED,
    distances,
    key_ranges,
    read_band,
    read_clamped,
    read_rows,
    tuned,
    visible,
)


@triton.jit
def _bias(
    t,
    table,
    number,
    apart,
    i,
    j,
    zero,
    nearest,
    farthest,
    BIAS: tl.constexpr,
    TURNED: tl.constexpr,
):
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
    dq,
    q,
    do,
    row,
    delta,
    key_base,
    value_base,
    k_row,
    v_row,
    table,
    number,
    scale,
    begin,
    end,
    low_query,
    start,
    keys,
    window,
    zero,
    nearest,
    farthest,
    BIAS: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    WIDTH: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq over the keys from `begin` to `end`. `row` is what every score of a row gets: minus its log-sum-exp, and any part
    of the bias that is one number for these tiles."""
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
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@tuned(narrow=[(64, 64, 4, 3), (128, 64, 8, 3)], wide=[(128, 64, 8, 2), (64, 64, 4, 2)])
@triton.jit(do_not_specialize=[*UNSPECIALISED, "bucket"])
def backward_queries(
    query,
    key,
    value,
    out,
    d_out,
    d_query,
    lse,
    delta,
    table,
    factors,
    starts,
    heads,
    queries,
    keys,
    window,
    span,
    zero,
    nearest,
    farthest,
    scale,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    o_batch,
    o_head,
    o_row,
    g_batch,
    g_head,
    g_row,
    dq_batch,
    dq_head,
    dq_row,
    bucket,
    KIND: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    STARTS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """The derivative by BM queries of one head; and `delta`, each row's sum of
    out · d_out, for the other kernels. `factors` (H,) is what a curve's numbers are multiplied by."""
    pair = tl.program_id(1)
    batch = (pair // heads).to(tl.int64)
    head = (pair % heads).to(tl.int64)
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    m = block * BM
    low_query = keys - queries + m
    start = tl.load(starts + batch) if STARTS else 0
    rows = m + tl.arange(0, BM)
    inside = rows < queries
    q = read_rows(query + batch * q_batch + head * q_head, m, q_row, queries, True, BM, WIDTH)
    o = read_rows(out + batch * o_batch + head * o_head, m, o_row, queries, True, BM, WIDTH)
    do = read_rows(d_out + batch * g_batch + head * g_head, m, g_row, queries, True, BM, WIDTH)
    sums = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta + pair.to(tl.int64) * queries + rows, sums, mask=inside)
    row = -tl.load(lse + pair.to(tl.int64) * queries + rows, mask=inside, other=float("inf"))
    k_base = key + batch * k_batch + head // GROUP * k_head
    v_base = value + batch * v_batch + head // GROUP * v_head
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
    place = d_query + batch * dq_batch + head * dq_head
    place += rows.to(tl.int64)[:, None] * dq_row + tl.arange(0, WIDTH)[None, :]
    tl.store(place, (dq * scale).to(d_query.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _key_tiles(
    dk,
    dv,
    first_sum,
    second_sum,
    k,
    v,
    query_base,
    d_out_base,
    q_row,
    g_row,
    lse,
    delta,
    table,
    slopes,
    number,
    constant,
    scale,
    begin,
    end,
    shift,
    n,
    start,
    queries,
    keys,
    window,
    zero,
    nearest,
    farthest,
    BIAS: tl.constexpr,
    GRAD: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    WIDTH: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk and dv over the queries from `begin` to `end`, and for each key the sums that the bias's parameters need. Query r is
    at position `shift` + r; `constant` is added to every score of these tiles."""
    i = tl.arange(0, BM)[None, :]
    j = tl.arange(0, BN)[:, None]
    for m in range(begin, end, BM):
        q = read_rows(query_base, m, q_row, queries, MASK, BM, WIDTH)
        do = read_rows(d_out_base, m, g_row, queries, MASK, BM, WIDTH)
        rows = m + tl.arange(0, BM)
        if MASK:
            row = constant - tl.load(lse + rows, mask=rows < queries, other=float("inf"))
            sums = tl.load(delta + rows, mask=rows < queries, other=0.0)
        else:
            row = constant - tl.load(lse + rows)
            sums = tl.load(delta + rows)
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
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        ds = p * (dp - sums[None, :])
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
    n,
    shift,
    start,
    queries,
    keys,
    window,
    nearest,
    farthest,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """The queries that see the keys n .. n + BN - 1, cut at multiples of BM: from `first` masked, from `full` on every score
    counts and distances are at most `nearest`, from `near` between, from `past` at least `farthest`, from `ragged` to `end`
    masked again."""
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


@tuned(narrow=[(64, 128, 8, 3), (32, 64, 4, 3)], wide=[(32, 128, 8, 3), (32, 64, 4, 3)])
@triton.jit(do_not_specialize=[*UNSPECIALISED, "bucket"])
def backward_keys(
    query,
    key,
    value,
    d_out,
    d_key,
    d_value,
    lse,
    delta,
    table,
    slopes,
    factors,
    sums,
    starts,
    heads,
    queries,
    keys,
    window,
    span,
    zero,
    nearest,
    farthest,
    scale,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    g_batch,
    g_head,
    g_row,
    dk_batch,
    dk_head,
    dk_row,
    dv_batch,
    dv_head,
    dv_row,
    bucket,
    KIND: tl.constexpr,
    GRAD: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    STARTS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """The derivative by BN keys and values of one key head, over all query heads that share it.
    GRAD: which sums of score derivatives go to `sums` (2, B · H, keys / 16), a block's in the first of its places:
    times |distance| (linear), times a curve's numbers and their `slopes` (curve), past either end (ends), or none."""
    pair = tl.program_id(1)
    kv_heads = heads // GROUP
    batch = (pair // kv_heads).to(tl.int64)
    kv_head = (pair % kv_heads).to(tl.int64)
    n = tl.program_id(0) * BN
    shift = keys - queries
    start = tl.load(starts + batch) if STARTS else 0
    k = read_rows(key + batch * k_batch + kv_head * k_head, n, k_row, keys, True, BN, WIDTH)
    v = read_rows(value + batch * v_batch + kv_head * v_head, n, v_row, keys, True, BN, WIDTH)
    dk = tl.zeros([BN, WIDTH], tl.float32)
    dv = tl.zeros([BN, WIDTH], tl.float32)
    first, full, near, past, ragged, end = _query_ranges(
        n, shift, start, queries, keys, window, nearest, farthest, CAUSAL, WINDOW, BM, BN
    )
    by = scale * LOG2E
    EACH: tl.constexpr = "absolute" if KIND == "linear" else "clamped" if KIND == "table" else KIND
    FAR: tl.constexpr = "slope" if KIND == "linear" else "none"
    NEAR: tl.constexpr = "absolute" if KIND == "linear" else "band" if KIND == "table" else KIND
    PAST: tl.constexpr = "past" if GRAD == "ends" else GRAD
    FUTURE: tl.constexpr = "future" if GRAD == "ends" else GRAD
    for member in range(GROUP):
        head = kv_head * GROUP + member
        lines = batch * heads + head
        q_base = query + batch * q_batch + head * q_head
        g_base = d_out + batch * g_batch + head * g_head
        l_base = lse + lines * queries
        d_base = delta + lines * queries
        number = tl.load(factors + head) if KIND == "linear" or KIND == "curve" else 0.0
        band = table + head * span
        slope = slopes + head * span
        last = tl.load(band + (zero - farthest)) if KIND == "table" else 0.0
        closest = tl.load(band + (zero - nearest)) if KIND == "table" else 0.0
        a = tl.zeros([BN], tl.float32)
        b = tl.zeros([BN], tl.float32)
        dk, dv, a, b = _key_tiles(
            dk, dv, a, b, k, v, q_base, g_base, q_row, g_row, l_base, d_base, band, slope, number, 0.0, by, first,
            tl.minimum(full, end), shift, n, start, queries, keys, window, zero, nearest, farthest, EACH, GRAD, True, CAUSAL,
            WINDOW, WIDTH, BM, BN, PRECISION,
        )  # fmt: skip
        if not CAUSAL and (KIND == "linear" or KIND == "table"):
            dk, dv, a, b = _key_tiles(
                dk, dv, a, b, k, v, q_base, g_base, q_row, g_row, l_base, d_base, band, slope, -number, closest, by, full,
                near, shift, n, start, queries, keys, window, zero, nearest, farthest, FAR, FUTURE, False, CAUSAL,
                WINDOW, WIDTH, BM, BN, PRECISION,
            )  # fmt: skip
        if KIND != "linear" or not CAUSAL:
            dk, dv, a, b = _key_tiles(
                dk, dv, a, b, k, v, q_base, g_base, q_row, g_row, l_base, d_base, band, slope, number, 0.0, by, near,
                past, shift, n, start, queries, keys, window, zero, nearest, farthest, NEAR, GRAD, False, CAUSAL,
                WINDOW, WIDTH, BM, BN, PRECISION,
            )  # fmt: skip
        if KIND == "linear" or KIND == "table":
            dk, dv, a, b = _key_tiles(
                dk, dv, a, b, k, v, q_base, g_base, q_row, g_row, l_base, d_base, band, slope, number, last, by, past,
                ragged, shift, n, start, queries, keys, window, zero, nearest, farthest, FAR, PAST, False, CAUSAL,
                WINDOW, WIDTH, BM, BN, PRECISION,
            )  # fmt: skip
        dk, dv, a, b = _key_tiles(
            dk, dv, a, b, k, v, q_base, g_base, q_row, g_row, l_base, d_base, band, slope, number, 0.0, by, ragged,
            end, shift, n, start, queries, keys, window, zero, nearest, farthest, EACH, GRAD, True, CAUSAL,
            WINDOW, WIDTH, BM, BN, PRECISION,
        )  # fmt: skip
        if GRAD != "none":
            blocks = tl.cdiv(keys, 16)
            at = tl.arange(0, BN // 16)
            place = sums + lines * blocks + n // 16 + at
            tl.store(place, tl.where(at == 0, tl.sum(a, 0), 0.0), mask=n // 16 + at < blocks)
            place += tl.num_programs(1).to(tl.int64) * GROUP * blocks
            tl.store(place, tl.where(at == 0, tl.sum(b, 0), 0.0), mask=n // 16 + at < blocks)
    rows = n + tl.arange(0, BN)
    columns = tl.arange(0, WIDTH)[None, :]
    at = rows.to(tl.int64)[:, None]
    place = d_key + batch * dk_batch + kv_head * dk_head + at * dk_row + columns
    tl.store(place, (dk * scale).to(d_key.dtype.element_ty), mask=(rows < keys)[:, None])
    place = d_value + batch * dv_batch + kv_head * dv_head + at * dv_row + columns
    tl.store(place, dv.to(d_value.dtype.element_ty), mask=(rows < keys)[:, None])
