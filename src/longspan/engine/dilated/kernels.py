"""The kernels of `longspan.engine.dilated.attention`.

In one launch every segment of a pattern takes part: a program has some of the queries that one head takes of one segment, and
they and their keys are rows `step` apart in memory, which are read as such; nothing is gathered. What a softmax over the keys of
the launches before came to lies in `lse` and `sums`, and the launch adds its keys to it, so the last one has the result.

Tiles are those of `windowed` with a window without end, and keys' tiles are computed transposed from the start, as there.
"""

from __future__ import annotations

import triton
import triton.language as tl

from longspan.engine.biased.kernels.forward import LOG2E, read_rows
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


@triton.jit(do_not_specialize=UNSPECIALISED)
def forward(
    query,
    key,
    value,
    sums,
    out,
    lse,
    ends,
    heads,
    text,
    size,
    step,
    blocks,
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
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    CAUSAL: tl.constexpr,
    ENDS: tl.constexpr,
    LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    FAR: tl.constexpr,
):
    """BM queries of one head and segment over the segment's keys. sums (B, H, T, WIDTH) and lse (B, H, T), to base 2, hold what
    there is so far; LAST writes to `out`."""
    pair = tl.program_id(1)
    batch = (pair // heads).to(tl.int64)
    head = (pair % heads).to(tl.int64)
    segment = (tl.program_id(0) // blocks).to(tl.int64)
    m = (blocks - 1 - tl.program_id(0) % blocks) * BM
    offset = head % step
    apart = step.to(tl.int64) if FAR else step
    end = tl.load(ends + batch) if ENDS else text
    rows, keys = _taken(text, segment, size, offset, step), _taken(end, segment, size, offset, step)
    if m >= rows:
        return
    first = segment * size + offset
    q = read_rows(query + batch * q_batch + head * q_head + first * q_row, m, apart * q_row, keys, True, BM, WIDTH)
    k_base = key + batch * k_batch + head // GROUP * k_head + first * k_row
    v_base = value + batch * v_batch + head // GROUP * v_head + first * v_row
    acc = tl.zeros([BM, WIDTH], tl.float32)
    total = tl.zeros([BM], tl.float32)
    top = tl.full([BM], float("-inf"), tl.float32)
    low = m if CAUSAL else keys
    _, _, ragged, last = near_keys(low, keys, ENDLESS, BM, BN)
    acc, total, top = softmax_tiles(
        acc, total, top, q, k_base, v_base, apart * k_row, apart * v_row, scale * LOG2E, 0, ragged, low, 0, keys,
        ENDLESS, False, False, WIDTH, BM, BN, PRECISION,
    )  # fmt: skip
    acc, total, top = softmax_tiles(
        acc, total, top, q, k_base, v_base, apart * k_row, apart * v_row, scale * LOG2E, ragged, last, low, 0, keys,
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
        place = out + batch * o_batch + head * o_head + at[:, None] * o_row + columns
        tl.store(place, result.to(out.dtype.element_ty), mask=(row < rows)[:, None])
    else:
        tl.store(sums + line[:, None] * WIDTH + columns, result, mask=(row < rows)[:, None])


@triton.jit(do_not_specialize=UNSPECIALISED)
def backward_queries(
    query,
    key,
    value,
    d_out,
    sums,
    lse,
    delta,
    ends,
    heads,
    text,
    size,
    step,
    blocks,
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
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    CAUSAL: tl.constexpr,
    ENDS: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    FAR: tl.constexpr,
):
    """Adds to `sums` (B, H, T, WIDTH) the derivative by BM queries of one head and segment."""
    pair = tl.program_id(1)
    batch = (pair // heads).to(tl.int64)
    head = (pair % heads).to(tl.int64)
    segment = (tl.program_id(0) // blocks).to(tl.int64)
    m = (blocks - 1 - tl.program_id(0) % blocks) * BM
    offset = head % step
    apart = step.to(tl.int64) if FAR else step
    end = tl.load(ends + batch) if ENDS else text
    keys = _taken(end, segment, size, offset, step)
    if m >= keys:
        return
    first = segment * size + offset
    q = read_rows(query + batch * q_batch + head * q_head + first * q_row, m, apart * q_row, keys, True, BM, WIDTH)
    do = read_rows(d_out + batch * g_batch + head * g_head + first * g_row, m, apart * g_row, keys, True, BM, WIDTH)
    row = m + tl.arange(0, BM)
    line = pair.to(tl.int64) * text + first + row.to(tl.int64) * step
    top = tl.load(lse + line, mask=row < keys, other=float("inf"))
    weight = tl.load(delta + line, mask=row < keys, other=0.0)
    k_base = key + batch * k_batch + head // GROUP * k_head + first * k_row
    v_base = value + batch * v_batch + head // GROUP * v_head + first * v_row
    place = sums + line[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    dq = tl.zeros([BM, WIDTH], tl.float32)
    low = m if CAUSAL else keys
    _, _, ragged, last = near_keys(low, keys, ENDLESS, BM, BN)
    dq = query_tiles(
        dq, q, do, top, weight, k_base, v_base, apart * k_row, apart * v_row, scale * LOG2E, 0, ragged, low, 0, keys,
        ENDLESS, False, False, WIDTH, BM, BN, PRECISION,
    )  # fmt: skip
    dq = query_tiles(
        dq, q, do, top, weight, k_base, v_base, apart * k_row, apart * v_row, scale * LOG2E, ragged, last, low, 0, keys,
        ENDLESS, True, False, WIDTH, BM, BN, PRECISION,
    )  # fmt: skip
    inside = (row < keys)[:, None]
    tl.store(place, tl.load(place, mask=inside, other=0.0) + dq * scale, mask=inside)


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
        top = tl.load(lse + places, mask=rows < keys, other=float("inf")) if MASK else tl.load(lse + places)
        weight = tl.load(delta + places, mask=rows < keys, other=0.0) if MASK else tl.load(delta + places)
        p = tl.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale - top[None, :])
        if MASK:
            p = tl.where((shift + m - n + i - j >= 0) & (n + j < keys), p, 0.0)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        ds = p * (tl.dot(v, tl.trans(do), input_precision=PRECISION) - weight[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=UNSPECIALISED)
def backward_keys(
    query,
    key,
    value,
    d_out,
    d_key,
    d_value,
    lse,
    delta,
    ends,
    heads,
    text,
    size,
    step,
    blocks,
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
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    CAUSAL: tl.constexpr,
    ENDS: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    FAR: tl.constexpr,
):
    """Adds to d_key and d_value (B, H, T, WIDTH), for each query head, the derivative by BN keys and values of a segment."""
    pair = tl.program_id(1)
    batch = (pair // heads).to(tl.int64)
    head = (pair % heads).to(tl.int64)
    segment = (tl.program_id(0) // blocks).to(tl.int64)
    n = (tl.program_id(0) % blocks) * BN
    offset = head % step
    apart = step.to(tl.int64) if FAR else step
    end = tl.load(ends + batch) if ENDS else text
    keys = _taken(end, segment, size, offset, step)
    if n >= keys:
        return
    first = segment * size + offset
    q_base = query + batch * q_batch + head * q_head + first * q_row
    g_base = d_out + batch * g_batch + head * g_head + first * g_row
    k_base = key + batch * k_batch + head // GROUP * k_head + first * k_row
    v_base = value + batch * v_batch + head // GROUP * v_head + first * v_row
    k = read_rows(k_base, n, apart * k_row, keys, True, BN, WIDTH)
    v = read_rows(v_base, n, apart * v_row, keys, True, BN, WIDTH)
    row = n + tl.arange(0, BN)
    start = pair.to(tl.int64) * text + first
    line = start + row.to(tl.int64) * step
    dk = tl.zeros([BN, WIDTH], tl.float32)
    dv = tl.zeros([BN, WIDTH], tl.float32)
    shift = 0 if CAUSAL else keys
    begin, full, ragged, last = near_queries(n, shift, keys, ENDLESS, BM, BN)
    dk, dv = _strided_key_tiles(
        dk, dv, k, v, q_base, g_base, apart * q_row, apart * g_row, lse + start, delta + start, scale * LOG2E, begin,
        tl.minimum(full, last), shift, n, keys, step, True, WIDTH, BM, BN, PRECISION,
    )  # fmt: skip
    dk, dv = _strided_key_tiles(
        dk, dv, k, v, q_base, g_base, apart * q_row, apart * g_row, lse + start, delta + start, scale * LOG2E, full,
        ragged, shift, n, keys, step, False, WIDTH, BM, BN, PRECISION,
    )  # fmt: skip
    dk, dv = _strided_key_tiles(
        dk, dv, k, v, q_base, g_base, apart * q_row, apart * g_row, lse + start, delta + start, scale * LOG2E, ragged,
        last, shift, n, keys, step, True, WIDTH, BM, BN, PRECISION,
    )  # fmt: skip
    inside = (row < keys)[:, None]
    columns = tl.arange(0, WIDTH)[None, :]
    place = d_key + line[:, None] * WIDTH + columns
    tl.store(place, tl.load(place, mask=inside, other=0.0) + dk * scale, mask=inside)
    place = d_value + line[:, None] * WIDTH + columns
    tl.store(place, tl.load(place, mask=inside, other=0.0) + dv, mask=inside)
