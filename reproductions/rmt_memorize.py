"""RMT remembers a fact over far more segments than it was trained on (Bulatov 2023, "Scaling Transformer to 1M tokens").

    python reproductions/rmt_memorize.py --out reproductions/rmt_memorize
    python reproductions/rmt_memorize.py --small --model FOLDER --out /tmp/rmt

Takes a small model of our own (`longspan-7m`, trained on texts of 512 tokens), gives it memory, and trains it on the task
`memorize`: a fact stands before everything else, a question at the end, and texts that say nothing of it between them. The
curriculum is the paper's, from one segment to more, each stage from the weights before; here with shorter texts among a stage's
own. A stage is gone through again until 99 % of held-out texts are answered, at most `--tries` times, and none is begun that, by
the one before, would end after `--budget` seconds. The model then reads texts of up to a million tokens, a segment at a time, in
rows of different facts and different noise.

An answer is right if greedy decoding says just the place. Beside it the same model is given each text's last segment alone, which
holds the question and not the fact: a guess is right one time in six. What is judged: two segments are solved; texts 64 times as
long as two segments, as the longest of training, and the longest texts are answered; the last segment alone is not enough; on a
GPU, memory is level. The paper says (abstract) that information is kept for up to two million tokens. `--small` only shows that
it runs.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

import longspan as ls
from longspan import meter
from longspan.compare.statistics import wilson
from longspan.memory.rmt import RMTConfig
from longspan.models import read_config
from longspan.tasks.base import Sample, parse_task
from longspan.tasks.facts import Memorize
from longspan.util import environment
from longspan.util.units import read_size

SOLVED, HELD = 0.99, 0.9
FARTHER = 64
"""How many times the longest length of training is read at least."""
AT_ONCE = 16
"""Segments that are read in one call: no more are ever held."""
SMALL = {"stages": "1,2", "segment": 64, "tokens": 4, "steps": 4, "batch": 4, "count": 8, "longest": "20k", "tries": 1}


@dataclass(frozen=True)
class Varied(Memorize):
    """`memorize` on texts of one segment up to as many as a sample has room for, every second one of those: a stage on one length
    alone forgets the shorter ones."""

    segment: int = 256

    name: ClassVar[str] = "memorize-varied"

    def samples(self, tokenizer: Any, length: int, count: int, seed: int) -> list[Sample]:
        rng, most = random.Random(f"{self.name}/{seed}"), length // self.segment
        drawn = [most if i % 2 == 0 else rng.randint(1, most) for i in range(count)]
        made = {
            n: iter(super(Varied, self).samples(tokenizer, n * self.segment, drawn.count(n), seed + n))
            for n in set(drawn)
        }
        return [next(made[n]) for n in drawn]


def train(stage: int, number: int, model: str, options: argparse.Namespace) -> Any:
    """Trains a stage of `stage` segments from `model` on."""
    steps = options.steps
    recipe: dict[str, Any] = {
        "out": str(options.models / f"{number:02}-segments-{stage}"),
        "model": model,
        "seed": options.seed + number,
        "data": {
            "train": f"{Varied.name}:segment={options.segment}",
            "packing": "none",
            "length": stage * options.segment,
            "samples": min(steps * options.batch, options.samples),
        },
        "training": {
            "steps": steps,
            "batch": options.batch,
            "learning_rate": options.learning_rate,
            "warmup": steps // 10,
            "schedule": "linear",
            "weight_decay": 0.001,
            "betas": [0.9, 0.999],
            "clip": 5.0,
            "loss_chunk": "32k",
            "log_every": max(1, steps // 4),
            "save_every": None,
        },
    }
    if read_config(model).model_type != RMTConfig.model_type:
        recipe["method"] = f"rmt:tokens={options.tokens},segment={options.segment}"
    return ls.train(recipe)


def texts(tokenizer: Any, length: int, count: int, seed: int) -> list[Sample]:
    return parse_task("memorize").samples(tokenizer, length, count, seed)


@torch.inference_mode()
def said(model: Any, ids: Tensor, answers: list[list[int]]) -> list[bool]:
    """Whether greedy decoding says each row's answer after ids (B, T): read piece by piece, from the CPU."""
    cache, last = DynamicCache(), None
    for part in ids.split(AT_ONCE * model.config.segment, dim=1):
        last = model(part.to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    assert last is not None
    width = max(map(len, answers))
    right = torch.tensor([[*a, *[0] * (width - len(a))] for a in answers], device=model.device)
    logits = torch.cat((last, model(right, past_key_values=cache, use_cache=True).logits[:, :-1]), dim=1)
    same = logits.argmax(-1) == right
    return [bool(row[: len(answer)].all()) for row, answer in zip(same, answers, strict=True)]


def measure(model: Any, tokenizer: Any, length: int, count: int, options: argparse.Namespace) -> dict[str, Any]:
    """The share of held-out texts that are answered, of whole texts and of their last segments; peak memory of a GPU, and
    time."""
    task, hits, alone = parse_task("memorize"), [], []
    meter.reset_peak(model.device)
    begun = time.perf_counter()
    for start in range(0, count, options.rows):
        rows = min(options.rows, count - start)
        samples = texts(tokenizer, length, rows, 10**6 + start)
        answers = [task.answer(tokenizer, sample) for sample in samples]
        ids = torch.from_numpy(
            np.array([np.array(sample.tokens) for sample in samples])
        )  # not from lists: that is slow
        hits += said(model, ids, answers)
        alone += said(model, ids[:, -(ids.shape[1] % model.config.segment or model.config.segment) :], answers)
    return {
        "length": length,
        "segments": length / model.config.segment,
        "right": share(hits),
        "last_segment_alone": share(alone),
        "count": count,
        "peak_bytes": meter.read_peak(model.device) if model.device.type == "cuda" else None,
        "seconds": time.perf_counter() - begun,
    }


def share(hits: list[bool]) -> dict[str, Any]:
    return {"value": sum(hits) / len(hits), "interval": wilson(sum(hits), len(hits))}


def curriculum(options: argparse.Namespace, keep: Callable[[list[dict[str, Any]]], None]) -> tuple[str, int]:
    """The last model and how many segments it was trained on. keep: given what all stages so far came to, after each."""
    begun, model, longest = time.perf_counter(), options.model, 0
    stages: list[dict[str, Any]] = []
    for stage in (int(part) for part in options.stages.split(",")):
        for _ in range(options.tries):
            at = time.perf_counter()
            if stages and at - begun + stages[-1]["seconds"] * stage / stages[-1]["segments"] > options.budget:
                print(f"no time for {stage} segments")
                return model, longest
            done = train(stage, len(stages), model, options)
            model, longest = done.model, max(longest, stage)
            loaded, tokenizer = ls.load(model, dtype="float32")
            right = measure(loaded, tokenizer, stage * options.segment, options.count, options)["right"]["value"]
            told = {"segments": stage, "steps": done.steps, "loss": done.loss, "right": right}
            stages.append(told | {"train_s": done.seconds, "seconds": time.perf_counter() - at})
            print(
                f"{stage} segments: {right:.3f} right, {{steps}} steps, loss {{loss:.3f}}, {{seconds:.0f}} s".format(
                    **stages[-1]
                )
            )
            keep(stages)
            if right >= SOLVED:
                break
    return model, longest


def lengths(longest: int, options: argparse.Namespace) -> list[int]:
    """2 segments and the longest of training, `FARTHER` times both, and from the longest on four times as long each up to the
    longest asked for."""
    made, last = {2, longest, FARTHER * 2, FARTHER * longest}, read_size(options.longest)
    last -= last % options.segment  # questions stand at the end of a segment, as in training
    while longest * options.segment < last:
        made.add(longest)
        longest *= 4
    return [*sorted(n * options.segment for n in made if n * options.segment < last), last]


def claims(found: list[dict[str, Any]], longest: int, segment: int) -> dict[str, bool]:
    """What holds. Memory is said something of where a GPU counted it: on a CPU the texts themselves are counted with it."""
    two = [f for f in found if f["length"] == 2 * segment]
    beyond = [f for f in found if f["length"] >= 2 * segment]
    peaks = [f["peak_bytes"] for f in found if f["length"] >= longest * segment and f["peak_bytes"]]
    told = {"two segments are solved": bool(two) and two[0]["right"]["value"] >= SOLVED}
    for base, what in ((2, "two segments"), (longest, "the longest of training")):
        far = [f["right"]["value"] for f in found if f["length"] == FARTHER * base * segment]
        told[f"at {FARTHER} times {what} at least {HELD:.0%} are right"] = bool(far) and far[0] >= HELD
    told[f"at the longest length at least {HELD:.0%} are right"] = found[-1]["right"]["value"] >= HELD
    told["the last segment alone is not enough"] = all(f["last_segment_alone"]["interval"][0] < 1 / 3 for f in beyond)
    if peaks:
        told["memory is level"] = max(peaks) <= 1.1 * min(peaks)
    return told


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", type=Path, default=Path("runs/rmt_memorize"), help="where the models go")
    parser.add_argument("--model", default="longspan-7m")
    parser.add_argument("--stages", default="1,2,3,4,6,8", help="segments of each stage")
    parser.add_argument("--tokens", type=int, default=10, help="of memory")
    parser.add_argument("--segment", type=int, default=256)
    parser.add_argument("--steps", type=int, default=150, help="of a stage")
    parser.add_argument("--tries", type=int, default=4, help="how often a stage is gone through at most")
    parser.add_argument("--budget", type=float, default=300.0, help="seconds within which all stages are to end")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--samples", type=int, default=6000, help="texts of a stage at most")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=256, help="held-out texts of a length; of very long ones --rows")
    parser.add_argument("--rows", type=int, default=64, help="texts that are read side by side")
    parser.add_argument("--longest", default="1m", help="tokens of the longest text")
    parser.add_argument("--small", action="store_true", help="a few small steps, to see that it runs")
    return parser


def main(given: list[str] | None = None) -> None:
    parser = arguments()
    if parser.parse_args(given).small:
        parser.set_defaults(**SMALL)
    options = parser.parse_args(given)
    settings = {
        key: value if isinstance(value, int | float | str) else str(value) for key, value in vars(options).items()
    }
    device = environment.machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    made = {"command": environment.command_line(), **environment.versions(), **device, "settings": settings}

    def keep(stages: list[dict[str, Any]]) -> None:
        made["stages"] = stages
        write(made, options.out)

    model_name, longest = curriculum(options, keep)
    model, tokenizer = ls.load(model_name, dtype="float32")
    found: list[dict[str, Any]] = []
    print(f"{'tokens':>10} {'segments':>9}  right                  last segment alone     peak GB        s")
    for length in lengths(longest, options):
        count = options.count if length <= FARTHER * 2 * options.segment else min(options.rows, options.count)
        one = measure(model, tokenizer, length, count, options)
        found.append(one)
        cells = [(one[key]["value"], *one[key]["interval"]) for key in ("right", "last_segment_alone")]
        shares = "   ".join("{:.3f} [{:.3f}, {:.3f}]".format(*cell) for cell in cells)
        peak = f"{one['peak_bytes'] / 1e9:7.3f}" if one["peak_bytes"] else "      –"
        print(f"{length:>10,} {one['segments']:>9,.0f}  {shares}  {peak}  {one['seconds']:7.1f}", flush=True)
        write({**made, "lengths": found}, options.out)
    told = claims(found, longest, options.segment)
    for claim, holds in told.items():
        print(f"{'holds' if holds else 'does not hold'}: {claim}")
    write({**made, "lengths": found, "claims": told}, options.out)


def write(told: dict[str, Any], folder: Path) -> None:
    """What there is so far: a run that is broken off leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rmt_memorize.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
