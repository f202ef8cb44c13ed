"""Training with gist tokens: what is learned of a sample, the model that comes of it, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import recipes_tiny
import torch
from safetensors.torch import load_file

import longspan as ls
import tiny
from longspan.memory.gist import method as gist
from longspan.tasks.base import parse_task
from longspan.training.data import task_tokens
from longspan.training.metrics import read_metrics
from longspan.training.recipe import read_recipe
from longspan.training.samples import IGNORE, TextWindows
from longspan.util.errors import SpecError

Have = dict[str, Path]
LENGTH = 200


def recipe(have: Have, out: Path, **changes: Any) -> dict[str, Any]:
    data = {"train": "instructions", "packing": "none", "length": LENGTH, "samples": 16} | changes.pop("data", {})
    return recipes_tiny.recipe(have, out, data=data, **{"method": "gist:tokens=3", **changes})


def losses(out: Path) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in read_metrics(out) if "loss" in r}


def test_gist_tokens_stand_behind_the_instruction(have: Have, tmp_path: Path) -> None:
    tokenizer, task = tiny.tokenizer(), parse_task("instructions")
    tokens = task_tokens(read_recipe(recipe(have, tmp_path / "out")), "data.train", tokenizer)
    windows, id = TextWindows(tokens, LENGTH, "none", 1), tokenizer.convert_tokens_to_ids(gist.TOKEN)
    for i, sample in enumerate(task.samples(tokenizer, LENGTH - 3, 16, 0)):
        made, at = windows.sample(i, 0), sample.meta["instruction_tokens"]
        read = made["input_ids"].tolist()
        assert [j for j, x in enumerate(read) if x == id] == [at, at + 1, at + 2]
        assert read[:at] + read[at + 3 : len(sample.tokens) + 3] == sample.tokens
        learned = made["labels"][made["labels"] != IGNORE].tolist()
        assert learned == [*sample.meta["answer"], tokenizer.eos_token_id]


@pytest.mark.parametrize("mode", ["gist", "positive", "negative"])
def test_trained_resumed_and_loaded(have: Have, tmp_path: Path, mode: str) -> None:
    """From a trained model, stopped and gone on with, and from the result once more."""
    base = ls.train(recipes_tiny.recipe(have, tmp_path / "base", training={"steps": 2}, data={"length": LENGTH})).model
    asked = recipe(have, tmp_path / "out", model=base, tokenizer=None, method=f"gist:tokens=3,mode={mode}")
    done = ls.train(asked)
    assert losses(tmp_path / "out")[12] < losses(tmp_path / "out")[1]
    model, tokenizer = ls.load(done.model, device="cpu")
    method = gist.method_on(model)
    assert (method.tokens, method.mode, method.id) == (3, mode, tokenizer.convert_tokens_to_ids(gist.TOKEN))
    was, now = (load_file(Path(f) / "model.safetensors") for f in (base, done.model))
    row = now["model.embed_tokens.weight"][method.id]
    assert len(now["model.embed_tokens.weight"]) == len(was["model.embed_tokens.weight"]) + 1
    mean = was["model.embed_tokens.weight"].mean(0)
    assert not torch.equal(row, mean) and (row - mean).norm() < 0.5 * mean.norm() + 0.5  # learned, from the mean on
    recipes_tiny.assert_resumes_alike(asked, tmp_path / "out")
    further = recipe(
        have, tmp_path / "more", model=done.model, tokenizer=None, training={"steps": 1, "learning_rate": 1e-9}
    )
    more = load_file(Path(ls.train(further).model) / "model.safetensors")
    assert torch.allclose(more["model.embed_tokens.weight"][method.id], row, atol=1e-6)  # not begun anew


def test_instructions_of_a_folder(have: Have, tmp_path: Path) -> None:
    rows = [{"instruction": f"Say {word}.", "input": "", "output": word} for word in ("one", "two", "three", "four")]
    (tmp_path / "alpaca").mkdir()
    (tmp_path / "alpaca" / "a.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    source = f"instructions:data={tmp_path / 'alpaca'}"
    asked = recipe(have, tmp_path / "out", data={"train": source, "valid": source, "samples": 4, "valid_samples": 4})
    done = ls.train(asked)
    assert done.valid_loss is not None and losses(tmp_path / "out")[12] < losses(tmp_path / "out")[1]


def test_instructions_among_a_text(have: Have, tmp_path: Path) -> None:
    data = {"train": str(have["train"]), "task": "instructions", "packing": "plain", "samples": 8}
    ls.train(recipe(have, tmp_path / "out", data=data))
    assert losses(tmp_path / "out")[12] < losses(tmp_path / "out")[1]


def test_refusals(have: Have, tmp_path: Path) -> None:
    asked = recipe(have, tmp_path / "out")
    for changes, said in (
        ({"data.train": "prose", "data.samples": None}, r"data\.train=instructions"),
        ({"data.train": "passkey", "data.length": 800}, "which tokens are the instruction"),
        ({"method": "gist:tokens=3,id=4"}, "id=4 is not <GIST>"),
        ({"method": "gist:tokens=500"}, "leave no room"),
    ):
        with pytest.raises(SpecError, match=said):
            ls.train(asked, **{**changes, "out": str(tmp_path / said[:4])})
    base = ls.train(recipes_tiny.recipe(have, tmp_path / "base", training={"steps": 1}, data={"length": LENGTH})).model
    with pytest.raises(SpecError, match="leave lora out"):
        ls.train(recipe(have, tmp_path / "lora", model=base, tokenizer=None), **{"lora.rank": 2})
