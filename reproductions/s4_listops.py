"""S4 on ListOps, without attention: does a state space learn nested operations?

    python reproductions/s4_listops.py --short --out reproductions/s4_listops
    python reproductions/s4_listops.py --short --shuffle --out reproductions/s4_listops
    python reproductions/s4_listops.py --seconds 500 --out reproductions/s4_listops-full
    python reproductions/s4_listops.py --small --out /tmp/listops

Trains an encoder whose layers are `--attention` on trees drawn as Long Range Arena draws them, and counts right answers on
2,000 others, beside the answer that is commonest in training. The defaults are those of the authors' repository for S4 on this
task (8 layers of 128 channels, batches of 50, 40 epochs of 96,000 texts), but for the norms, which are RMSNorm before each layer.
Their repository gives 59.5 % (models/s4/experiments.md, state-spaces/s4). `--shuffle` puts every text's words into random order:
what is right then needs no order, and so no mixing. `--short` is minutes on a GPU: the same model on trees of 50 to 300 words,
20,000 steps. `--small` is a minute on a CPU. What is judged: S4 is above the shuffled run by more than luck (Newcombe's
interval).

What was found so far is written at every tenth of the way. With `--seconds` a run stops after so many, with a checkpoint, and
the same command goes on from it.
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

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import get_cosine_schedule_with_warmup

from longspan.compare.statistics import newcombe, wilson
from longspan.lm import LongspanConfig, LongspanForSequenceClassification
from longspan.tasks.listops import WORDS, Trees, value, words
from longspan.training.trainer import group_by_settings, module_settings

SHORT = {
    "max_depth": 6,
    "max_args": 6,
    "min_length": 50,
    "max_length": 300,
    "texts": 60_000,
    "steps": 20_000,
}
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
    parser.add_argument(
        "--short", action="store_true", help="settings for minutes on a GPU; others that are given count"
    )
    parser.add_argument("--seconds", type=float, help="stops after so many, to go on another time")
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


class Training:
    """A training that can be left and taken up again."""

    def __init__(self, rows: Data, options: argparse.Namespace, device: torch.device):
        self.rows, self.options = rows, options
        self.model = build(options).to(device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay
        )
        group_by_settings(self.optimizer, module_settings(self.model))
        self.schedule = get_cosine_schedule_with_warmup(self.optimizer, options.warmup, options.steps)
        self.order = torch.Generator().manual_seed(options.seed)
        self.losses = torch.zeros(options.steps, device=device)  # not waited for at every step
        self.queue: list[int] = []
        self.step, self.seconds = 0, 0.0

    def run(self, until: int, deadline: float) -> bool:
        """Goes on to step `until`; False where the time was over before."""
        begin, self.model = time.perf_counter(), self.model.train()
        while self.step < until and time.perf_counter() < deadline:
            self._one()
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - begin
        return self.step == until

    def _one(self) -> None:
        if len(self.queue) < self.options.batch:
            self.queue = torch.randperm(len(self.rows), generator=self.order).tolist()
        chosen, self.queue = self.queue[: self.options.batch], self.queue[self.options.batch :]
        loss = self.model(**batch([self.rows[i] for i in chosen], self.model.device)).loss
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.losses[self.step] = loss.detach()
        self.step += 1

    def save(self, path: Path) -> None:
        state = {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "schedule")}
        state |= {name: getattr(self, name) for name in ("losses", "queue", "step", "seconds")}
        beside = path.with_suffix(".new")
        torch.save(state | {"order": self.order.get_state(), "settings": settings_of(self.options)}, beside)
        beside.replace(path)

    def load(self, path: Path) -> None:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["settings"] != settings_of(self.options):
            raise SystemExit(f"{path} is of a run with other settings; give another folder to --out, or delete it")
        for name in ("model", "optimizer", "schedule"):
            getattr(self, name).load_state_dict(state[name])
        self.losses = state["losses"].to(self.losses.device)
        self.queue, self.step, self.seconds = state["queue"], state["step"], state["seconds"]
        self.order.set_state(state["order"])


@torch.no_grad()
def told(model: LongspanForSequenceClassification, rows: Data, size: int = 100) -> list[int]:
    """1 for every text whose answer is right."""
    right: list[int] = []
    for start in range(0, len(rows), size):
        given = batch(rows[start : start + size], model.device)
        answers = given.pop("labels")
        right += (model(**given).logits.argmax(-1) == answers).int().tolist()
    return right


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    return {k: v for k, v in vars(options).items() if k not in ("out", "small", "short", "seconds")}


def place(options: argparse.Namespace) -> Path:
    name = options.attention.replace(":", "-").replace(",", "-").replace("=", "")
    return Path(options.out, name + ("-shuffled" if options.shuffle else "") + ".json")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Trains and tests; the result is also written to `--out`, at every tenth of the way."""
    rows, test = data(options)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    training, checkpoint = Training(rows, options, device), place(options).with_suffix(".pt")
    deadline = time.perf_counter() + (options.seconds or float("inf"))
    options.out.mkdir(parents=True, exist_ok=True)
    if checkpoint.is_file():
        training.load(checkpoint)
    result = described(training, test)
    while training.step < options.steps:
        tenth = 1 + 10 * training.step // options.steps
        if not training.run(-(-options.steps * tenth // 10), deadline):
            break
        result = described(training, test)
        place(options).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"step {training.step:,}: loss {result['losses'][-1]:.3f}, {result['accuracy']:.1%} right", flush=True)
    if options.seconds:
        training.save(checkpoint)
    return result


def described(training: Training, test: Data) -> dict[str, Any]:
    """What is known after so many steps."""
    right = told(training.model.eval(), test)
    commonest = Counter(answer for _, answer in training.rows).most_common(1)[0][0]
    tenths = max(1, training.options.steps // 10)
    return {
        **settings_of(training.options),
        "steps_done": training.step,
        "parameters": sum(p.numel() for p in training.model.parameters()),
        "accuracy": sum(right) / len(right),
        "interval": list(wilson(sum(right), len(right))),
        "accuracy_of_the_commonest_answer": sum(answer == commonest for _, answer in test) / len(test),
        "right": right,
        "losses": [part.mean().item() for part in training.losses[: training.step].split(tenths)],
        "seconds": training.seconds,
        "device": torch.cuda.get_device_name() if training.model.device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def compared(options: argparse.Namespace) -> None:
    """Says what both orders of words, where both are there, decide."""
    both = {shuffle: place(argparse.Namespace(**{**vars(options), "shuffle": shuffle})) for shuffle in (False, True)}
    if not all(path.is_file() for path in both.values()):
        return
    plain, shuffled = (json.loads(path.read_text(encoding="utf-8")) for path in both.values())
    if plain["steps_done"] == shuffled["steps_done"] and len(plain["right"]) == len(shuffled["right"]):
        low, high = newcombe(np.array(plain["right"], float), np.array(shuffled["right"], float))
        says = "holds" if low > 0 else "does not hold"
        print(f"{says}: order is used, {plain['accuracy'] - shuffled['accuracy']:+.1%} [{low:+.1%}, {high:+.1%}]")


def main(given: list[str] | None = None) -> dict[str, Any]:
    parser = arguments()
    asked = parser.parse_args(given)
    if asked.small or asked.short:
        parser.set_defaults(**(SMALL if asked.small else SHORT))
    options = parser.parse_args(given)
    result = run(options)
    chance = result["accuracy_of_the_commonest_answer"]
    low, high = result["interval"]
    print(
        f"{result['accuracy']:.1%} [{low:.1%}, {high:.1%}] right after {result['steps_done']:,} of {options.steps:,} steps and "
        f"{result['seconds']:.0f} s; the commonest answer alone: {chance:.1%}"
    )
    compared(options)
    return result


if __name__ == "__main__":
    main()
