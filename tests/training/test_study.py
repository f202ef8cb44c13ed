"""The extrapolation study, tiny: trained, tested, drawn, and not done twice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from longspan.cli.main import run
from longspan.training import study as studies
from longspan.training.study import Curve, Settings, curves, read_results, study, table
from longspan.util.errors import NotSupported, SpecError


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    words = [
        f"{a} {b} {c}."
        for a in ("one", "two", "six")
        for b in ("owls", "crows", "jays")
        for c in ("sing", "fly", "hide")
    ]
    (tmp_path / "text.txt").write_text("\n".join(words * 60))
    return {
        "model": {
            "type": "longspan",
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": 64,
        },
        "tokenizer": {"train": "bpe", "vocabulary": 280},
        "data": {"train": str(tmp_path / "text.txt"), "length": 64},
        "training": {"steps": 4, "batch": 2},
    }


def test_study(recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    settings = Settings(("alibi", "learned"), seeds=2, times=(1, 2), samples=2, text=recipe["data"]["train"])
    folder = study(recipe, settings, tmp_path / "study", said.append)
    records = read_results(folder)
    assert len(records) == 2 * 2 * (2 * 2 + 2 + 1)
    heads, rows = table(folder)
    assert heads[1:3] == ["64", "128"]
    assert [r[0] for r in rows] == ["alibi", "learned"]
    assert rows[1][2] == "–"
    assert rows[1][3] == "does not hold"
    assert heads[-1] == "resolution at 64 / 128"
    assert rows[1][-1].endswith("/ –")
    assert (folder / "curves.png").stat().st_size > 10_000
    alibi = curves(records, "non-overlapping")[0]
    own = [r["score"] for r in records if (r["scheme"], r["protocol"], r["length"]) == ("alibi", "non-overlapping", 64)]
    assert len(own) == 2
    assert alibi.low[0] == min(own) < alibi.mean[0] < max(own) == alibi.high[0]

    lines = (folder / "results.jsonl").read_text().splitlines()
    (folder / "results.jsonl").write_text(
        "\n".join(lines[:-1]) + "\n" + lines[-1][:30]
    )  # a stop in the middle of a line
    monkeypatch.setattr(studies, "_figures", lambda *args: {"score": 1.0, "share_within": [1.0], "distances": [0]})
    study(recipe, settings, folder, said.append)
    assert len(read_results(folder)) == len(records)
    assert [r["score"] for r in read_results(folder)].count(1.0) == 1


def test_figures_of_another_model_or_other_samples_are_not_taken_for_these(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = [1.0]
    monkeypatch.setattr(studies, "_figures", lambda *args: {"score": score[0], "share_within": [1.0], "distances": [0]})

    def asked(**more: Any) -> list[float]:
        settings = Settings(("alibi",), times=(1,), text=recipe["data"]["train"], sliding=False, **more)
        folder = study(recipe, settings, tmp_path / "study", lambda text: None, seed=0, **overrides)
        return json.loads((folder / "study.json").read_text())["curves"]["non-overlapping"][0]["mean"]

    overrides: dict[str, Any] = {}
    assert asked() == [1.0]
    score[0] = 2.0
    assert asked() == [1.0]
    assert asked(samples=3) == [2.0]
    assert asked() == [1.0]
    shutil.rmtree(tmp_path / "study" / "models")
    overrides = {"training.learning_rate": 0.02}
    assert asked() == [2.0]


def test_xpos_is_read_as_its_paper_reads_it_too(recipe: dict[str, Any], tmp_path: Path) -> None:
    settings = Settings(("xpos",), times=(1, 4), samples=1, text=recipe["data"]["train"], sliding=False)
    folder = study(recipe, settings, tmp_path / "study", lambda text: None)
    plain, blockwise = curves(read_results(folder), "non-overlapping")
    assert (plain.scheme, blockwise.scheme) == ("xpos", "xpos, bca")
    assert plain.mean[1] != blockwise.mean[1] and plain.mean[0] == pytest.approx(blockwise.mean[0], abs=1e-3)
    assert [row[0] for row in table(folder)[1]] == ["xpos", "xpos, bca"]


def test_a_curve_holds_by_its_worst_length() -> None:
    assert Curve("a", "p", [1, 2, 4], [3.0, 2.9, 3.04]).holds
    assert not Curve("a", "p", [1, 2, 4], [3.0, 3.2, 2.9]).holds
    assert not Curve("a", "p", [1, 2], [3.0, None]).holds


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"schemes": ("yarn:factor=2",)}, "not one position scheme"),
        ({"schemes": ("rope", "rope")}, "once"),
        ({"times": (2, 4)}, "from 1"),
        ({"seeds": 0}, "at least 1"),
        ({"text": "nothing"}, "neither a built-in text nor a file"),
    ],
)
def test_refusals(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(SpecError, match=says):
        Settings(**wrong)


def test_what_the_last_scheme_cannot_have_is_said_before_the_first_is_trained(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    said: list[str] = []
    settings = Settings(("rope", "tupe"), text=recipe["data"]["train"])
    with pytest.raises(NotSupported, match="computes a score for every pair of positions"):
        study(recipe, settings, tmp_path / "study", said.append, **{"model.attention": "window:size=8"})
    assert not said
    assert not (tmp_path / "study").exists()


def test_command(recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    arguments = [
        "study",
        str(tmp_path / "recipe.yaml"),
        "training.steps=2",
        "-p",
        "nope",
        "--times",
        "1,2",
        "--samples",
        "1",
    ]
    arguments += ["--text", recipe["data"]["train"], "--out", str(tmp_path / "study"), "--no-sliding"]
    assert run(arguments) == 0
    assert "nope" in capsys.readouterr().out
