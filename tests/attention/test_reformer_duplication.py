"""The duplication task of `reproductions/reformer_duplication.py`, small: the texts, what is scored, and a model that learns."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

import scripts

SMALL = [
    "--length",
    "16",
    "--symbols",
    "6",
    "--width",
    "32",
    "--heads",
    "2",
    "--chunk",
    "4",
    "--batch",
    "32",
    "--held-out",
    "2",
]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return scripts.load("reformer_duplication")


def test_texts_are_a_word_twice(script: ModuleType) -> None:
    options = script.parse(["--out", "unused", *SMALL])
    ids = script.examples(options, 3, "cpu")
    assert ids.shape == (32, 16)
    assert torch.equal(ids[:, :8], ids[:, 8:])
    assert (ids[:, 0] == 0).all()
    assert set(ids[:, 1:8].unique().tolist()) == set(range(1, 7))
    assert not torch.equal(ids, script.examples(options, 4, "cpu"))


def test_a_model_that_was_trained_copies_and_one_that_was_not_does_not(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def settings(steps: int) -> list[str]:
        sizes = [*SMALL, "--steps", str(steps), "--train", "full,2", "--learning-rate", "0.01"]
        return ["--out", str(tmp_path / str(steps)), *sizes]

    def here(hashes: str, given: list[str]) -> int:
        script.main([*given, "--one", hashes])
        return 0

    script.main(settings(1))  # each in a process of its own
    monkeypatch.setattr(script, "carry_out", here)
    script.main(settings(250))
    for steps, good in ((1, False), (250, True)):
        for hashes in ("full", "2"):
            found = json.loads((tmp_path / str(steps) / f"trained-{hashes}.json").read_text())["accuracy"]
            assert set(found) == {"full", "8", "4", "2", "1"}
            assert (found[hashes] > 0.9) == good
    with pytest.raises(SystemExit, match="other settings"):
        script.main([*settings(250), "--steps", "2", "--train", "full"])
    assert "trained with full" in capsys.readouterr().out
