"""The kernel of `longspan.engine.decode.single_query`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def attend(
    query,
    key,
    value,
    out,
    partial,
    weight,
    arrived,
    size,
    kv_heads,
    q_batch,
    q_head,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    SCALE: tl.constexpr,  # as an argument a compiler would hand it over in double precision
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCKS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One key-value head's run of BLOCKS × KEYS keys, for the GROUP query heads that share it, padded to ROWS; whichever
    program of a head is the last to arrive joins all PARTS of it."""
    pair = tl.program_id(0)
    batch = (pair // kv_heads).to(tl.int64)
    head = (pair % kv_heads).to(tl.int64)
    split = tl.program_id(1)
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    real = rows < GROUP
    q_heads = head * GROUP + rows
    q = tl.load(query + batch * q_batch + q_heads[:, None] * q_head + columns[None, :], mask=real[:, None], other=0.0)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    for block in range(BLOCKS):
        keys = (split * BLOCKS + block) * KEYS + tl.arange(0, KEYS)
        inside = keys < size
        at = keys.to(tl.int64)[:, None]
        k = tl.load(key + batch * k_batch + head * k_head + at * k_row + columns, mask=inside[:, None], other=0.0)
        v = tl.load(value + batch * v_batch + head * v_head + at * v_row + columns, mask=inside[:, None], other=0.0)
        scores = tl.where(inside[None, :], tl.dot(q, tl.trans(k)) * SCALE, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        finite = tl.where(new_top == float("-inf"), 0.0, new_top)
        shrink = tl.exp2(top - finite)
        p = tl.exp2(scores - finite[:, None])
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v)
        top = new_top
    if PARTS == 1:
        joined = acc / total[:, None]
        place = (batch * kv_heads * GROUP + q_heads)[:, None] * WIDTH + columns
        tl.store(out + place, joined.to(out.dtype.element_ty), mask=real[:, None])
    else:
        place = (pair * PARTS + split).to(tl.int64) * ROWS + rows
        tl.store(partial + place[:, None] * WIDTH + columns, acc)
        tl.store(weight + 2 * place, top)
        tl.store(weight + 2 * place + 1, total)
        tl.debug_barrier()
        if tl.atomic_add(arrived + pair, 1, sem="acq_rel") == PARTS - 1:
            tl.store(arrived + pair, 0)  # ready for the next call
            parts = tl.arange(0, PARTS)
            for row in tl.static_range(GROUP):
                places = (pair * PARTS + parts).to(tl.int64) * ROWS + row
                tops = tl.load(weight + 2 * places, cache_modifier=".cg")
                shares = tl.exp2(tops - tl.max(tops, 0))
                whole = tl.sum(shares * tl.load(weight + 2 * places + 1, cache_modifier=".cg"), 0)
                sums = tl.load(partial + places[:, None] * WIDTH + columns, cache_modifier=".cg")
                joined = tl.sum(shares[:, None] * sums, 0) / whole
                where = (batch * kv_heads * GROUP + head * GROUP + row) * WIDTH + columns
                tl.store(out + where, joined.to(out.dtype.element_ty))
