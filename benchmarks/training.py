"""Training speed of a model of ours beside the same model in transformers, on one device.

    python benchmarks/training.py --out training.json            about a minute on a GPU
    python benchmarks/training.py --shapes tiny --seconds 5      anywhere

The same shape with rotary positions as `longspan`, as `llama` through the loss that `longspan train` uses, and as `llama` with
its own loss (`labels=`). All take turns in one process, a whole step each: forward, backward, clipping, fused AdamW; weights in
float32, products in bfloat16 on CUDA. The figure is the median of the turns, in tokens a second.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import steps
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from longspan.lm import LongspanConfig, LongspanForCausalLM
from longspan.training.loss import NextToken


@dataclass(frozen=True)
class Shape:
    layers: int
    hidden: int
    feed_forward: int
    heads: int
    kv_heads: int
    vocabulary: int
    length: int
    batch: int


SHAPES = {
    "tiny": Shape(2, 64, 172, 4, 2, 1000, 128, 4),
    "7m": Shape(8, 256, 688, 4, 2, 4096, 512, 64),  # recipes/small.yaml
    "135m": Shape(30, 576, 1536, 9, 3, 49152, 2048, 8),  # the built-in model
}


def settings(shape: Shape) -> dict[str, Any]:
    return {
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.feed_forward,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": 64 if shape.hidden >= 256 else 16,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": shape.length,
        "tie_word_embeddings": True,
    }


def step(model: PreTrainedModel, own_loss: bool, ids: torch.Tensor) -> Callable[[], None]:
    cuda = ids.device.type == "cuda"
    wrapped = NextToken(model, None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def run() -> None:
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=cuda):
            if own_loss:
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            else:
                loss = wrapped(input_ids=ids, labels=ids.roll(-1, 1))["loss"]
        steps.finish(model, optimizer, loss)

    return run


def measure(name: str, device: str, seconds: float) -> dict[str, Any]:
    shape = SHAPES[name]
    torch.manual_seed(0)
    ids = torch.randint(0, shape.vocabulary, (shape.batch, shape.length), device=device)
    llama = lambda: LlamaForCausalLM(LlamaConfig(**settings(shape)))  # noqa: E731
    ours = LongspanForCausalLM(LongspanConfig(position="rope", **settings(shape)))
    runs = {
        "longspan": step(ours.to(device).train(), False, ids),
        "transformers, same loss": step(llama().to(device).train(), False, ids),
        "transformers": step(llama().to(device).train(), True, ids),
    }
    times: dict[str, list[float]] = {what: [] for what in runs}
    for run in runs.values():
        for _ in range(3):
            run()
    begun = time.perf_counter()
    while time.perf_counter() - begun < seconds or len(times["longspan"]) < 5:
        for what, run in runs.items():
            start = time.perf_counter()
            run()
            times[what].append(time.perf_counter() - start)
    speed = {what: ids.numel() / statistics.median(found) for what, found in times.items()}
    turns = len(times["longspan"])
    over = {what: speed["longspan"] / speed[what] for what in speed if what != "longspan"}
    return {"shape": name, **asdict(shape), "turns": turns, "tokens_per_s": speed, "times_as_fast": over}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--shapes", default="7m,135m")
    parser.add_argument("--seconds", type=float, default=15.0, help="of turns for each shape")
    chosen = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "rows": [],
    }
    for name in chosen.shapes.split(","):
        row = measure(name, device, chosen.seconds)
        result["rows"].append(row)
        for what, speed in row["tokens_per_s"].items():
            ratio = row["times_as_fast"].get(what)
            print(
                f"{name:6s} {what:26s}{speed:14,.0f} tokens/s" + (f"   ours / it {ratio:.3f}" if ratio else ""),
                flush=True,
            )
        if chosen.out:
            chosen.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
