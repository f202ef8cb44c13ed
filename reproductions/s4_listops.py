"""S4 on ListOps, without attention: does a state space learn nested operations?

    python reproductions/s4_listops.py --out reproductions/s4_listops
    python reproductions/s4_listops.py --small --out /tmp/listops

Trains an encoder whose layers are `--attention` on trees drawn as Long Range Arena draws them, and counts right answers on
2,000 others, beside the answer that is commonest in training. The defaults are those of the authors' repository for S4 on this
task (8 layers of 128 channels, batches of 50, 40 epochs of 96,000 texts), but for the norms, which are RMSNorm before each layer.
Their repository gives 59.5 % (models/s4/experiments.md, state-spaces/s4). `--shuffle` puts every text's words into random order:
what is right then needs no order, and so no mixing. `--small` is a minute on a CPU: short texts, a small model, few steps.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import get_cosine_schedule_with_warmup

from longspan.lm import LongspanConfig, LongspanForSequenceClassification
from longspan.tasks.listops import WORDS, Trees, value, words
from longspan.training.trainer import own_settings, set_apart

SMALL = {
    "max_depth": 3,
    "max_args": 4,
    "min_length": 3,
    "max_length": 30,
    "texts": 8000,
    "width": 64,
    "layers": 2,
    "states": 16,
    "steps": 400,
    "warmup": 40,
}
NUMBERS = {word: i + 1 for i, word in enumerate(WORDS)}
"""Token numbers of words; 0 is padding."""


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--attention", default="s4", help="a mixer, with its settings but states")
    parser.add_argument("--max-depth", type=int, default=10)
    parser.add_argument("--max-args", type=int, default=10)
    parser.add_argument("--min-length", type=int, default=500)
    parser.add_argument("--max-length", type=int, default=2000)
    parser.add_argument("--texts", type=int, default=96_000)
    parser.add_argument("--test-texts", type=int, default=2000)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--states", type=int, default=64)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--steps", type=int, default=76_800)
    parser.add_argument("--warmup", type=int, default=1000)
    parser.add_argument("--learning-rate", type=float, default=0.01)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shuffle", action="store_true", help="words of every text in random order")
    parser.add_argument(
        "--small", action="store_true", help="settings for a minute on a CPU; others that are given count"
    )
    parser.add_argument("--out", type=Path, required=True)
    return parser


Data = list[tuple[list[int], int]]
"""Token numbers and answers."""


def data(options: argparse.Namespace) -> tuple[Data, Data]:
    """Texts to train on and others to test on."""
    trees = Trees(options.max_depth, options.max_args, options.min_length, options.max_length).draw(options.seed)
    rng = random.Random(options.seed)
    drawn = []
    for tree in itertools.islice(trees, options.texts + options.test_texts):
        text = words(tree)
        if options.shuffle:
            rng.shuffle(text)
        drawn.append(([NUMBERS[word] for word in text], value(tree)))
    return drawn[options.test_texts :], drawn[: options.test_texts]


def batch(rows: Data, device: torch.device) -> dict[str, Tensor]:
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in rows], device=device)
    answers = torch.tensor([answer for _, answer in rows], device=device)
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": answers}


def build(options: argparse.Namespace) -> LongspanForSequenceClassification:
    torch.manual_seed(options.seed)
    mark = "," if ":" in options.attention else ":"
    config = LongspanConfig(
        kind="encoder",
        position="nope",
        attention=f"{options.attention}{mark}states={options.states}",
        vocab_size=len(WORDS) + 1,
        hidden_size=options.width,
        num_hidden_layers=options.layers,
        max_position_embeddings=options.max_length,
        pad_token_id=0,
        num_labels=10,
    )
    return LongspanForSequenceClassification(config)


def train(model: LongspanForSequenceClassification, rows: Data, options: argparse.Namespace) -> list[float]:
    """The mean loss of every tenth of the way."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay)
    set_apart(optimizer, own_settings(model))
    schedule = get_cosine_schedule_with_warmup(optimizer, options.warmup, options.steps)
    order = torch.Generator().manual_seed(options.seed)
    losses = torch.zeros(options.steps)
    queue: list[int] = []
    for step in range(options.steps):
        if len(queue) < options.batch:
            queue = torch.randperm(len(rows), generator=order).tolist()
        chosen, queue = queue[: options.batch], queue[options.batch :]
        loss = model(**batch([rows[i] for i in chosen], model.device)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses[step] = loss.detach()
        if step % max(1, options.steps // 20) == 0:
            print(f"step {step:,}: loss {loss.item():.3f}", flush=True)
    return [part.mean().item() for part in losses.chunk(10)]


@torch.no_grad()
def accuracy(model: LongspanForSequenceClassification, rows: Data, size: int = 100) -> float:
    right = 0
    for start in range(0, len(rows), size):
        given = batch(rows[start : start + size], model.device)
        answers = given.pop("labels")
        right += int((model(**given).logits.argmax(-1) == answers).sum())
    return right / len(rows)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Trains and tests; the result is also written to `--out`."""
    rows, test = data(options)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build(options).to(device).train()
    begin = time.perf_counter()
    losses = train(model, rows, options)
    seconds = time.perf_counter() - begin
    commonest = Counter(answer for _, answer in rows).most_common(1)[0][0]
    result = {
        **{k: v for k, v in vars(options).items() if k not in ("out", "small")},
        "parameters": sum(p.numel() for p in model.parameters()),
        "accuracy": accuracy(model.eval(), test),
        "accuracy_of_the_commonest_answer": sum(answer == commonest for _, answer in test) / len(test),
        "losses": losses,
        "seconds": seconds,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    name = options.attention.replace(":", "-").replace(",", "-").replace("=", "")
    name += "-shuffled" if options.shuffle else ""
    (options.out / f"{name}.json").write_text(json.dumps(result, indent=1))
    return result


def main(given: list[str] | None = None) -> dict[str, Any]:
    parser = arguments()
    if parser.parse_args(given).small:
        parser.set_defaults(**SMALL)
    result = run(parser.parse_args(given))
    chance = result["accuracy_of_the_commonest_answer"]
    print(f"{result['accuracy']:.1%} right after {result['seconds']:.0f} s; the commonest answer alone: {chance:.1%}")
    return result


if __name__ == "__main__":
    main()
