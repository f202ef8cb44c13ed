"""A run folder as `longspan compare` leaves one, made up in a moment: figures of the shape that a 135M model gives.

`python tests/compare/sample_run.py FOLDER` writes one to look at, with its report.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from longspan.compare import statistics as stats
from longspan.compare.report.pages import html
from longspan.compare.storing import Store

WINDOW = 8192
BUCKETS = 64
CARD = {"parameters": 134_515_008, "weights_bytes": 538_060_032, "cache_bytes_per_token": 46_080}
PPL = {
    "spec": "ppl",
    "name": "ppl",
    "title": "Loss by position",
    "version": 1,
    "measures": "mean negative log-likelihood of real text",
    "source": "CPython's documentation topics; stand-in for PG-19",
    "metric": "NLL (nats a token)",
    "higher_is_better": False,
    "worst": math.log(49_152),
    "samples": 4,
}
PASSKEY = {
    "spec": "passkey",
    "name": "passkey",
    "title": "Passkey retrieval",
    "version": 1,
    "measures": "share of hidden numbers that are found",
    "source": "generated; wording of Mohtashami & Jaggi 2023",
    "metric": "share found",
    "higher_is_better": True,
    "worst": 0.0,
    "samples": 8,
}
STREAM = {
    "spec": "stream-eval",
    "name": "stream-eval",
    "title": "StreamEval, rebuilt",
    "version": 1,
    "measures": "whether lines a fixed distance back are known",
    "source": "generated",
    "metric": "share right",
    "higher_is_better": True,
    "worst": 0.0,
    "samples": 4,
}
METHODS = (
    "none",
    "pi:factor=4",
    "ntk:factor=4",
    "ntk:factor=8",
    "yarn:factor=4",
    "self_extend:group=8,neighbours=1024",
    "streaming:sinks=4,window=1020",
)
LENGTHS = (8192, 16384, 32768)


def _plain(x: float) -> float:
    """Loss at position x (in windows) of the bare model: level inside its window, then a collapse."""
    return 3.13 if x <= 1 else 8.4 - 5.27 * math.exp(-1.1 * (x - 1) ** 1.4)


LOSS: dict[str, Callable[[float], float]] = {
    "none": _plain,
    "pi:factor=4": lambda x: 5.06,
    "ntk:factor=4": lambda x: 3.2 + (0.25 * max(0.0, x - 3)),
    "ntk:factor=8": lambda x: 3.38,
    "yarn:factor=4": lambda x: 3.24,
    "self_extend:group=8,neighbours=1024": lambda x: 3.22,
    "streaming:sinks=4,window=1020": lambda x: 3.31,
}
FOUND: dict[str, tuple[float, float, float]] = {
    "none": (0.75, 0.0, 0.0),
    "pi:factor=4": (0.0, 0.0, 0.0),
    "ntk:factor=4": (1.0, 1.0, 0.13),
    "ntk:factor=8": (1.0, 1.0, 0.88),
    "yarn:factor=4": (0.88, 0.88, 0.5),
    "self_extend:group=8,neighbours=1024": (0.88, 0.75, 0.75),
    "streaming:sinks=4,window=1020": (0.13, 0.0, 0.0),
}


def sample_run(
    methods: Sequence[str] = METHODS,
    lengths: Sequence[int] = LENGTHS,
    tasks: Sequence[dict[str, Any]] = (PPL, PASSKEY),
    *,
    samples: int | None = None,
    out_of_memory: Sequence[tuple[str, str, int]] = (("self_extend:group=8,neighbours=1024", "ppl", 32768),),
    failed: Sequence[tuple[str, str, int]] = (),
    missing: Sequence[tuple[str, str, int]] = (),
    model: str = "smollm2-135m",
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(manifest, cells). A cell is named by (method, task, length)."""
    cells = []
    for method in methods:
        for task in tasks:
            for length in lengths:
                name = (method, task["spec"], length)
                if name in missing:
                    continue
                record = _describe(*name, model)
                if name in out_of_memory:
                    record |= _ended("out_of_memory", "OutOfMemoryError: 12.4 GB were wanted, 9.1 GB are free")
                elif name in failed:
                    record |= _ended("failed", "RuntimeError: shape <script>alert(1)</script>")
                else:
                    record |= _result(method, task, length, samples or task["samples"])
                cells.append(record)
    return _manifest(methods, lengths, tasks, model, samples), cells


