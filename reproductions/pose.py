"""PoSE (Zhu 2023, arXiv 2309.10400): a model reads 4 and 8 times its window after training within it. What of that is PoSE's?

    python reproductions/pose.py --train FOLDER --text NOVEL.txt.gz --out reproductions/pose

Every variant is the same model, texts, number of tokens and learning rate (LoRA's is five times as high), under YaRN, NTK or PI.
Controls, which the paper lacks: YaRN alone; trained without skips (the same samples at ordinary positions); trained at the full
length. A quarter of the samples are passkeys, with keys that the test does not ask for. Each variant is then asked for 20
passkeys (Landmark's protocol) at every length, and reads NOVEL, which it was not trained on, at its target.

Variants run `--jobs` at once, each in a process of its own, and what is finished is kept: the same command goes on where it was
stopped. Seconds are of the training alone; they grow with --jobs, memory does not. What is judged: PoSE under YaRN finds 90 % at
its target, the control without skips does not, and PoSE takes at most a quarter of the memory of training at full length
(at 4 times the window, samples of half a window and LoRA too).
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

import longspan as ls
from longspan.meter import Meter
from longspan.models import inspect_model
from longspan.tasks.base import parse_task

TIMES = (1, 2, 4, 8)
"""Lengths that are tested, in windows of the model."""
SEED = 1
"""Of the test; training draws its passkeys with 0."""


@dataclass(frozen=True)
class Variant:
    """`method` stretches the window `times`. `kind` is pose, no-skips, full, untrained, or memory: full length for a few steps,
    to see what it takes. Samples are a window long, or one of `parts` of it, and as many more."""

    name: str
    method: str
    times: int
    kind: str = "pose"
    lora: bool = False
    parts: int = 1


VARIANTS = (
    Variant("yarn-x4", "yarn", 4),
    Variant("yarn-x4-no-skips", "yarn", 4, "no-skips"),
    Variant("yarn-x4-untrained", "yarn", 4, "untrained"),
    Variant("yarn-x4-full", "yarn", 4, "full"),
    Variant("yarn-x8", "yarn", 8),
    Variant("yarn-x8-full", "yarn", 8, "memory"),
    Variant("yarn-x4-halves", "yarn", 4, parts=2),
    Variant("yarn-x4-lora", "yarn", 4, lora=True),
    Variant("ntk-x4", "ntk", 4),
    Variant("pi-x4", "pi", 4),
    Variant("yarn-x8-no-skips", "yarn", 8, "no-skips"),
    Variant("yarn-x8-untrained", "yarn", 8, "untrained"),
    Variant("ntk-x8", "ntk", 8),
    Variant("pi-x8", "pi", 8),
)


def recipe(variant: Variant, options: argparse.Namespace) -> dict[str, Any]:
    """The same number of tokens for every variant; at full length they come in fewer samples."""
    ordinary, target = variant.kind in ("full", "memory"), variant.times * options.window
    steps = 3 if variant.kind == "memory" else options.steps
    made: dict[str, Any] = {
        "out": str(options.models / variant.name),
        "model": options.model,
        "method": f"{variant.method}:factor={variant.times}",
        "data": {
            "train": options.train,
            "length": target if ordinary else options.window // variant.parts,
            "task": "passkey",
            "samples": options.keys,
        },
        "training": {
            "steps": steps,
            "batch": max(1, options.batch // variant.times) if ordinary else options.batch * variant.parts,
            "micro_batch": 1,
            "learning_rate": options.learning_rate * (5 if variant.lora else 1),
            "schedule": "linear",
            "warmup": min(10, steps // 2),
            "weight_decay": 0.0,
            "betas": [0.9, 0.999],
            "loss_chunk": 512,
            "log_every": 10,
            "save_every": "none",
        },
    }
    if not ordinary:
        made["positions"] = {"kind": "pose", "target": target, "skips": variant.kind == "pose"}
    if variant.lora:
        made["lora"] = {"rank": 16}
    return made


def measure(variant: Variant, options: argparse.Namespace) -> dict[str, Any]:
    target = variant.times * options.window
    found: dict[str, Any] = {"variant": variant.name, "kind": variant.kind, "target": target}
    if variant.kind == "untrained":
        model, tokenizer = ls.load(options.model)
        ls.apply(model, f"{variant.method}:factor={variant.times}")
    else:
        done = ls.train(recipe(variant, options))
        found |= {"train_loss": done.loss, "train_s": done.seconds, "train_peak_bytes": done.peak_bytes}
        found |= {
            "train_tokens": done.tokens,
            "train_tokens_per_s": done.tokens_per_s,
            "recipe": recipe(variant, options),
        }
        model, tokenizer = ls.load(done.model)
    if variant.kind != "memory":
        lengths = [options.window * times for times in TIMES if times <= variant.times]
        passkeys = {n: run("passkey", model, tokenizer, n, options.passkeys) for n in lengths}
        found["passkey"] = {str(n): statistics.fmean(o.score for o in outcomes) for n, outcomes in passkeys.items()}
        texts = run(f"ppl:text={options.text}", model, tokenizer, target, options.texts)
        found["nll"] = statistics.fmean(o.score for o in texts)
        columns = zip(*(o.detail["nll_by_position"] for o in texts), strict=True)
        found["nll_by_position"] = [None if None in c else statistics.fmean(c) for c in columns]
    device = torch.cuda.get_device_name() if model.device.type == "cuda" else "CPU"
    return found | {"device": device, "torch": torch.__version__, "transformers": transformers.__version__}


def run(spec: str, model: Any, tokenizer: Any, length: int, count: int) -> list[Any]:
    task = parse_task(spec)
    with torch.inference_mode():
        return [
            task.run(model, tokenizer, s, Meter(model.device)) for s in task.samples(tokenizer, length, count, SEED)
        ]


def judge(found: dict[str, dict[str, Any]]) -> dict[str, bool]:
    """The claims that what was measured can decide."""
    said = {}
    for times in ("x4", "x8"):
        control, full = (found.get(f"yarn-{times}{more}") for more in ("-no-skips", "-full"))
        for more in ("", "-halves", "-lora"):
            if one := found.get(f"yarn-{times}{more}"):
                said[f"yarn-{times}{more}: PoSE finds 90 % of passkeys at its target"] = at_target(one) >= 0.9
        if control:
            said[f"yarn-{times}: without skips it does not"] = at_target(control) < 0.9
        for more in ("", "-halves", "-lora"):
            one = found.get(f"yarn-{times}{more}")
            if one and full and one["train_peak_bytes"] and full["train_peak_bytes"]:
                ratio = one["train_peak_bytes"] / full["train_peak_bytes"]
                claim = f"yarn-{times}{more}: at most 1/4 of the memory of training at full length ({ratio:.2f})"
                said[claim] = ratio <= 0.25
    return said


def at_target(one: dict[str, Any]) -> float:
    return float(one["passkey"][str(one["target"])])


def line(one: dict[str, Any]) -> str:
    keys = "".join(f"{share:6.2f}" for share in one.get("passkey", {}).values())
    places = [x for x in one.get("nll_by_position", []) if x is not None]
    losses = f"{one['nll']:8.3f}{places[0]:8.3f}{places[-1]:8.3f}" if places else " " * 24
    cost = f"{one['train_s']:9.1f}" if "train_s" in one else f"{'–':>9}"
    peak = f"{one['train_peak_bytes'] / 1e9:9.2f}" if one.get("train_peak_bytes") else f"{'–':>9}"
    return f"{one['variant']:20s}{cost}{peak}{losses}   {keys}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", required=True, help="what data.train takes")
    parser.add_argument("--text", required=True, help="a text that is read at the target")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", type=Path, default=Path("runs/pose"), help="where the models go")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--variants", default=",".join(v.name for v in VARIANTS))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4, help="samples of the model's window a step")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--keys", type=int, default=400, help="passkeys to train on")
    parser.add_argument("--passkeys", type=int, default=20, help="at each length")
    parser.add_argument("--texts", type=int, default=4)
    parser.add_argument("--jobs", type=int, default=1, help="variants at once on the device")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    known = {v.name: v for v in VARIANTS}
    names = options.variants.split(",")
    if unknown := set(names) - known.keys():
        raise SystemExit(f"no variant {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    options.window = inspect_model(options.model).window
    options.out.mkdir(parents=True, exist_ok=True)
    if options.one:
        found = measure(known[options.one], options)
        (options.out / f"{options.one}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        return
    given = sys.argv[1:] if arguments is None else arguments
    missing = [n for n in names if not (options.out / f"{n}.json").is_file()]
    print(f"{'':20s}{'train s':>9}{'peak GB':>9}{'NLL':>8}{'first':>8}{'last':>8}   passkeys at 1, 2, 4, 8 windows")
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        running = {pool.submit(carry_out, name, given): name for name in missing}
        for future in concurrent.futures.as_completed(running):
            place = options.out / f"{running[future]}.json"
            failed = f"{running[future]}: failed, exit code {future.result()}"
            print(line(json.loads(place.read_text())) if place.is_file() else failed, flush=True)
    results = {n: json.loads(p.read_text()) for n in names if (p := options.out / f"{n}.json").is_file()}
    for claim, holds in judge(results).items():
        print(f"{'holds' if holds else 'does not hold'}: {claim}")


def carry_out(name: str, given: list[str]) -> int:
    return subprocess.run([sys.executable, __file__, *given, "--one", name], check=False).returncode


if __name__ == "__main__":
    main()
