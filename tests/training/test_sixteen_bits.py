"""Every recipe that comes along, at a small size, under bf16 autocast: tables of angles and of places are float32 there, while
queries, keys and values are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import recipes_tiny

import longspan as ls
from longspan.training.metrics import read_metrics

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
LLAMA = dict(recipes_tiny.MODEL)
OURS = {"type": "longspan", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
SMALL: dict[str, dict[str, Any]] = {
    "focused": {"model": LLAMA, "method": "focused:local=16,d=2,late=4,after=1", "data.length": 32},
    "gist": {"model": LLAMA, "data.length": 200},
    "landmark": {
        "model": {**LLAMA, "max_position_embeddings": 96},
        "method": "landmark:block=8,local=16",
        "data.length": 64,
        "data.task_share": 0.25,
    },
    "local": {"model": {**OURS, "attention": "local:block=8"}, "data.length": 32},
    "pose-32k": {"model": {**LLAMA, "max_position_embeddings": 64}, "data.length": 32, "positions.target": 128},
    "rmt": {"model": LLAMA, "method": "rmt:tokens=2,segment=16", "data.length": 32},
    "small": {"model": OURS, "data.length": 32},
}


@pytest.fixture(scope="module")
def have(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return recipes_tiny.folder(tmp_path_factory.mktemp("data"))


def losses(path: Path, have: dict[str, Path], out: Path, dtype: str) -> list[float]:
    changes: dict[str, Any] = {
        "out": str(out),
        "tokenizer": str(have["tokenizer"]),
        "data.train": str(have["train"]),
        "data.packing": "plain",
        "data.task": None,
        "data.samples": None,
        "training.steps": 3,
        "training.batch": 4,
        "training.micro_batch": 4,
        "training.warmup": 1,
        "training.log_every": 1,
        "training.save_every": None,
        "training.dtype": dtype,
    }
    if path.stem == "gist":  # its task sets instructions and answers apart
        changes |= {"data.train": "instructions", "data.packing": "none", "data.samples": 12}
    ls.train(path, **{**changes, **SMALL[path.stem]})
    return [row["loss"] for row in read_metrics(out) if "loss" in row]


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_trains_as_in_float32(path: Path, have: dict[str, Path], tmp_path: Path) -> None:
    single = losses(path, have, tmp_path / "fp32", "fp32")
    assert losses(path, have, tmp_path / "bf16", "bf16") == pytest.approx(single, rel=0.02)
