"""The kernels of `longspan.engine.dilated.attention`.

In one launch every segment of a pattern takes part: a program has some of the queries that one head takes of one segment, and
they and their keys are rows `step` apart in memory, which are read as such; nothing is gathered. What a softmax over the keys
of the launches before came to lies in `lse` and `sums`, and the launch adds its keys to it, so the last one has the result.

Tiles are those of `longspan.engine.window` with an endless window, and keys' tiles are computed transposed from the start, as
there.
"""

from __future__ import annotations

import triton
import triton.language as tl

from longspan.engine.kernel_parts import (
    LOG2E,
    add_value_gradient,
    empty_softmax,
    head_of,
    read_rows,
    read_sums,
    split_pair,
    store_tile,
)
from longspan.engine.window.kernels.backward import near_queries, query_tiles
from longspan.engine.window.kernels.forward import near_keys, softmax_tiles

ENDLESS = tl.constexpr(2**30)
UNSPECIALISED = ["heads", "text", "size", "step", "blocks"]
"""Numbers that say nothing about alignment: a kernel compiled for one length serves all."""


@triton.jit
def _taken(length, segment, size, offset, step):
    """How many tokens a head takes of a segment, of a text of `length` tokens."""
    room = tl.minimum(size, length - segment * size) - offset
    return ((tl.maximum(room, 0) + step - 1) // step).to(tl.int32)


@triton.jit
def _lane(pair, ends, heads, text, size, step, blocks, ENDS: tl.constexpr, FAR: tl.constexpr):
    """What a program's head takes of its segment: the row of the batch and the head, the first token, how far apart tokens lie,
    and how many there are as queries and, before the row's end, as keys."""
    batch, head = split_pair(pair, heads)
    segment = (tl.program_id(0) // blocks).to(tl.int64)
    offset = head % step
    apart = step.to(tl.int64) if FAR else step
    end = tl.load(ends + batch) if ENDS else text
    rows, keys = _taken(text, segment, size, offset, step), _taken(end, segment, size, offset, step)
    return batch, head, segment * size + offset, apart, rows, keys


@triton.jit
def _lane_of(x, strides, batch, head, first):
    """Where the lane that begins with token `first` begins in x (B, H, T, D)."""
    return head_of(x, strides, batch, head) + first * strides.row


@triton.jit(do_not_specialize=UNSPECIALISED)
def forward(
    query, key, value, sums, out, lse, ends,
    heads, text, size, step, blocks, scale,
    query_strides, key_strides, value_strides, out_strides,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, CAUSAL: tl.constexpr, ENDS: tl.constexpr, LAST: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, FAR: tl.constexpr,
):  # fmt: skip
    """BM queries of one head and segment over the segment's keys.

    sums (B, H, T, WIDTH) and lse (B, H, T), to base 2, hold what there is so far; LAST writes to `out`.
    """
    pair = tl.program_id(1)
    m = (blocks - 1 - tl.program_id(0) % blocks) * BM
    batch, head, first, apart, rows, keys = _lane(pair, ends, heads, text, size, step, blocks, ENDS, FAR)
    if m >= rows:
        return
    q_base = _lane_of(query, query_strides, batch, head, first)
    q = read_rows(q_base, m, apart * query_strides.row, keys, True, BM, WIDTH)
    k_base = _lane_of(key, key_strides, batch, head // GROUP, first)
    v_base = _lane_of(value, value_strides, batch, head // GROUP, first)
    k_row, v_row = apart * key_strides.row, apart * value_strides.row
    acc, total, top = empty_softmax(False, BM, WIDTH)
    low = m if CAUSAL else keys
    _, _, ragged, last = near_keys(low, keys, ENDLESS, BM, BN)
    acc, total, top = softmax_tiles(
        acc, total, top, q, k_base, v_base, k_row, v_row, scale * LOG2E, 0, ragged, low, 0, keys,
        ENDLESS, False, False, WIDTH, BM, BN, PRECISION,
    )  # fmt: skip
    acc, total, top = softmax_tiles(
        acc, total, top, q, k_base, v_base, k_row, v_row, scale * LOG2E, ragged, last, low, 0, keys,
        ENDLESS, True, False, WIDTH, BM, BN, PRECISION,
    )  # fmt: skip
    row = m + tl.arange(0, BM)
    at = first + row.to(tl.int64) * step
    line = pair.to(tl.int64) * text + at
    columns = tl.arange(0, WIDTH)[None, :]
    prior = tl.load(lse + line, mask=row < rows, other=float("-inf"))
    before = tl.load(sums + line[:, None] * WIDTH + columns, mask=(prior > float("-inf"))[:, None], other=0.0)
    highest = tl.maximum(top, prior)
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    ours, theirs = tl.exp2(top - highest), tl.exp2(prior - highest)
    total = total * ours + theirs
    seen = (row < keys) & (total > 0.0)
    total = tl.where(seen, total, 1.0)
    result = tl.where(seen[:, None], (acc * ours[:, None] + before * theirs[:, None]) / total[:, None], 0.0)
    tl.store(lse + line, highest + tl.log2(total), mask=row < rows)
    if LAST:
        store_tile(out, out_strides, batch, head, at, result, row < rows, WIDTH)
    else:
        tl.store(sums + line[:, None] * WIDTH + columns, result, mask=(row < rows)[:, None])


@triton.jit
def _add_lines(sums, line, x, inside, WIDTH: tl.constexpr):
    """Adds x (ROWS, WIDTH) to the lines of `sums` numbered `line`, where `inside` (ROWS,) is true."""
    places = sums + line[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    tl.store(places, tl.load(places, mask=inside[:, None], other=0.0) + x, mask=inside[:, None])


@triton.jit(do_not_specialize=UNSPECIALISED)
def backward_queries(
    query, key, value, d_out, sums, lse, delta, ends,
    heads, text, size, step, blocks, scale,
    query_strides, key_strides, value_strides, d_out_strides,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, CAUSAL: tl.constexpr, ENDS: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, FAR: tl.constexpr,
):  # fmt: skip
    """Adds to `sums` (B, H, T, WIDTH) the derivative by BM queries of one head and segment."""
    pair = tl.program_id(1)
    m = (blocks - 1 - tl.program_id(0) % blocks) * BM
    batch, head, first, apart, _, keys = _lane(pair, ends, heads, text, size, step, blocks, ENDS, FAR)
    if m >= keys:
        return
    q_base = _lane_of(query, query_strides, batch, head, first)
    q = read_rows(q_base, m, apart * query_strides.row, keys, True, BM, WIDTH)
    g_base = _lane_of(d_out, d_out_strides, batch, head, first)
    do = read_rows(g_base, m, apart * d_out_strides.row, keys, True, BM, WIDTH)
    row = m + tl.arange(0, BM)
    line = pair.to(tl.int64) * text + first + row.to(tl.int64) * step
    top, weight = read_sums(lse, delta, line, row < keys, True)
    k_base = _lane_of(key, key_strides, batch, head // GROUP, first)
    v_base = _lane_of(value, value_strides, batch, head // GROUP, first)
    k_row, v_row = apart * key_strides.row, apart * value_strides.row
    dq = tl.zeros([BM, WIDTH], tl.float32)
    low = m if CAUSAL else keys
    _, _, ragged, last = near_keys(low, keys, ENDLESS, BM, BN)
    dq = query_tiles(
        dq, q, do, top, weight, k_base, v_base, k_row, v_row, scale * LOG2E, 0, ragged, low, 0, keys,
        ENDLESS, False, False, WIDTH, BM, BN, PRECISION,
    )  # fmt: skip
    dq = query_tiles(
        dq, q, do, top, weight, k_base, v_base, k_row, v_row, scale * LOG2E, ragged, last, low, 0, keys,
        ENDLESS, True, False, WIDTH, BM, BN, PRECISION,
    )  # fmt: skip
    _add_lines(sums, line, dq * scale, row < keys, WIDTH)


@triton.jit
def _strided_key_tiles(
    dk, dv, k, v, query_base, d_out_base, q_row, g_row, lse, delta, scale, begin, end, shift, n, keys, step,
    MASK: tl.constexpr, WIDTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv over the queries from `begin` to `end`, whose log-sum-exps lie `step` apart."""
    i = tl.arange(0, BM)[None, :]
    j = tl.arange(0, BN)[:, None]
    for m in range(begin, end, BM):
        q = read_rows(query_base, m, q_row, keys, MASK, BM, WIDTH)
        do = read_rows(d_out_base, m, g_row, keys, MASK, BM, WIDTH)
        rows = m + tl.arange(0, BM)
        places = rows.to(tl.int64) * step
        top, weight = read_sums(lse, delta, places, rows < keys, MASK)
        p = tl.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale - top[None, :])
        if MASK:
            p = tl.where((shift + m - n + i - j >= 0) & (n + j < keys), p, 0.0)
        dv, ds = add_value_gradient(dv, p, do, v, weight, PRECISION)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=UNSPECIALISED)
def backward_keys(
    query, key, value, d_out, d_key, d_value, lse, delta, ends,
    heads, text, size, step, blocks, scale,
    query_strides, key_strides, value_strides, d_out_strides,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, CAUSAL: tl.constexpr, ENDS: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, FAR: tl.constexpr,
):  # fmt: skip
    """Adds to d_key and d_value (B, H, T, WIDTH), for each query head, the derivative by BN keys and values of a segment."""
    pair = tl.program_id(1)
    n = (tl.program_id(0) % blocks) * BN
    batch, head, first, apart, _, keys = _lane(pair, ends, heads, text, size, step, blocks, ENDS, FAR)
    if n >= keys:
        return
    q_base = _lane_of(query, query_strides, batch, head, first)
    g_base = _lane_of(d_out, d_out_strides, batch, head, first)
    k_base = _lane_of(key, key_strides, batch, head // GROUP, first)
    v_base = _lane_of(value, value_strides, batch, head // GROUP, first)
    k_row, v_row = apart * key_strides.row, apart * value_strides.row
    q_row, g_row = apart * query_strides.row, apart * d_out_strides.row
    k = read_rows(k_base, n, k_row, keys, True, BN, WIDTH)
    v = read_rows(v_base, n, v_row, keys, True, BN, WIDTH)
    row = n + tl.arange(0, BN)
    start = pair.to(tl.int64) * text + first
    line = start + row.to(tl.int64) * step
    dk = tl.zeros([BN, WIDTH], tl.float32)
    dv = tl.zeros([BN, WIDTH], tl.float32)
    shift = 0 if CAUSAL else keys
    begin, full, ragged, last = near_queries(n, shift, keys, ENDLESS, BM, BN)
    dk, dv = _strided_key_tiles(
        dk, dv, k, v, q_base, g_base, q_row, g_row, lse + start, delta + start, scale * LOG2E, begin,
        tl.minimum(full, last), shift, n, keys, step, True, WIDTH, BM, BN, PRECISION,
    )  # fmt: skip
    dk, dv = _strided_key_tiles(
        dk, dv, k, v, q_base, g_base, q_row, g_row, lse + start, delta + start, scale * LOG2E, full,
        ragged, shift, n, keys, step, False, WIDTH, BM, BN, PRECISION,
    )  # fmt: skip
    dk, dv = _strided_key_tiles(
        dk, dv, k, v, q_base, g_base, q_row, g_row, lse + start, delta + start, scale * LOG2E, ragged,
        last, shift, n, keys, step, True, WIDTH, BM, BN, PRECISION,
    )  # fmt: skip
    _add_lines(d_key, line, dk * scale, row < keys, WIDTH)
    _add_lines(d_value, line, dv, row < keys, WIDTH)
