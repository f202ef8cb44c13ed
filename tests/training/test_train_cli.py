"""`longspan train` from outside: what it prints, and how mistakes end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import recipes_tiny
import yaml

import longspan as ls
from longspan.cli.main import run

Have = dict[str, Path]


@pytest.fixture
def recipe(have: Have, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipes_tiny.recipe(have, tmp_path / "out", training={"steps": 2})))
    return path


def test_it_trains_and_says_where_the_model_is(recipe: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["train", str(recipe), "training.steps=3", "seed=5"]) == 0
    said = capfd.readouterr()
    assert "3 steps" in said.out and "out/model" in said.out.replace("\n", "")
    assert "step 1 of 3: loss" in said.err
    assert run(["train", str(recipe), "training.steps=3", "seed=5", "--json"]) == 0
    made = json.loads(capfd.readouterr().out)
    assert made["steps"] == 3 and made["tokens"] == 3 * 4 * 32
    assert ls.TrainResult(**made).model.endswith("model")


def test_a_dry_run_counts_and_writes_nothing(recipe: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["train", str(recipe), "--dry-run", "--json"]) == 0
    made = json.loads(capfd.readouterr().out)
    tied, layer = 261 * 32, 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48 + 2 * 32
    assert made["estimate"] and made["parameters"] == made["trained"] == tied + 2 * layer + 32
    assert made["tokens"] == 2 * 4 * 32 and made["fits"] and made["optimiser"] == 2 * 4 * made["parameters"]
    # six operations a weight and token, and 12 · layers · hidden · length / 2 for attention
    products, norms = 6 * made["parameters"], 6 * 2 * 32 * 32
    assert made["flops"] == pytest.approx((products + norms) * made["tokens"])
    assert run(["train", str(recipe), "--dry-run"]) == 0
    assert "it fits" in capfd.readouterr().out
    assert not (recipe.parent / "out").exists()


def test_a_dry_run_knows_what_a_model_does_not_keep(recipe: Path, capfd: pytest.CaptureFixture[str]) -> None:
    made = {}
    for setting in ("reversible=false", "reversible=true", "mlp_chunk=8"):
        given = ["model.type=longspan", f"model.{setting}", "model.num_hidden_layers=8"]
        assert run(["train", str(recipe), *given, "--dry-run", "--json"]) == 0
        made[setting] = json.loads(capfd.readouterr().out)
    plain, reversible, chunked = made.values()
    assert plain["parameters"] == reversible["parameters"] == chunked["parameters"]
    assert reversible["activations"] < plain["activations"] / 2
    assert plain["activations"] / 2 < chunked["activations"] < plain["activations"] * 3 / 4


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["training.stps=3"], 'did you mean "steps"'),
        (["training.steps"], "not key=value"),
        (["model.type=lama"], 'did you mean "llama"'),
        (["model.hiden_size=3"], 'did you mean "hidden_size"'),
        (["model.zzz=3"], "no key 'zzz'; transformers' documentation names them all"),
        (["model.num_attention_heads=5"], "model: no llama configuration"),
        (["model.vocab_size=100"], "leave it out"),
        (["data.train=nowhere.txt"], "neither a built-in text nor a file"),
        (["positions.kind=pose", "positions.target=64"], "this model reads 32 tokens"),
        (["training.batch=3"], "training.batch=4"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    recipe: Path, capfd: pytest.CaptureFixture[str], settings: list[str], said: str
) -> None:
    assert run(["train", str(recipe), *settings]) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: ") and said in error and "Traceback" not in error
    assert not (recipe.parent / "out").exists()
