"""`reproductions/landmark.py` at toy size: it trains, measures, judges, and measures nothing twice."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import scripts


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return scripts.load("landmark")


@pytest.mark.slow
def test_small(script: ModuleType, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["--small", "--out", str(tmp_path / "o"), "--models", str(tmp_path / "m"), "--train", "novel"]
    given += ["--lengths", "300", "--passkeys", "1", "--memory", "600"]
    script.main(given)
    told = json.loads((tmp_path / "o" / "landmark.json").read_text())
    found = told["results"]
    for name in ("as it was", "landmark", "per head, offload"):
        assert found[f"passkey 300, {name}"]["count"] == 1 and found[f"memory 600, {name}"]["ms_a_token"] > 0
    assert found["memory 600, per head, offload"]["cache_cpu_gb"] > 0 == found["memory 600, landmark"]["cache_cpu_gb"]
    assert found["passkey 300, 3 blocks"]["count"] == 1
    assert {"device_name", "torch", "transformers", "command"} <= told.keys() and len(told["claims"]) == 1
    assert "passkeys found at" in capsys.readouterr().out
    for name in ("passkeys", "memory", "train"):
        monkeypatch.setattr(script, name, lambda *args, **more: pytest.fail("measured twice"))
    script.main(given)


def test_judged(script: ModuleType) -> None:
    options = argparse.Namespace(lengths=[2000, 8000, 32000], memory=64, more=8)
    found = {f"passkey {n}, landmark": {"found": share} for n, share in ((2000, 0.1), (8000, 0.95), (32000, 0.85))}
    found["passkey 32000, 8 blocks"] = {"found": 0.9}
    found |= {
        f"memory 64, {name}": {"cache_device_gb": size} for name, size in (("as it was", 1), ("per head, offload", 0.2))
    }
    said = script.judge(found, options, 1000)
    assert list(said.values()) == [True, False, True, False] and "8,000" in next(iter(said))
    found["memory 64, per head, offload"]["peak_over_weights_gb"] = 0.3
    assert list(script.judge(found, options, 1000).values())[-1] is False
    found["memory 64, per head, offload"]["peak_over_weights_gb"] = 0.2
    assert list(script.judge(found, options, 1000).values())[-1] is True
