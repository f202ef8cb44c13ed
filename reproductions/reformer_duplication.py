"""Reformer's duplication task (Kitaev 2020, section 2.1, Table 2): how many hashes does it take to copy?

    python reproductions/reformer_duplication.py --out reproductions/reformer_duplication

A text is 0w0w, w random symbols from 1 to N; a language model of one layer is trained on it and asked for the second w. One
model is trained with full attention (one bucket, queries and keys shared) and one for each number of hashes, and every one is
read with full attention and with 1, 2, 4 and 8 hashes. The defaults are the paper's sizes: N = 127, length 1,024, width 256,
4 heads, 150,000 steps. The paper does not give the chunk, the batch, the learning rate and the kind of positions; here they
are 32 (the chunk that its Table 3 assumes), 32, 0.001 with warm-up and linear decay, and learned positions. 150,000 steps are
hours; `--steps 30000 --jobs 4` trains the four models at once in minutes on a GPU.
One JSON file for each trained model is written, at every tenth of its way; those that are whole are not trained again.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from longspan.lm import LongspanConfig, LongspanForCausalLM

READ_WITH = ("full", "8", "4", "2", "1")
HELD_OUT = 10**6
"""Above the seeds of training."""


def examples(options: argparse.Namespace, seed: int, device: str) -> Tensor:
    """(batch, length) texts 0w0w."""
    draw = torch.Generator(device).manual_seed(seed)
    shape = options.batch, options.length // 2 - 1
    word = torch.randint(1, options.symbols + 1, shape, generator=draw, device=device)
    half = torch.nn.functional.pad(word, (1, 0))
    return torch.cat((half, half), dim=1)


def build(options: argparse.Namespace, hashes: str, device: str) -> LongspanForCausalLM:
    attention = f"lsh:chunk={options.chunk},hashes={hashes},form={options.form},seed={options.seed}"
    if hashes == "full":
        attention = f"lsh:chunk={options.length},hashes=1,buckets=1"
    torch.manual_seed(options.seed)
    config = LongspanConfig(
        vocab_size=options.symbols + 1,
        hidden_size=options.width,
        intermediate_size=options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        max_position_embeddings=options.length,
        position="learned",
        attention=attention,
    )
    return LongspanForCausalLM(config).to(device)


def train(options: argparse.Namespace, hashes: str, device: str) -> Iterator[tuple[int, LongspanForCausalLM]]:
    """The steps done and the model, at every tenth of the way."""
    model = build(options, hashes, device).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=options.learning_rate)
    warm = max(1, options.steps // 50)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warm, (options.steps - s) / (options.steps - warm + 1))
    )
    for step in range(options.steps):
        ids = examples(options, options.seed * options.steps + step, device)
        labels = ids.clone()
        labels[:, : options.length // 2 + 1] = -100  # what cannot be known, and the 0 between
        loss = model(ids, labels=labels, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % max(1, options.steps // 10) == 0 or step + 1 == options.steps:
            print(f"  trained with {hashes}: step {step + 1:,}, loss {loss.item():.3f}", flush=True)
            yield step + 1, model


@torch.no_grad()
def accuracy(options: argparse.Namespace, trained: LongspanForCausalLM, hashes: str, device: str) -> float:
    """The share of the second word's symbols that are guessed right, over held-out texts."""
    model = build(options, hashes, device).eval()
    weights = {name: x for name, x in trained.state_dict().items() if "rotations" not in name}
    model.load_state_dict(weights, strict=False)
    right, half = [], options.length // 2
    for number in range(options.held_out):
        ids = examples(options, HELD_OUT * (options.seed + 1) + number, device)
        guesses = model(ids, use_cache=False).logits.argmax(-1)
        right.append((guesses[:, half:-1] == ids[:, half + 1 :]).double().mean())
    return torch.stack(right).mean().item()


def measure(options: argparse.Namespace, hashes: str, device: str) -> None:
    """Trains one model; what is known of it so far is in its file."""
    start = time.perf_counter()
    for done, model in train(options, hashes, device):
        found = {
            "trained_with": hashes,
            "steps_done": done,
            "seconds": time.perf_counter() - start,
            "accuracy": {read: accuracy(options, model, read, device) for read in READ_WITH},
            "texts": options.held_out * options.batch,
            "settings": settings_of(options),
            "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        place(options, hashes).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def place(options: argparse.Namespace, hashes: str) -> Path:
    return Path(options.out, f"trained-{hashes}.json")


def whole(options: argparse.Namespace, hashes: str) -> dict[str, Any] | None:
    """The result of a model that was trained to its end."""
    if not place(options, hashes).is_file():
        return None
    found: dict[str, Any] = json.loads(place(options, hashes).read_text(encoding="utf-8"))
    if found["settings"] != settings_of(options):
        raise SystemExit(f"{place(options, hashes)} is of a run with other settings; give another folder to --out")
    return found if found.get("steps_done", options.steps) == options.steps else None


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(options).items() if name not in ("out", "train", "jobs", "one")}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--train", default="full,4,2,1", help="full, or a number of hashes; several with commas")
    parser.add_argument("--jobs", type=int, default=1, help="models at once on the device")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--form", default="paper", choices=("paper", "trax", "aligned"))
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    sizes = {"length": 1024, "symbols": 127, "width": 256, "heads": 4, "layers": 1, "chunk": 32, "batch": 32}
    for name, default in {**sizes, "steps": 150_000, "held_out": 16, "seed": 0}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.one:
        measure(options, options.one, "cuda" if torch.cuda.is_available() else "cpu")
        return
    given = sys.argv[1:] if arguments is None else arguments
    asked = options.train.split(",")
    work = [hashes for hashes in asked if whole(options, hashes) is None]
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        for hashes, code in zip(work, pool.map(lambda one: carry_out(one, given), work), strict=True):
            if code:
                print(f"trained with {hashes}: failed, exit code {code}")
    print("accuracy by the attention read with: " + "  ".join(f"{r:>6}" for r in READ_WITH))
    for hashes in asked:
        if (result := whole(options, hashes)) is not None:
            found = result["accuracy"]
            print(f"{'trained with ' + hashes:>36} " + "  ".join(f"{100 * found[r]:5.1f}%" for r in READ_WITH))


def carry_out(hashes: str, given: list[str]) -> int:
    return subprocess.run([sys.executable, __file__, *given, "--one", hashes], check=False).returncode


if __name__ == "__main__":
    main()
