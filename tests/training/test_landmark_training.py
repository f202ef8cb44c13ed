"""Training with landmarks: the model that comes of it, resumed and loaded, memory, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import recipes_tiny
import torch
from safetensors.torch import load_file

import longspan as ls
from longspan.hf.site import current
from longspan.memory.landmark import method as landmark
from longspan.training.metrics import read_metrics
from longspan.training.recipe import read_recipe
from longspan.util.errors import SpecError

Have = dict[str, Path]


def recipe(have: Have, out: Path, **changes: Any) -> dict[str, Any]:
    made = {"method": "landmark:block=6,retrieve=2,local=12", "data": {"length": 64}} | changes
    return recipes_tiny.recipe(have, out, **made)


def losses(out: Path) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in read_metrics(out) if "loss" in r}


def test_trained_resumed_and_loaded(have: Have, tmp_path: Path) -> None:
    base = ls.train(recipes_tiny.recipe(have, tmp_path / "base", training={"steps": 2}, data={"length": 80})).model
    asked = recipe(have, tmp_path / "out", model=base, tokenizer=None)
    done = ls.train(asked)
    assert losses(tmp_path / "out")[12] < losses(tmp_path / "out")[1]
    model, tokenizer = ls.load(done.model, device="cpu")
    id = tokenizer.convert_tokens_to_ids(landmark.TOKEN)
    assert landmark.reader_on(model).method.id == id == model.config.landmark_token_id
    assert current(model).spec == f"landmark:block=6,retrieve=2,local=12,id={id}"
    assert model.generation_config.suppress_tokens == [id]
    was, now = (load_file(Path(f) / "model.safetensors") for f in (base, done.model))
    row = now["model.embed_tokens.weight"][id]
    mean = was["model.embed_tokens.weight"].mean(0)
    assert len(now["model.embed_tokens.weight"]) == len(was["model.embed_tokens.weight"]) + 1
    assert not torch.equal(row, mean) and (row - mean).norm() < 0.5 * mean.norm() + 0.5  # learned, from the mean on
    prompt = tokenizer("alpha beta gamma delta on off up down alpha beta", return_tensors="pt")
    assert id not in model.generate(**prompt, max_new_tokens=30)[0]
    recipes_tiny.assert_resumes_alike(asked, tmp_path / "out")


@pytest.mark.parametrize(
    "changes",
    [
        {"data.task": "passkey", "data.length": 400, "data.samples": 8, "training.gradient_checkpointing": True},
        {"data.train": "passkey", "data.packing": "none", "data.length": 400, "data.samples": 8},
        {"training.loss_chunk": None},
    ],
)
def test_tasks_padding_and_checkpointing(have: Have, tmp_path: Path, changes: dict[str, Any]) -> None:
    valid = {"train": str(have["train"]), "valid": str(have["valid"]), "length": 64, "valid_samples": 2}
    more = {"data": valid, "training": {"steps": 2}, "model": recipes_tiny.MODEL | {"max_position_embeddings": 512}}
    done = ls.train(recipe(have, tmp_path / "out", **more), **changes)
    assert done.valid_loss is not None and done.loss is not None and 0 < done.loss < 10


def test_refusals(have: Have, tmp_path: Path) -> None:
    base = ls.train(recipes_tiny.recipe(have, tmp_path / "base", training={"steps": 1}, data={"length": 80})).model
    asked = recipe(have, tmp_path / "out", model=base, tokenizer=None)
    for changes, said in (
        ({"method": "landmark:block=6,local=12,retrieve=2,id=4"}, "id=4 is not <LANDMARK>"),
        ({"lora.rank": 2}, "leave lora out"),
        ({"data.packing": "boundaries"}, "use plain or none"),
        ({"data.length": 75}, "holds 68"),
        ({"positions.kind": "pose", "positions.target": 80, "data.length": 40}, "positions.kind=ordinary"),
    ):
        with pytest.raises(SpecError, match=said):
            ls.train(asked, **{**changes, "out": str(tmp_path / said[:4].strip())})


def test_the_recipe_reads() -> None:
    read = read_recipe(Path(__file__).parents[2] / "recipes" / "landmark.yaml")
    method = landmark.landmark_of(read.method)
    assert method is not None and method.positions <= 512 and read.data.length <= 2048
