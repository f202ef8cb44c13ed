"""Recipes that train in a second or two: a Llama of two layers over a few kilobytes of made-up text."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import longspan as ls
import tiny

MODEL = {
    "type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


def text(words: int, seed: int = 0) -> str:
    """Words that follow one another with some order, so that there is something to learn."""
    rng, known = random.Random(seed), ["alpha", "beta", "gamma", "delta", "on", "off", "up", "down"]
    place, said = 0, []
    for _ in range(words):
        place = (place + rng.choice((1, 1, 1, 2))) % len(known)
        said.append(known[place])
    return " ".join(said)


def folder(path: Path) -> dict[str, Path]:
    """Texts to train and to validate on, three documents each, and a tokenizer of bytes."""
    for part, seed in (("train", 0), ("valid", 10)):
        (path / part).mkdir(parents=True)
        for i in range(3):
            (path / part / f"{i}.txt").write_text(text(400, seed + i), encoding="utf-8")
    tiny.tokenizer().save_pretrained(path / "tokenizer")
    return {name: path / name for name in ("train", "valid", "tokenizer")}


def recipe(have: dict[str, Path], out: Path, **changes: Any) -> dict[str, Any]:
    """A recipe over `folder`; `changes` are sections, merged into what is there."""
    made: dict[str, Any] = {
        "out": str(out),
        "model": dict(MODEL),
        "tokenizer": str(have["tokenizer"]),
        "data": {"train": str(have["train"]), "length": 32},
        "training": {
            "steps": 12,
            "batch": 4,
            "micro_batch": 2,
            "learning_rate": 0.003,
            "log_every": 1,
            "save_every": 4,
            "dtype": "fp32",
        },
    }
    for key, value in changes.items():
        merged = key in ("data", "training") and isinstance(value, dict)
        made[key] = {**made[key], **value} if merged else value
    return made


def assert_resumes_alike(recipe: Any, out: Path) -> None:
    """A training in `out` that finished after step 12 is taken back to step 8, and ends with the same weights again."""
    weights = load_file(out / "model" / "model.safetensors")
    for name in ("model", "checkpoints/checkpoint-12"):
        shutil.rmtree(out / name)
    (out / "result.json").unlink()
    assert ls.train(recipe).resumed_from == 8
    again = load_file(out / "model" / "model.safetensors")
    assert all(torch.equal(again[name], weights[name]) for name in weights)
