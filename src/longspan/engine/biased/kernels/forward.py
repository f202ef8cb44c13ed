"""The forward kernel of `longspan.engine.biased.attention`, and what it shares with the backward ones.

A bias that depends on the distance alone is a Toeplitz matrix, so a tile of it has few numbers in it. A linear bias splits into
a part for each query and a part for each key: one addition a score. Any other is read from a table of one number for each
distance, which stays in the nearest cache. A thread's scores lie 8 apart in both directions, so two or more share a number, and
`read_band` writes the addresses so that the compiler sees it: about one load for two scores, and no arithmetic for addresses.

Everything is in powers of two: scores and biases are multiplied by log₂ e.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

from longspan.engine.kernels import INTERPRETED

DIRECT = tl.constexpr(INTERPRETED)
"""Whether kernels run as plain Python, where no inline assembly can."""
LOG2E = tl.constexpr(1.4426950408889634)

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
def read_rows(base, at, row, limit, MASK: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """(ROWS, WIDTH) from row `at` on; with MASK, zeros from row `limit` on."""
    rows = tl.arange(0, ROWS)
    places = base + tl.cast(at, tl.int64) * row + rows[:, None] * row + tl.arange(0, WIDTH)[None, :]
    return tl.load(places, mask=(at + rows < limit)[:, None], other=0.0) if MASK else tl.load(places)


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
    low_query,
    start,
    keys,
    window,
    nearest,
    farthest,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """The keys that the queries at positions low_query .. low_query + BM - 1 see, cut at multiples of BN: from `first` masked,
    from `full` on every score counts and distances are at least `farthest`, from `near` between, from `ahead` at most
    `nearest`, from `ragged` to `end` masked again."""
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
    acc,
    total,
    top,
    q,
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
    """The softmax carried over the keys from `begin` to `end`. `number` is the one number of the bias: a slope, or what is
    added to every score of these tiles."""
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
            new_top = tl.maximum(top, tl.max(t, 1))
            finite = tl.where(new_top == float("-inf"), 0.0, new_top) if MASK else new_top
            p = tl.exp2(t - finite[:, None])
            shrink = tl.exp2(top - finite)
        total = total * shrink + tl.sum(p, 1)
        v = read_rows(value_base, n, v_row, keys, MASK, BN, WIDTH)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        top = new_top
    return acc, total, top


def tuning_key(kernel: Any) -> list[str]:
    """Those of a kernel's arguments that block sizes are chosen anew for. From 3.9 on Triton refuses names of no argument."""
    return [
        name for name in ("bucket", "KIND", "GRAD", "WIDTH", "CAUSAL", "WINDOW", "GROUP") if name in kernel.arg_names
    ]


def tuned(narrow: list[tuple[int, ...]], wide: list[tuple[int, ...]]) -> Callable:
    """Autotuning among (BM, BN, warps, stages): `narrow` for heads of up to 64, `wide` for larger. They are those
    whose inner loops keep to the registers on compute capability 9.0. For float32 there is one, which always fits."""
    if INTERPRETED:
        return lambda kernel: triton.autotune([triton.Config({"BM": 32, "BN": 16})], key=tuning_key(kernel))(kernel)
    shapes: dict[str, list[tuple[int, ...]]] = {"narrow": narrow, "wide": wide, "single": [(32, 32, 4, 1)]}
    plans = {
        name: [triton.Config({"BM": m, "BN": n}, num_warps=warps, num_stages=stages) for m, n, warps, stages in shape]
        for name, shape in shapes.items()
    }

    def fitting(configs: list, arguments: dict, **constants: Any) -> list:
        if arguments["query"].element_size() == 4:
            return plans["single"]
        return plans["wide" if constants["WIDTH"] > 64 else "narrow"]

    return lambda kernel: triton.autotune(
        [config for plan in plans.values() for config in plan],
        key=tuning_key(kernel),
        prune_configs_by={"early_config_prune": fitting},
    )(kernel)


@tuned(narrow=[(128, 64, 4, 3), (128, 128, 8, 2)], wide=[(128, 64, 8, 3), (128, 128, 8, 2)])
@triton.jit(do_not_specialize=[*UNSPECIALISED, "bucket"])
def forward(
    query,
    key,
    value,
    out,
    lse,
    table,
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
    """BM queries of one head over all keys that they see. KIND: none, linear, table (with one number past either end) or
    curve (a table as long as the distances go). The log-sum-exp is to base 2, +inf for a row that sees nothing."""
    pair = tl.program_id(1)
    batch = (pair // heads).to(tl.int64)
    head = (pair % heads).to(tl.int64)
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest rows first
    m = block * BM
    low_query = keys - queries + m
    start = tl.load(starts + batch) if STARTS else 0
    q = read_rows(query + batch * q_batch + head * q_head, m, q_row, queries, True, BM, WIDTH)
    k_base = key + batch * k_batch + head // GROUP * k_head
    v_base = value + batch * v_batch + head // GROUP * v_head
    acc = tl.zeros([BM, WIDTH], tl.float32)
    total = tl.zeros([BM], tl.float32)
    top = tl.full([BM], float("-inf"), tl.float32)
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
    place = out + batch * o_batch + head * o_head + rows.to(tl.int64)[:, None] * o_row + tl.arange(0, WIDTH)[None, :]
    tl.store(place, result.to(out.dtype.element_ty), mask=(rows < queries)[:, None])
    sums = tl.where(sees, top + tl.log2(total), float("inf"))
    tl.store(lse + pair.to(tl.int64) * queries + rows, sums, mask=rows < queries)
