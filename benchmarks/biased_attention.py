"""Attention with a bias by distance against the same kernel without one, SDPA and FlexAttention, on one GPU.

    python benchmarks/biased_attention.py --out biased.json            about two minutes on 16 cores
    python benchmarks/biased_attention.py --kinds none,log --widths 64 --no-flex

First every kind is compiled in a process of its own, which also compares it with the formula in float64 at 1,024 tokens. Then,
for each length, all kinds take turns in one process, so that what slows the GPU down slows all of them; a time is the median
of the turns, in milliseconds. "over none" is the ratio to the kernel without a bias, in the same turns.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import math
import multiprocessing
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from longspan.engine.biased.attention import biased_attention, reference
from longspan.engine.biased.bias import Bias

HEADS = 16
KINDS = ["none", "linear", "linear learned", "log learned", "power learned", "t5 learned", "sandwich"]
PEERS = {"sdpa cudnn": SDPBackend.CUDNN_ATTENTION, "sdpa flash": SDPBackend.FLASH_ATTENTION}


@dataclass
class Row:
    name: str
    width: int
    tokens: int
    forward_ms: float | None = None
    both_ms: float | None = None
    forward_over_none: float | None = None
    both_over_none: float | None = None
    note: str = ""


@dataclass
class AttentionCall:
    """Something that computes attention, and what its gradients are taken by."""

    run: Callable[[], Tensor]
    wanted: list[Tensor]
    forward: list[float] = field(default_factory=list)
    both: list[float] = field(default_factory=list)


def bias_of(kind: str, tokens: int, dtype: torch.dtype = torch.float32) -> Bias:
    """With slopes as ALiBi has them, and parameters as they are at the start of a training."""
    name, _, learned = kind.partition(" ")
    slopes = torch.tensor([2 ** (-8 * (h + 1) / HEADS) for h in range(HEADS)], dtype=dtype, device="cuda")
    generator = torch.Generator("cuda").manual_seed(1)
    other = torch.rand(HEADS, device="cuda", generator=generator).to(dtype) * 0.9 + 0.1
    if name == "none":
        return Bias()
    if name == "linear":
        return Bias("linear", slopes.requires_grad_(bool(learned)))
    if name in ("log", "power"):
        return Bias(name, slopes.requires_grad_(), other.requires_grad_())  # type: ignore[arg-type]
    if name == "t5":
        table = torch.randn(HEADS, 129, device="cuda", generator=generator).to(dtype)
        return Bias("table", table.requires_grad_(), far=128)
    distance = torch.arange(tokens, device="cuda", dtype=torch.float64)[:, None]
    waves = torch.cos(distance * 10000 ** (-torch.arange(1, 65, device="cuda") / 64)).sum(1) - 64
    heads = torch.arange(1, HEADS + 1, device="cuda")[:, None] * 8 / HEADS
    return Bias("table", (waves / heads).to(dtype))


def inputs(tokens: int, width: int) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    shape = 1, HEADS, tokens, width
    numbers = [torch.randn(shape, device="cuda", generator=generator) for _ in range(4)]
    return [x.bfloat16().requires_grad_(i < 3) for i, x in enumerate(numbers)]


def parameters(bias: Bias) -> list[Tensor]:
    return [x for x in (bias.a, bias.b) if x is not None and x.requires_grad]


def check(kind: str, width: int, tokens: int = 1024) -> dict[str, float]:
    """‖ours - exact‖ / ‖exact‖ of the output and of every gradient. Run in a process of its own, it leaves compiled kernels."""
    *qkv, push = inputs(tokens, width)
    bias, scale = bias_of(kind, tokens), width**-0.5
    wanted = [*qkv, *parameters(bias)]
    out = biased_attention(*qkv, bias, scale=scale)
    ours = [out, *torch.autograd.grad(out, wanted, push)]
    wide = [x.detach().double().requires_grad_() for x in qkv]
    copies = [None if x is None else x.detach().double().requires_grad_(x.requires_grad) for x in (bias.a, bias.b)]
    exact_bias = Bias(bias.kind, *copies, bias.far, bias.offset)
    out = reference(*wide, exact_bias, scale=scale)
    exact = [out, *torch.autograd.grad(out, [*wide, *parameters(exact_bias)], push.double())]
    names = ("out", "query", "key", "value", "a", "b")
    return {n: float((x - y).norm() / y.norm()) for n, x, y in zip(names, ours, exact, strict=False)}


def milliseconds(run: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def take_turns(calls: dict[str, AttentionCall], push: Tensor, seconds: float) -> None:
    """Fills in the times of each call: as many turns as fit, at least five."""
    for call in calls.values():
        for _ in range(2):
            out = call.run()
            if call.wanted:
                torch.autograd.grad(out, call.wanted, push)
    spent = 0.0
    for turn in range(200):
        for call in calls.values():
            with torch.no_grad():
                call.forward.append(milliseconds(call.run))
            spent += call.forward[-1]
            if call.wanted:
                call.both.append(milliseconds(lambda call=call: torch.autograd.grad(call.run(), call.wanted, push)))
                spent += call.both[-1]
        if turn >= 4 and spent > seconds * 1000:
            return


def sdpa(backend: SDPBackend, qkv: list[Tensor]) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(*qkv, is_causal=True)


def score_mod(bias: Bias) -> Callable | None:
    """The same bias for FlexAttention, on the kernel that can read tensors."""
    a, b = (None if x is None else x.detach() for x in (bias.a, bias.b))
    if bias.kind == "linear":
        return lambda s, _, h, q, k: s - a[h] * (q - k)
    if bias.kind == "log":
        return lambda s, _, h, q, k: s - a[h] * torch.log(1 + b[h] * (q - k))
    if bias.kind == "power":
        return lambda s, _, h, q, k: s - a[h] * torch.pow((q - k).float(), b[h])
    if bias.kind == "table":
        last = a.shape[1] - 1
        return lambda s, _, h, q, k: s + a[h, torch.clamp(q - k, 0, last)]
    return None


def causal(_b: Tensor, _h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q >= k


def flex(bias: Bias, qkv: list[Tensor]) -> Callable[[], Tensor]:
    tokens = qkv[0].shape[2]
    mask = create_block_mask(causal, None, None, tokens, tokens, device="cuda")
    run = torch.compile(flex_attention, dynamic=False)
    mod = score_mod(bias)
    return lambda: run(*qkv, score_mod=mod, block_mask=mask)


def measure(width: int, tokens: int, kinds: list[str], with_flex: bool, seconds: float) -> list[Row]:
    *qkv, push = inputs(tokens, width)
    calls: dict[str, AttentionCall] = {}
    for kind in kinds:
        bias = bias_of(kind, tokens)
        run = lambda bias=bias: biased_attention(*qkv, bias, scale=width**-0.5)  # noqa: E731
        calls[kind] = AttentionCall(run, [*qkv, *parameters(bias)])
    for name, backend in PEERS.items():
        calls[name] = AttentionCall(lambda backend=backend: sdpa(backend, qkv), list(qkv))
    notes = {}
    for kind in kinds if with_flex else []:
        bias = bias_of(kind, tokens)
        if kind == "linear learned":  # the same forward as with slopes that are fixed
            continue
        name = f"flex {kind.removesuffix(' learned')}"
        calls[name] = AttentionCall(flex(bias, qkv), [] if parameters(bias) else list(qkv))
        notes[name] = "forward only" if parameters(bias) else ""
    for name in list(calls):
        try:
            torch.autograd.grad(calls[name].run(), calls[name].wanted, push) if calls[name].wanted else calls[
                name
            ].run()
        except Exception as error:
            notes[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
            del calls[name]
    take_turns(calls, push, seconds)
    rows = [Row(name, width, tokens, note=note) for name, note in notes.items() if name not in calls]
    return [*(row_of(name, call, calls.get("none"), width, tokens, notes) for name, call in calls.items()), *rows]


def row_of(
    name: str, call: AttentionCall, base: AttentionCall | None, width: int, tokens: int, notes: dict[str, str]
) -> Row:
    row = Row(name, width, tokens, statistics.median(call.forward), note=notes.get(name, ""))
    row.both_ms = statistics.median(call.both) if call.both else None
    if base is not None:
        row.forward_over_none = row.forward_ms / statistics.median(base.forward)
        row.both_over_none = row.both_ms / statistics.median(base.both) if row.both_ms else None
    return row


def line(row: Row) -> str:
    def cell(x: float | None, digits: int) -> str:
        return f"{x:10.{digits}f}" if x is not None and math.isfinite(x) else f"{'-':>10}"

    figures = cell(row.forward_ms, 3), cell(row.forward_over_none, 3), cell(row.both_ms, 3), cell(row.both_over_none, 3)
    return f"{row.width:4d} {row.tokens:6d} {row.name:20s}{''.join(figures)}  {row.note}"


def checks(kinds: list[str], widths: list[int]) -> list[dict[str, Any]]:
    jobs = [(kind, width) for width in widths for kind in kinds]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(min(len(jobs), os.cpu_count() or 1), context) as pool:
        futures = {job: pool.submit(check, *job) for job in jobs}
    results = []
    for (kind, width), future in futures.items():
        error = future.exception()
        results.append({"kind": kind, "width": width, **({"error": str(error)} if error else future.result())})
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--widths", default="64,128")
    parser.add_argument("--tokens", default="8192,16384,32768")
    parser.add_argument("--flex-tokens", type=int, default=16384, help="compiled for this length only")
    parser.add_argument("--flex-width", type=int, default=64)
    parser.add_argument("--no-flex", action="store_true")
    parser.add_argument("--seconds", type=float, default=2.0, help="for the turns of each length and head size")
    chosen = parser.parse_args()
    kinds = chosen.kinds.split(",")
    widths, lengths = ([int(x) for x in text.split(",")] for text in (chosen.widths, chosen.tokens))
    result: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "heads": HEADS}

    def save() -> None:
        if chosen.out:
            chosen.out.write_text(json.dumps(result, indent=1) + "\n")

    result["errors"] = checks(kinds, widths)
    print("relative error at 1,024 tokens against float64")
    for entry in result["errors"]:
        print("  ", {k: f"{v:.1e}" if isinstance(v, float) else v for k, v in entry.items()}, flush=True)
    save()
    print(f"\n{'D':>4} {'tokens':>6} {'':20s}{'forward':>10}{'over none':>10}{'both':>10}{'over none':>10}")
    result["rows"] = []
    for with_flex in (False, True):
        for width in widths:
            for tokens in lengths:
                if with_flex and (chosen.no_flex or tokens != chosen.flex_tokens or width != chosen.flex_width):
                    continue
                for row in measure(width, tokens, kinds, with_flex, chosen.seconds):
                    if not with_flex or row.name.startswith("flex"):
                        print(line(row), flush=True)
                        result["rows"].append(vars(row))
                save()


if __name__ == "__main__":
    main()
