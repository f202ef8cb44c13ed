"""Tasks on the built-in model: figures that a model of its size is known to reach."""

from __future__ import annotations

import random
from typing import Any

import pytest
from tasks_tiny import FakeMeter

from longspan.core.tokens import bos_id
from longspan.hf.heads import plain_head
from longspan.models import load
from longspan.tasks.base import parse_task
from longspan.tasks.passkey import landmark_prompt

pytestmark = [pytest.mark.model, pytest.mark.slow]


@pytest.fixture(scope="module")
def built_in() -> tuple[Any, Any]:

    return load("smollm2-135m", device="cpu")


def test_prose_of_a_thousand_tokens(built_in: tuple[Any, Any]) -> None:
    model, tokenizer = built_in
    task = parse_task("ppl")
    outcome = task.run(model, tokenizer, task.samples(tokenizer, 1024, 1, 0)[0], FakeMeter())
    assert 2 < outcome.score < 3.5
    positions = outcome.detail["nll_by_position"]
    assert sum(positions[:4]) > sum(positions[-4:])
    assert 0.6 < outcome.detail["bits_per_byte"] < 1.6


@pytest.mark.parametrize("spec", ["passkey", "passkey:protocol=pi"])
def test_keys_are_found_at_600_tokens(built_in: tuple[Any, Any], spec: str) -> None:
    model, tokenizer = built_in
    task = parse_task(spec)
    outcomes = [task.run(model, tokenizer, s, FakeMeter()) for s in task.samples(tokenizer, 600, 3, 0)]
    assert [o.score for o in outcomes] == [1.0] * 3


def test_its_logits_are_a_plain_product_and_it_uses_no_bos(built_in: tuple[Any, Any]) -> None:
    model, tokenizer = built_in
    assert plain_head(model) is model.lm_head
    assert bos_id(tokenizer) is None
    assert tokenizer.bos_token not in landmark_prompt(100, random.Random(0)).text
