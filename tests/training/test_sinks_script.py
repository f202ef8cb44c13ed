"""`reproductions/sinks.py` at toy size: it trains, streams and judges; what it streams is what one forward gives."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import recipes_tiny
import torch
import torch.nn.functional as F

import longspan as ls
import scripts
from longspan.lm import LongspanConfig, LongspanForCausalLM

SMALL = ["model.hidden_size=32", "model.head_dim=8", "model.num_hidden_layers=1", "data.length=64", "training.batch=2"]
SMALL += ["training.micro_batch=2", "training.warmup=1", "tokenizer.vocabulary=280"]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return scripts.load("sinks")


def test_trains_streams_and_judges(script: ModuleType, have: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    text = tmp_path / "text.txt"
    text.write_text(recipes_tiny.text(600, 5), encoding="utf-8")
    given = [str(text), "--train", str(have["train"]), "--models", str(tmp_path / "m"), "--out", str(tmp_path / "o")]
    given += ["--steps", "2", "--tokens", "300", "--sinks", "none,learned"]
    script.main(given + [part for item in SMALL for part in ("--set", item)])
    written = json.loads((tmp_path / "o" / "sinks.json").read_text())
    for sink in ("none", "learned"):
        found = written["models"][sink]
        assert set(found["nll_by_kept_tokens"]) == {"0", "1", "2", "4"}
        assert all(0 < loss < 20 for loss in found["nll_by_kept_tokens"].values())
        assert found["cache_tokens"] == 64 and found["steps"] == 2
    assert len(written["claims"]) == 4
    assert "sink learned" in capsys.readouterr().out


def test_losses(script: ModuleType) -> None:
    torch.manual_seed(0)
    config = LongspanConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, sink="learned")
    model, ids = LongspanForCausalLM(config).eval(), torch.randint(0, 50, (1, 200))
    with ls.applied(model, "streaming:sinks=1,window=15"), torch.no_grad():
        got = script.streamed(model, ids, 16, 64)
        logits = model(ids).logits[0, :-1]
    assert got == pytest.approx(F.cross_entropy(logits[16:], ids[0, 17:]).item(), abs=1e-5)
    with torch.no_grad():
        last = model(ids[:, 199 - 32 : 199]).logits[0, -7:]
    short = ids[:, 199 - 39 :]
    assert script.recomputed(model, short, 32) == pytest.approx(F.cross_entropy(last, ids[0, 193:]).item(), abs=1e-5)


def test_claims_can_fail(script: ModuleType) -> None:
    def of(*losses: float) -> dict[str, Any]:
        return {"nll_by_kept_tokens": dict(zip(("0", "1", "2", "4"), losses, strict=True))}

    paper = {"none": of(3.33, 2.92, 2.89, 2.89), "learned": of(7.1, 2.89, 2.89, 2.89)}
    assert len(said := script.judge(paper)) == 4 and all(said.values())
    assert not any(script.judge({"none": of(3, 3, 3, 3), "learned": of(3, 3.1, 3, 3)}).values())
    assert script.judge({"zero": of(1, 1, 1, 1)}) == {}
