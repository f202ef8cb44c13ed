"""Models trained with somewhere to rest (Xiao 2024, section 3.3 and Table 3): which first tokens does a stream still need?

    python reproductions/sinks.py TEXT --train FOLDER --out reproductions/sinks

Trains the recipe (recipes/small.yaml) three times, by the same seed: as it is, with a zero sink (softmax-off-by-one) and with a
learned one, a token before every text. Each model then reads TEXT (.txt or .txt.gz), which it has not seen, under `streaming`
with as many tokens in the cache as it was trained on, of which the first 0, 1, 2 or 4 are kept. The learned token is one of them:
0 kept drops it as well, 1 keeps it alone. The loss is the mean past the first eviction, and so is that of the same tokens with
the window read anew for blocks of 64 (no cache, the paper's baseline).

The paper's figures (perplexity, 160M parameters, cache of 1,024): as it is 27.87, 18.49, 18.05, 18.05; zero sink 29214, 19.90,
18.27, 18.01; learned sink 1235, 18.01, 18.01, 18.02. What is judged: with the learned token alone the model is as good as the
plain one is with four first tokens, within 0.02 nats, and the plain one is worse with none than with four.
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
import yaml
from transformers import DynamicCache

import longspan as ls

RECIPE = Path(__file__).parents[1] / "recipes" / "small.yaml"
KEPT = (0, 1, 2, 4)
NEW = 64
"""Tokens that a window read anew is asked for."""


def read(path: Path) -> str:
    return gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text(encoding="utf-8")


@torch.inference_mode()
def streamed(model: Any, ids: torch.Tensor, cache_tokens: int, chunk: int) -> float:
    """Mean loss (nats) of the tokens past the first `cache_tokens`, read in chunks on one cache."""
    cache, losses = DynamicCache(), []
    for start in range(0, ids.shape[1] - 1, chunk):
        part, following = ids[:, start : start + chunk], ids[0, start + 1 : start + chunk + 1]
        logits = model(input_ids=part, past_key_values=cache, use_cache=True).logits[0, : len(following)]
        losses.append(F.cross_entropy(logits.float(), following, reduction="none"))
    return torch.cat(losses)[cache_tokens:].mean().item()


@torch.inference_mode()
def recomputed(model: Any, ids: torch.Tensor, window: int) -> float:
    """The same tokens, NEW at a time, each with the window before it read anew."""
    losses = []
    for start in range(window, ids.shape[1] - 1, NEW):
        end = min(start + NEW, ids.shape[1] - 1)
        logits = model(input_ids=ids[:, end - window : end], use_cache=False).logits[0, start - end :]
        losses.append(F.cross_entropy(logits.float(), ids[0, start + 1 : end + 1], reduction="none"))
    return torch.cat(losses).mean().item()


def measure(sink: str, options: argparse.Namespace) -> dict[str, Any]:
    given = {"model.sink": sink, "data.train": options.train, "out": str(options.models / f"sink-{sink}")}
    for item in options.set:
        name, _, value = item.partition("=")
        given[name] = yaml.safe_load(value)
    if options.steps is not None:
        given["training.steps"] = options.steps
    done = ls.train(RECIPE, **given)
    model, tokenizer = ls.load(done.model)
    size = model.config.max_position_embeddings
    ids = tokenizer(read(options.text), return_tensors="pt", verbose=False)["input_ids"][:, : options.tokens].to(
        model.device
    )
    if ids.shape[1] < 2 * size:
        raise SystemExit(
            f"{options.text} has {ids.shape[1]:,} tokens; a stream past a cache of {size} needs {2 * size:,}"
        )
    losses = {}
    for kept in KEPT:
        with ls.applied(model, f"streaming:sinks={kept},window={size - kept}"):
            losses[str(kept)] = streamed(model, ids, size, options.chunk)
    return {
        "sink": sink,
        "nll_by_kept_tokens": losses,
        "nll_recomputed": recomputed(model, ids, size),
        "train_loss": done.loss,
        "train_s": done.seconds,
        "parameters": done.parameters,
        "steps": done.steps,
        "cache_tokens": size,
        "stream_tokens": ids.shape[1],
        "text": options.text.name,
        "device": torch.cuda.get_device_name() if model.device.type == "cuda" else "CPU",
        "dtype": str(model.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def judge(found: dict[str, dict[str, Any]]) -> dict[str, bool]:
    """What the paper says of its models, of these; only for sinks that were trained."""
    said = {}
    if "none" in found:
        plain = found["none"]["nll_by_kept_tokens"]
        said["plain: none kept is worse than four by 0.02 nats"] = plain["0"] > plain["4"] + 0.02
    if {"none", "learned"} <= set(found):
        learned = found["learned"]["nll_by_kept_tokens"]
        said["learned: its token alone is as good as four of the plain model's"] = learned["1"] <= plain["4"] + 0.02
        said["learned: text tokens beside it bring nothing"] = abs(learned["1"] - learned["4"]) <= 0.02
        said["learned: without its token it is worse"] = learned["0"] > learned["1"] + 0.02
    return said


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("--train", default="prose", help="what data.train takes; `prose` if left out")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", type=Path, default=Path("runs/sinks"), help="where the models go")
    parser.add_argument("--sinks", default="none,zero,learned")
    parser.add_argument("--steps", type=int, help="of training; the recipe's if left out")
    parser.add_argument("--tokens", type=int, default=65_536, help="of the stream")
    parser.add_argument("--chunk", type=int, default=4096)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the recipe")
    options = parser.parse_args(arguments)
    found: dict[str, dict[str, Any]] = {}
    print("loss by first tokens kept:      " + "  ".join(f"{kept:>6}" for kept in KEPT) + "  recomputed")
    for sink in options.sinks.split(","):
        result = found[sink] = measure(sink, options)
        row = "  ".join(f"{result['nll_by_kept_tokens'][str(kept)]:6.3f}" for kept in KEPT)
        print(f"{'sink ' + sink:>31} {row}  {result['nll_recomputed']:10.3f}", flush=True)
        write(found, options.out)
    for claim, holds in judge(found).items():
        print(f"{'holds' if holds else 'does not hold'}: {claim}")


def write(found: dict[str, dict[str, Any]], folder: Path) -> None:
    """What there is so far: a run that is broken off leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"models": found, "claims": judge(found)}, indent=1)
    (folder / "sinks.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
