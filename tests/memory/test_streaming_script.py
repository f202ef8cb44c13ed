"""`reproductions/streaming_llm.py` at toy size: chunks give the losses of single steps, and peers read the same tokens."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import longspan as ls
import scripts
import tiny
from longspan.bench.timings import Row

GIVEN = ["--method", "streaming:sinks=2,window=30", "--tokens", "500", "--prompt", "50", "--probe", "6"]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return scripts.load("streaming_llm")


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A text and a model, as the script takes them."""
    place = tmp_path_factory.mktemp("stream")
    (place / "a.txt").write_text("All happy families are alike. " * 5, encoding="utf-8")
    (place / "b.txt").write_text("Every unhappy family is unhappy in its own way. " * 3, encoding="utf-8")
    return [str(place / "a.txt"), str(place / "b.txt"), "--model", str(tiny.folder(place / "model")), *GIVEN]


def ran(script: ModuleType, given: list[str], out: Path, *more: str) -> dict[str, Any]:
    script.main([*given, "--out", str(out), *more])
    return json.loads((out / "streaming-sinks2-window30.json").read_text())


def test_chunks_steps_and_peers_agree(script: ModuleType, given: list[str], tmp_path: Path) -> None:
    single = ran(script, given, tmp_path / "single", "--no-peers")
    chunked = ran(script, given, tmp_path / "chunked", "--chunk", "40")
    assert single["peers"] == [] and len(single["segments"]) == 10
    for a, b in zip(single["segments"], chunked["segments"], strict=True):
        assert a["nll"] == pytest.approx(b["nll"], abs=1e-4) and a["cache_bytes"] == b["cache_bytes"]
    for name in ("first_nll", "last_nll"):
        assert single["level"][name] == pytest.approx(chunked["level"][name], abs=1e-4)
    assert single["level"]["first_nll"] == pytest.approx(single["level"]["last_nll"], rel=0.02)  # the same tokens
    found = {(r["peer"], r["at"]): r for r in chunked["peers"]}
    assert set(found) == {(peer, at) for peer in ("window recomputed", "dense cache") for at in (100, 200, 400)}
    sizes = [found["dense cache", at]["cache_bytes"] for at in (100, 200, 400)]
    assert sizes == [2 * 2 * 2 * 16 * 4 * at for at in (100, 200, 400)]
    for record in found.values():
        assert abs(record["nll"] - record["streaming_nll"]) < 1 and record["streaming_ms_per_step"] > 0


def test_a_stream_ends_as_it_begins(script: ModuleType, given: list[str]) -> None:
    _, tokenizer = ls.load(given[3])
    once = sum(len(tokenizer(Path(p).read_text())["input_ids"]) for p in given[:2])
    count = 2 * once + 2
    ids = script.tokens_of([Path(p) for p in given[:2]], tokenizer, count)[0]
    last = script.passage(count)
    assert len(ids) == count and torch.equal(ids[:10], ids[once : once + 10])
    assert count // 4 == last and torch.equal(ids[:last], ids[-last:])


def test_what_is_level(script: ModuleType) -> None:
    def said(end: float = 3.0, step: float = 1.0, size: int = 5) -> list[bool]:
        losses = torch.full((1000,), 9.0)
        losses[:50], losses[-5:] = torch.nan, torch.nan  # the prompt, and what was not read
        losses[50:250], losses[-200:-5] = 3.0, end
        records = [{"ms_per_step": 1.0, "cache_bytes": 5}] * 9 + [{"ms_per_step": step, "cache_bytes": size}]
        return list(script.level(losses, records, 50)["claims"].values())

    assert said() == [True] * 3 and said(end=3.05) == [True] * 3
    assert said(end=3.1) == [False, True, True] and said(end=2.9)[0] is False
    assert said(step=1.2) == [True, False, True] and said(size=6) == [True, True, False]


def test_peers_by_hand(script: ModuleType, given: list[str]) -> None:
    model, tokenizer = ls.load(given[3])
    ids = script.tokens_of([Path(p) for p in given[:2]], tokenizer, 350)
    assert ids.shape == (1, 350)
    with torch.no_grad():
        whole = F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
        short = model(ids[:, 101 - 32 : 101]).logits[:, -1]
    (dense,) = script.dense(model, ids, [101], 4, 100.0)
    assert dense["nll"] == pytest.approx(whole[97:101].mean().item(), abs=1e-5)
    (window,) = script.recomputed(model, ids, [101], 32, 1)
    assert window["nll"] == pytest.approx(F.cross_entropy(short, ids[:, 101]).item(), abs=1e-5)


def test_what_stops_a_peer_is_its_last_record(
    script: ModuleType, given: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = ls.load(given[3])
    ids = script.tokens_of([Path(given[0])], tokenizer, 200)
    (late,) = script.measured(script.dense(model, ids, [100, 150], 4, -1.0), "dense cache")
    assert "past" in late["note"]
    monkeypatch.setattr(script, "generate_row", lambda *given, **more: Row("", 0.001))
    rows = list(script.static(model, ids, [10, 20, 40], 4, 100.0, 20))
    assert [r["at"] for r in rows] == [10, 20, 40] and "did not come so far" in rows[2]["note"]
    (late,) = script.static(model, ids, [10, 20], 4, -1.0, 20)
    assert "past" in late["note"]

    def full() -> Any:
        yield {"peer": "dense cache", "at": 5, "ms_per_step": 1.0}
        raise torch.OutOfMemoryError("no memory")

    assert script.measured(full(), "dense cache")[-1] == {"peer": "dense cache", "note": "out of memory"}
    with pytest.raises(SystemExit, match="streaming"):
        script.main([*given, "--method", "yarn:factor=2", "--out", "unused"])
