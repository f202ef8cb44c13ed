"""A trained method in a user's own file, that of docs/own-method.md, through every command; and a user's own type of model."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import longspan as ls
import tiny
from longspan import plugins
from longspan.cli.main import run
from longspan.compare.planning.plan import make_plan
from longspan.compare.planning.requests import Request
from longspan.core import method
from longspan.hf.parts import add_parts, parts_of
from longspan.hf.site import current
from longspan.models import inspect_model
from longspan.plugins import load_user_file
from longspan.training import plan_training
from longspan.training.recipe import read_recipe
from longspan.util.errors import LongspanError, NotSupported, SpecError

PAGE = Path(__file__).parents[1] / "docs" / "own-method.md"
SPEC = "temper:opening=4"
WRAPPER = '''
"""A model of a type of its own: a Llama whose output is scaled by one learned number."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from longspan.core.method import Method


class LouderConfig(LlamaConfig):
    model_type = "louder-llama"


class LouderForCausalLM(LlamaForCausalLM):
    config_class = LouderConfig

    def __init__(self, config):
        super().__init__(config)
        self.louder = nn.Parameter(torch.ones(1))

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * self.louder
        return out


AutoConfig.register(LouderConfig.model_type, LouderConfig, exist_ok=True)
AutoModelForCausalLM.register(LouderConfig, LouderForCausalLM, exist_ok=True)


@dataclass(frozen=True)
class Louder(Method):
    name: ClassVar[str] = "louder"
    title: ClassVar[str] = "One learned factor on the logits"
    works_on: ClassVar[str] = "a trained model that is then fine-tuned"

    def build_model(self, model):
        louder = LouderForCausalLM(LouderConfig(**model.config.to_dict()))
        louder.load_state_dict(model.state_dict(), strict=False)
        return louder.to(model.dtype)
