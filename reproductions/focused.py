"""Focused Transformer on the dictionary look-up: what negatives in training are worth in a memory far longer than training's.

    python reproductions/focused.py --out reproductions/focused
    python reproductions/focused.py --small --out /tmp/focused

The built-in model is trained on documents of two local contexts, definitions in the first and questions in the second, with a
document's own earlier context as all of its memory (d=1). From there it goes on twice, for as many steps on the same documents:
with d=1 again, and with the earlier contexts of other documents beside its own (--d). Both then read dictionaries of up to 32
local contexts, with every earlier context in memory, and are asked for values: greedy decoding must say just the value. With
--new a small model of our own is trained from nothing, as in the paper, without positions in memory layers; that takes longer.

Before that the built-in model reads --tokens tokens three times: with a cache of all layers, with memory layers, and with these
in CPU memory; what it takes of the GPU is printed beside what the cache holds.

What is judged, with 95 % intervals over dictionaries: at 16 local contexts and more, d > 1 finds more values than d=1; and on a
GPU, that with offload no more of it is held, nor ever in use over the weights, than a quarter of what the cache of all layers
takes. The same command goes on where it was stopped. The paper trains 37 million parameters from nothing, with d=128 after d=1.
Keys have three symbols here: of two, a quarter of a document's keys would stand in the other documents too, with other values.
`--small` takes two minutes on a CPU and shows only that it runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import DynamicCache, PreTrainedTokenizerFast

import longspan as ls
from longspan import meter as meter_module
from longspan.compare.statistics import Scale, difference, score
from longspan.memory.document import Memory
from longspan.meter import Meter
from longspan.tasks.answers import WORDS
from longspan.tasks.base import parse_task
from longspan.util import environment

SCALE = Scale(higher_is_better=True, worst=0.0)
SEED = 10**6
"""Of the test; training draws its dictionaries with small numbers."""
SMALL = {
    "local": 64,
    "width": 2,
    "symbols": 16,
    "questions": 4,
    "new": True,
    "hidden": 32,
    "depth": 2,
    "d": 4,
    "batch": 8,
    "first": 4,
    "steps": 4,
    "count": 2,
    "times": [2, 4],
    "tokens": 3000,
    "samples": 32,
}


def tokenizer(folder: Path) -> Path:
    """A tokenizer of the task's own: one token for each sign and each word."""
    special = ["<s>", "</s>", "<pad>"]
    signs = ["Key:", " Value:", "Question:", "\n", *(f" {word}" for word in WORDS), *WORDS]
    raw = Tokenizer(models.WordLevel({sign: i for i, sign in enumerate(special + signs)}, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(" ?[A-Za-z]+:?|\n"), "isolated")
    made = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    made.save_pretrained(folder)
    return folder


def task(options: argparse.Namespace) -> str:
    return f"lookup:questions={options.questions},width={options.width},symbols={options.symbols}"


def recipe(name: str, d: int, steps: int, model: str | dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Two local contexts a document. What goes on draws other documents than what it goes on from."""
    anew, begins = isinstance(model, dict), name == "start"
    layers = f"layers={options.layers}," if options.layers else ""
    positions = "none" if options.new else "first"
    return {
        "out": str(options.models / name),
        "model": model,
        "tokenizer": str(options.models / "tokenizer") if anew else None,
        "method": f"focused:local={options.local},{layers}positions={positions},d={d}",
        "seed": 0 if begins else 1,
        "data": {
            "train": task(options),
            "samples": options.samples,
            "packing": "none",
            "length": 2 * options.local,
        },
        "training": {
            "steps": steps,
            "batch": options.batch,
            "learning_rate": options.learning_rate,
            "warmup": min(50, steps // 4) if begins else 0,
            "schedule": "constant",
            "weight_decay": 0.0,
            "betas": [0.9, 0.98],
            "log_every": max(1, steps // 20),
            "save_every": "none",
        },
    }


def train(name: str, d: int, steps: int, model: str | dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    given = recipe(name, d, steps, model, options)
    done = ls.train(given)
    print(f"{name}: {steps:,} steps with d={d} in {done.seconds:.0f} s, loss {done.loss:.3f}", flush=True)
    told = {"name": name, "d": d, "steps": steps, "loss": done.loss}
    told |= {"seconds": done.seconds, "peak_bytes": done.peak_bytes}
    return told | {"model": done.model, "parameters": done.parameters, "recipe": given}


def to_train(options: argparse.Namespace) -> str | dict[str, Any]:
    if not options.new:
        return str(options.model)
    return {
        "type": "longspan",
        "hidden_size": options.hidden,
        "num_hidden_layers": options.depth,
        "num_attention_heads": max(1, options.hidden // 32),
        "max_position_embeddings": 2 * options.local,
    }


@torch.inference_mode()
def ask(folder: str, options: argparse.Namespace) -> dict[int, list[dict[str, Any]]]:
    """A record for each dictionary, by its number of local contexts."""
    model, words = ls.load(folder, dtype="float32")
    wanted, found = parse_task(task(options)), {}
    for times in options.times:
        samples = wanted.samples(words, times * options.local, options.count, SEED)
        outcomes = [wanted.run(model, words, sample, Meter(model.device)) for sample in samples]
        found[times] = [
            {
                "id": str(sample.id),
                "score": outcome.score,
                "failed": outcome.failed,
                "detail": {name: outcome.detail.get(name) for name in ("pairs", "tokens", "tokens_right", "nll")},
            }
            for sample, outcome in zip(samples, outcomes, strict=True)
        ]
        share = statistics.fmean(o.score for o in outcomes)
        pairs = found[times][0]["detail"]["pairs"]
        print(f"  {Path(folder).parent.name}: {times:>4} contexts, {pairs:,} pairs: {share:.1%} found", flush=True)
    return found


# How much of a GPU a long text takes


def room(method: str, options: argparse.Namespace) -> dict[str, Any]:
    """The built-in model with `method` reads a text in pieces and then `STEPS` tokens one by one."""
    model, _ = ls.load(options.model)
    if method != "none":
        ls.apply(model, method)
    ids = torch.randint(0, model.config.vocab_size, (1, options.tokens + 16), device=model.device)
    cache = DynamicCache(config=model.config)
    weights = _allocated(model.device)
    meter_module.reset_peak(model.device)
    begun = time.perf_counter()
    with torch.inference_mode():
        for part in ids[:, : options.tokens].split(options.piece, dim=1):
            model.get_decoder()(input_ids=part, past_key_values=cache, use_cache=True)
        read_s = _since(begun, model.device)
        held, peak = _allocated(model.device) - weights, meter_module.read_peak(model.device)
        begun = time.perf_counter()
        for place in range(options.tokens, options.tokens + 16):
            model(ids[:, place : place + 1], past_key_values=cache, use_cache=True)
        step_s = _since(begun, model.device) / 16
    cuda = model.device.type == "cuda"
    told = {
        "method": method,
        "tokens": options.tokens,
        "cache_gpu_bytes": held if cuda else None,
        "read_peak_gpu_bytes": peak - weights if cuda and peak else None,
        "read_s": read_s,
        "token_s": step_s,
    }
    shown = f"{held / 2**20:,.0f} MiB of the GPU" if cuda else "no GPU"
    print(
        f"  {method}: {options.tokens:,} tokens, {shown}, read in {read_s:.1f} s, then {step_s * 1e3:.1f} ms a token",
        flush=True,
    )
    return told


def reread(options: argparse.Namespace) -> dict[str, Any]:
    """A document read once and kept in a file: how long reading takes, and loading."""
    model, _ = ls.load(options.model)
    ls.apply(model, options.offloading)
    ids = torch.randint(0, model.config.vocab_size, (options.tokens,), device=model.device)
    begun = time.perf_counter()
    held = Memory.of(model, ids)
    read_s = _since(begun, model.device)
    path = options.models / "document.safetensors"
    held.save(path)
    begun = time.perf_counter()
    again = Memory.load(path, model)
    load_s = _since(begun, model.device)
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    question = ids[:5]
    same = torch.equal(*(model.generate(**m.inputs(question), **settings) for m in (held, again)))
    print(f"  a memory of {len(again):,} tokens: read in {read_s:.1f} s, loaded in {load_s:.1f} s, same answer: {same}")
    return {"tokens": len(again), "read_s": read_s, "load_s": load_s, "file_bytes": path.stat().st_size, "same": same}


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _since(begun: float, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun


# What it comes to


def summary(found: dict[str, dict[int, list[dict[str, Any]]]]) -> list[dict[str, Any]]:
    rows = []
    for times in found["more"]:
        one, more = found["one"][times], found["more"][times]
        made = {name: score(records, SCALE) for name, records in (("one", one), ("more", more))}
        over = difference(more, one, SCALE)
        rows.append(
            {
                "contexts": times,
                "pairs": one[0]["detail"]["pairs"],
                **{name: {"value": s.value, "interval": s.interval} for name, s in made.items()},
                "more - one": {"value": over.value, "interval": over.interval},
            }
        )
    return rows


def claims(rows: list[dict[str, Any]], d: int, rooms: list[dict[str, Any]]) -> dict[str, bool]:
    """What the paper says, at each length of 16 local contexts and more; and what memory in the CPU saves of a GPU's. rooms: of
    the cache of all layers first, with offload last."""
    said = {
        f"at {row['contexts']} contexts d={d} finds more than d=1": min(row["more - one"]["interval"]) > 0
        for row in rows
        if row["contexts"] >= 16
    }
    if rooms and rooms[0]["cache_gpu_bytes"]:
        all_of_it, last = rooms[0]["cache_gpu_bytes"], rooms[-1]
        for key, what in (("cache_gpu_bytes", "held"), ("read_peak_gpu_bytes", "in use at most")):
            share = last[key] / all_of_it
            said[f"with offload {share:.1%} of the GPU's cache of all layers {what}: a quarter"] = share <= 1 / 4
    return said


def show(rows: list[dict[str, Any]], said: dict[str, bool], d: int) -> None:
    print(f"contexts    pairs      d=1     d={d:<4}  difference")
    for row in rows:
        low, high = sorted(row["more - one"]["interval"])
        print(
            f"{row['contexts']:>8} {row['pairs']:>8,} {row['one']['value']:>8.1%} {row['more']['value']:>8.1%}  "
            f"{row['more - one']['value']:+.1%} [{low:+.1%}, {high:+.1%}]"
        )
    for claim, holds in said.items():
        print(f"{'holds' if holds else 'does not hold'}: {claim}")


def read_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", type=Path, default=Path("runs/focused"), help="where the models go")
    parser.add_argument("--small", action="store_true", help="a few small steps, to see that it runs")
    parser.add_argument("--local", type=int, default=512, help="tokens of the local context")
    parser.add_argument("--d", type=int, default=32, help="contexts that training meets, against 1")
    parser.add_argument("--first", type=int, default=250, help="steps before the two part")
    parser.add_argument("--steps", type=int, default=200, help="of each after that")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--layers", help="memory layers, such as 2/3; the method's own choice if left out")
    parser.add_argument("--new", action="store_true", help="train a model of our own from nothing")
    parser.add_argument("--hidden", type=int, default=256, help="of a new model")
    parser.add_argument("--depth", type=int, default=4, help="of a new model")
    parser.add_argument("--samples", type=int, default=4000, help="documents to train on")
    parser.add_argument("--width", type=int, default=3, help="symbols of a key")
    parser.add_argument("--symbols", type=int, default=64)
    parser.add_argument("--questions", type=int, default=46)
    parser.add_argument("--count", type=int, default=16, help="dictionaries of each length")
    parser.add_argument("--times", type=int, nargs="+", default=[2, 4, 16, 32], help="lengths, in local contexts")
    parser.add_argument("--model", default="smollm2-135m", help="what is trained, and reads the long text")
    parser.add_argument("--tokens", type=int, default=2**17, help="of that text")
    parser.add_argument("--piece", type=int, default=8192, help="of it read at once")
    if "--small" in (arguments if arguments is not None else sys.argv):
        parser.set_defaults(**SMALL)
    options = parser.parse_args(arguments)
    options.offloading = "focused:local=2k,offload=true"
    return options


def main(arguments: list[str] | None = None) -> None:
    options = read_options(arguments)
    tokenizer(options.models / "tokenizer")
    device = environment.machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    made: dict[str, Any] = {
        "command": environment.command_line(),
        **environment.versions(),
        **device,
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()},
    }
    before = measured(made, options.out)
    found = {name: {int(n): some for n, some in by.items()} for name, by in before.get("records", {}).items()}
    made["room"] = before.get("room", [])
    for method in ("none", "focused:local=2k", options.offloading)[len(made["room"]) :]:
        made["room"].append(room(method, options))
        write(made | {"records": found}, options.out)
    made["kept"] = before.get("kept") or reread(options)
    write(made | {"records": found}, options.out)
    made["trained"] = [train("start", 1, options.first, to_train(options), options)]
    for name, d in (("one", 1), ("more", options.d)):
        made["trained"].append(train(name, d, options.steps, made["trained"][0]["model"], options))
        if name not in found:
            found[name] = ask(made["trained"][-1]["model"], options)
        write(made | {"records": found}, options.out)
    rows = summary(found)
    said = claims(rows, options.d, made["room"])
    show(rows, said, options.d)
    write({**made, "table": rows, "claims": said, "records": found}, options.out)


def measured(made: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What an earlier run of the same options on the same device left; the same command does not measure it again."""
    path = folder / "focused.json"
    before = json.loads(path.read_text()) if path.is_file() else {}
    same = all(before.get(key) == made[key] for key in ("options", "device_name"))
    return before if same else {}


def write(told: dict[str, Any], folder: Path) -> None:
    """What there is so far: a run that is broken off leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "focused.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
