"""Long-document classification: encoders under four attentions, told apart by accuracy and by cost.

    python reproductions/movie_reviews.py movie_reviews.zip --out reproductions/movie_reviews

Reads the film reviews of Pang and Lee (2004; 2,000 texts, half of them favourable) as bytes, up to 4,096 of each behind one
byte that stands for the text, and trains the same encoder from scratch under each attention to tell favour from disfavour.
Every text is tested once: in each of `--folds` parts by a model that was trained on the others. A test can be told from luck
only by its interval, so accuracies come with Wilson's, and differences to full attention with Newcombe's for the same texts.

Cost is of training (seconds, tokens a second, peak memory) and of reading one text. Longformer is told that the first byte
is global, as in its paper; BigBird has its first and last block (ITC).
"""

from __future__ import annotations

import argparse
import json
import random
import time
import zipfile
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import get_linear_schedule_with_warmup

from longspan.compare.stats import newcombe, wilson
from longspan.lm import LongspanConfig, LongspanForSequenceClassification
from longspan.training.trainer import own_settings, set_apart

TEXT, PAD = 256, 257
"""Numbers after those of the bytes: what stands before a text, and padding."""
ATTENTIONS = ["full", "local:block=256", "longformer:window=512", "bigbird:block=64"]
Data = list[tuple[list[int], int]]
"""Token numbers, and 1 for a favourable text."""


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="movie_reviews.zip, of NLTK's data")
    parser.add_argument("--attention", action="append", help=f"once for each; left out: {', '.join(ATTENTIONS)}")
    parser.add_argument("--position", default="rope")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--texts", type=int, default=2000, help="so many, drawn in equal parts from both kinds")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--dropout", type=float, default=0.1, help="of the residual stream")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    return parser


def read(options: argparse.Namespace) -> Data:
    """The texts in an order that the seed decides, cut to the length."""
    rows: Data = []
    with zipfile.ZipFile(options.data) as archive:
        for label, folder in enumerate(("neg", "pos")):
            names = sorted(n for n in archive.namelist() if f"/{folder}/" in n and n.endswith(".txt"))
            chosen = random.Random(options.seed).sample(names, min(len(names), options.texts // 2))
            rows += [([TEXT, *archive.read(name)][: options.length], label) for name in chosen]
    random.Random(options.seed).shuffle(rows)
    return rows


def build(options: argparse.Namespace, attention: str) -> LongspanForSequenceClassification:
    torch.manual_seed(options.seed)
    config = LongspanConfig(
        kind="encoder",
        position=options.position,
        attention=attention,
        vocab_size=PAD + 1,
        hidden_size=options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=max(1, options.width // 64),
        max_position_embeddings=options.length,
        hidden_dropout=options.dropout,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=PAD,
        num_labels=2,
    )
    return LongspanForSequenceClassification(config)


def batch(rows: Data, model: LongspanForSequenceClassification) -> dict[str, Tensor]:
    longest, device = max(len(ids) for ids, _ in rows), model.device
    ids = torch.tensor([ids + [PAD] * (longest - len(ids)) for ids, _ in rows], device=device)
    made = {"input_ids": ids, "attention_mask": (ids != PAD).long()}
    if any(a.takes_globals for a in model.config.attentions):
        made["global_attention_mask"] = (ids == TEXT).long()
    return made | {"labels": torch.tensor([label for _, label in rows], device=device)}


def precision(device: torch.device) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def train(model: LongspanForSequenceClassification, rows: Data, options: argparse.Namespace) -> dict[str, float]:
    """Seconds, tokens and the mean loss of the last epoch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=0.01)
    set_apart(optimizer, own_settings(model))
    steps = options.epochs * -(-len(rows) // options.batch)
    schedule = get_linear_schedule_with_warmup(optimizer, max(1, steps // 10), steps)
    order, tokens, begin, losses = random.Random(options.seed), 0, time.perf_counter(), []
    for epoch in range(options.epochs):
        losses = []
        # Texts of like length go together, in an order that changes: less padding.
        shuffled = sorted(rows, key=lambda row: len(row[0]) * order.uniform(0.8, 1.25))
        starts = list(range(0, len(rows), options.batch))
        order.shuffle(starts)
        for start in starts:
            given = batch(shuffled[start : start + options.batch], model)
            with precision(model.device):
                loss = model(**given).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
            tokens += given["input_ids"].numel()
        print(f"  epoch {epoch + 1} of {options.epochs}: loss {torch.stack(losses).mean().item():.3f}", flush=True)
    return {"seconds": time.perf_counter() - begin, "tokens": tokens, "loss": torch.stack(losses).mean().item()}


@torch.no_grad()
def test(model: LongspanForSequenceClassification, rows: Data) -> tuple[list[bool], float]:
    """Whether each text was told rightly, and the seconds that one takes by itself."""
    right, begin = [], time.perf_counter()
    for row in rows:
        given = batch([row], model)
        label = given.pop("labels")
        with precision(model.device):
            right.append(bool(model(**given).logits.argmax(-1) == label))
    return right, (time.perf_counter() - begin) / len(rows)


def judge(attention: str, rows: Data, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """All folds of one attention."""
    right: list[bool] = []
    spent: list[dict[str, float]] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for fold in range(options.folds):
        print(f"{attention}, part {fold + 1} of {options.folds}", flush=True)
        tested = rows[fold :: options.folds]
        others = [row for i, row in enumerate(rows) if i % options.folds != fold]
        model = build(options, attention).to(device)
        made = train(model.train(), others, options)
        found, seconds = test(model.eval(), tested)
        right += found
        spent.append(made | {"seconds_a_text": seconds})
    low, high = wilson(sum(right), len(right))
    return {
        "attention": attention,
        "accuracy": sum(right) / len(right),
        "interval": [low, high],
        "right": [int(r) for r in right],
        "seconds": sum(s["seconds"] for s in spent),
        "tokens_per_s": sum(s["tokens"] for s in spent) / sum(s["seconds"] for s in spent),
        "seconds_a_text": sum(s["seconds_a_text"] for s in spent) / len(spent),
        "train_loss": sum(s["loss"] for s in spent) / len(spent),
        "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        "parameters": model.num_parameters(),
    }


def show(results: list[dict[str, Any]]) -> None:
    table = Table("attention", "accuracy", "beside the first", "training", "tokens/s", "peak memory", "a text")
    first = np.array(results[0]["right"], float)
    for r in results:
        accuracy = f"{r['accuracy']:.1%} [{r['interval'][0]:.1%}, {r['interval'][1]:.1%}]"
        low, high = newcombe(np.array(r["right"], float), first)
        beside = f"{r['accuracy'] - results[0]['accuracy']:+.1%} [{low:+.1%}, {high:+.1%}]"
        memory = "–" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 1e9:.2f} GB"
        cells = [f"{r['seconds']:.0f} s", f"{r['tokens_per_s']:,.0f}", memory, f"{1e3 * r['seconds_a_text']:.1f} ms"]
        table.add_row(r["attention"], accuracy, "" if r is results[0] else beside, *cells)
    Console(width=140).print(table)


def main(given: list[str] | None = None) -> list[dict[str, Any]]:
    options = arguments().parse_args(given)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows, results = read(options), []
    options.out.mkdir(parents=True, exist_ok=True)
    settings = {k: v for k, v in vars(options).items() if k not in ("out", "data", "attention")}
    for attention in options.attention or ATTENTIONS:
        results.append(judge(attention, rows, options, device))
        record = {
            "settings": settings,
            "results": results,
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        (options.out / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    show(results)
    return results


if __name__ == "__main__":
    main()
