"""What the Triton kernels share: reading and writing rows, the online softmax, its gradients, and autotuning.

Imported by files of kernels only, so that importing the package needs no Triton. Everything is in powers of two: scores are
multiplied by log₂ e. Gradients of keys are computed transposed from the start, keys by queries, so that no transposed
accumulator is ever an operand: Triton up to 3.7.0 miscompiles that for Hopper GPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

from longspan.engine.kernels import INTERPRETED

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def split_pair(pair, heads):
    """The row of the batch and the head that a program's number `pair` stands for, int64."""
    return (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)


@triton.jit
def head_of(x, strides, batch, head):
    """Where one head of a row begins in x (B, H, T, D)."""
    return x + batch * strides.batch + head * strides.head


@triton.jit
def read_rows(base, at, row, limit, MASK: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """(ROWS, WIDTH) from row `at` on, rows lying `row` apart; with MASK, zeros from row `limit` on."""
    rows = tl.arange(0, ROWS)
    places = base + tl.cast(at, tl.int64) * row + rows[:, None] * row + tl.arange(0, WIDTH)[None, :]
    return tl.load(places, mask=(at + rows < limit)[:, None], other=0.0) if MASK else tl.load(places)


@triton.jit
def read_tile(x, strides, batch, head, at, limit, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """(ROWS, WIDTH) of one head of x (B, H, T, WIDTH) from token `at` on, zeros from token `limit` on."""
    return read_rows(head_of(x, strides, batch, head), at, strides.row, limit, True, ROWS, WIDTH)


@triton.jit
def store_tile(x, strides, batch, head, rows, tile, inside, WIDTH: tl.constexpr):
    """Writes a tile (ROWS, WIDTH) to the tokens `rows` of one head of x (B, H, T, WIDTH), where `inside` (ROWS,) is true."""
    places = head_of(x, strides, batch, head) + rows.to(tl.int64)[:, None] * strides.row + tl.arange(0, WIDTH)[None, :]
    tl.store(places, tile.to(x.dtype.element_ty), mask=inside[:, None])


@triton.jit
def read_sums(lse, delta, at, inside, MASK: tl.constexpr):
    """The log-sum-exp and the sum of out · d_out of the queries at `at`; with MASK, +inf and 0 outside `inside`."""
    log_sum = tl.load(lse + at, mask=inside, other=float("inf")) if MASK else tl.load(lse + at)
    sums = tl.load(delta + at, mask=inside, other=0.0) if MASK else tl.load(delta + at)
    return log_sum, sums


@triton.jit
def empty_softmax(ZERO: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """A softmax over nothing, or with ZERO over one key and value of zeros: weighted values, sums of weights, largest scores."""
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    total = tl.full([ROWS], 1.0 if ZERO else 0.0, tl.float32)
    top = tl.full([ROWS], 0.0 if ZERO else float("-inf"), tl.float32)
    return acc, total, top


@triton.jit
def softmax_weights(t, top, MASK: tl.constexpr):
    """The new largest scores, the weights of scores t, and what earlier weights shrink by; with MASK a row may see nothing."""
    new_top = tl.maximum(top, tl.max(t, 1))
    finite = tl.where(new_top == float("-inf"), 0.0, new_top) if MASK else new_top
    return new_top, tl.exp2(t - finite[:, None]), tl.exp2(top - finite)


@triton.jit
def add_values(
    acc, total, p, shrink, base, n, row, keys, MASK: tl.constexpr, BN: tl.constexpr, WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Weighted values and sums of weights with those of the keys n ..

    n + BN - 1 added, whose weights are p.
    """
    total = total * shrink + tl.sum(p, 1)
    v = read_rows(base, n, row, keys, MASK, BN, WIDTH)
    return tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION), total


@triton.jit
def add_query_gradient(dq, p, do, k, v, sums, PRECISION: tl.constexpr):
    """dq with the part of a tile of keys added, whose weights are p (queries, keys)."""
    ds = p * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - sums[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit
def add_value_gradient(dv, p, do, v, sums, PRECISION: tl.constexpr):
    """dv with the part of a tile of queries added, whose weights are p (keys, queries), and the derivative by their scores."""
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
    return dv, p * (tl.dot(v, tl.trans(do), input_precision=PRECISION) - sums[None, :])


@triton.jit
def read_queries(
    query, query_strides, out, out_strides, d_out, d_out_strides, lse, delta, batch, head, pair, m, queries,
    BM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """What the gradient of BM queries needs: q, d_out, the log-sum-exp and the sum of out · d_out, which goes to `delta`."""
    rows = m + tl.arange(0, BM)
    inside = rows < queries
    q = read_tile(query, query_strides, batch, head, m, queries, BM, WIDTH)
    o = read_tile(out, out_strides, batch, head, m, queries, BM, WIDTH)
    do = read_tile(d_out, d_out_strides, batch, head, m, queries, BM, WIDTH)
    sums = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta + pair.to(tl.int64) * queries + rows, sums, mask=inside)
    return q, do, tl.load(lse + pair.to(tl.int64) * queries + rows, mask=inside, other=float("inf")), sums


def tuning_key(kernel: Any) -> list[str]:
    """Names of a kernel's arguments that block sizes are tuned anew for; Triton from 3.9 on refuses any others."""
    return [
        name for name in ("bucket", "KIND", "GRAD", "WIDTH", "CAUSAL", "WINDOW", "GROUP") if name in kernel.arg_names
    ]


def tuned(narrow: list[tuple[int, ...]], wide: list[tuple[int, ...]]) -> Callable:
    """A decorator that autotunes a kernel among (BM, BN, warps, stages).

    `narrow` is for heads of up to 64, `wide` for larger ones; all keep inner loops in the registers on compute capability 9.0.
    For float32 there is one choice, which always fits. The kernel takes its arguments by name, `query` and `WIDTH` among them.
    """
    if INTERPRETED:
        return lambda kernel: triton.autotune([triton.Config({"BM": 32, "BN": 16})], key=tuning_key(kernel))(kernel)
    shapes: dict[str, list[tuple[int, ...]]] = {"narrow": narrow, "wide": wide, "single": [(32, 32, 4, 1)]}
    plans = {
        name: [triton.Config({"BM": m, "BN": n}, num_warps=warps, num_stages=stages) for m, n, warps, stages in shape]
        for name, shape in shapes.items()
    }

    def fitting(configs: list, positional: dict, **arguments: Any) -> list:
        if arguments["query"].element_size() == 4:
            return plans["single"]
        return plans["wide" if arguments["WIDTH"] > 64 else "narrow"]

    return lambda kernel: triton.autotune(
        [config for plan in plans.values() for config in plan],
        key=tuning_key(kernel),
        prune_configs_by={"early_config_prune": fitting},
    )(kernel)
