"""The forward kernel of `longspan.engine.biased.attention`, and what it shares with the backward ones.

A bias that depends on the distance alone is a Toeplitz matrix, so a tile of it has few numbers in it. A linear bias splits into
a part for each query and a part for each key: one addition a score. Any other is read from a table of one number for each
distance, which stays in the nearest cache. A thread's scores lie 8 apart in both directions, so two or more share a number, and
`read_band` writes the addresses so that the compiler sees it: about one load for two scores, and no arithmetic for addresses.

Everything is in powers of two: scores and biases are multiplied by log₂ e.
"""

from __future__ import annotations

import triton
import triton.language as tl

from longspan.engine.kernel_parts import (
    LOG2E,
    add_values,
    empty_softmax,
    head_of,
    read_rows,
    read_tile,
    softmax_weights,
    split_pair,
    store_tile,
    tuned,
)
from longspan.engine.kernels import INTERPRETED

DIRECT = tl.constexpr(INTERPRETED)
"""Whether kernels run as plain Python, where no inline assembly can."""

UNSPECIALISED = ["heads", "queries", "keys", "window", "span", "zero", "nearest", "farthest"]
"""Numbers that say nothing about alignment: a kernel compiled for one length serves all."""


@triton.jit(do_not_specialize=["size", "offset", "span", "zero", "nearest", "farthest"])
def fill(table, out, slopes, a, b, size, offset, span, zero, nearest, farthest, KIND: tl.constexpr, UNIT: tl.constexpr):
    """One number for each distance, at `out[head, zero - distance]`: distances from `nearest` to `farthest`, those past them as
    the last ones where the kind is a table. With UNIT no outer coefficient is in it, and `slopes` gets the derivative by the
    inner one."""
    head = tl.program_id(1)
    at = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    place = out + head.to(tl.int64) * span + at
    if KIND == "table":
        distance = tl.minimum(tl.maximum(zero - at, nearest), farthest)
        entry = tl.load(table + head.to(tl.int64) * size + distance + offset, mask=at < span, other=0.0)
        tl.store(place, entry.to(tl.float32) * LOG2E, mask=at < span)
    else:
        distance = tl.abs(zero - at).to(tl.float32)
        outer = tl.load(a + head)
        inner = tl.load(b + head)
        if KIND == "log":
            number = tl.log2(1.0 + inner * distance)
            slope = distance / (1.0 + inner * distance)
        else:
            logarithm = tl.log2(tl.maximum(distance, 1.0))
            number = tl.exp2(inner * logarithm)
            number = tl.where(distance == 0.0, tl.where(inner == 0.0, 1.0, 0.0), number)
            slope = number * logarithm / LOG2E
            outer *= LOG2E
        if UNIT:
            tl.store(place, number, mask=at < span)
            tl.store(slopes + head.to(tl.int64) * span + at, slope, mask=at < span)
        else:
            tl.store(place, -outer * number, mask=at < span)


@triton.jit
def _read(places):
    """A load for each element that the compiler may merge with equal ones and leave in the layout of the scores."""
    return (
        tl.load(places)
        if DIRECT
        else tl.inline_asm_elementwise(
            "ld.global.nc.f32 $0, [$1];", "=f,l", [places.to(tl.int64)], dtype=tl.float32, is_pure=True, pack=1
        )
    )


@triton.jit
def read_band(table, at, row, column, TURNED: tl.constexpr):
    """The table's numbers for a tile whose first query and first key have theirs at `at`; its rows are queries and its columns
    keys, TURNED the other way round. Of a number's place the bits that tell threads apart are added first, those that tell a
    thread's scores apart last (a tensor core's layout: bit 3 of the row, all of the column but bits 1 and 2), so that the
    latter are constants, and equal for scores that share a number."""
    thread = (column & 6).to(tl.int64) - (row & -9).to(tl.int64)
    fixed = (column & -7).to(tl.int64) - (row & 8).to(tl.int64)
    return _read((table + at - thread) - fixed if TURNED else (table + at + thread) + fixed)


@triton.jit
def read_clamped(table, apart, i, j, zero, nearest, farthest):
    """The same for a tile at any distance: those past the ends of the table count as its ends."""
    return _read(table + (zero - tl.minimum(tl.maximum(apart + i - j, nearest), farthest)).to(tl.int64))


