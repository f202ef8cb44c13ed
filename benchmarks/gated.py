"""Training speed of FLASH and of the gated attention unit beside Transformer++ of equal size, by length (Hua 2022, figure 1).

    python benchmarks/gated.py --out gated.json              some minutes on a GPU
    python benchmarks/gated.py --shape tiny -l 64 -l 128     anywhere

Transformer++ is the paper's name for a Transformer with rotary positions and a gated feed-forward network: here our own decoder
with full attention through SDPA, cuDNN first on Hopper. It has L layers, the others 2·L, which is as many weights. Each
takes whole steps (forward, backward, clipping, fused AdamW; weights in float32, products in bfloat16 on CUDA), with the same
number of tokens a step at every length. The figure is the median step's, in tokens a second; a row is written when it is there.
The paper gives up to 4.9 times on Wiki-40B and 12.1 times on PG-19, against attention that is not fused.
"""

from __future__ import annotations

import argparse
import gc
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

from longspan.engine.backends import dense_first
from longspan.lm import LongspanConfig, LongspanForCausalLM
from longspan.util.failures import is_out_of_memory


@dataclass(frozen=True)
class Shape:
    layers: int
    hidden: int
    vocabulary: int
    tokens: int
    """Of a step."""


SHAPES = {"tiny": Shape(1, 128, 100, 256), "110m": Shape(12, 768, 32768, 2**15)}
NAMES = ("full", "gau", "flash")


def build(name: str, shape: Shape, length: int) -> LongspanForCausalLM:
    gated = name != "full"
    torch.manual_seed(0)
    config = LongspanConfig(
        attention=name,
        position="rope",
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.hidden * 8 // 3,
        num_hidden_layers=shape.layers * (2 if gated else 1),
        num_attention_heads=shape.hidden // 64,
        head_dim=128 if gated else 64,  # of the unit's one head, which turns
        max_position_embeddings=length,
        tie_word_embeddings=True,
    )
    return LongspanForCausalLM(config)


def step(model: LongspanForCausalLM, ids: torch.Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    cuda = ids.device.type == "cuda"

    def run() -> None:
        with dense_first(ids.device), torch.autocast(ids.device.type, torch.bfloat16, enabled=cuda):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        steps.finish(model, optimizer, loss)

    return run


def measure(name: str, shape: Shape, length: int, device: str, seconds: float) -> dict[str, Any]:
    """One model at one length; `tokens_per_s` is None where it is out of memory."""
    found: dict[str, Any] = {"attention": name, "length": length, "batch": max(1, shape.tokens // length)}
    try:
        model = build(name, shape, length).to(device).train()
        found["parameters"] = model.num_parameters()
        run = step(model, torch.randint(0, shape.vocabulary, (found["batch"], length), device=device))
        for _ in range(3):
            run()
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        times: list[float] = []
        while sum(times) < seconds or len(times) < 5:
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        found["tokens_per_s"] = found["batch"] * length / statistics.median(times)
        found["peak_bytes"] = torch.cuda.max_memory_allocated() if device == "cuda" else None
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        found["tokens_per_s"] = None
    return found


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--shape", default="110m", choices=SHAPES)
    parser.add_argument("-l", "--length", type=int, action="append", help="once for each; left out, 512 to 8,192")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each model at each length")
    chosen = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "shape": asdict(SHAPES[chosen.shape]),
        "rows": [],
    }
    for length in chosen.length or (512, 1024, 2048, 4096, 8192):
        base = None
        for name in NAMES:
            row = measure(name, SHAPES[chosen.shape], length, device, chosen.seconds)
            gc.collect()
            speed = row["tokens_per_s"]
            base = speed if name == "full" else base
            row["times_as_fast"] = speed / base if speed and base else None
            result["rows"].append(row)
            said = f"{speed:14,.0f} tokens/s" if speed else "  out of memory"
            said += f"   {row['times_as_fast']:.2f} times Transformer++" if row["times_as_fast"] else ""
            print(f"{length:6d} {'Transformer++' if name == 'full' else name:14s}{said}", flush=True)
            if chosen.out:
                chosen.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result["rows"]


if __name__ == "__main__":
    main()
