"""Long-document classification: encoders under four attentions, told apart by accuracy and by cost.

    python reproductions/movie_reviews.py movie_reviews.zip --out reproductions/movie_reviews --jobs 4

Reads the film reviews of Pang and Lee (2004; 2,000 texts, half of them favourable) as bytes, up to 4,096 of each behind one
byte that stands for the text, and trains the same encoder from scratch under each attention to tell favour from disfavour.
Every text is tested once: in each of `--folds` parts by a model that was trained on the others. A test can be told from luck
only by its interval, so accuracies come with Wilson's, and differences to full attention with Newcombe's for the same texts.

Each attention and part is a process of its own, `--jobs` at once, and a file of its own: the same command goes on where it was
stopped. All attentions have their first part before one has its second, and are compared on the parts that all have.

Cost is of training (seconds, tokens a second, peak memory) and of reading one text; several jobs share the device, so that only
memory is told. Longformer is told that the first byte is global, as in its paper; BigBird has its first and last block (ITC).
What is judged: each attention is above luck, and none of the sparse ones is below full attention by more than luck.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import random
import re
import subprocess
import sys
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

from longspan.compare.statistics import newcombe, wilson
from longspan.lm import LongspanConfig, LongspanForSequenceClassification
from longspan.training.trainer import group_by_settings, module_settings

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
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--dropout", type=float, default=0.1, help="of the residual stream")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="attentions and parts at once on the device")
    parser.add_argument("--fold", type=int, help=argparse.SUPPRESS)
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
    """Seconds, tokens (without padding) and the mean loss of the last epoch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=0.01)
    group_by_settings(optimizer, module_settings(model))
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
            tokens += sum(len(ids) for ids, _ in shuffled[start : start + options.batch])
        mean = torch.stack(losses).mean().item()
        print(f"  {model.config.attention}: epoch {epoch + 1} of {options.epochs}, loss {mean:.3f}", flush=True)
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


def measure(attention: str, fold: int, options: argparse.Namespace) -> dict[str, Any]:
    """One part of one attention."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = read(options)
    others = [row for i, row in enumerate(rows) if i % options.folds != fold]
    model = build(options, attention).to(device)
    made = train(model.train(), others, options)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    right, seconds = test(model.eval(), rows[fold :: options.folds])
    return {
        "attention": attention,
        "fold": fold,
        "right": [int(r) for r in right],
        **made,
        "seconds_a_text": seconds,
        "peak_bytes": peak,
        "parameters": model.num_parameters(),
        "jobs": options.jobs,
        "settings": settings_of(options),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    return {k: v for k, v in vars(options).items() if k not in ("out", "data", "attention", "jobs", "fold")}


def place(options: argparse.Namespace, attention: str, fold: int) -> Path:
    name = re.sub(r"[^a-z0-9]+", "-", attention.lower())
    return Path(options.out, f"{name}-{fold}.json")


def summed(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """What the parts of one attention say together."""
    right = [r for part in parts for r in part["right"]]
    seconds = sum(part["seconds"] for part in parts)
    return {
        "attention": parts[0]["attention"],
        "parts": len(parts),
        "accuracy": sum(right) / len(right),
        "interval": list(wilson(sum(right), len(right))),
        "right": right,
        "seconds": seconds,
        "tokens_per_s": sum(part["tokens"] for part in parts) / seconds,
        "seconds_a_text": sum(part["seconds_a_text"] for part in parts) / len(parts),
        "train_loss": sum(part["loss"] for part in parts) / len(parts),
        "peak_bytes": parts[0]["peak_bytes"],
        "shared": any(part["jobs"] > 1 for part in parts),
    }


def beside(one: dict[str, Any], first: dict[str, Any]) -> tuple[float, float]:
    return newcombe(np.array(one["right"], float), np.array(first["right"], float))


def show(results: list[dict[str, Any]]) -> None:
    table = Table("attention", "parts", "accuracy", "beside the first", "training", "tokens/s", "peak memory", "a text")
    for r in results:
        accuracy = f"{r['accuracy']:.1%} [{r['interval'][0]:.1%}, {r['interval'][1]:.1%}]"
        low, high = beside(r, results[0])
        difference = f"{r['accuracy'] - results[0]['accuracy']:+.1%} [{low:+.1%}, {high:+.1%}]"
        memory = "–" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 1e9:.2f} GB"
        cost = [f"{r['seconds']:.0f} s", f"{r['tokens_per_s']:,.0f}", memory, f"{1e3 * r['seconds_a_text']:.1f} ms"]
        if r["shared"]:
            cost = ["–", "–", memory, "–"]
        table.add_row(r["attention"], str(r["parts"]), accuracy, "" if r is results[0] else difference, *cost)
    Console(width=150).print(table)


def judge(results: list[dict[str, Any]]) -> dict[str, bool]:
    said = {f"{r['attention']}: above luck": r["interval"][0] > 0.5 for r in results}
    return said | {
        f"{r['attention']}: not below {results[0]['attention']} by more than luck": beside(r, results[0])[1] >= 0
        for r in results[1:]
    }


def collect(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every attention over the parts that all of them have."""
    folds = [n for n in range(options.folds) if all(place(options, a, n).is_file() for a in options.attention)]
    found = [[json.loads(place(options, a, n).read_text()) for n in folds] for a in options.attention]
    for part in (part for parts in found for part in parts):
        if part["settings"] != settings_of(options):
            raise SystemExit(f"{options.out} has results of other settings; give another folder to --out")
    return [summed(parts) for parts in found] if folds else []


def main(given: list[str] | None = None) -> list[dict[str, Any]]:
    options = arguments().parse_args(given)
    given = sys.argv[1:] if given is None else given
    options.attention = options.attention or ATTENTIONS
    options.out.mkdir(parents=True, exist_ok=True)
    if options.fold is not None:
        attention = options.attention[-1]
        made = measure(attention, options.fold, options)
        place(options, attention, options.fold).write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
        return []
    work = [(a, n) for n in range(options.folds) for a in options.attention if not place(options, a, n).is_file()]
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        codes = pool.map(lambda one: carry_out(*one, given), work)
        for (attention, fold), code in zip(work, codes, strict=True):
            print(f"{attention}, part {fold + 1}: {f'failed, exit code {code}' if code else 'done'}", flush=True)
    results = collect(options)
    if results:
        (options.out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        show(results)
        for claim, holds in judge(results).items():
            print(f"{'holds' if holds else 'does not hold'}: {claim}")
    return results


def carry_out(attention: str, fold: int, given: list[str]) -> int:
    command = [sys.executable, __file__, *given, "--attention", attention, "--fold", str(fold)]
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    main()
