"""The reproduction of Focused Transformer: it runs at toy size, and what it says of its records is what they say."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import scripts
import tiny
from longspan.models import load_tokenizer
from longspan.tasks.base import parse_task


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return scripts.load("focused")


def records(scores: list[float]) -> list[dict[str, Any]]:
    return [
        {"id": str(i), "score": x, "failed": False, "detail": {"pairs": 100, "tokens": 1000}}
        for i, x in enumerate(scores)
    ]


@pytest.mark.parametrize(("gain", "holds"), [(0.3, True), (0.0, False), (-0.3, False)])
def test_what_holds(script: ModuleType, gain: float, holds: bool, capsys: pytest.CaptureFixture) -> None:
    one = [0.4 + 0.01 * (i % 3) for i in range(12)]
    more = [x + gain + 0.01 * (-1) ** i for i, x in enumerate(one)]
    found = {"one": {2: records(one), 16: records(one)}, "more": {2: records(more), 16: records(more)}}
    rows = script.summary(found)
    said = script.claims(rows, 8, [])
    assert list(said.values()) == [holds] and "at 16 contexts" in next(iter(said))
    script.show(rows, said, 8)
    assert ("does not hold" not in capsys.readouterr().out) == holds


@pytest.mark.parametrize(
    ("held", "peak", "holds"), [(20, 24, [True, True]), (20, 40, [True, False]), (30, 40, [False] * 2)]
)
def test_what_offload_saves(script: ModuleType, held: int, peak: int, holds: list[bool]) -> None:
    """Against what the cache of all layers holds, not against its peak."""
    rooms = [
        {"cache_gpu_bytes": size, "read_peak_gpu_bytes": most} for size, most in ((100, 500), (40, 60), (held, peak))
    ]
    said = script.claims([], 8, rooms)
    assert list(said.values()) == holds and "in use at most" in list(said)[1]
    assert not script.claims([], 8, [{"cache_gpu_bytes": None, "read_peak_gpu_bytes": None}] * 3)


def test_a_key_belongs_to_one_document(script: ModuleType) -> None:
    """Or crossbatch would show a question several values for its key, and none of them would be wrong."""
    options = script.read_options(["--out", "unused"])
    pairs = 2 * options.local // (3 * options.width)  # more than there is room for
    assert options.d * pairs / options.symbols**options.width < 0.05


def test_the_tokenizer_has_a_token_for_each_word(script: ModuleType, tmp_path: Path) -> None:
    words = load_tokenizer(str(script.tokenizer(tmp_path / "tokenizer")))
    [sample] = parse_task("lookup:questions=2,width=2").samples(words, 100, 1, 0)
    assert words.unk_token_id not in sample.tokens and words.pad_token_id not in sample.tokens
    per_pair = 2 * 2 + 3  # signs, symbols, and the line's end
    assert sample.meta["pairs"] == (100 - 1 - 2 * per_pair) // per_pair


def test_it_runs(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = str(tiny.folder(tmp_path / "tiny", window=2048))
    sizes = ["--tokens", "5000", "--first", "2", "--steps", "2", "--model", model]
    given = ["--small", "--out", str(tmp_path / "out"), "--models", str(tmp_path / "models"), *sizes]
    script.main(given)
    told = json.loads((tmp_path / "out" / "focused.json").read_text())
    assert {"command", "torch", "transformers", "claims", "table"} <= set(told)
    assert [row["method"] for row in told["room"]] == ["none", "focused:local=2k", "focused:local=2k,offload=true"]
    assert told["kept"]["same"] and told["trained"][2]["d"] == 4
    assert "same answer: True" in capsys.readouterr().out
    for name in ("room", "reread", "ask"):
        monkeypatch.setattr(script, name, lambda *given: pytest.fail("measured twice"))
    script.main(given)
    again = json.loads((tmp_path / "out" / "focused.json").read_text())
    assert again == told | {"command": again["command"]}
