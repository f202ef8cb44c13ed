"""The reproduction of gist tokens: what is judged of its records, and that held-out instructions were not trained on."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

import longspan as ls
import scripts
import tiny
from longspan.memory.gist import method as method
from longspan.tasks.base import parse_task


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return scripts.load("gist")


def found(script: ModuleType, **shift: float) -> dict[str, Any]:
    """Records of forty samples, whose loss is their number in hundredths and a shift of each mode."""
    return {
        mode: {
            "samples": {
                split: [
                    {
                        "id": str(i),
                        "nll": 1 + i / 100 + shift[mode],
                        "exact": float(i % 40 >= 40 * shift[mode] / 3),
                        "instruction_tokens": 10,
                    }
                    for i in range(40)
                ]
                for split in script.SPLITS
            },
            "cache_differs_from_mask_by": 0.0,
        }
        for mode in script.MODES
    }


@pytest.mark.parametrize(("gist", "between"), [(1.5, True), (0.05, True), (2.99, False), (-0.9, False)])
def test_between_the_controls(script: ModuleType, gist: float, between: bool, capsys: pytest.CaptureFixture) -> None:
    records = found(script, negative=3.0, gist=gist, positive=0.0)
    if gist == 2.99:  # a little better in the mean, and not by more than the scatter
        for split in script.SPLITS:
            for i, record in enumerate(records["gist"]["samples"][split]):
                record["nll"] += (-1) ** i
    told = script.summary(records, 1)
    said = script.claims(told)
    script.show(records, told, said)
    assert said["seen instructions, nll: between the controls"] is between
    assert told["seen"]["compression"] == 10
    assert ("does not hold: seen instructions, nll" in capsys.readouterr().out) is not between


def test_cache_and_mask_are_judged_alike(script: ModuleType) -> None:
    """On a tiny model: the script's own reading with the cache, and in one pass."""
    tokenizer = tiny.tokenizer()
    model = ls.apply(tiny.model(256), "gist:tokens=2", tokenizer=tokenizer)
    wanted = method.method_on(model)
    samples = parse_task("instructions").samples(tokenizer, 250, 12, 0)
    assert script.largest_difference(model, samples, wanted) < 1e-4
    records = script.judge(model, samples, wanted)
    assert [r["id"] for r in records] == [s.id for s in samples]
    one = torch.tensor([[*samples[0].tokens, *samples[0].meta["answer"]]])
    at, count = samples[0].meta["instruction_tokens"], len(samples[0].meta["answer"])
    ids = torch.cat((one[:, :at], torch.full((1, 2), wanted.id), one[:, at:]), dim=1)
    with torch.no_grad():
        logits = model(ids).logits[0, -count - 1 : -1]
    loss = torch.nn.functional.cross_entropy(logits, one[0, -count:])
    assert records[0]["nll"] == pytest.approx(loss.item(), rel=1e-4)
