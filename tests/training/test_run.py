"""Whole trainings: killed and resumed, on two processes, with methods and adapters, and what is refused on the way."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import recipes_tiny
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import longspan as ls
import tiny
from longspan.cli.printing import console
from longspan.compare.planning.trained import training_cost
from longspan.core.tokens import encode
from longspan.models import rows_needed
from longspan.tasks.base import parse_task
from longspan.training import run as run_module
from longspan.training import trainer
from longspan.training.data import task_tokens, tokenise
from longspan.training.metrics import describe, read_metrics, work
from longspan.training.recipe import read_recipe
from longspan.training.run import terminal
from longspan.training.samples import IGNORE, TextWindows
from longspan.training.trainer import COMPLETE, clear_broken, newest_checkpoint
from longspan.util.errors import LongspanError, NotSupported, SpecError

Have = dict[str, Path]
SIZES = {k: v for k, v in recipes_tiny.MODEL.items() if k != "type"}
RESTLESS = {**recipes_tiny.MODEL, "attention_dropout": 0.2, "max_position_embeddings": 256}
"""Dropout: resuming is only right if the state of the random numbers is."""
POSE, POSE_128 = {"kind": "pose", "target": 256}, {"kind": "pose", "target": 128}


def losses(out: Path) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in read_metrics(out) if "loss" in r}


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors")


def start(recipe: dict[str, Any], path: Path, *launcher: str) -> subprocess.Popen[bytes]:
    """The command line on a recipe, in processes of their own."""
    path.write_text(yaml.safe_dump(recipe))
    command = [sys.executable, *launcher, "-m", "longspan", "train", str(path)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.fixture(scope="module")
def unbroken(have: Have, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """A run of forty steps that nothing disturbed, with all that depends on chance: dropout, PoSE, shuffling."""
    out = tmp_path_factory.mktemp("unbroken") / "out"
    recipe = recipes_tiny.recipe(
        have,
        out,
        model=RESTLESS,
        positions=POSE,
        data={"valid": str(have["valid"])},
        training={"steps": 40, "eval_every": 8},
    )
    ls.train(recipe)
    return recipe, out


def test_a_run_leaves_what_it_says(unbroken: tuple[dict[str, Any], Path]) -> None:
    _, out = unbroken
    made = losses(out)
    assert sorted(made) == list(range(1, 41)) and made[40] < made[1] - 0.5
    records = read_metrics(out)
    assert [r["step"] for r in records if "valid_loss" in r] == [8, 16, 24, 32, 40]
    one = next(r for r in records if "loss" in r)
    assert {"grad_norm", "learning_rate", "tokens_per_s", "mfu", "peak_bytes"} <= set(one) and one["mfu"] is None
    assert "tokens/s" in describe(one) and (out / "loss.png").stat().st_size > 5000
    assert not list(out.glob("**/*.bin")) or {p.name for p in out.glob("**/*.bin")} == {"ids.bin"}
    assert {p.name for p in (out / "checkpoints").iterdir()} == {"checkpoint-36", "checkpoint-40"}


def test_the_result_loads_with_its_tokenizer_and_recipe(unbroken: tuple[dict[str, Any], Path]) -> None:
    recipe, out = unbroken
    model, tokenizer = ls.load(out / "model", device="cpu", dtype="float32")
    plain = AutoModelForCausalLM.from_pretrained(out / "model")
    ids = AutoTokenizer.from_pretrained(out / "model")("alpha beta", return_tensors="pt").input_ids
    assert tokenizer("alpha beta")["input_ids"] == ids[0].tolist()
    assert torch.equal(model(ids).logits, plain(ids).logits)
    assert plain.config.eos_token_id == tokenizer.eos_token_id and plain.dtype == torch.float32
    assert (
        yaml.safe_load((out / "model" / "recipe.yaml").read_text())["training"]["steps"] == recipe["training"]["steps"]
    )


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_losses_and_weights(
    unbroken: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    recipe, whole = unbroken
    recipe, out = {**recipe, "out": str(tmp_path / "out")}, tmp_path / "out"
    process = start(recipe, tmp_path / "recipe.yaml")
    try:
        while max(losses(out), default=0) < 10:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.002)
    finally:
        process.kill()
        process.wait()
    stopped = max(losses(out))
    assert stopped < 40 and not (out / "model").exists()
    done = ls.train(recipe)
    assert done.resumed_from is not None and 0 < done.resumed_from <= stopped
    assert losses(out) == losses(whole)
    assert all(torch.equal(w, weights(whole)[name]) for name, w in weights(out).items())


def test_a_checkpoint_without_its_mark_does_not_count(tmp_path: Path) -> None:
    for step, whole in ((4, True), (12, True), (8, True), (16, False)):
        folder = tmp_path / "checkpoints" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        if whole:
            (folder / COMPLETE).write_text("{}")
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "checkpoint-12"
    clear_broken(tmp_path)
    assert not (tmp_path / "checkpoints" / "checkpoint-16").exists()
    assert newest_checkpoint(tmp_path / "absent") is None


def test_metrics_survive_a_torn_line_and_leave_out_what_was_made_again(tmp_path: Path) -> None:
    lines = [{"event": "start", "step": 0}, *({"step": s, "loss": 9.0} for s in (1, 2, 3))]
    again = [{"event": "start", "step": 1}, {"step": 2, "loss": 1.0}]
    text = [json.dumps(x) for x in lines] + ['{"step": 4, "lo'] + [json.dumps(x) for x in again]
    (tmp_path / "metrics.jsonl").write_text("\n".join(text) + "\n")
    assert losses(tmp_path) == {1: 9.0, 2: 1.0}


def test_the_same_command_again_changes_nothing(unbroken: tuple[dict[str, Any], Path]) -> None:
    recipe, out = unbroken
    before = (out / "metrics.jsonl").read_bytes()
    assert ls.train(recipe).loss == losses(out)[40]
    assert (out / "metrics.jsonl").read_bytes() == before


def test_another_recipe_in_the_same_folder_is_refused(unbroken: tuple[dict[str, Any], Path]) -> None:
    recipe, _ = unbroken
    with pytest.raises(SpecError, match=r"training\.learning_rate: 0\.003 → 0\.002"):
        ls.train(recipe, **{"training.learning_rate": 0.002})


def test_tokens_are_those_that_are_read(have: Have, tmp_path: Path) -> None:
    """Samples of 64 places that hold one letter each: what pads them is no token, for speed and operations neither."""
    (tmp_path / "letters").mkdir()
    for name in "abcde":
        (tmp_path / "letters" / f"{name}.txt").write_text(name)
    data = {"train": str(tmp_path / "letters"), "length": 64, "packing": "none"}
    done = ls.train(recipes_tiny.recipe(have, tmp_path / "out", data=data, training={"steps": 8, "log_every": 4}))
    size = only_size(tmp_path / "out")
    assert size < 6 and done.tokens == 8 * 4 * size
    records = [r for r in read_metrics(tmp_path / "out") if "seconds" in r]
    assert [r["tokens_per_s"] * r["seconds"] for r in records] == [pytest.approx(4 * 4 * size)] * 2
    assert done.tokens_per_s == pytest.approx(records[1]["tokens_per_s"])


@pytest.mark.parametrize("chunk", [None, 16])
def test_mfu_is_by_the_tokens_that_are_read(
    have: Have, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int | None
) -> None:
    monkeypatch.setattr(run_module, "peak_flops", lambda device, dtype: 1e12)
    (tmp_path / "letters").mkdir()
    for name in "abcde":
        (tmp_path / "letters" / f"{name}.txt").write_text(name * 7)
    data = {"train": str(tmp_path / "letters"), "length": 64, "packing": "none"}
    done = ls.train(
        recipes_tiny.recipe(
            have, tmp_path / "out", data=data, training={"steps": 8, "log_every": 4, "loss_chunk": chunk}
        )
    )
    size = only_size(tmp_path / "out")
    model, _ = ls.load(done.model, device="cpu")
    labelled = 1.0 if chunk is None else (size - 1) / size
    assert done.mfu == pytest.approx(done.tokens_per_s * work(model, size, labelled).total / 1e12)


def only_size(out: Path) -> int:
    """The tokens of a document, which all have the same."""
    (ends,) = (np.load(p) for p in (out / "tokens").glob("*/ends.npy"))
    (size,) = set(np.diff(ends, prepend=0).tolist())
    return int(size)


def test_a_mistake_before_the_first_step_does_not_hold_the_folder(have: Have, tmp_path: Path) -> None:
    recipe = recipes_tiny.recipe(have, tmp_path / "out", training={"steps": 1})
    with pytest.raises(SpecError, match="too few for data"):
        ls.train(recipe, **{"data.length": 100_000})
    assert ls.train(recipe).steps == 1


def test_changed_data_is_refused(tmp_path: Path) -> None:
    have = recipes_tiny.folder(tmp_path / "data")
    recipe = recipes_tiny.recipe(have, tmp_path / "out", training={"steps": 2})
    ls.train(recipe)
    (tmp_path / "out" / "result.json").unlink()  # as if it had been stopped
    (have["train"] / "1.txt").write_text("something else " * 500)
    with pytest.raises(LongspanError, match=r"other content of data\.train"):
        ls.train(recipe)


def test_a_folder_of_something_else_is_left_alone(have: Have, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(LongspanError, match=r"it has letter\.txt"):
        ls.train(recipes_tiny.recipe(have, tmp_path))


WORK = ("metrics.jsonl", "checkpoints", "model", "result.json")
"""What steps of a training leave; any one of them is somebody's work."""


