"""The receptive field of models whose field is known, and the task on top of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tasks_tiny import SHAPE, FakeMeter, llama
from transformers import AutoModelForCausalLM, MistralConfig

from longspan.compare.statistics import independent
from longspan.tasks.base import parse_task
from longspan.tasks.receptive_field import field, gradient_norms
from longspan.util.errors import SpecError


def windowed(layers: int, window: int) -> Any:
    shape = {**SHAPE, "num_hidden_layers": layers, "initializer_range": 0.02}
    config = MistralConfig(**shape, max_position_embeddings=256, sliding_window=window)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(("layers", "window"), [(1, 9), (1, 30), (2, 9), (3, 12)])
def test_support_of_a_hard_window(layers: int, window: int) -> None:
    """(window - 1) · layers + 1 tokens move the last state, and no other."""
    norms = gradient_norms(windowed(layers, window), list(range(100)))
    reach = (window - 1) * layers + 1
    assert (norms[-reach:] > 0).all()
    assert (norms[:-reach] == 0).all()


def test_field_counts_the_newest() -> None:
    assert field(torch.tensor([0.5, 0.8, 0.995, 1.0]), 0.99) == 3
    assert field(torch.tensor([0.995, 1.0]), 0.99) == 1


def test_task(tokenizer: Any, meter: FakeMeter) -> None:
    task = parse_task("field:share=0.9,directions=2")
    samples = task.samples(tokenizer, 128, 3, 0)
    assert [len(s.tokens) for s in samples] == [128] * 3
    with torch.no_grad():  # as a worker runs it
        outcome = task.run(llama(), tokenizer, samples[0], meter)
    assert 1 < outcome.score <= 128
    share = outcome.detail["share_within"]
    assert share == sorted(share)
    assert share[-1] == pytest.approx(1.0)
    assert meter.calls == [("prefill", 128)]
    longer = task.samples(tokenizer, 256, 3, 0)
    assert longer[1].tokens[-120:] == samples[1].tokens[-120:]


@pytest.mark.parametrize("spec", ["field", "resolution", "ppl"])
def test_windows_that_overlap_count_as_fewer(spec: str, tokenizer: Any, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(97 + i * i % 25) for i in range(998)))
    task = parse_task(f"{spec}:text={text}")
    for length, known in ((100, 5.0), (400, 2.5), (1000, 1.0)):
        samples = [{"detail": s.meta} for s in task.samples(tokenizer, length, 5, 0)]
        assert independent(samples, length) == pytest.approx(known, abs=0.4 if known == 2.5 else 0.01)


@pytest.mark.parametrize("spec", ["field:share=1", "field:directions=0", "field:text=nowhere.txt"])
def test_refusals(spec: str) -> None:
    with pytest.raises(SpecError, match="field"):
        parse_task(spec)
