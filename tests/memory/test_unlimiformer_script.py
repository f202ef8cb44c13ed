"""`reproductions/unlimiformer.py` on a tiny model: it reads, answers, saves, judges."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import scripts


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return scripts.load("unlimiformer")


def test_reads_answers_and_judges(
    script: ModuleType, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = {name: 1 if "layers" in name else 2 if "heads" in name else 32 for name in script.BASE}
    monkeypatch.setattr(script, "BASE", {**tiny, "vocab_size": 300, "max_position_embeddings": 64})
    monkeypatch.setattr(script, "NEW", 4)
    monkeypatch.setattr(script, "WARM", 100)
    text = tmp_path / "text.txt"
    text.write_text("The alder stood by the water. " * 20, encoding="utf-8")
    script.main([str(text), "--out", str(tmp_path / "o"), "--lengths", "200,400,900"])
    written = json.loads((tmp_path / "o" / "unlimiformer.json").read_text())
    assert [row["tokens"] for row in written["rows"]] == [200, 400, 900]
    for row in written["rows"]:
        assert row["states"] == row["tokens"] and row["store_bytes"] == row["tokens"] * 32 * 4
        assert row["saved_answers_alike"] and row["read_s"] > 0 and row["answer_s_per_token"] > 0
    assert len(written["claims"]) == 5 and written["claims"]["900 tokens are read"]
    assert "900 tokens: read in" in capsys.readouterr().out


def test_claims_can_fail(script: ModuleType) -> None:
    def row(tokens: int, read_s: float, peak: int, states: int | None = None, alike: bool = True) -> dict[str, Any]:
        return {
            "tokens": tokens,
            "states": tokens if states is None else states,
            "store_bytes": tokens,
            "read_s": read_s,
            "peak_read_bytes": peak + tokens,
            "saved_answers_alike": alike,
        }

    good = script.judge([row(1, 1, 100), row(4, 4, 100), row(16, 17, 110)], 16)
    assert len(good) == 5 and all(good.values())
    bad = script.judge([row(1, 1, 100), row(4, 4, 100, states=5), row(16, 32, 200, alike=False)], 64)
    assert len(bad) == 5 and not any(bad.values())