@pytest.fixture(scope="module")
def finished(have: Have, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """A run of two steps; tests that spoil it take a copy."""
    out = tmp_path_factory.mktemp("finished") / "out"
    recipe = recipes_tiny.recipe(have, out, training={"steps": 2, "save_every": 1})
    ls.train(recipe)
    return recipe, out


def spoiled(finished: tuple[dict[str, Any], Path], place: Path, *removed: str) -> dict[str, Any]:
    """A copy of the finished run without some of its files; the recipe for it."""
    recipe, out = finished
    shutil.copytree(out, place)
    for name in removed:
        shutil.rmtree(place / name) if (place / name).is_dir() else (place / name).unlink()
    return {**recipe, "out": str(place)}


@pytest.mark.parametrize("kept", WORK)
def test_a_folder_keeps_its_recipe_as_long_as_anything_trained_is_in_it(
    finished: tuple[dict[str, Any], Path], tmp_path: Path, kept: str
) -> None:
    recipe = spoiled(finished, tmp_path / "out", "recipe.yaml", *(name for name in WORK if name != kept))
    for key, value in (("training.learning_rate", 0.002), ("model.hidden_size", 64)):
        with pytest.raises(SpecError, match=f"another recipe.*{key}"):
            ls.train(recipe, **{key: value})
    (tmp_path / "out" / "run.json").unlink()
    with pytest.raises(LongspanError, match=r"lost its run\.json"):
        ls.train(recipe)


def test_a_folder_in_which_nothing_was_trained_takes_another_recipe(
    finished: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    recipe = spoiled(finished, tmp_path / "out", *WORK)
    assert ls.train(recipe, seed=1).steps == 2
    assert yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())["seed"] == 1


def test_a_run_begun_when_its_recipe_stood_beside_run_json_goes_on(
    finished: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    recipe, place = spoiled(finished, tmp_path / "out"), tmp_path / "out" / "run.json"
    place.write_text(json.dumps({k: v for k, v in json.loads(place.read_text()).items() if k != "recipe"}))
    assert ls.train(recipe).steps == 2
    with pytest.raises(SpecError, match="another recipe"):
        ls.train(recipe, seed=1)


@pytest.mark.parametrize("content", ["", '{"steps": 2, "los', "[1]", "{}", "\xff"])
@pytest.mark.parametrize("name", ["run.json", "result.json"])
def test_a_damaged_file_is_named_with_what_to_do(
    finished: tuple[dict[str, Any], Path], tmp_path: Path, name: str, content: str
) -> None:
    recipe = spoiled(finished, tmp_path / "out")
    (tmp_path / "out" / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(LongspanError, match=rf"{name} is damaged .*; ") as caught:
        ls.train(recipe)
    assert "\n" not in str(caught.value)
    if name == "result.json":
        if content != "{}":
            with pytest.raises(LongspanError, match="is damaged"):
                training_cost(tmp_path / "out")
        (tmp_path / "out" / name).unlink()
        assert ls.train(recipe).loss == losses(finished[1])[2]  # as the error says


def test_what_can_be_made_again_is(finished: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    recipe, out = spoiled(finished, tmp_path / "out", "model"), tmp_path / "out"
    (out / "recipe.yaml").write_text("")
    with open(out / "metrics.jsonl", "ab") as file:
        file.write(b'5\n{"loss": 1}\n\xff\n[')
    (out / "checkpoints" / "checkpoint-2" / "optimizer.pt").write_bytes(b"cut")
    done = ls.train(recipe)
    assert done.resumed_from == 1 and losses(out) == losses(finished[1])
    assert all(torch.equal(w, weights(finished[1])[name]) for name, w in weights(out).items())
    assert yaml.safe_load((out / "recipe.yaml").read_text())["training"]["steps"] == 2


def test_a_folder_that_was_moved_says_where_it_is(finished: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    done = ls.train(spoiled(finished, tmp_path / "moved"))
    assert (done.out, done.model) == (str(tmp_path / "moved"), str(tmp_path / "moved" / "model"))


def test_a_result_without_a_loss_can_be_shown(
    finished: tuple[dict[str, Any], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = ls.train(spoiled(finished, tmp_path / "out", "metrics.jsonl", "result.json"))
    assert done.loss is None
    terminal(done, console())
    assert "no loss is on record" in capsys.readouterr().out


@pytest.fixture
def largest_file() -> Iterator[Callable[[int], None]]:
    """Sets how large a file may grow, in bytes, as a full disk would: until the test ends."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(("most", "file"), [(20_000, "checkpoint-8"), (90_000, "checkpoints")])
def test_a_disk_that_is_full_loses_nothing(
    have: Have, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, largest_file: Callable, most: int, file: str
) -> None:
    out, saved = tmp_path / "out", trainer.save_folder
    recipe = recipes_tiny.recipe(have, out, training={"steps": 8})

    def save(model: Any, tokenizer: Any, recipe: Any, folder: Any) -> None:
        if "checkpoint-8" in str(folder):
            largest_file(most)
        saved(model, tokenizer, recipe, folder)

    with monkeypatch.context() as patched:
        patched.setattr(trainer, "save_folder", save)
        with pytest.raises(LongspanError, match=rf"{file}.* cannot be written: .*the same command resumes") as caught:
            ls.train(recipe)
    assert "\n" not in str(caught.value)
    largest_file(resource.RLIM_INFINITY)
    names = {p.name for p in (out / "checkpoints").iterdir()}
    assert names == {"checkpoint-4"}
    assert ls.train(recipe).resumed_from == 4
    whole = {**recipe, "out": str(tmp_path / "whole")}
    ls.train(whole)
    assert losses(out) == losses(tmp_path / "whole")


def test_a_disk_without_room_is_told_before_the_first_step(
    have: Have, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = recipes_tiny.recipe(have, tmp_path / "out", training={"steps": 12}), tmp_path / "out"
    whole = sum(
        p.numel() * 4 for p in AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, vocab_size=261)).parameters()
    )
    free = [2 * 3 * whole + 3 * whole - 1]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free[0]))
    with pytest.raises(LongspanError, match=r"needed for checkpoints of .* training\.save_every=none"):
        ls.train(recipe)
    assert not losses(out)
    free[0] += 1
    ls.train(recipe)
    shutil.rmtree(out / "checkpoints" / "checkpoint-12")
    (out / "result.json").unlink()
    free[0] = 3 * whole - 1  # for the last checkpoint, in which the model fits
    with pytest.raises(LongspanError, match="needed"):
        ls.train(recipe)
    free[0] += whole + 1
    assert ls.train(recipe).resumed_from == 8


def test_micro_batches_change_nothing(have: Have, tmp_path: Path) -> None:
    made = []
    for micro in (1, 2, 4):
        out = tmp_path / str(micro)
        ls.train(recipes_tiny.recipe(have, out, data={"packing": "none"}, training={"micro_batch": micro, "steps": 4}))
        made.append(losses(out))
    for other in made[1:]:
        assert other == pytest.approx(made[0], rel=1e-5)


@pytest.mark.slow
def test_two_processes_train_as_one(have: Have, tmp_path: Path) -> None:
    outs = [tmp_path / "one", tmp_path / "two"]
    recipes = [
        recipes_tiny.recipe(
            have,
            out,
            positions=POSE,
            model={**recipes_tiny.MODEL, "max_position_embeddings": 256},
            data={"valid": str(have["valid"]), "valid_samples": 7},
            training={"steps": 8, "micro_batch": 1},
            tokenizer={"train": "bpe", "vocabulary": 270},
        )
        for out in outs
    ]
    ls.train(recipes[0])
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    process = start(recipes[1], tmp_path / "recipe.yaml", *launcher)
    try:
        said = process.communicate(timeout=120)[0].decode()
    finally:
        process.terminate()  # the launcher ends its workers on this, and would leave them on a kill
        process.wait()
    assert process.returncode == 0, said
    assert losses(outs[1]) == pytest.approx(losses(outs[0]), rel=1e-4)
    valid = [[r["valid_loss"] for r in read_metrics(out) if "valid_loss" in r] for out in outs]
    assert valid[1] == pytest.approx(valid[0], rel=1e-4)
    assert read_metrics(outs[1])[0]["devices"] == 2


# Fine-tuning


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("base") / "model", window=32)


def tuning(have: Have, out: Path, base: Path, *, steps: int = 4, **changes: Any) -> dict[str, Any]:
    made = recipes_tiny.recipe(have, out, training={"steps": steps}, **changes)
    del made["tokenizer"]
    return {**made, "model": str(base)}


def test_scaling_for_pose_ends_up_in_the_saved_model(have: Have, base: Path, tmp_path: Path) -> None:
    recipe = tuning(have, tmp_path / "out", base, positions=POSE_128)
    ls.train({**recipe, "method": "yarn"})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert model.config.rope_parameters["rope_type"] == "yarn" and model.config.rope_parameters["factor"] == 4.0
    assert model.config.max_position_embeddings == 128
    before = load_file(base / "model.safetensors")
    assert not torch.equal(weights(tmp_path / "out")["lm_head.weight"], before["lm_head.weight"])


def test_scaling_is_still_there_after_a_resume(have: Have, base: Path, tmp_path: Path) -> None:
    configs = []
    for stop in (False, True):
        out = tmp_path / str(stop)
        recipe = {**tuning(have, out, base, positions=POSE_128, steps=8), "method": "ntk:factor=4"}
        ls.train(recipe)
        if stop:  # back to the checkpoint of step 4, as if it had been killed after it
            (out / "result.json").unlink()
            shutil.rmtree(out / "checkpoints" / "checkpoint-8")
            assert ls.train(recipe).resumed_from == 4
        configs.append(json.loads((out / "model" / "config.json").read_text()))
    assert configs[0] == configs[1] and configs[0]["longspan"]["method"].startswith("ntk:factor=4")
    one, two = (weights(tmp_path / str(s)) for s in (False, True))
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_a_target_past_the_scaling_is_refused_before_anything_is_written(
    have: Have, base: Path, tmp_path: Path
) -> None:
    recipe = tuning(have, tmp_path / "out", base, positions={"kind": "pose", "target": 256})
    with pytest.raises(SpecError, match="reads 128 tokens; use method=yarn:factor=8"):
        ls.train({**recipe, "method": "ntk:factor=4"})
    with pytest.raises(SpecError, match="use method=yarn:factor=8"):
        ls.train(recipe)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("save", ["merged", "adapter"])
def test_adapters(have: Have, base: Path, tmp_path: Path, save: str) -> None:
    peft = pytest.importorskip("peft")
    out = tmp_path / "out"
    recipe = tuning(have, out, base, steps=8, lora={"rank": 2, "targets": ["q_proj", "v_proj"], "save": save})
    ls.train(recipe)
    once = losses(out)
    (out / "result.json").unlink()
    assert (out / "checkpoints" / "checkpoint-4" / "adapter_model.safetensors").is_file()
    shutil.rmtree(out / "checkpoints" / "checkpoint-8")
    done = ls.train(recipe)
    assert done.resumed_from == 4
    assert losses(out) == once
    saved = out / "model" / ("model" if save == "merged" else "adapter_model")
    assert done.parameters == sum(t.numel() for t in load_file(saved.with_suffix(".safetensors")).values())
    before = tiny.model(window=32)
    ids = torch.arange(20)[None]
    if save == "merged":
        made, _ = ls.load(out / "model", device="cpu", dtype="float32")
        assert torch.equal(made.model.layers[0].mlp.up_proj.weight, before.model.layers[0].mlp.up_proj.weight)
    else:
        made = peft.PeftModel.from_pretrained(tiny.model(window=32), out / "model")
    assert not torch.allclose(made(ids).logits, before(ids).logits)


def test_an_adapter_for_no_layer_is_refused(have: Have, base: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    with pytest.raises(SpecError, match='did you mean "q_proj"'):
        ls.train(tuning(have, tmp_path / "out", base, lora={"targets": ["qproj"]}))


def test_checkpointing_changes_nothing(have: Have, tmp_path: Path) -> None:
    made = []
    for name, more in (("plain", {}), ("checkpointed", {"gradient_checkpointing": True})):
        out = tmp_path / name
        ls.train(
            recipes_tiny.recipe(
                have, out, data={"packing": "boundaries"}, training={"steps": 3, "loss_chunk": 16, **more}
            )
        )
        made.append(losses(out))
    assert made[1] == pytest.approx(made[0], rel=1e-5)


def test_a_tokenizer_with_gaps_in_its_ids(have: Have, tmp_path: Path) -> None:
    tiny.tokenizer(gap=3).save_pretrained(tmp_path / "tokenizer")
    recipe = recipes_tiny.recipe(have, tmp_path / "out", training={"steps": 1}, tokenizer=str(tmp_path / "tokenizer"))
    with pytest.raises(SpecError, match="need 771 rows"):
        ls.train(recipe, **{"model.vocab_size": 770})
    ls.train(recipe)
    assert weights(tmp_path / "out")["model.embed_tokens.weight"].shape[0] == 5 + 3 * 255 + 1
    tiny.tokenizer(gap=300).save_pretrained(tmp_path / "wide")
    wide = AutoTokenizer.from_pretrained(tmp_path / "wide")
    assert rows_needed(wide) > 2**16 > len(wide)
    tokens = tokenise(["zz"], wide, tmp_path / "tokens", title="", show=False)
    assert tokens.document(0).tolist() == [0, *encode(wide, "zz"), 1]


def test_a_tokenizer_that_is_not_the_models_is_refused(have: Have, tmp_path: Path) -> None:
    base = tiny.folder(tmp_path / "base", window=32)
    tiny.tokenizer(gap=3).save_pretrained(base)
    with pytest.raises(LongspanError, match=r"data\.train: .* the model has 264: they do not belong together"):
        ls.train(tuning(have, tmp_path / "out", base))


@pytest.mark.parametrize("method", [ls.Gist(), ls.Landmark()])
def test_a_new_token_is_not_given_another_ones_id(method: Any) -> None:
    assert method.prepare_tokenizer(tiny.tokenizer()).id == 261
    made = tiny.tokenizer(gap=2)  # the 262nd token would be 261, which is that of a byte
    for _ in range(2):
        with pytest.raises(NotSupported, match="would be 261, which is"):
            method.prepare_tokenizer(made)


def test_half_precision_weights(have: Have, tmp_path: Path) -> None:
    ls.train(recipes_tiny.recipe(have, tmp_path / "out", training={"steps": 2, "dtype": "pure-bf16"}))
    assert weights(tmp_path / "out")["model.norm.weight"].dtype == torch.bfloat16


def test_a_training_that_comes_apart_says_so(have: Have, tmp_path: Path) -> None:
    recipe = recipes_tiny.recipe(have, tmp_path / "out", training={"learning_rate": 1e30, "clip": None})
    with pytest.raises(LongspanError, match="has diverged"):
        ls.train(recipe)


def test_batches_that_do_not_divide_are_refused_with_the_nearest(have: Have, tmp_path: Path) -> None:
    recipe = recipes_tiny.recipe(have, tmp_path / "out", training={"batch": 7, "micro_batch": 2})
    with pytest.raises(SpecError, match=r"training\.batch=8"):
        ls.train(recipe)


def test_a_task_is_trained_on_by_its_answers(have: Have, tmp_path: Path) -> None:
    data = {"train": "passkey", "valid": "passkey", "packing": "none", "length": 800, "samples": 6, "valid_samples": 2}
    out = tmp_path / "out"
    recipe = recipes_tiny.recipe(have, out, data=data, training={"steps": 3, "batch": 2, "micro_batch": 1})
    ls.train(recipe)
    assert losses(out)[3] < losses(out)[1]
    for key, value, said in (
        ("data.packing", "plain", r"use data\.packing=none"),
        ("data.train", "ppl", "no answers to learn"),
        ("data.train", "prose", r"data\.samples=6 would change nothing"),
    ):
        with pytest.raises(LongspanError, match=said):
            ls.train(recipe, **{key: value, "out": str(tmp_path / "other")})


@pytest.mark.parametrize("spec", ["stream-eval:every=1,distance=1,digits=2", "lookup:questions=3,width=1", "copy"])
def test_every_answer_of_a_sample_is_learned(have: Have, tmp_path: Path, spec: str) -> None:
    data = {"train": spec, "packing": "none", "length": 300, "samples": 4}
    recipe = recipes_tiny.recipe(have, tmp_path / "out", data=data, training={"steps": 2, "batch": 2, "micro_batch": 1})
    tokenizer, task = tiny.tokenizer(), parse_task(spec)
    tokens = task_tokens(read_recipe(recipe), "data.train", tokenizer)
    windows = TextWindows(tokens, 300, "none", 0)
    for i, sample in enumerate(task.samples(tokenizer, 300, 4, 0)):
        answers = [sample.tokens[a:b] for a, b in task.answered(sample)] + [task.answer(tokenizer, sample)]
        labels = windows.sample(i, 0)["labels"]
        assert labels[labels != IGNORE].tolist() == [t for one in answers for t in one] + [tokenizer.eos_token_id]
        assert len(answers) > 1 or spec == "copy"
    ls.train(recipe)


def test_a_hub_data_set_without_its_library_says_what_to_install(
    have: Have, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(NotSupported, match=r"longspan\[train\]"):
        ls.train(recipes_tiny.recipe(have, tmp_path / "out", data={"train": "someone/books"}))


def test_recurrent_memory_in_two_stages(have: Have, tmp_path: Path) -> None:
    """A trained model is tuned on two segments and then on four, from the weights before; it loads in another process."""
    first = recipes_tiny.recipe(have, tmp_path / "base", training={"steps": 2})
    base = ls.train(first).model
    more = {"tokenizer": None, "model": base, "method": "rmt:tokens=2,segment=12,depth=1"}
    second = recipes_tiny.recipe(have, tmp_path / "two", data={"length": 24}, **more)
    ls.train({k: v for k, v in second.items() if v is not None})
    after = {r["step"]: r["loss"] for r in read_metrics(tmp_path / "two") if "loss" in r}
    assert len(after) == 12 and after[12] < after[1]
    whole = weights(tmp_path / "two")
    for name in ("model", "checkpoints/checkpoint-12"):  # as if it had been stopped after step 8
        shutil.rmtree(tmp_path / "two" / name)
    (tmp_path / "two" / "result.json").unlink()
    assert ls.train({k: v for k, v in second.items() if v is not None}).resumed_from == 8
    again = weights(tmp_path / "two")
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    more = {"tokenizer": None, "model": str(tmp_path / "two" / "model")}
    third = recipes_tiny.recipe(have, tmp_path / "four", data={"length": 48}, training={"steps": 4}, **more)
    ls.train({k: v for k, v in third.items() if v is not None})
    code = "import sys, longspan as ls; m, _ = ls.load(sys.argv[1]); print(type(m).__name__, m.config.segment)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "four" / "model")], capture_output=True, text=True, check=True
    )
    assert done.stdout.split()[-2:] == ["RMTForCausalLM", "12"]
