"""Forward and backward of one gated attention unit by length: how many forward passes a backward pass takes.

    python benchmarks/gated_backward.py                                       a GPU: 32,768 tokens, 16 heads of 128
    python benchmarks/gated_backward.py --device cpu -l 1k -l 2k -l 4k --heads 2

A whole layer of a decoder, as wide as `heads` heads of `width` channels, one text, gradients for the input and every weight.
`forward_ms` is the pass without gradients, `training_forward_ms` the one that a backward pass follows; each is the fastest of
--turns. One line of JSON for each unit, dtype and length; `over_forward` is the backward pass in forward passes, `peak_gb` the
memory that training takes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch

from longspan.attention.gau import GatedMixer
from longspan.core.method import parse
from longspan.lm import LongspanConfig
from longspan.util.units import read_size

DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32}


def build(spec: str, hidden: int, length: int) -> torch.nn.Module:
    torch.manual_seed(0)
    config = LongspanConfig(
        attention=spec, position="nope", hidden_size=hidden, num_attention_heads=1, max_position_embeddings=length
    )
    method = cast(GatedMixer, parse(spec).methods[0])
    return method.build(config, 0, config.build_position_encoding(causal=True), causal=True)


def measure(spec: str, dtype: str, hidden: int, length: int, device: str, turns: int) -> dict[str, Any]:
    unit = build(spec, hidden, length).to(device, DTYPES[dtype])
    x = torch.randn(1, length, hidden, device=device, dtype=DTYPES[dtype], requires_grad=True)
    push, times = torch.randn_like(x), []
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(turns + 1):  # the first one warms up
        with torch.no_grad():
            _, plain = timed(lambda: unit(x)[0], device)
        out, forward = timed(lambda: unit(x)[0], device)
        _, backward = timed(lambda out=out: out.backward(push), device)
        times.append((plain, forward, backward))
        unit.zero_grad()
        x.grad = None
    plain, forward, backward = (min(column) * 1000 for column in zip(*times[1:], strict=True))
    row = {"attention": spec, "dtype": dtype, "tokens": length, "hidden": hidden, "forward_ms": plain}
    row |= {"training_forward_ms": forward, "backward_ms": backward, "over_forward": backward / plain}
    row = {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}
    peak = round(torch.cuda.max_memory_allocated() / 1e9, 2) if device == "cuda" else None
    return row | {"peak_gb": peak}


def timed(run: Callable[[], Any], device: str) -> tuple[Any, float]:
    marks, out = [], None
    for last in (False, True):
        if device == "cuda":
            torch.cuda.synchronize()
        marks.append(time.perf_counter())
        out = out if last else run()
    return out, marks[1] - marks[0]


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-l", "--length", action="append")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--dtypes", default="bf16,float32")
    parser.add_argument("--units", default="gau,flash")
    parser.add_argument("--turns", type=int, default=3)
    chosen = parser.parse_args(arguments)
    rows = []
    for spec in chosen.units.split(","):
        for dtype in chosen.dtypes.split(","):
            for text in chosen.length or ["32k"]:
                size = chosen.heads * chosen.width, read_size(text, "length")
                rows.append(measure(spec, dtype, *size, chosen.device, chosen.turns))
                print(json.dumps(rows[-1]), flush=True)
    return rows


if __name__ == "__main__":
    main()
