"""Kernels of `longspan.engine.window.sink_correction`: a window's attention joined with the sinks that it did not reach.

A row's result over the window is a softmax already: its weight against the sinks is told by its log-sum-exp. So the forward goes
on with that softmax over the sinks, and the backward hands the window its share of the derivative.
"""

from __future__ import annotations

import triton
import triton.language as tl

from longspan.engine.kernel_parts import LOG2E, head_of, read_sums, read_tile, split_pair, store_tile
from longspan.engine.window.kernels.backward import query_tiles
from longspan.engine.window.kernels.forward import UNSPECIALISED, far_end, softmax_tiles


@triton.jit(do_not_specialize=UNSPECIALISED)
def join(
    query, key, value, near, near_lse, out, lse,
    heads, queries, keys, window, sinks, scale,
    query_strides, key_strides, value_strides, near_strides, out_strides,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, SINK: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """`out` and `lse`, to base 2, from the window's `near` and `near_lse`, to base e."""
    pair = tl.program_id(1)
    batch, head = split_pair(pair, heads)
    m = tl.program_id(0) * BM
    low = keys - queries + m
    rows = m + tl.arange(0, BM)
    line = pair.to(tl.int64) * queries + rows
    q = read_tile(query, query_strides, batch, head, m, queries, BM, WIDTH)
    acc = read_tile(near, near_strides, batch, head, m, queries, BM, WIDTH).to(tl.float32)
    top = tl.load(near_lse + line, mask=rows < queries, other=0.0) * LOG2E
    k_base = head_of(key, key_strides, batch, head // GROUP)
    v_base = head_of(value, value_strides, batch, head // GROUP)
    k_row, v_row = key_strides.row, value_strides.row
    acc, total, top = softmax_tiles(
        acc, tl.full([BM], 1.0, tl.float32), top, q, k_base, v_base, k_row, v_row, scale * LOG2E, 0,
        far_end(low, window, sinks, BM), low, sinks, keys, window, True, True, WIDTH, BM, SINK, PRECISION,
    )  # fmt: skip
    store_tile(out, out_strides, batch, head, rows, acc / total[:, None], rows < queries, WIDTH)
    tl.store(lse + line, top + tl.log2(total), mask=rows < queries)


@triton.jit(do_not_specialize=["heads", "queries"])
def split(
    near, near_lse, out, lse, d_out, d_near, d_near_lse, delta,
    heads, queries,
    near_strides, out_strides, d_out_strides, d_near_strides,
    WIDTH: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """The derivatives by `near` and `near_lse`, and `delta`, each row's sum of out · d_out."""
    pair = tl.program_id(1)
    batch, head = split_pair(pair, heads)
    m = tl.program_id(0) * BM
    rows = m + tl.arange(0, BM)
    inside = rows < queries
    line = pair.to(tl.int64) * queries + rows
    old = read_tile(near, near_strides, batch, head, m, queries, BM, WIDTH).to(tl.float32)
    new = read_tile(out, out_strides, batch, head, m, queries, BM, WIDTH).to(tl.float32)
    do = read_tile(d_out, d_out_strides, batch, head, m, queries, BM, WIDTH).to(tl.float32)
    weight = tl.exp2(
        tl.load(near_lse + line, mask=inside, other=0.0) * LOG2E - tl.load(lse + line, mask=inside, other=0.0)
    )
    sums = tl.sum(new * do, 1)
    tl.store(delta + line, sums, mask=inside)
    tl.store(d_near_lse + line, weight * (tl.sum(old * do, 1) - sums), mask=inside)
    store_tile(d_near, d_near_strides, batch, head, rows, do * weight[:, None], inside, WIDTH)


@triton.jit(do_not_specialize=UNSPECIALISED)
def add_queries(
    query, key, value, d_out, d_query, lse, delta,
    heads, queries, keys, window, sinks, scale,
    query_strides, key_strides, value_strides, d_out_strides, d_query_strides,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, SINK: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Adds to d_query the derivative by way of the sinks."""
    pair = tl.program_id(1)
    batch, head = split_pair(pair, heads)
    m = tl.program_id(0) * BM
    low = keys - queries + m
    end = far_end(low, window, sinks, BM)
    if end <= 0:
        return
    rows = m + tl.arange(0, BM)
    inside = rows < queries
    line = pair.to(tl.int64) * queries + rows
    q = read_tile(query, query_strides, batch, head, m, queries, BM, WIDTH)
    do = read_tile(d_out, d_out_strides, batch, head, m, queries, BM, WIDTH)
    row, sums = read_sums(lse, delta, line, inside, True)
    k_base = head_of(key, key_strides, batch, head // GROUP)
    v_base = head_of(value, value_strides, batch, head // GROUP)
    k_row, v_row = key_strides.row, value_strides.row
    dq = query_tiles(
        tl.zeros([BM, WIDTH], tl.float32), q, do, row, sums, k_base, v_base, k_row, v_row, scale * LOG2E, 0, end, low,
        sinks, keys, window, True, True, WIDTH, BM, SINK, PRECISION,
    )  # fmt: skip
    place = head_of(d_query, d_query_strides, batch, head)
    place += rows.to(tl.int64)[:, None] * d_query_strides.row + tl.arange(0, WIDTH)[None, :]
    before = tl.load(place, mask=inside[:, None], other=0.0).to(tl.float32)
    tl.store(place, (before + dq * scale).to(d_query.dtype.element_ty), mask=inside[:, None])
