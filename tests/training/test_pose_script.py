"""`reproductions/pose.py` at toy size: every kind of variant trains, is tested and is judged; what is finished is kept."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import scripts
import tiny


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return scripts.load("pose")


def test_variants(script: ModuleType, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "text.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 600)
    given = [
        "--train",
        str(text),
        "--text",
        str(text),
        "--keys",
        "8",
        "--out",
        str(tmp_path / "o"),
        "--models",
        str(tmp_path / "m"),
    ]
    model = tiny.folder(tmp_path / "base", window=512)
    given += ["--model", str(model), "--steps", "2", "--passkeys", "1", "--texts", "1"]
    names = ["yarn-x4-no-skips", "yarn-x4-full"]
    calls = []

    def here(name: str, arguments: list[str]) -> int:
        calls.append(name)
        script.main([*arguments, "--one", name])
        return 0

    monkeypatch.setattr(script, "carry_out", here)
    script.main([*given, "--variants", ",".join(names)])
    found = {name: json.loads((tmp_path / "o" / f"{name}.json").read_text()) for name in names}
    assert all(set(one["passkey"]) == {"512", "1024", "2048"} and 0 < one["nll"] < 12 for one in found.values())
    assert {one["target"] for one in found.values()} == {2048}
    padding = 3  # of the passkey among the samples, which ends before its place does
    assert {one["train_tokens"] for one in found.values() if "train_tokens" in one} == {2 * 4 * 512 - padding}
    assert found["yarn-x4-no-skips"]["recipe"]["positions"] == {"kind": "pose", "target": 2048, "skips": False}
    assert "positions" not in found["yarn-x4-full"]["recipe"]
    assert "yarn-x4: without skips it does not" in capsys.readouterr().out
    script.main([*given, "--variants", ",".join(names)])
    assert calls == names


def test_claims(script: ModuleType) -> None:
    def one(share: float, peak: float = 1e9) -> dict[str, Any]:
        return {"target": 32, "passkey": {"8": 1.0, "32": share}, "train_peak_bytes": peak}

    said = script.judge({"yarn-x4": one(0.95), "yarn-x4-no-skips": one(0.95), "yarn-x4-full": one(1.0, 3e9)})
    assert list(said.values()) == [True, False, False]