'''


class Done(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def _registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a file registers is gone after the test, so that the next one loads it anew."""
    method.catalogue()
    for name in [n for n in sys.modules if n.startswith("longspan_user_")]:
        del sys.modules[name]
    monkeypatch.setattr(method.Method, "registry", dict(method.Method.registry))
    monkeypatch.setenv(plugins.VARIABLE, "")


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    return lambda *arguments: Done(run([str(a) for a in arguments]), *capfd.readouterr())


def example() -> str:
    code = re.search(r"<!-- example: temper\.py -->\n```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    assert code is not None
    return code[1]


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model to tune, a text, and the page's file."""
    folder = tmp_path_factory.mktemp("own")
    tiny.folder(folder / "base", window=512)
    (folder / "text.txt").write_text("alpha beta gamma delta on off up down " * 300, encoding="utf-8")
    (folder / "temper.py").write_text(example(), encoding="utf-8")
    (folder / "louder.py").write_text(WRAPPER, encoding="utf-8")
    return folder


def recipe(space: Path, out: Path, **changes: Any) -> dict[str, Any]:
    training = {"steps": 8, "batch": 4, "log_every": 1, "save_every": 4, "learning_rate": 0.05, "dtype": "fp32"}
    return {
        "out": str(out),
        "model": str(space / "base"),
        "method": SPEC,
        "data": {"train": str(space / "text.txt"), "length": 32},
        "training": {**training, **changes.pop("training", {})},
        **changes,
    }


@pytest.fixture(scope="module")
def trained(space: Path) -> Path:
    """The folder of a training with the method, run by the command in a process of its own."""
    (space / "recipe.yaml").write_text(yaml.safe_dump(recipe(space, space / "run")))
    arguments = ["train", str(space / "recipe.yaml"), "--include", str(space / "temper.py")]
    done = subprocess.run([sys.executable, "-m", "longspan", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return space / "run"


def temper(space: Path) -> ModuleType:
    return load_user_file(space / "temper.py")


def test_trained_and_saved_under_its_name(trained: Path) -> None:
    config = json.loads((trained / "model" / "config.json").read_text())
    assert config["longspan"] == {"method": SPEC, "files": ["temper.py"]}
    learned = load_file(trained / "model" / "model.safetensors")["longspan_parts.temper.log"]
    assert learned.shape == (2, 4) and learned.abs().min() > 0


def test_loaded_again_as_it_was_trained(space: Path, trained: Path) -> None:
    temper(space)
    model, tokenizer = ls.load(trained / "model", device="cpu")
    ids = tokenizer("alpha beta gamma", return_tensors="pt").input_ids
    assert current(model).spec == SPEC and parts_of(model)["temper"].open == 1.0
    bare, _ = ls.load(trained / "model", device="cpu", method="none")
    assert not parts_of(bare)
    with torch.no_grad():
        with_method, without = model(ids).logits, bare(ids).logits
        assert not torch.allclose(with_method, without)
        parts_of(model)["temper"].log.zero_()
        torch.testing.assert_close(model(ids).logits, without)
    assert model.generate(ids, max_new_tokens=3, eos_token_id=None).shape[1] == ids.shape[1] + 3


def test_a_loaded_model_saved_again_is_the_same(space: Path, trained: Path, tmp_path: Path) -> None:
    temper(space)
    model, tokenizer = ls.load(trained / "model", device="cpu")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _ = ls.load(tmp_path, device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_goes_on_where_it_was_stopped(space: Path, trained: Path, tmp_path: Path) -> None:
    temper(space)
    shutil.copytree(trained, tmp_path / "run")
    for name in ("model", "checkpoints/checkpoint-8"):
        shutil.rmtree(tmp_path / "run" / name)
    (tmp_path / "run" / "result.json").unlink()
    done = ls.train(recipe(space, tmp_path / "run"))
    assert done.resumed_from == 4
    first, second = (load_file(folder / "model" / "model.safetensors") for folder in (trained, tmp_path / "run"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    configs = [json.loads((folder / "model" / "config.json").read_text()) for folder in (trained, tmp_path / "run")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"training": {"steps": 2, "log_every": 1, "save_every": None}}, "temper:opening=2"),
        ({"lora": {"rank": 2}}, "lora: .* parameters that temper adds"),
    ],
)
def test_recipes_that_cannot_teach_it_are_refused(
    space: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    temper(space)
    with pytest.raises(SpecError, match=said):
        ls.train(recipe(space, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_planned(space: Path, trained: Path, command: Callable[..., Done]) -> None:
    temper(space)
    with_method, without = (
        plan_training(read_recipe(recipe(space, space / "plan", method=spec))) for spec in (SPEC, None)
    )
    assert with_method.method == SPEC and with_method.parameters == without.parameters + 2 * 4
    done = command(
        "plan",
        trained / "model",
        "-l",
        "64",
        "-m",
        "temper",
        "--dtype",
        "fp32",
        "--json",
        "--include",
        space / "temper.py",
    )
    planned = json.loads(done.out)
    assert planned["method"] == "temper" and planned["needs"]["weights"] == 4 * (planned["parameters"] + 2 * 4)


def test_compared_and_reported(
    space: Path, trained: Path, tmp_path: Path, command: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    include = ("--include", space / "temper.py")
    arguments = ("-t", "passkey", "-l", "512", "--samples", "1", "--out", tmp_path / "run", "--json")
    done = command("compare", space / "base", "-m", trained, *arguments, *include)
    assert done.code == 0, done.err
    report = json.loads(done.out)
    rows = [row for row in report["rows"] if row["method"] == str(trained)]
    assert rows and all(row["status"] == "ok" for row in rows)
    assert any("8 temperatures were trained" in note for note in report["advice"]["notes"])
    monkeypatch.setenv(plugins.VARIABLE, "")
    assert command("report", tmp_path / "run").code == 0
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert f"LlamaForCausalLM with {SPEC}" in page and "8 temperatures were trained" in page


def test_a_changed_file_is_another_measurement(space: Path, trained: Path) -> None:
    temper(space)
    keys = []
    for code in (example(), example().replace("opens over", "opens during")):
        (space / "temper.py").write_text(code, encoding="utf-8")
        request = Request(str(space / "base"), methods=[str(trained)], tasks=["passkey"], lengths=[512])
        keys.append({c.spec: c.key for c in make_plan(request).cells()})
    assert keys[0][str(trained)] != keys[1][str(trained)] and keys[0]["none"] == keys[1]["none"]


def test_export_is_refused_with_its_own_reason(
    space: Path, trained: Path, tmp_path: Path, command: Callable[..., Done]
) -> None:
    include = ("--include", space / "temper.py")
    done = command("apply", trained / "model", SPEC, "--out", tmp_path / "out", *include)
    assert done.code == 2 and "its temperatures act inside attention" in done.err
    assert not (tmp_path / "out").exists()
    assert command("apply", trained / "model", "none", "--out", tmp_path / "out", *include).code == 0
    assert not [name for name in load_file(tmp_path / "out" / "model.safetensors") if "temper" in name]


def test_without_the_file_it_is_said_which_to_include(
    space: Path, trained: Path, tmp_path: Path, command: Callable[..., Done]
) -> None:
    for arguments in (
        ("generate", trained / "model", "--prompt", "a"),
        ("compare", space / "base", "-m", trained, "--out", tmp_path / "run"),
    ):
        done = command(*arguments)
        assert done.code == 2 and "temper is not loaded" in done.err and "--include temper.py" in done.err
    assert ls.load(trained / "model", device="cpu", method="none")


def test_other_settings_and_untrained_models(space: Path, trained: Path, tmp_path: Path) -> None:
    temper(space)
    model, _ = ls.load(space / "base", device="cpu")
    with pytest.raises(NotSupported, match="was not trained with it"):
        ls.apply(model, "temper")
    add_parts(model, method.parse("temper"), inspect_model(space / "base"))
    assert ls.apply(model, "temper") is model
    shutil.copytree(trained / "model", tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["longspan_parts.temper.log"] = torch.zeros(3, 4)
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    with pytest.raises(NotSupported, match="do not fit"):
        ls.load(tmp_path / "model", device="cpu")


def test_a_model_type_of_a_users_own(space: Path, tmp_path: Path, command: Callable[..., Done]) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe(space, tmp_path / "run", method="louder")))
    arguments = [
        "train",
        str(tmp_path / "recipe.yaml"),
        "training.loss_chunk=none",
        "--include",
        str(space / "louder.py"),
    ]
    done = subprocess.run([sys.executable, "-m", "longspan", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert config["model_type"] == "louder-llama" and config["longspan"] == {
        "built_by": "louder",
        "files": ["louder.py"],
    }
    with pytest.raises(LongspanError, match=r"'louder-llama', built by louder; .* --include louder.py"):
        ls.load(tmp_path / "run" / "model", device="cpu")
    load_user_file(space / "louder.py")
    model, _ = ls.load(tmp_path / "run" / "model", device="cpu")
    assert type(model).__name__ == "LouderForCausalLM" and float(model.louder.detach()) != 1.0
    shutil.rmtree(tmp_path / "run" / "model")
    (tmp_path / "run" / "result.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "checkpoint-8")
    again = recipe(space, tmp_path / "run", method="louder", training={"loss_chunk": None})
    assert ls.train(again).resumed_from == 4
    assert json.loads((tmp_path / "run" / "model" / "config.json").read_text()) == config


TWICE = '''
"""Queries times two, on every input."""

