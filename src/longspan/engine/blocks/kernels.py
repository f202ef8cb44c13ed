"""The kernels of `longspan.engine.blocks.lists`: a program per block, over that block's list.

A block that sees everything would run alone at the end, so its list is cut into parts, each a program's, which leave what they
have in float32 to be put together; the longest lists and parts start first. Keys' tiles are computed transposed from the start,
keys by queries: Triton up to 3.7.0 miscompiles transposed accumulators for Hopper GPUs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from longspan.engine.kernel_parts import (
    LOG2E,
    add_query_gradient,
    add_value_gradient,
    add_values,
    empty_softmax,
    head_of,
    read_rows,
    read_sums,
    read_tile,
    softmax_weights,
    split_pair,
    store_tile,
)

UNSPECIALISED = ["heads", "tokens", "count", "slots"]
"""Numbers that say nothing about alignment: a kernel compiled for one length serves all."""


@triton.jit
def _share(starts, line, part, parts):
    """Where in the index a part of a list begins and ends."""
    begin = tl.load(starts + line)
    size = (tl.load(starts + line + 1) - begin).to(tl.int64)  # a list of all blocks times its parts may be past 2³¹
    return begin + (size * part // parts).to(tl.int32), begin + (size * (part + 1) // parts).to(tl.int32)


@triton.jit(do_not_specialize=UNSPECIALISED)
def forward(
    query, key, value, out, lse, part_out, part_lse, work, starts, index,
    heads, tokens, count, slots, scale,
    query_strides, key_strides, value_strides, out_strides,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A block of queries over a part of the blocks of keys in its list. work (N, 4): block, part, of how many parts, and the slot
    of part_out (B, H, slots, BLOCK, WIDTH) and part_lse (B, H, slots, BLOCK) that takes it, -1 for a list that is whole. The
    log-sum-exp is to base 2."""
    pair = tl.program_id(1)
    batch, head = split_pair(pair, heads)
    task = work + 4 * tl.program_id(0)
    block, slot = tl.load(task), tl.load(task + 3)
    begin, end = _share(starts, head * count + block, tl.load(task + 1), tl.load(task + 2))
    m = block * BLOCK
    q = read_tile(query, query_strides, batch, head, m, tokens, BLOCK, WIDTH)
    k_base = head_of(key, key_strides, batch, head // GROUP)
    v_base = head_of(value, value_strides, batch, head // GROUP)
    k_row, v_row = key_strides.row, value_strides.row
    acc, total, top = empty_softmax(False, BLOCK, WIDTH)
    by = scale * LOG2E
    for at in range(begin, end):
        n = tl.load(index + at) * BLOCK
        k = read_rows(k_base, n, k_row, tokens, True, BLOCK, WIDTH)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * by
        s = tl.where((n + tl.arange(0, BLOCK) < tokens)[None, :], s, float("-inf"))
        new_top, p, shrink = softmax_weights(s, top, False)
        acc, total = add_values(acc, total, p, shrink, v_base, n, v_row, tokens, True, BLOCK, WIDTH, PRECISION)
        top = new_top
    i = tl.arange(0, BLOCK)
    columns = tl.arange(0, WIDTH)[None, :]
    total = tl.where(
        total > 0.0, total, 1.0
    )  # another head may have the longer list, and this one nothing for this part
    result, log_sum = acc / total[:, None], top + tl.log2(total)
    if slot < 0:
        store_tile(out, out_strides, batch, head, m + i, result, m + i < tokens, WIDTH)
        tl.store(lse + pair.to(tl.int64) * tokens + m + i, log_sum, mask=m + i < tokens)
    else:
        line = (pair.to(tl.int64) * slots + slot) * BLOCK + i
        tl.store(part_out + line[:, None] * WIDTH + columns, result)
        tl.store(part_lse + line, log_sum)


@triton.jit(do_not_specialize=["heads", "tokens", "slots"])
def join_forward(
    part_out, part_lse, out, lse, owners,
    heads, tokens, slots,
    out_strides,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One softmax of the parts of a block's list. owners (N, 3): block, its first slot, its parts."""
    pair = tl.program_id(1)
    batch, head = split_pair(pair, heads)
    owner = owners + 3 * tl.program_id(0)
    m, first, parts = tl.load(owner) * BLOCK, tl.load(owner + 1), tl.load(owner + 2)
    i = tl.arange(0, BLOCK)
    columns = tl.arange(0, WIDTH)[None, :]
    acc, total, top = empty_softmax(False, BLOCK, WIDTH)
    for slot in range(first, first + parts):
        line = (pair.to(tl.int64) * slots + slot) * BLOCK + i
        one = tl.load(part_lse + line)
        new_top = tl.maximum(top, one)
        finite = tl.where(new_top == float("-inf"), 0.0, new_top)
        shrink, weight = tl.exp2(top - finite), tl.exp2(one - finite)
        acc = acc * shrink[:, None] + tl.load(part_out + line[:, None] * WIDTH + columns) * weight[:, None]
        total = total * shrink + weight
        top = new_top
    store_tile(out, out_strides, batch, head, m + i, acc / total[:, None], m + i < tokens, WIDTH)
    tl.store(lse + pair.to(tl.int64) * tokens + m + i, top + tl.log2(total), mask=m + i < tokens)


@triton.jit(do_not_specialize=["heads", "tokens", "slots"])
def join_gradients(
    sums, gradient, owners,
    heads, tokens, slots,
    gradient_strides,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds up sums (B, H, slots, BLOCK, WIDTH) of the parts of a block's list into `gradient`, whose heads `heads` counts."""
    pair = tl.program_id(1)
    batch, head = split_pair(pair, heads)
    owner = owners + 3 * tl.program_id(0)
    m, first, parts = tl.load(owner) * BLOCK, tl.load(owner + 1), tl.load(owner + 2)
    i = tl.arange(0, BLOCK)
    columns = tl.arange(0, WIDTH)[None, :]
    acc = tl.zeros([BLOCK, WIDTH], tl.float32)
    for slot in range(first, first + parts):
        line = (pair.to(tl.int64) * slots + slot) * BLOCK + i
        acc += tl.load(sums + line[:, None] * WIDTH + columns)
    store_tile(gradient, gradient_strides, batch, head, m + i, acc, m + i < tokens, WIDTH)


@triton.jit(do_not_specialize=UNSPECIALISED)
def backward_queries(
    query, key, value, d_out, d_query, part_query, lse, delta, work, starts, index,
    heads, tokens, count, slots, scale,
    query_strides, key_strides, value_strides, d_out_strides, d_query_strides,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The derivative by a block of queries, of a part of its list; `work` as in `forward`."""
    pair = tl.program_id(1)
    batch, head = split_pair(pair, heads)
    task = work + 4 * tl.program_id(0)
    block, slot = tl.load(task), tl.load(task + 3)
    begin, end = _share(starts, head * count + block, tl.load(task + 1), tl.load(task + 2))
    m = block * BLOCK
    rows = m + tl.arange(0, BLOCK)
    q = read_tile(query, query_strides, batch, head, m, tokens, BLOCK, WIDTH)
    do = read_tile(d_out, d_out_strides, batch, head, m, tokens, BLOCK, WIDTH)
    line = pair.to(tl.int64) * tokens + rows
    top, weight = read_sums(lse, delta, line, rows < tokens, True)
    k_base = head_of(key, key_strides, batch, head // GROUP)
    v_base = head_of(value, value_strides, batch, head // GROUP)
    k_row, v_row = key_strides.row, value_strides.row
    dq = tl.zeros([BLOCK, WIDTH], tl.float32)
    by = scale * LOG2E
    for at in range(begin, end):
        n = tl.load(index + at) * BLOCK
        k = read_rows(k_base, n, k_row, tokens, True, BLOCK, WIDTH)
        v = read_rows(v_base, n, v_row, tokens, True, BLOCK, WIDTH)
        p = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * by - top[:, None])
        p = tl.where((n + tl.arange(0, BLOCK) < tokens)[None, :], p, 0.0)
        dq = add_query_gradient(dq, p, do, k, v, weight, PRECISION)
    columns = tl.arange(0, WIDTH)[None, :]
    if slot < 0:
        store_tile(d_query, d_query_strides, batch, head, rows, dq * scale, rows < tokens, WIDTH)
    else:
        line = (pair.to(tl.int64) * slots + slot) * BLOCK + tl.arange(0, BLOCK)
        tl.store(part_query + line[:, None] * WIDTH + columns, dq * scale)


@triton.jit(do_not_specialize=UNSPECIALISED)
def backward_keys(
    query, key, value, d_out, d_key, d_value, part_key, part_value, lse, delta, work, starts, index,
    heads, tokens, count, slots, scale,
    query_strides, key_strides, value_strides, d_out_strides, d_key_strides, d_value_strides,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The derivative by a block of keys and values of one key head, over the query heads that share it, of a part of their
    lists, which are of blocks of queries; `work` as in `forward`, the parts' sums of as many heads as keys have."""
    pair = tl.program_id(1)
    kv_heads = heads // GROUP
    batch, kv_head = split_pair(pair, kv_heads)
    task = work + 4 * tl.program_id(0)
    block, part, parts, slot = tl.load(task), tl.load(task + 1), tl.load(task + 2), tl.load(task + 3)
    n = block * BLOCK
    rows = n + tl.arange(0, BLOCK)
    k = read_tile(key, key_strides, batch, kv_head, n, tokens, BLOCK, WIDTH)
    v = read_tile(value, value_strides, batch, kv_head, n, tokens, BLOCK, WIDTH)
    dk = tl.zeros([BLOCK, WIDTH], tl.float32)
    dv = tl.zeros([BLOCK, WIDTH], tl.float32)
    by = scale * LOG2E
    for member in range(GROUP):
        head = kv_head * GROUP + member
        begin, end = _share(starts, head * count + block, part, parts)
        q_base = head_of(query, query_strides, batch, head)
        g_base = head_of(d_out, d_out_strides, batch, head)
        line = (batch * heads + head) * tokens
        for at in range(begin, end):
            m = tl.load(index + at) * BLOCK
            i = m + tl.arange(0, BLOCK)
            q = read_rows(q_base, m, query_strides.row, tokens, True, BLOCK, WIDTH)
            do = read_rows(g_base, m, d_out_strides.row, tokens, True, BLOCK, WIDTH)
            top, weight = read_sums(lse + line, delta + line, i, i < tokens, True)
            p = tl.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * by - top[None, :])
            dv, ds = add_value_gradient(dv, p, do, v, weight, PRECISION)
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    columns = tl.arange(0, WIDTH)[None, :]
    if slot < 0:
        store_tile(d_key, d_key_strides, batch, kv_head, rows, dk * scale, rows < tokens, WIDTH)
        store_tile(d_value, d_value_strides, batch, kv_head, rows, dv, rows < tokens, WIDTH)
    else:
        line = (pair.to(tl.int64) * slots + slot) * BLOCK + tl.arange(0, BLOCK)
        tl.store(part_key + line[:, None] * WIDTH + columns, dk * scale)
        tl.store(part_value + line[:, None] * WIDTH + columns, dv)
