"""Kernels of `longspan.engine.window.sink_correction`: a window's attention joined with the sinks that it did not reach.

A row's result over the window is a softmax already: its weight against the sinks is told by its log-sum-exp. So the forward goes
on with that softmax over the sinks, and the backward hands the window its share of the derivative.
"""

from __future__ import annotations

import triton
import triton.language as tl

from longspan.engine.biased.kernels.forward import LOG2E, read_rows
from longspan.engine.window.kernels.backward import query_tiles
from longspan.engine.window.kernels.forward import UNSPECIALISED, far_end, softmax_tiles


@triton.jit(do_not_specialize=UNSPECIALISED)
def join(
    query,
    key,
    value,
    near,
    near_lse,
    out,
    lse,
    heads,
    queries,
    keys,
    window,
    sinks,
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
    n_batch,
    n_head,
    n_row,
    o_batch,
    o_head,
    o_row,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    SINK: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
):
    """`out` and `lse`, to base 2, from the window's `near` and `near_lse`, to base e."""
    pair = tl.program_id(1)
    batch = (pair // heads).to(tl.int64)
    head = (pair % heads).to(tl.int64)
    m = tl.program_id(0) * BM
    low = keys - queries + m
    rows = m + tl.arange(0, BM)
    line = pair.to(tl.int64) * queries + rows
    q = read_rows(query + batch * q_batch + head * q_head, m, q_row, queries, True, BM, WIDTH)
    acc = read_rows(near + batch * n_batch + head * n_head, m, n_row, queries, True, BM, WIDTH).to(tl.float32)
    top = tl.load(near_lse + line, mask=rows < queries, other=0.0) * LOG2E
    k_base = key + batch * k_batch + head // GROUP * k_head
    v_base = value + batch * v_batch + head // GROUP * v_head
    acc, total, top = softmax_tiles(
        acc, tl.full([BM], 1.0, tl.float32), top, q, k_base, v_base, k_row, v_row, scale * LOG2E, 0,
        far_end(low, window, sinks, BM), low, sinks, keys, window, True, True, WIDTH, BM, SINK, PRECISION,
    )  # fmt: skip
    place = out + batch * o_batch + head * o_head + rows.to(tl.int64)[:, None] * o_row + tl.arange(0, WIDTH)[None, :]
    tl.store(place, (acc / total[:, None]).to(out.dtype.element_ty), mask=(rows < queries)[:, None])
    tl.store(lse + line, top + tl.log2(total), mask=rows < queries)


@triton.jit(do_not_specialize=["heads", "queries"])
def split(
    near,
    near_lse,
    out,
    lse,
    d_out,
    d_near,
    d_near_lse,
    delta,
    heads,
    queries,
    n_batch,
    n_head,
    n_row,
    o_batch,
    o_head,
    o_row,
    g_batch,
    g_head,
    g_row,
    dn_batch,
    dn_head,
    dn_row,
    WIDTH: tl.constexpr,
    BM: tl.constexpr,
):
    """The derivatives by `near` and `near_lse`, and `delta`, each row's sum of out · d_out."""
    pair = tl.program_id(1)
    batch = (pair // heads).to(tl.int64)
    head = (pair % heads).to(tl.int64)
    m = tl.program_id(0) * BM
    rows = m + tl.arange(0, BM)
    inside = rows < queries
    line = pair.to(tl.int64) * queries + rows
    old = read_rows(near + batch * n_batch + head * n_head, m, n_row, queries, True, BM, WIDTH).to(tl.float32)
    new = read_rows(out + batch * o_batch + head * o_head, m, o_row, queries, True, BM, WIDTH).to(tl.float32)
    do = read_rows(d_out + batch * g_batch + head * g_head, m, g_row, queries, True, BM, WIDTH).to(tl.float32)
    weight = tl.exp2(
        tl.load(near_lse + line, mask=inside, other=0.0) * LOG2E - tl.load(lse + line, mask=inside, other=0.0)
    )
    sums = tl.sum(new * do, 1)
    tl.store(delta + line, sums, mask=inside)
    tl.store(d_near_lse + line, weight * (tl.sum(old * do, 1) - sums), mask=inside)
    place = d_near + batch * dn_batch + head * dn_head
    place += rows.to(tl.int64)[:, None] * dn_row + tl.arange(0, WIDTH)[None, :]
    tl.store(place, (do * weight[:, None]).to(d_near.dtype.element_ty), mask=inside[:, None])


@triton.jit(do_not_specialize=UNSPECIALISED)
def add_queries(
    query,
    key,
    value,
    d_out,
    d_query,
    lse,
    delta,
    heads,
    queries,
    keys,
    window,
    sinks,
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
    dq_batch,
    dq_head,
    dq_row,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    SINK: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
):
    """Adds to d_query the derivative by way of the sinks."""
    pair = tl.program_id(1)
    batch = (pair // heads).to(tl.int64)
    head = (pair % heads).to(tl.int64)
    m = tl.program_id(0) * BM
    low = keys - queries + m
    end = far_end(low, window, sinks, BM)
    if end <= 0:
        return
    rows = m + tl.arange(0, BM)
    inside = rows < queries
    line = pair.to(tl.int64) * queries + rows
    q = read_rows(query + batch * q_batch + head * q_head, m, q_row, queries, True, BM, WIDTH)
    do = read_rows(d_out + batch * g_batch + head * g_head, m, g_row, queries, True, BM, WIDTH)
    row = tl.load(lse + line, mask=inside, other=float("inf"))
    sums = tl.load(delta + line, mask=inside, other=0.0)
    k_base = key + batch * k_batch + head // GROUP * k_head
    v_base = value + batch * v_batch + head // GROUP * v_head
    dq = query_tiles(
        tl.zeros([BM, WIDTH], tl.float32), q, do, row, sums, k_base, v_base, k_row, v_row, scale * LOG2E, 0, end, low,
        sinks, keys, window, True, True, WIDTH, BM, SINK, PRECISION,
    )  # fmt: skip
    place = d_query + batch * dq_batch + head * dq_head
    place += rows.to(tl.int64)[:, None] * dq_row + tl.arange(0, WIDTH)[None, :]
    before = tl.load(place, mask=inside[:, None], other=0.0).to(tl.float32)
    tl.store(place, (before + dq * scale).to(d_query.dtype.element_ty), mask=inside[:, None])
