"""`reproductions/transformer_xl.py` at toy size: it trains twice, reads with every memory, judges, and reads in one forward."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import scripts
from longspan.lm import LongspanConfig, LongspanForCausalLM

SMALL = ["model.hidden_size=32", "model.head_dim=8", "model.num_hidden_layers=1", "data.length=64", "training.batch=2"]
SMALL += ["training.micro_batch=2", "training.warmup=1", "tokenizer.vocabulary=280"]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return scripts.load("transformer_xl")


def words(count: int, seed: int) -> str:
    draw = random.Random(seed)
    return " ".join(draw.choice(["alder", "birch", "cedar", "elm", "fir", "hazel"]) for _ in range(count)) + "."


def test_trains_reads_and_judges(script: ModuleType, tmp_path: Path, capsys: Any) -> None:
    for name, seed in (("train", 1), ("text", 2)):
        (tmp_path / f"{name}.txt").write_text(words(1500 if name == "train" else 300, seed), encoding="utf-8")
    given = [str(tmp_path / "text.txt"), "--train", str(tmp_path / "train.txt"), "--models", str(tmp_path / "m")]
    given += ["--out", str(tmp_path / "o"), "--steps", "2", "--segment", "16", "--memories", "16,32,64"]
    given += ["--tokens", "200", "--chunk", "64"]
    script.main(given + [part for item in SMALL for part in ("--set", item)])
    written = json.loads((tmp_path / "o" / "transformer_xl.json").read_text())
    for name, memory in (("recurrent", 16), ("segments", 0)):
        found = written["models"][name]
        assert found["memory"] == memory and found["steps"] == 2
        assert set(found["nll_by_memory"]) == {"16", "32", "64"} == set(found["tokens_in_reach"])
        assert len(set(found["nll_by_memory"].values())) > 1, "another memory is another loss"
    assert len(written["claims"]) == 3
    assert "recurrent" in capsys.readouterr().out


def test_losses(script: ModuleType) -> None:
    torch.manual_seed(0)
    memory = "transformer-xl:segment=8,length=24,same_length=true"
    config = LongspanConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, position="xl", memory=memory
    )
    model, ids = LongspanForCausalLM(config).eval(), torch.randint(0, 50, (1, 150))
    got = script.losses(model, ids, 50, 32)
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[0, 50:-1]
    assert got == pytest.approx(F.cross_entropy(logits, ids[0, 51:]).item(), abs=1e-5)


def test_claims_can_fail(script: ModuleType) -> None:
    def of(*by: float) -> dict[str, Any]:
        lengths = ("64", "128", "256", "512")
        return {"segment": 128, "memory": 128, "nll_by_memory": dict(zip(lengths, by, strict=True))}

    good = script.judge({"recurrent": of(4.0, 3.9, 3.8, 3.7), "segments": of(4.0, 3.9, 4.2, 4.5)})
    assert len(good) == 3 and all(good.values())
    bad = script.judge({"recurrent": of(4.0, 3.9, 3.95, 3.99), "segments": of(4.0, 3.9, 3.9, 3.9)})
    assert len(bad) == 3 and not any(bad.values())
    assert script.judge({}) == {}
