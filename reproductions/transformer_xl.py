"""Transformer-XL (Dai 2019): does the loss fall as the memory that a model is read with grows, past the one it was trained with?

    python reproductions/transformer_xl.py TEXT --train FOLDER --out reproductions/transformer_xl

Trains the recipe (recipes/small.yaml) twice, by the same seed, on texts of 2,048 tokens that are read in segments of 128: with a
memory of the 128 tokens before each segment, and without one. Positions are the paper's (`position=xl`). Both then read TEXT
(.txt or .txt.gz), which they have not seen, in the paper's manner of evaluation: every token sees just as many tokens, its own
the last of them (`same_length`), from 16 to 2,048. The loss is the mean of the same tokens each time: those past the longest
context.

Through its layers a token may know of `layers` times as many tokens; past that the loss cannot change, and the record says how
far it reaches. The paper evaluates with memories of up to 4 times that of training and finds the loss falling. What is judged:
the loss falls with every doubling to what a token of training saw at most, a memory of twice that is better still, and the model
that was trained without a memory is worse with every memory longer than its segments.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
import yaml
from tqdm import tqdm
from transformers import AutoModelForCausalLM, DynamicCache

import longspan as ls

RECIPE = Path(__file__).parents[1] / "recipes" / "small.yaml"
LENGTH = 2048
"""Tokens of a text in training."""


def read(path: Path) -> str:
    return gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text(encoding="utf-8")


def train(name: str, memory: int, options: argparse.Namespace) -> Any:
    recipe = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))["training"]
    texts = max(1, recipe["batch"] * 512 // LENGTH)  # as many tokens a step as the recipe has
    given = {
        "model.position": "xl",
        "model.memory": f"transformer-xl:segment={options.segment},length={memory}",
        "data.train": options.train,
        "data.length": LENGTH,
        "training.batch": texts,
        "training.micro_batch": texts,
        "training.loss_chunk": 16384,
        "out": str(options.models / name),
    }
    for item in options.set:
        key, _, value = item.partition("=")
        given[key] = yaml.safe_load(value)
    if options.steps is not None:
        given["training.steps"] = options.steps
    return ls.train(RECIPE, **given)


@torch.inference_mode()
def losses(model: Any, ids: torch.Tensor, first: int, chunk: int) -> float:
    """Mean loss (nats) of the tokens past the first `first` of ids (1, T), read in chunks on one cache."""
    cache, found = DynamicCache(config=model.config), []
    for start in range(0, ids.shape[1] - 1, chunk):
        part, following = ids[:, start : start + chunk], ids[0, start + 1 : start + chunk + 1]
        logits = model(input_ids=part, past_key_values=cache, use_cache=True).logits[0, : len(following)]
        found.append(F.cross_entropy(logits.float(), following, reduction="none"))
    return torch.cat(found)[first:].mean().item()


def measure(name: str, memory: int, options: argparse.Namespace) -> dict[str, Any]:
    done = train(name, memory, options)
    trained, tokenizer = ls.load(done.model, dtype="float32")  # a longer memory is worth thousandths of a nat
    ids = tokenizer(read(options.text), return_tensors="pt", verbose=False)["input_ids"][:, : options.tokens]
    longest = max(options.memories)
    if ids.shape[1] < 2 * longest:
        raise SystemExit(f"{options.text} has {ids.shape[1]:,} tokens; a memory of {longest:,} needs {2 * longest:,}")
    found, reach = {}, {}
    for length in tqdm(options.memories, desc=f"{name}: memories"):
        spec = f"transformer-xl:segment={options.segment},length={length},same_length=true"
        reader = AutoModelForCausalLM.from_pretrained(done.model, memory=spec, dtype=trained.dtype)
        reader = reader.to(trained.device).eval()
        found[str(length)] = losses(reader, ids.to(trained.device), longest, options.chunk)
        reach[str(length)] = (length - 1) * trained.config.num_hidden_layers + 1
    return {
        "model": name,
        "segment": options.segment,
        "memory": memory,
        "nll_by_memory": found,
        "tokens_in_reach": reach,
        "train_loss": done.loss,
        "train_s": done.seconds,
        "parameters": done.parameters,
        "steps": done.steps,
        "tokens": ids.shape[1],
        "text": options.text.name,
        "device": torch.cuda.get_device_name() if trained.device.type == "cuda" else "CPU",
        "dtype": str(trained.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def judge(found: dict[str, dict[str, Any]]) -> dict[str, bool]:
    """What was measured, of the claims."""
    said: dict[str, bool] = {}
    with_memory, without = found.get("recurrent"), found.get("segments")
    if with_memory is None:
        return said
    most = with_memory["segment"] + with_memory["memory"]
    by = {int(n): loss for n, loss in with_memory["nll_by_memory"].items()}
    within = [by[n] for n in sorted(by) if n <= most]
    said[f"the loss falls with every doubling of the memory up to {most}, all that training saw"] = all(
        later < earlier for earlier, later in itertools.pairwise(within)
    )
    if 2 * most in by and most in by:
        said[f"{2 * most} tokens of memory are better than {most}"] = by[2 * most] < by[most]
    if without is not None:
        other = {int(n): loss for n, loss in without["nll_by_memory"].items()}
        said["trained without a memory it is worse with every memory longer than its segments"] = all(
            other[n] > by[n] for n in by if n > with_memory["segment"]
        )
    return said


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("--train", default="prose", help="what data.train takes; `prose` if left out")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", type=Path, default=Path("runs/transformer_xl"), help="where the models go")
    parser.add_argument("--steps", type=int, help="of training; the recipe's if left out")
    parser.add_argument("--segment", type=int, default=128)
    parser.add_argument("--memories", type=lambda text: [int(n) for n in text.split(",")], help="16,32,…,2048")
    parser.add_argument("--tokens", type=int, default=16_384, help="of TEXT")
    parser.add_argument("--chunk", type=int, default=1024)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the recipe")
    options = parser.parse_args(arguments)
    options.memories = options.memories or [2**n for n in range(4, 12)]
    options.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[str, Any]] = {}
    print("loss by memory:  " + "  ".join(f"{n:>6}" for n in options.memories))
    for name, memory in (("recurrent", options.segment), ("segments", 0)):
        found[name] = measure(name, memory, options)
        print(f"{name:>15}  " + "  ".join(f"{loss:6.3f}" for loss in found[name]["nll_by_memory"].values()), flush=True)
        text = json.dumps({"models": found, "claims": judge(found)}, indent=1)
        (options.out / "transformer_xl.json").write_text(text + "\n", encoding="utf-8")
    for claim, holds in judge(found).items():
        print(f"{'holds' if holds else 'does not hold'}: {claim}")


if __name__ == "__main__":
    main()
