"""Recipes: what is read, what lies on top, and that every mistake is named with what is right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from longspan.training.recipe import Recipe, TokenizerRecipe, differences, read_override, read_overrides, read_recipe
from longspan.util.errors import LongspanError, SpecError

ROOT = Path(__file__).parent.parent.parent
SCRATCH: dict[str, Any] = {
    "out": "o",
    "model": {"type": "llama", "hidden_size": 64},
    "tokenizer": {"train": "bpe"},
    "data": {"train": "prose"},
}
TUNED: dict[str, Any] = {"out": "o", "model": "smollm2-135m", "data": {"train": "prose"}}


def read(base: dict[str, Any], *settings: str) -> Recipe:
    return read_recipe(base, [read_override(s) for s in settings])


def test_values_are_read_by_their_types() -> None:
    made = read(
        SCRATCH,
        "training.learning_rate=1e-4",
        "data.length=8k",
        "training.betas=[0.9, 0.99]",
        "training.clip=none",
        "model.num_hidden_layers=3",
        "tokenizer.vocabulary=1k",
    )
    assert made.training.learning_rate == 1e-4 and made.data.length == 8192
    assert made.training.betas == (0.9, 0.99) and made.training.clip is None
    assert made.model == {"type": "llama", "hidden_size": 64, "num_hidden_layers": 3}
    assert made.tokenizer == TokenizerRecipe("bpe", 1024)


def test_overrides_make_sections_and_leave_the_source_alone() -> None:
    assert read(TUNED, "lora.targets=q_proj,v_proj").lora.targets == ("q_proj", "v_proj")
    assert "lora" not in TUNED and TUNED["data"] == {"train": "prose"}


def test_what_is_stored_reads_back_to_the_same_recipe() -> None:
    made = read(SCRATCH, "positions.kind=pose", "positions.target=4k", "training.steps=7")
    assert read_recipe(made.to_dict()) == made
    assert not differences(made.to_dict(), read_recipe(made.to_dict()).to_dict())
    assert differences(made.to_dict(), read(SCRATCH, "training.steps=8").to_dict()) == [
        "positions.kind: pose → ordinary",
        "positions.target: 4096 → None",
        "training.steps: 7 → 8",
    ]


@pytest.mark.parametrize(
    ("base", "setting", "said"),
    [
        (SCRATCH, "trainig.steps=3", 'did you mean "training"'),
        (SCRATCH, "training.step=3", 'did you mean "steps"'),
        (SCRATCH, "training.steps=many", "whole number"),
        (SCRATCH, "training.steps=0", "at least 1"),
        (SCRATCH, "training.steps=true", "must be a number"),
        (SCRATCH, "training.schedule=cosin", 'did you mean "cosine"'),
        (SCRATCH, "training.learning_rate=nan", "finite"),
        (SCRATCH, "training.learning_rate=-1", "above 0"),
        (SCRATCH, "training.betas=[0.9]", "2 values"),
        (SCRATCH, "training.betas=[0.9, 1.0]", "below 1"),
        (SCRATCH, "training.compile=1", "true or false"),
        (SCRATCH, "training.warmup=2000", "1000 steps"),
        (SCRATCH, "training.save_every=15", "such as 10"),
        (SCRATCH, "training.eval_every=50", "without data.valid"),
        (SCRATCH, "data.valid_samples=3", "without data.valid"),
        (SCRATCH, "data.packing=boundary", 'did you mean "boundaries"'),
        (SCRATCH, "data=prose", "must be keys with values"),
        (SCRATCH, "data.train=", "data.train needs a value"),
        (SCRATCH, "model.type=", "model.type must name"),
        (SCRATCH, "tokenizer=", "needs a tokenizer"),
        (SCRATCH, "tokenizer.vocabulary=100", "from 260"),
        (SCRATCH, "tokenizer.train=wordpiece", "bpe"),
        (SCRATCH, "lora.rank=4", "is built from scratch"),
        (SCRATCH, "method=yarm:factor=4", 'did you mean "yarn"'),
        (SCRATCH, "seed=-1", "seed must be"),
        (SCRATCH, "out=", "out needs a value"),
        (TUNED, "model.position=alibi", "which has no keys"),
        (TUNED, "tokenizer.train=bpe", "leave tokenizer out"),
        (TUNED, "tokenizer=gpt2", "has its own"),
        (TUNED, "positions.chunks=3", "would change nothing"),
        (TUNED, "positions.kind=pose", "positions.target must be given"),
        (TUNED, "lora.rank=0", "at least 1"),
        (TUNED, "lora.save=both", "merged"),
    ],
)
def test_mistakes_are_named_with_what_is_right(base: dict, setting: str, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        read(base, setting)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["positions.kind=pose", "positions.target=512"], "at least the window of 1,024"),
        (["positions.kind=pose", "positions.target=4k", "positions.window=2k"], "a sample is one window"),
        (["positions.kind=pose", "positions.target=4k", "data.packing=boundaries"], "use data.packing=plain"),
        (["method=yarn:factor=4", "lora.save=adapter"], "use lora.save=merged"),
    ],
)
def test_keys_that_do_not_go_together(settings: list[str], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        read(TUNED, *settings)


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("- a\n- b\n")
    (tmp_path / "broken.yaml").write_text("a: [1, 2\n")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\xfa")
    for name, said in (
        ("list.yaml", "keys with values"),
        ("broken.yaml", "not YAML"),
        ("bytes.yaml", "cannot be read"),
        ("absent.yaml", "there is no recipe"),
    ):
        with pytest.raises(LongspanError, match=said):
            read_recipe(tmp_path / name)
    with pytest.raises(SpecError, match="not key=value"):
        read_override("training.steps")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("out: a\nmodel: m\nout: b\n", "the key 'out' is on line 1 and again on line 3; leave one out"),
        ("data:\n  train: prose\n  length: 8\n\n  length: 16\n", "'length' is on line 3 and again on line 5"),
        (
            "data: {train: prose}\ntraining: {steps: 1}\ndata: {train: code}\n",
            "'data' is on line 1 and again on line 3",
        ),
        ("out: a\ntraining: {steps: 1, batch: 2, steps: 3}\n", "'steps' is twice on line 2"),
        ("- {a: 1}\n- [{a: 1,\n   'a': 2}]\n", "'a' is on line 2 and again on line 3"),
        ("seed: 2024-13-01\n", "is not YAML: month must be"),
        ("a: " + "[" * 3000, "is not YAML"),
    ],
)
def test_a_key_that_a_recipe_has_twice_is_refused_with_both_lines(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "twice.yaml").write_text(text)
    with pytest.raises(SpecError) as caught:
        read_recipe(tmp_path / "twice.yaml")
    assert said in str(caught.value) and "twice.yaml" in str(caught.value)


def test_a_key_may_stand_once_in_each_of_several_sections_and_over_what_is_merged(tmp_path: Path) -> None:
    (tmp_path / "merged.yaml").write_text(
        "out: o\nmodel: &one {type: llama, hidden_size: 32}\ntokenizer: {train: bpe}\ndata: {train: prose}\n"
    )
    assert read_recipe(tmp_path / "merged.yaml").data.train == "prose"
    (tmp_path / "merged.yaml").write_text(
        "out: o\nmodel:\n  <<: &one {type: llama, hidden_size: 32}\n  hidden_size: 64\n"
        "tokenizer: {train: bpe}\ndata: {train: prose}\n"
    )
    assert read_recipe(tmp_path / "merged.yaml").model == {"type": "llama", "hidden_size": 64}


def test_settings_that_are_given_twice_are_refused() -> None:
    with pytest.raises(SpecError, match=r"training\.steps is set twice, to 1 and to 2"):
        read_overrides(["training.steps=1", "seed=3", "training.steps=2"])
    with pytest.raises(SpecError, match=r"model=.*: the key 'type' is twice on line 1"):
        read_override("model={type: llama, type: gpt2}")


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_recipes_that_come_along_can_be_read(path: Path) -> None:
    assert read_recipe(path, [("data.train", "prose")]).out.startswith("runs/")


def test_the_guide_names_every_key_with_its_default() -> None:
    guide = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    made = read(TUNED, "lora.rank=16").to_dict()
    for section in ("data", "positions", "training", "lora"):
        for key, value in made[section].items():
            if (section, key) == ("data", "train"):
                continue
            shown = str(value).lower() if value is None or isinstance(value, bool) else value
            assert f"| `{section}.{key}` | {shown} |" in guide, f"{section}.{key} = {shown}"
