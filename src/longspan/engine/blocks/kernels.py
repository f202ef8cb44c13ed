"""The kernels of `longspan.engine.blocks.lists`: a program per block, over that block's list.

A block that sees everything would run alone at the end, so its list is cut into parts, each a program's, which leave what they
have in float32 to be put together; the longest lists and parts start first. Keys' tiles are computed transposed from the start,
keys by queries: Triton up to 3.7.0 miscompiles transposed accumulators for Hopper GPUs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from longspan.engine.kernel_parts import LOG2E, read_rows

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
    query,
    key,
    value,
    out,
    lse,
    part_out,
    part_lse,
    work,
    starts,
    index,
    heads,
    tokens,
    count,
    slots,
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
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A block of queries over a part of the blocks of keys in its list.

    work (N, 4): block, part, of how many parts, and the slot of part_out (B, H, slots, BLOCK, WIDTH) and part_lse (B,
    H, slots, BLOCK) that takes it, -1 for a list that is whole. The log-sum-exp is to base 2.
    """
    pair = tl.program_id(1)
    batch = (pair // heads).to(tl.int64)
    head = (pair % heads).to(tl.int64)
    task = work + 4 * tl.program_id(0)
    block, slot = tl.load(task), tl.load(task + 3)
    begin, end = _share(starts, head * count + block, tl.load(task + 1), tl.load(task + 2))
    m = block * BLOCK
    q = read_rows(query + batch * q_batch + head * q_head, m, q_row, tokens, True, BLOCK, WIDTH)
    k_base = key + batch * k_batch + head // GROUP * k_head
    v_base = value + batch * v_batch + head // GROUP * v_head
    acc = tl.zeros([BLOCK, WIDTH], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    by = scale * LOG2E
    for at in range(begin, end):
        n = tl.load(index + at) * BLOCK
        k = read_rows(k_base, n, k_row, tokens, True, BLOCK, WIDTH)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * by
        s = tl.where((n + tl.arange(0, BLOCK) < tokens)[None, :], s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        v = read_rows(v_base, n, v_row, tokens, True, BLOCK, WIDTH)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        top = new_top
    i = tl.arange(0, BLOCK)
    columns = tl.arange(0, WIDTH)[None, :]
    total = tl.where(
        total > 0.0, total, 1.0
    )  # another head may have the longer list, and this one nothing for this part
    result, log_sum = acc / total[:, None], top + tl.log2(total)
    if slot < 0:
        place = out + batch * o_batch + head * o_head + (m + i).to(tl.int64)[:, None] * o_row + columns
        tl.store(place, result.to(out.dtype.element_ty), mask=(m + i < tokens)[:, None])
        tl.store(lse + pair.to(tl.int64) * tokens + m + i, log_sum, mask=m + i < tokens)
    else:
        line = (pair.to(tl.int64) * slots + slot) * BLOCK + i
        tl.store(part_out + line[:, None] * WIDTH + columns, result)
        tl.store(part_lse + line, log_sum)


@triton.jit(do_not_specialize=["heads", "tokens", "slots"])
def join_forward(
    part_out,
    part_lse,
    out,
    lse,
    owners,
    heads,
    tokens,
    slots,
    o_batch,
    o_head,
    o_row,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One softmax of the parts of a block's list.

    owners (N, 3): block, its first slot, its parts.
    """
    pair = tl.program_id(1)
    batch = (pair // heads).to(tl.int64)
    head = (pair % heads).to(tl.int64)
    owner = owners + 3 * tl.program_id(0)
    m, first, parts = tl.load(owner) * BLOCK, tl.load(owner + 1), tl.load(owner + 2)
    i = tl.arange(0, BLOCK)
    columns = tl.arange(0, WIDTH)[None, :]
    acc = tl.zeros([BLOCK, WIDTH], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    for slot in range(first, first + parts):
        line = (pair.to(tl.int64) * slots + slot) * BLOCK + i
        one = tl.load(part_lse + line)
        new_top = tl.maximum(top, one)
        finite = tl.where(new_top == float("-inf"), 0.0, new_top)
        shrink, weight = tl.exp2(top - finite), tl.exp2(one - finite)
        acc = acc * shrink[:, None] + tl.load(part_out + line[:, None] * WIDTH + columns) * weight[:, None]
        total = total * shrink + weight
        top = new_top
    place = out + batch * o_batch + head * o_head + (m + i).to(tl.int64)[:, None] * o_row + columns
    tl.store(place, (acc / total[:, None]).to(out.dtype.element_ty), mask=(m + i < tokens)[:, None])
    tl.store(lse + pair.to(tl.int64) * tokens + m + i, top + tl.log2(total), mask=m + i < tokens)


@triton.jit(do_not_specialize=["heads", "tokens", "slots"])
def join_gradients(
    sums,
    gradient,
    owners,
    heads,
    tokens,
    slots,
    batch_step,
    head_step,
    row_step,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds up sums (B, H, slots, BLOCK, WIDTH) of the parts of a block's list into `gradient`, whose heads `heads` counts."""
    pair = tl.program_id(1)
    batch = (pair // heads).to(tl.int64)
    head = (pair % heads).to(tl.int64)
    owner = owners + 3 * tl.program_id(0)
    m, first, parts = tl.load(owner) * BLOCK, tl.load(owner + 1), tl.load(owner + 2)
    i = tl.arange(0, BLOCK)
    columns = tl.arange(0, WIDTH)[None, :]
    acc = tl.zeros([BLOCK, WIDTH], tl.float32)
    for slot in range(first, first + parts):
        line = (pair.to(tl.int64) * slots + slot) * BLOCK + i
        acc += tl.load(sums + line[:, None] * WIDTH + columns)
    place = gradient + batch * batch_step + head * head_step + (m + i).to(tl.int64)[:, None] * row_step + columns
    tl.store(place, acc.to(gradient.dtype.element_ty), mask=(m + i < tokens)[:, None])


@triton.jit(do_not_specialize=UNSPECIALISED)
def backward_queries(
    query,
    key,
    value,
    d_out,
    d_query,
    part_query,
    lse,
    delta,
    work,
    starts,
    index,
    heads,
    tokens,
    count,
    slots,
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
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The derivative by a block of queries, of a part of its list; `work` as in `forward`."""
    pair = tl.program_id(1)
    batch = (pair // heads).to(tl.int64)
    head = (pair % heads).to(tl.int64)
    task = work + 4 * tl.program_id(0)
    block, slot = tl.load(task), tl.load(task + 3)
    begin, end = _share(starts, head * count + block, tl.load(task + 1), tl.load(task + 2))
    m = block * BLOCK
    rows = m + tl.arange(0, BLOCK)
    q = read_rows(query + batch * q_batch + head * q_head, m, q_row, tokens, True, BLOCK, WIDTH)
    do = read_rows(d_out + batch * g_batch + head * g_head, m, g_row, tokens, True, BLOCK, WIDTH)
    line = pair.to(tl.int64) * tokens + rows
    top = tl.load(lse + line, mask=rows < tokens, other=float("inf"))
    weight = tl.load(delta + line, mask=rows < tokens, other=0.0)
    k_base = key + batch * k_batch + head // GROUP * k_head
    v_base = value + batch * v_batch + head // GROUP * v_head
    dq = tl.zeros([BLOCK, WIDTH], tl.float32)
    by = scale * LOG2E
    for at in range(begin, end):
        n = tl.load(index + at) * BLOCK
        k = read_rows(k_base, n, k_row, tokens, True, BLOCK, WIDTH)
        v = read_rows(v_base, n, v_row, tokens, True, BLOCK, WIDTH)
        p = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * by - top[:, None])
        p = tl.where((n + tl.arange(0, BLOCK) < tokens)[None, :], p, 0.0)
        ds = p * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - weight[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    columns = tl.arange(0, WIDTH)[None, :]
    if slot < 0:
        place = d_query + batch * dq_batch + head * dq_head + rows.to(tl.int64)[:, None] * dq_row + columns
        tl.store(place, (dq * scale).to(d_query.dtype.element_ty), mask=(rows < tokens)[:, None])
    else:
        line = (pair.to(tl.int64) * slots + slot) * BLOCK + tl.arange(0, BLOCK)
        tl.store(part_query + line[:, None] * WIDTH + columns, dq * scale)


@triton.jit(do_not_specialize=UNSPECIALISED)
def backward_keys(
    query,
    key,
    value,
    d_out,
    d_key,
    d_value,
    part_key,
    part_value,
    lse,
    delta,
    work,
    starts,
    index,
    heads,
    tokens,
    count,
    slots,
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
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The derivative by a block of keys and values of one key head, over the query heads that share it, of a part of their
    lists, which are of blocks of queries; `work` as in `forward`, the parts' sums of as many heads as keys have."""
    pair = tl.program_id(1)
    kv_heads = heads // GROUP
    batch = (pair // kv_heads).to(tl.int64)
    kv_head = (pair % kv_heads).to(tl.int64)
    task = work + 4 * tl.program_id(0)
    block, part, parts, slot = tl.load(task), tl.load(task + 1), tl.load(task + 2), tl.load(task + 3)
    n = block * BLOCK
    rows = n + tl.arange(0, BLOCK)
    k = read_rows(key + batch * k_batch + kv_head * k_head, n, k_row, tokens, True, BLOCK, WIDTH)
    v = read_rows(value + batch * v_batch + kv_head * v_head, n, v_row, tokens, True, BLOCK, WIDTH)
    dk = tl.zeros([BLOCK, WIDTH], tl.float32)
    dv = tl.zeros([BLOCK, WIDTH], tl.float32)
    by = scale * LOG2E
    for member in range(GROUP):
        head = kv_head * GROUP + member
        begin, end = _share(starts, head * count + block, part, parts)
        q_base = query + batch * q_batch + head * q_head
        g_base = d_out + batch * g_batch + head * g_head
        line = (batch * heads + head) * tokens
        for at in range(begin, end):
            m = tl.load(index + at) * BLOCK
            i = m + tl.arange(0, BLOCK)
            q = read_rows(q_base, m, q_row, tokens, True, BLOCK, WIDTH)
            do = read_rows(g_base, m, g_row, tokens, True, BLOCK, WIDTH)
            top = tl.load(lse + line + i, mask=i < tokens, other=float("inf"))
            weight = tl.load(delta + line + i, mask=i < tokens, other=0.0)
            p = tl.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * by - top[None, :])
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
            ds = p * (tl.dot(v, tl.trans(do), input_precision=PRECISION) - weight[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    inside = (rows < tokens)[:, None]
    columns = tl.arange(0, WIDTH)[None, :]
    at = rows.to(tl.int64)[:, None]
    if slot < 0:
        tl.store(
            d_key + batch * dk_batch + kv_head * dk_head + at * dk_row + columns,
            (dk * scale).to(d_key.dtype.element_ty), mask=inside,
        )  # fmt: skip
        tl.store(
            d_value + batch * dv_batch + kv_head * dv_head + at * dv_row + columns,
            dv.to(d_value.dtype.element_ty), mask=inside,
        )  # fmt: skip
    else:
        line = (pair.to(tl.int64) * slots + slot) * BLOCK + tl.arange(0, BLOCK)
        tl.store(part_key + line[:, None] * WIDTH + columns, dk * scale)
        tl.store(part_value + line[:, None] * WIDTH + columns, dv)
