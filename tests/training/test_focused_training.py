"""Training with crossbatch: its curriculum, going on after a stop, the model that comes of it, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import recipes_tiny
import torch
import yaml

import longspan as ls
from longspan.hf.site import current
from longspan.training.data import documents, tokenise
from longspan.training.metrics import read_metrics
from longspan.training.recipe import read_recipe
from longspan.training.samples import TextWindows, Validation
from longspan.util.errors import SpecError

Have = dict[str, Path]
METHOD = "focused:local=16,layers=1"


def recipe(have: Have, out: Path, **changes: Any) -> dict[str, Any]:
    return recipes_tiny.recipe(have, out, **{"method": METHOD, **changes})


def losses(out: Path) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in read_metrics(out) if "loss" in r}


@pytest.mark.parametrize("more", [{}, {"training": {"gradient_checkpointing": True}}])
def test_trained_stopped_gone_on_with_and_loaded(have: Have, tmp_path: Path, more: dict[str, Any]) -> None:
    asked = recipe(have, tmp_path / "out", method=f"{METHOD},d=1,late=2,after=9", **more)
    done = ls.train(asked)
    assert losses(tmp_path / "out")[12] < losses(tmp_path / "out")[1]
    recipes_tiny.assert_resumes_alike(asked, tmp_path / "out")
    model, tokenizer = ls.load(done.model, device="cpu")
    assert current(model).spec == f"{METHOD},d=1,late=2,after=9"
    said = model.generate(**tokenizer("on off up down " * 6, return_tensors="pt"), max_new_tokens=20, eos_token_id=None)
    assert said.shape[1] > 5 * 16


def test_negatives_come_with_the_step_that_they_are_for(have: Have, tmp_path: Path) -> None:
    runs = {}
    for name, method in (("one", "d=1"), ("late", "d=1,late=2,after=6"), ("two", "d=2")):
        ls.train(recipe(have, tmp_path / name, method=f"{METHOD},{method}"))
        runs[name] = losses(tmp_path / name)
    same = [step for step in runs["one"] if runs["one"][step] == runs["late"][step]]
    assert same == [1, 2, 3, 4, 5, 6]  # the seventh step is number 6
    assert runs["two"][1] != runs["one"][1]


def test_validation_reads_its_own_text_alone(have: Have, tmp_path: Path) -> None:
    """The loss of a sample is that of the model with its memory, whatever else is in the batch."""
    data = {"valid": str(have["valid"]), "valid_samples": 3}
    done = ls.train(recipe(have, tmp_path / "out", data=data, training={"steps": 1, "micro_batch": 2, "eval_every": 1}))
    model, tokenizer = ls.load(done.model, device="cpu")

    wanted = read_recipe(recipe(have, tmp_path / "out", data=data))
    tokens = tokenise(documents(wanted.data, "data.valid"), tokenizer, tmp_path / "tokens", title="", show=False)
    rows = Validation(TextWindows(tokens, 32, "plain", 0), 3)
    total = 0.0
    for row in (rows[i] for i in range(3)):
        with torch.no_grad():
            logits = model(torch.from_numpy(row["input_ids"])[None]).logits[0]
        total += torch.nn.functional.cross_entropy(logits, torch.from_numpy(row["labels"])).item() / 3
    assert done.valid_loss == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data.length": 16}, r"data\.length=32"),
        ({"method": f"{METHOD},d=3"}, r"training\.micro_batch=3"),
        ({"method": f"{METHOD},d=1,late=4,after=2"}, r"training\.micro_batch=4"),
        ({"data.packing": "boundaries"}, "positions within its contexts"),
    ],
)
def test_refusals(have: Have, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        ls.train(recipe(have, tmp_path / "out"), **changes)
    assert not (tmp_path / "out").exists()


def test_the_recipe(have: Have, tmp_path: Path) -> None:
    path = Path(__file__).parents[2] / "recipes" / "focused.yaml"
    small = {
        "out": str(tmp_path / "out"),
        "model": dict(recipes_tiny.MODEL),
        "tokenizer": str(have["tokenizer"]),
        "method": "focused:local=16,d=2,late=8,after=1",
        "data.train": str(have["train"]),
        "data.length": 32,
        "training.batch": 8,
        "training.steps": 2,
        "training.warmup": 1,
        "training.log_every": 1,
        "training.save_every": None,
    }
    assert "late=8" in yaml.safe_load(path.read_text(encoding="utf-8"))["method"]
    assert ls.train(path, **small).steps == 2