def write_run(folder: Path, manifest: dict[str, Any], cells: list[dict[str, Any]]) -> Path:
    """The run as files, through the code that writes real ones."""

    with Store(folder) as store:
        store.write_manifest(manifest)
        for cell in cells:
            store.append(cell)
    return folder


def _describe(method: str, task: str, length: int, model: str) -> dict[str, Any]:
    return {
        "key": f"{method}|{task}|{length}",
        "model": model,
        "fingerprint": "b179c9523d0e6a0f" * 4,
        "method": method,
        "asked": method.partition(":")[0],
        "task": task.partition(":")[0],
        "task_spec": task,
        "task_version": 1,
        "length": length,
        "seed": 0,
    }


def _ended(status: str, error: str) -> dict[str, Any]:
    empty = {"score": None, "interval": None, "n": 0, "samples": [], "cost": {}, "first_prompt": None}
    return {"status": status, "error": error, **empty, "versions": {}, "finished": "2026-01-01T00:00:00+00:00"}


def _result(method: str, task: dict[str, Any], length: int, count: int) -> dict[str, Any]:
    draw = np.random.default_rng(length)  # the same texts for every method
    makes = {"ppl": _loss_sample, "stream-eval": _stream_sample}.get(task["name"], _passkey_sample)
    records = [makes(method, length, i, count, draw) for i in range(count)]
    estimate = stats.score(records, stats.Scale(task["higher_is_better"], task["worst"]))
    return {
        "status": "ok",
        "error": None,
        "score": estimate.value,
        "interval": list(estimate.interval or ()),
        "n": estimate.n,
        "samples": records,
        "cost": _cost(method, task, length),
        "versions": {"longspan": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "python": "3.11.2"},
        "first_prompt": {
            "head": "<|im_start|>There is an important info hidden inside a lot of irrelevant text.",
            "tail": "Here we go. There and back again.\nWhat is the pass key? The pass key is",
            "tokens": length,
        },
        "finished": "2026-01-01T00:00:00+00:00",
    }


