"""StreamingLLM over a hundred thousand tokens, one token at a time: is the loss level, the step, the memory?

    python reproductions/streaming_llm.py TEXT --tokens 100000 --out reproductions/streaming_llm
    python reproductions/streaming_llm.py TEXT --method streaming:sinks=0,window=2048 --out reproductions/streaming_llm

Reads TEXT (.txt or .txt.gz) with the built-in model and `streaming` on it, through the fixed-shape step, scoring each token
as it comes. Writes one record for every tenth of the way: mean NLL, median milliseconds a step, bytes of the cache and of the
process's peak on the device. The paper's figure for this is that the loss stays level to four million tokens.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import DynamicCache

import longspan as ls
from longspan.engine.decode import StreamDecoder

SEGMENTS = 10


def read(path: Path) -> str:
    return gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text()


@torch.inference_mode()
def stream(model: Any, ids: torch.Tensor, prompt: int) -> list[dict[str, float]]:
    cache = DynamicCache(config=model.config)
    model(input_ids=ids[:, :prompt], past_key_values=cache, use_cache=True, logits_to_keep=1)
    decoder = StreamDecoder(model, cache, compile=model.device.type == "cuda")
    losses = torch.zeros(ids.shape[1], device=ids.device)
    times: list[float] = []
    for i in range(prompt, ids.shape[1] - 1):
        start = time.perf_counter()
        logits = decoder.step(ids[:, i : i + 1])
        losses[i] = torch.nn.functional.cross_entropy(logits.float(), ids[:, i + 1])
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    records = []
    size = len(times) // SEGMENTS
    for s in range(SEGMENTS):
        begin, end = s * size, (s + 1) * size
        records.append(
            {
                "from_token": prompt + begin,
                "to_token": prompt + end,
                "nll": losses[prompt + begin : prompt + end].mean().item(),
                "ms_per_step": 1000 * statistics.median(times[begin:end]),
            }
        )
    held = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for layer in cache.layers
        for t in (layer.keys, layer.values, layer.sink_keys)
    }
    for record in records:
        record["cache_bytes"] = sum(held.values())
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--method", default="streaming:sinks=4,window=2044")
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    model, tokenizer = ls.load(options.model)
    ls.apply(model, options.method)
    ids = tokenizer(read(options.text), return_tensors="pt", verbose=False)["input_ids"][:, : options.tokens].to(
        model.device
    )
    records = stream(model, ids, prompt=4096)
    device = torch.cuda.get_device_name() if model.device.type == "cuda" else "CPU"
    result = {
        "method": options.method,
        "model": options.model,
        "text": options.text.name,
        "tokens": ids.shape[1],
        "device": device,
        "dtype": str(model.dtype),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peak_bytes": torch.cuda.max_memory_allocated() if model.device.type == "cuda" else None,
        "segments": records,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{options.method.replace(':', '-').replace(',', '-').replace('=', '')}.json").write_text(
        json.dumps(result, indent=1)
    )
    for r in records:
        place = f"{r['from_token']:>9,}–{r['to_token']:<9,}"
        print(f"{place} NLL {r['nll']:.3f}  {r['ms_per_step']:.3f} ms  {r['cache_bytes'] / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
