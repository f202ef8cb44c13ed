"""Forward and backward of attention in blocks by length: how each grows when the text is twice as long.

    python benchmarks/window_backward.py                       a minute on one core
    python benchmarks/window_backward.py --device cuda -l 32k -l 64k -l 128k

Attention alone, 4 heads of 64 in float32, batch 1, gradients for queries, keys and values. `masks` is the backend that runs any
pattern, `banded` the one that gathers many blocks of a window into one call. Figures are the fastest of --turns runs, in
seconds, and the factor to the line above, which is 2 where the cost is linear.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from longspan.core.method import parse
from longspan.engine.backends import use_backend
from longspan.engine.call import AttentionCall, AttentionShape
from longspan.engine.patterns import attend
from longspan.engine.window.banded import banded_attention
from longspan.positions.alibi import ALiBi
from longspan.positions.scheme import Shape
from longspan.util.units import read_size

HEADS, WIDTH = 4, 64
SPECS = ("window:size=256", "window:size=256,sinks=4", "local:block=256", "longnet:segments=256/1k,dilations=1/4")


def call(length: int, device: str, *, alibi: bool) -> AttentionCall:
    torch.manual_seed(0)
    heads = (torch.randn(1, HEADS, length, WIDTH, device=device, requires_grad=True) for _ in range(3))
    shape = Shape(layers=1, hidden=HEADS * WIDTH, heads=HEADS, head_dim=WIDTH, window=256, causal=True)
    return AttentionCall(*heads, WIDTH**-0.5, bias=ALiBi().build(shape).to(device).bias if alibi else None)


def runs(device: str) -> dict[str, Callable[[int], Tensor]]:
    found: dict[str, Callable[[int], Tensor]] = {
        "window:size=256, banded": lambda n: banded_attention(call(n, device, alibi=False), 255, 0)
    }
    for spec in SPECS:
        pattern = parse(spec).methods[0]
        for alibi in (False, True):
            found[f"{spec}, {'alibi' if alibi else 'no bias'}"] = lambda n, p=pattern, alibi=alibi: attend(
                p, call(n, device, alibi=alibi), AttentionShape(HEADS, n, 0, True)
            )
    return found


def seconds(run: Callable[[int], Tensor], length: int, turns: int, device: str) -> tuple[float, float]:
    """Of the forward and of the backward pass."""
    forward, backward = [], []
    for _ in range(turns):
        marks = [_now(device)]
        out = run(length)
        marks.append(_now(device))
        out.sum().backward()
        marks.append(_now(device))
        forward.append(marks[1] - marks[0])
        backward.append(marks[2] - marks[1])
    return min(forward), min(backward)


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-l", "--length", action="append")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--turns", type=int, default=2)
    chosen = parser.parse_args(arguments)
    lengths = [read_size(x, "length") for x in chosen.length or ("4k", "8k", "16k", "32k")]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {chosen.device}")
    print(f"{'':48}{'tokens':>8}{'forward':>10}{'factor':>8}{'backward':>10}{'factor':>8}")
    for name, run in runs(chosen.device).items():
        before: tuple[float, float] | None = None
        with use_backend("masks"):
            for length in lengths:
                here = seconds(run, length, chosen.turns, chosen.device)
                factors = (
                    ("", "") if before is None else tuple(f"{x / y:.2f}" for x, y in zip(here, before, strict=True))
                )
                cells = (f"{here[0]:.3f}", factors[0], f"{here[1]:.3f}", factors[1])
                print(
                    f"{name:48}{length:8}" + "".join(f"{c:>{w}}" for c, w in zip(cells, (10, 8, 10, 8), strict=True)),
                    flush=True,
                )
                before = here


if __name__ == "__main__":
    main()