def _loss_sample(method: str, length: int, number: int, count: int, draw: np.random.Generator) -> dict[str, Any]:
    text = draw.normal(0, 0.12, BUCKETS)
    loss = LOSS.get(method, lambda x: 3.5)
    own = np.random.default_rng(len(method) * 1000 + number).normal(0, 0.03, BUCKETS)
    means = [loss((i + 0.5) / BUCKETS * length / WINDOW) + text[i] + own[i] for i in range(BUCKETS)]
    counts = [length // BUCKETS] * BUCKETS
    mean = float(np.mean(means))
    detail = {
        "protocol": "window",
        "text": "prose",
        "begins_with": "<|im_start|>",
        "ppl": math.exp(mean),
        "bits_per_byte": mean / 2.9,
        "nll_by_position": [round(m, 4) for m in means],
        "tokens_by_position": counts,
    }
    return {"id": f"window-{number}", "score": mean, "failed": False, "detail": detail}


def _passkey_sample(method: str, length: int, number: int, count: int, draw: np.random.Generator) -> dict[str, Any]:
    shares = FOUND.get(method, (0.5, 0.5, 0.5))
    share = shares[LENGTHS.index(length)] if length in LENGTHS else shares[-1]
    order = np.random.default_rng(len(method)).permutation(count)
    if method.startswith("streaming"):
        order = np.arange(count)[::-1]  # only what was read last is still there
    found = bool(order[number] < round(share * count))
    key = int(draw.integers(10_000, 99_999))
    detail = {
        "depth": number / max(1, count - 1),
        "found": found,
        "answer": f"{key}." if found else "<b>The grass is green</b>",
        "key": str(key),
        "needle_token": 30 + round((length - 80) * number / max(1, count - 1)),
        "prompt_tokens": length - 12,
        "protocol": "landmark",
        "template": "none",
    }
    return {"id": f"key-{number}", "score": float(found), "failed": False, "detail": detail}


def _stream_sample(method: str, length: int, number: int, count: int, draw: np.random.Generator) -> dict[str, Any]:
    """Streaming answers everywhere; anything else up to the window. Nothing can be asked in the first part."""
    knows = [method.startswith("streaming") or (i + 0.5) / 32 * length < WINDOW for i in range(32)]
    asked = [0] + [length // 1024] * 31
    shares = [None if n == 0 else float(known) for n, known in zip(asked, knows, strict=True)]
    right = sum(n for n, known in zip(asked, knows, strict=True) if known) / sum(asked)
    detail = {
        "questions": sum(asked),
        "stream_tokens": length - 7,
        "right_by_position": shares,
        "asked_by_position": asked,
    }
    return {"id": f"stream-{number}", "score": right, "failed": False, "detail": detail | {"nll": 0.5}}


def _cost(method: str, task: dict[str, Any], length: int) -> dict[str, Any]:
    x = length / WINDOW
    streams = method.startswith("streaming")
    slower = 1.9 if method.startswith("self_extend") else 1.02 + 0.004 * len(method)
    prefill = (2.1 * x if streams else 1.9 * x + 0.62 * x * x) * slower
    cache = CARD["cache_bytes_per_token"] * (1024 if streams else length)
    peak = 1.1e9 + 2 * cache + (0.4e9 if task["name"] == "ppl" else 0)
    writes = task["name"] != "ppl"
    return {
        "prefill_s": round(prefill, 3),
        "prefill_s_quartiles": None,
        "prefill_tokens": length,
        "decode_s_per_token": round(0.018 + (0 if streams else 0.004 * x), 4) if writes else None,
        "peak_prefill_bytes": int(peak),
        "peak_decode_bytes": int(0.9 * peak) if writes else None,
        "weights_bytes": CARD["weights_bytes"],
        "cache_bytes": cache,
        "load_s": 1.4,
        "wall_s": round(prefill * 8 + 3, 2),
    }


def _manifest(
    methods: Sequence[str], lengths: Sequence[int], tasks: Sequence[dict[str, Any]], model: str, samples: int | None
) -> dict[str, Any]:
    specs = " ".join(f"-m '{m}'" for m in methods)
    return {
        "model": model,
        "fingerprint": "b179c9523d0e6a0f" * 4,
        "facts": {
            "model_type": "llama",
            "architecture": "LlamaForCausalLM",
            "window": WINDOW,
            "layers": 30,
            "vocab": 49_152,
            "parameters": CARD["parameters"],
        },
        "card": CARD,
        "methods": [
            {"spec": m, "asked": m.partition(":")[0], "title": m, "reach": None, "exportable": True} for m in methods
        ],
        "left_out": {"landmark": "works on a model trained for it, not on a pretrained one"},
        "tasks": {t["spec"]: t | {"samples": samples or t["samples"]} for t in tasks},
        "lengths": list(lengths),
        "why": "as asked for, with the native length",
        "native_length": WINDOW,
        "seed": 0,
        "environment": {
            "device": "cpu",
            "device_name": "Some Processor 9000 @ 2.40GHz",
            "device_memory": 64_000_000_000,
            "cores": 2,
            "threads": 2,
            "host_memory": 64_000_000_000,
            "platform": "Linux-6.1-x86_64",
            "longspan": "0.1.0",
            "torch": "2.13.0",
            "transformers": "5.23.0",
            "python": "3.11.2",
            "dtype": "float32",
            "command": f"longspan compare {model} {specs} -t ppl -t passkey -l 16k -l 32k --out runs/first",
        },
        "cells": [_describe(m, t["spec"], n, model) for m in methods for t in tasks for n in lengths],
        "written": "2026-01-01T00:00:00+00:00",
    }


if __name__ == "__main__":
    target = Path(sys.argv[1])
    made = json.loads(json.dumps(sample_run()))
    write_run(target, *made)
    html(*made, target / "report.html")
    print(target / "report.html")