@triton.jit
def distances(apart, i, j, TURNED: tl.constexpr):
    """|query - key| in float32; what is in a row of the tile is added up first, since a thread has fewer rows than columns."""
    in_row = (apart - j if TURNED else apart + i).to(tl.float32)
    return tl.abs(i.to(tl.float32) + in_row if TURNED else in_row - j.to(tl.float32))


@triton.jit
def visible(apart, i, j, key, start, keys, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Which scores of a tile count; `key` is the position of its first key."""
    seen = (key + j < keys) & (key + j >= start) & (i >= 0)
    if CAUSAL:
        seen = seen & (apart + i - j >= 0)
    if WINDOW:
        seen = seen & (apart + i - j < window)
    return seen


@triton.jit
def key_ranges(
    low_query, start, keys, window, nearest, farthest, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """The keys that the queries at positions low_query ..

    low_query + BM - 1 see, cut at multiples of BN: from `first` masked, from `full` on every score counts and
    distances are at least `farthest`, from `near` between, from `ahead` at most `nearest`, from `ragged` to `end`
    masked again.
    """
    first = start
    full = start
    end = keys
    whole = keys
    if WINDOW:
        first = tl.maximum(first, low_query - window + 1)
        full = tl.maximum(full, low_query + BM - window)
    if CAUSAL:
        end = tl.minimum(end, low_query + BM)
        whole = tl.minimum(whole, low_query + 1)
    first = first // BN * BN
    full = tl.minimum((full + BN - 1) // BN, (end + BN - 1) // BN) * BN
    ragged = tl.maximum(whole // BN * BN, full)
    near = tl.minimum(tl.maximum(tl.maximum(low_query - farthest + 1, 0) // BN * BN, full), ragged)
    ahead = ragged
    if not CAUSAL:
        ahead = (tl.maximum(low_query + BM - 1 - nearest, 0) + BN - 1) // BN * BN
        ahead = tl.minimum(tl.maximum(ahead, near), ragged)
    return first, full, near, ahead, ragged, end


@triton.jit
def _forward_tiles(
    acc, total, top, q, key_base, value_base, k_row, v_row, table, number, scale, begin, end, low_query, start, keys,
    window, zero, nearest, farthest, BIAS: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, WIDTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The softmax carried over the keys from `begin` to `end`.

    `number` is the one number of the bias: a slope, or what is added to every score of these tiles.
    """
    i = tl.arange(0, BM)[:, None]
    j = tl.arange(0, BN)[None, :]
    for n in range(begin, end, BN):
        k = read_rows(key_base, n, k_row, keys, MASK, BN, WIDTH)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        apart = low_query - n
        if BIAS == "none" and not MASK:  # the scale is positive, so that the largest score stays the largest
            new_top = tl.maximum(top, tl.max(s, 1) * scale + number)
            p = tl.exp2(s * scale - (new_top - number)[:, None])
            shrink = tl.exp2(top - new_top)
        elif BIAS == "slope" and not MASK:
            t = s * scale + number * j.to(tl.float32)
            row = number * (apart + tl.arange(0, BM)).to(tl.float32)
            new_top = tl.maximum(top, tl.max(t, 1) - row)
            p = tl.exp2(t - (new_top + row)[:, None])
            shrink = tl.exp2(top - new_top)
        else:
            t = s * scale
            if BIAS == "band" or BIAS == "curve":
                t += read_band(table, zero - apart, i, j, False)
            elif BIAS == "clamped":
                t += read_clamped(table, apart, i, j, zero, nearest, farthest)
            elif BIAS == "absolute":
                t -= number * distances(apart, i, j, False)
            if MASK:
                t = tl.where(visible(apart, i, j, n, start, keys, window, CAUSAL, WINDOW), t, float("-inf"))
            new_top, p, shrink = softmax_weights(t, top, MASK)
        acc, total = add_values(acc, total, p, shrink, value_base, n, v_row, keys, MASK, BN, WIDTH, PRECISION)
        top = new_top
    return acc, total, top


@tuned(narrow=[(128, 64, 4, 3), (128, 128, 8, 2)], wide=[(128, 64, 8, 3), (128, 128, 8, 2)])
@triton.jit(do_not_specialize=[*UNSPECIALISED, "bucket"])
def forward(
    query, key, value, out, lse, table, starts,
    heads, queries, keys, window, span, zero, nearest, farthest, scale,
    query_strides, key_strides, value_strides, out_strides,
    bucket,
    KIND: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, STARTS: tl.constexpr, GROUP: tl.constexpr,
    WIDTH: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """BM queries of one head over all keys that they see.

    KIND: none, linear, table (with one number past either end) or curve (a table as long as the distances go). The
    log-sum-exp is to base 2, +inf for a row that sees nothing.
    """
    pair = tl.program_id(1)
    batch, head = split_pair(pair, heads)
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest rows first
    m = block * BM
    low_query = keys - queries + m
    start = tl.load(starts + batch) if STARTS else 0
    q = read_tile(query, query_strides, batch, head, m, queries, BM, WIDTH)
    k_base = head_of(key, key_strides, batch, head // GROUP)
    v_base = head_of(value, value_strides, batch, head // GROUP)
    k_row, v_row = key_strides.row, value_strides.row
    acc, total, top = empty_softmax(False, BM, WIDTH)
    first, full, near, ahead, ragged, end = key_ranges(
        low_query, start, keys, window, nearest, farthest, CAUSAL, WINDOW, BM, BN
    )
    scale *= LOG2E
    slope = tl.load(table + head) * LOG2E if KIND == "linear" else 0.0
    band = table + head * span
    past = tl.load(band + (zero - farthest)) if KIND == "table" else 0.0
    future = tl.load(band + (zero - nearest)) if KIND == "table" else 0.0
    EACH: tl.constexpr = "absolute" if KIND == "linear" else "clamped" if KIND == "table" else KIND
    FAR: tl.constexpr = "slope" if KIND == "linear" else "none"
    NEAR: tl.constexpr = "absolute" if KIND == "linear" else "band" if KIND == "table" else KIND
    if WINDOW or STARTS:
        acc, total, top = _forward_tiles(
            acc, total, top, q, k_base, v_base, k_row, v_row, band, slope, scale, first, tl.minimum(full, end), low_query,
            start, keys, window, zero, nearest, farthest, EACH, True, CAUSAL, WINDOW, WIDTH, BM, BN, PRECISION,
        )  # fmt: skip
    if KIND == "linear" or KIND == "table":
        acc, total, top = _forward_tiles(
            acc, total, top, q, k_base, v_base, k_row, v_row, band, slope + past, scale, full, near, low_query,
            start, keys, window, zero, nearest, farthest, FAR, False, CAUSAL, WINDOW, WIDTH, BM, BN, PRECISION,
        )  # fmt: skip
    if KIND != "linear" or not CAUSAL:
        acc, total, top = _forward_tiles(
            acc, total, top, q, k_base, v_base, k_row, v_row, band, slope, scale, near, ahead, low_query,
            start, keys, window, zero, nearest, farthest, NEAR, False, CAUSAL, WINDOW, WIDTH, BM, BN, PRECISION,
        )  # fmt: skip
    if not CAUSAL and (KIND == "linear" or KIND == "table"):
        acc, total, top = _forward_tiles(
            acc, total, top, q, k_base, v_base, k_row, v_row, band, future - slope, scale, ahead, ragged, low_query,
            start, keys, window, zero, nearest, farthest, FAR, False, CAUSAL, WINDOW, WIDTH, BM, BN, PRECISION,
        )  # fmt: skip
    acc, total, top = _forward_tiles(
        acc, total, top, q, k_base, v_base, k_row, v_row, band, slope, scale, ragged, end, low_query,
        start, keys, window, zero, nearest, farthest, EACH, True, CAUSAL, WINDOW, WIDTH, BM, BN, PRECISION,
    )  # fmt: skip
    rows = m + tl.arange(0, BM)
    sees = (total > 0.0) & (low_query + tl.arange(0, BM) >= start)
    result = tl.where(sees[:, None], acc / tl.where(sees, total, 1.0)[:, None], 0.0)
    store_tile(out, out_strides, batch, head, rows, result, rows < queries, WIDTH)
    sums = tl.where(sees, top + tl.log2(total), float("inf"))
    tl.store(lse + pair.to(tl.int64) * queries + rows, sums, mask=rows < queries)
