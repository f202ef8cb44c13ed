"""Our own small model: it comes with the package, and methods do on it what they are for."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import longspan as ls
from longspan import models
from longspan.meter import Meter
from longspan.tasks.base import parse_task
from longspan.util import fetching

NAME = "longspan-7m"
Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@pytest.fixture(scope="module")
def small() -> Loaded:
    return models.load(NAME, device="cpu")


@cache
def _samples(length: int) -> list:
    _, tokenizer = models.load(NAME, device="cpu")
    return parse_task("ppl:text=novel").samples(tokenizer, length, 2, 0)


def loss(loaded: Loaded, length: int) -> float:
    """Nats a token in two places of the novel."""
    task, (model, tokenizer) = parse_task("ppl:text=novel"), loaded
    with torch.no_grad():
        found = [task.run(model, tokenizer, s, Meter(model.device)).score for s in _samples(length)]
    return sum(found) / len(found)


@pytest.fixture(scope="module")
def plain(small: Loaded) -> tuple[float, float]:
    return loss(small, 512), loss(small, 2048)


def test_it_needs_nothing_but_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("nothing is to be fetched")

    monkeypatch.setattr(fetching.subprocess, "run", refuse)
    monkeypatch.setenv("LONGSPAN_CACHE", str(tmp_path / "none"))
    model, tokenizer = models.load(NAME, device="cpu")
    alias, facts = models.aliases()[NAME], models.inspect_model(NAME)
    assert (facts.parameters, facts.window) == (alias.parameters, alias.window) == (model.num_parameters(), 512)
    assert len(tokenizer) == 4096 and not (tmp_path / "none").exists()
    size = sum(p.stat().st_size for p in models.ready_folder(NAME).iterdir())
    assert size < 16 * 2**20


def test_it_has_learned_and_only_its_window(plain: tuple[float, float]) -> None:
    near, far = plain
    assert near < 4.2 and far > near + 0.4


@pytest.mark.parametrize("spec", ["streaming", "window", "rerope", "leaky-rerope", "self-extend"])
def test_methods_read_past_its_window(spec: str, small: Loaded, plain: tuple[float, float]) -> None:
    model = ls.apply(small[0], spec, length=2048)
    try:
        assert loss(small, 512) < plain[0] + 0.05
        assert loss(small, 2048) < plain[0] + 0.15
    finally:
        ls.remove(model)


@pytest.mark.parametrize("spec", ["ntk", "dynamic-ntk", "yarn"])
def test_scaling_helps_some_way(spec: str, small: Loaded, plain: tuple[float, float]) -> None:
    model = ls.apply(small[0], spec, length=2048)
    try:
        assert plain[0] < loss(small, 2048) < plain[1] - 0.1
    finally:
        ls.remove(model)