from dataclasses import dataclass
from typing import ClassVar

from longspan.core.method import Method


@dataclass(frozen=True)
class Twice(Method):
    name: ClassVar[str] = "twice"
    title: ClassVar[str] = "Queries times two"
    slots: ClassVar[frozenset[str]] = frozenset({"queries"})

    def attach(self, site):
        site.scale_queries(self.scale)

    def scale(self, call):
        return call.query.new_full((), 2)


@dataclass(frozen=True)
class TwiceInside(Method):
    name: ClassVar[str] = "twice-inside"
    title: ClassVar[str] = "Scores times two"
    slots: ClassVar[frozenset[str]] = frozenset({"attention"})

    def attach(self, site):
        site.attention(self.attend)

    def attend(self, call):
        from longspan.engine.core import attention

        mask = call.query.new_ones(call.query.shape[2], call.key.shape[2]).tril(call.key.shape[2] - call.query.shape[2]).bool()
        return attention(call.query * 2, call.key, call.value, mask, call.scale)
'''


@torch.no_grad()
@pytest.mark.parametrize("beside", ["window:size=64", "twice-inside"])
def test_scaled_queries_beside_a_method_of_attention(beside: str, tmp_path: Path) -> None:
    """Both change every input, or one does: each is tried without the other's trial in its way, and both come off again."""
    (tmp_path / "twice.py").write_text(TWICE)
    ids, model = torch.arange(5, 25)[None], tiny.model()
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight *= 20
    before = model(ids).logits
    try:
        load_user_file(tmp_path / "twice.py")
        ls.apply(model, f"{beside} + twice")
        after = model(ids).logits
        ls.remove(model)
    finally:
        for name in ("twice", "twice-inside"):
            method.Method.registry.pop(name, None)
    assert torch.equal(model(ids).logits, before)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight *= 4 if beside == "twice-inside" else 2
    torch.testing.assert_close(after, model(ids).logits, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(after, before, rtol=1e-3)
