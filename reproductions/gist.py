"""Gist tokens on held-out instructions: does one token that stands for ten do as well as all ten?

    python reproductions/gist.py --out reproductions/gist
    python reproductions/gist.py --small --out /tmp/gist

Trains recipes/gist.yaml three times by the same seed and on the same instructions: with gist tokens, with nothing hidden
(positive control) and with the instruction hidden altogether (negative control). Each model is then given instructions that it
has not seen, of kinds that it was trained on (`seen`) and of kinds that it was not (`unseen`), and judged by the right outputs:
mean loss, and how often greedy decoding says just the output. The gist model reads them as it would in use: instructions are
compressed first, and what follows meets the gist tokens' keys and values alone.

What is judged, sample by sample with 95 % intervals: the gist model lies between the controls, better than the negative one, and
not better than the positive one. The paper's models (7B) do as well as their positive control on instructions like those of
training: ROUGE-L of 57.8 with one gist token against 58.0, and 31.5 for the negative one; on unseen ones 46.6, 48.1 and 31.4
(LLaMA-7B, from the authors' stored outputs). `--small` is a few minutes on a CPU and shows nothing but that it runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

import longspan as ls
from longspan.compare.statistics import Scale, difference, score
from longspan.memory.gist import method as gist
from longspan.memory.gist.decoder import compressed
from longspan.memory.gist.encoder import padded
from longspan.models import load_tokenizer
from longspan.tasks.base import Sample, parse_task
from longspan.training.recipe import read_recipe
from longspan.util import environment

RECIPE = Path(__file__).parents[1] / "recipes" / "gist.yaml"
MODES = ("negative", "gist", "positive")
SPLITS = ("seen", "unseen")
SCALES = {"nll": Scale(higher_is_better=False, worst=20.0), "exact": Scale(higher_is_better=True, worst=0.0)}
SMALL = {"training.steps": 2, "training.batch": 4, "training.log_every": 1, "training.warmup": 1, "data.samples": 24}
BATCH = 64
"""Samples that are judged at once."""


def held_out(options: argparse.Namespace) -> dict[str, list[Sample]]:
    """Samples of another seed by split, but for those that are trained on."""
    recipe = read_recipe(RECIPE, settings(options).items())
    tokenizer, data = load_tokenizer(str(recipe.model)), recipe.data
    source = parse_task(data.train).samples(tokenizer, data.length, data.samples or 1000, recipe.seed)
    trained, found = {tuple(s.tokens) for s in source}, {}
    for split in SPLITS:
        drawn = parse_task(f"instructions:split={split}").samples(tokenizer, 512, options.count, 10**6)
        found[split] = [s for s in drawn if tuple(s.tokens) not in trained]
    return found


@torch.inference_mode()
def outputs(model: Any, samples: list[Sample], method: gist.Gist, *, cache: bool) -> list[Tensor]:
    """Logits of each sample's output, (its tokens, vocabulary) in float32: read in one pass, or, with `cache`, the instruction
    first and what follows with the gist tokens alone."""
    heads = [[*s.tokens[: s.meta["instruction_tokens"]], *[method.id] * method.tokens] for s in samples]
    tails = [[*s.tokens[s.meta["instruction_tokens"] :], *s.meta["answer"]] for s in samples]
    if cache:
        first = torch.tensor([len(head) - method.tokens for head in heads], device=model.device)
        held = compressed(model, *padded(heads, 0, model.device), first, method.tokens)
        rows = tails
        ids, mask = padded(rows, 0, model.device)
        mask = torch.cat((mask.new_ones(len(rows), method.tokens), mask), dim=1)
        logits = model(ids, attention_mask=mask, past_key_values=held, use_cache=True).logits
    else:
        rows = [head + tail for head, tail in zip(heads, tails, strict=True)]
        ids, mask = padded(rows, 0, model.device)
        logits = model(ids, attention_mask=mask, use_cache=False).logits
    ends = [(len(row), len(s.meta["answer"])) for row, s in zip(rows, samples, strict=True)]
    return [row[end - count - 1 : end - 1].float() for row, (end, count) in zip(logits, ends, strict=True)]


def judge(model: Any, samples: list[Sample], method: gist.Gist) -> list[dict[str, Any]]:
    """A record for each sample."""
    records = []
    for start in range(0, len(samples), BATCH):
        part = samples[start : start + BATCH]
        for sample, logits in zip(part, outputs(model, part, method, cache=method.mode == "gist"), strict=True):
            right = torch.tensor(sample.meta["answer"], device=logits.device)
            exact, nll = bool((logits.argmax(-1) == right).all()), F.cross_entropy(logits, right).item()
            detail = {"kind": sample.meta["kind"], "instruction_tokens": sample.meta["instruction_tokens"]}
            records.append({"id": sample.id, "nll": nll, "exact": float(exact), **detail})
    return records


def train(mode: str, asked: dict[str, list[Sample]], options: argparse.Namespace) -> dict[str, Any]:
    """One training, and what its model makes of the held-out instructions, by split."""
    begun = time.perf_counter()
    given = {
        "out": str(options.models / mode),
        "method": f"gist:tokens={options.tokens},mode={mode}",
        **settings(options),
    }
    done = ls.train(RECIPE, **given)
    model, _ = ls.load(done.model, dtype="float32")
    method = gist.method_on(model)
    found = {split: judge(model, samples, method) for split, samples in asked.items()}
    told: dict[str, Any] = {"steps": done.steps, "train_loss": done.loss, "train_s": done.seconds, "samples": found}
    if mode == "gist":
        told["cache_differs_from_mask_by"] = largest_difference(model, asked["seen"][:BATCH], method)
    return told | {"total_s": time.perf_counter() - begun}


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """What is set over the recipe."""
    given = dict(SMALL) if options.small else {}
    if options.steps is not None:
        given["training.steps"] = options.steps
    return given | {name: yaml.safe_load(value) for name, _, value in (item.partition("=") for item in options.set)}


def largest_difference(model: Any, samples: list[Sample], method: gist.Gist) -> float:
    """Between logits with the gist tokens' cache and under the mask."""
    pairs = zip(*(outputs(model, samples, method, cache=cache) for cache in (True, False)), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


def summary(found: dict[str, dict[str, Any]], tokens: int) -> dict[str, Any]:
    """Scores and differences with their intervals, and what holds, by split."""
    told: dict[str, Any] = {}
    for split in SPLITS:
        records = {mode: found[mode]["samples"][split] for mode in found}
        part = {"samples": len(records["gist"]), "compression": compression(records["gist"], tokens)}
        for what, scale in SCALES.items():
            rows = {
                mode: [{"id": r["id"], "score": r[what], "failed": False, "detail": {}} for r in records[mode]]
                for mode in found
            }
            part[what] = {mode: estimate(score(rows[mode], scale)) for mode in found}
            for other in set(found) - {"gist"}:
                part[what][f"gist - {other}"] = estimate(difference(rows["gist"], rows[other], scale))
        told[split] = part
    return told


def by_kind(records: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean scores of each kind of instruction, and how many there are."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        kinds.setdefault(record["kind"], []).append(record)
    return {
        kind: {what: statistics.fmean(r[what] for r in some) for what in SCALES} | {"count": len(some)}
        for kind, some in sorted(kinds.items())
    }


def compression(records: list[dict[str, Any]], tokens: int) -> float:
    """Tokens of an instruction for each gist token."""
    return statistics.fmean(r["instruction_tokens"] for r in records) / tokens


def estimate(made: Any) -> dict[str, Any]:
    return {"value": made.value, "interval": made.interval}


def claims(told: dict[str, Any]) -> dict[str, bool]:
    """What the paper says, of these models. Better than the negative control: the whole interval says so; not better than the
    positive one: not the whole interval says otherwise."""
    shorter = statistics.fmean(part["compression"] for part in told.values())
    said = {f"{shorter:.1f} tokens of an instruction for a gist token: 10": shorter >= 10}
    for split, part in told.items():
        for what, sign in (("nll", -1.0), ("exact", 1.0)):
            over = sorted(sign * x for x in part[what]["gist - negative"]["interval"])[0] > 0
            under = sorted(sign * x for x in part[what]["gist - positive"]["interval"])[0] <= 0
            said[f"{split} instructions, {what}: between the controls"] = over and under
    return said


def show(found: dict[str, dict[str, Any]], told: dict[str, Any], said: dict[str, bool]) -> None:
    for split, part in told.items():
        print(f"{split}: {part['samples']:,} instructions of {part['compression']:.1f} tokens a gist token")
        for mode in MODES:
            cells = [(part[what][mode]["value"], *part[what][mode]["interval"]) for what in SCALES]
            print(
                f"  {mode:>9}  "
                + "   ".join(f"{w} {v:.3f} [{a:.3f}, {b:.3f}]" for w, (v, a, b) in zip(SCALES, cells, strict=True))
            )
    print(f"gist cache and mask differ by at most {found['gist']['cache_differs_from_mask_by']:.1e} in a logit")
    for claim, holds in said.items():
        print(f"{'holds' if holds else 'does not hold'}: {claim}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", type=Path, default=Path("runs/gist"), help="where the models go")
    parser.add_argument("--tokens", type=int, default=1, help="gist tokens")
    parser.add_argument("--count", type=int, help="held-out instructions of each split; 1000 if left out")
    parser.add_argument("--steps", type=int, help="of each training; the recipe's if left out")
    parser.add_argument("--small", action="store_true", help="two small steps, to see that it runs")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the recipe")
    options = parser.parse_args(arguments)
    options.count = options.count or (24 if options.small else 1000)
    device = environment.machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    made = {
        "command": environment.command_line(),
        **environment.versions(),
        **device,
        "tokens": options.tokens,
        "set": settings(options),
    }
    asked = held_out(options)
    found: dict[str, dict[str, Any]] = {}
    for mode in MODES:
        found[mode] = train(mode, asked, options)
        print(f"{mode}: trained in {found[mode]['train_s']:.0f} s, loss {found[mode]['train_loss']:.3f}", flush=True)
        write(made, found, options.out)
    told = summary(found, options.tokens)
    said = claims(told)
    show(found, told, said)
    write({**made, "summary": told, "claims": said}, found, options.out)


def write(made: dict[str, Any], found: dict[str, dict[str, Any]], folder: Path) -> None:
    """What there is so far: a run that is broken off leaves it."""
    models = {
        mode: one | {"samples": {split: by_kind(records) for split, records in one["samples"].items()}}
        for mode, one in found.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gist.json").write_text(json.dumps({**made, "models": models}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
