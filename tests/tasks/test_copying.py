"""Copy and reverse: what is asked, symbol by symbol, and what counts as right."""

from __future__ import annotations

from typing import Any

import pytest
from oracles import broken, check_samples, digest, places, run, whole
from tasks_tiny import FakeMeter, byte_tokenizer, llama

from longspan.tasks.base import parse_task
from longspan.util.errors import SpecError


def said(task: Any, tokenizer: Any, sample: Any) -> tuple[str, str]:
    """The prompt and the right answer, as text."""
    return str(tokenizer.decode(sample.tokens)), str(tokenizer.decode(task.answer(tokenizer, sample)))


def test_copy_says_the_sequence_twice_and_reverse_from_its_end() -> None:
    tokenizer = byte_tokenizer()
    for spec, sign in (("copy", "Copy"), ("copy:copies=1", "Copy"), ("reverse", "Reverse")):
        task = parse_task(spec)
        prompt, answer = said(task, tokenizer, task.samples(tokenizer, 100, 1, 0)[0])
        sequence = prompt.removeprefix("<s>Sequence: ").removesuffix(f"\n{sign}:").split()
        assert set(sequence) <= set("abcdefgh")
        expected = {"copy": sequence * 2, "copy:copies=1": sequence, "reverse": sequence[::-1]}[spec]
        assert answer == " " + " ".join(expected)


@pytest.mark.parametrize(("spec", "share"), [("copy", 3), ("copy:copies=1", 2), ("reverse", 2), ("copy:copies=3", 4)])
def test_sequences_fill_the_length(spec: str, share: int) -> None:
    tokenizer, task = byte_tokenizer(), parse_task(spec)
    for length in (100, 371):
        for sample in check_samples(task, tokenizer, length):
            assert length - 2 * share < len(whole(task, tokenizer, sample)) <= length


def test_a_shorter_sequence_is_the_start_of_a_longer() -> None:
    tokenizer, task = byte_tokenizer(), parse_task("copy")
    short, long = (task.samples(tokenizer, n, 2, 5) for n in (100, 300))
    for a, b in zip(short, long, strict=True):
        assert b.meta["sequence"][: len(a.meta["sequence"])] == a.meta["sequence"]


def test_first_samples_stay_what_they_are() -> None:
    tokenizer = byte_tokenizer()
    found = {
        s: digest(parse_task(s), tokenizer, parse_task(s).samples(tokenizer, 200, 1, 0)[0]) for s in ("copy", "reverse")
    }
    assert found == {"copy": "db6aec3d148830f5", "reverse": "c466ccacd8562581"}


def test_symbols_count_and_not_the_tokens_they_are_made_of() -> None:
    tokenizer, task = byte_tokenizer(), parse_task("reverse")
    sample = task.samples(tokenizer, 121, 1, 0)[0]
    at = places(task, tokenizer, sample)
    number = len(sample.meta["sequence"])
    assert len(at) == 2 * number  # a space and a letter each
    outcome, meter = run(task, tokenizer, sample)
    assert (outcome.score, outcome.failed, outcome.detail["exact"]) == (1.0, False, True)
    assert sum(n for _, n in meter.calls if _ != "cache") == len(whole(task, tokenizer, sample)) - 1
    outcome, _ = run(
        task, tokenizer, sample, {at[1], at[2], at[3]}
    )  # the first letter; the second letter and its space
    assert outcome.score == pytest.approx((number - 2) / number)
    assert not outcome.detail["exact"]
    by_position = [share for share in outcome.detail["right_by_position"] if share is not None]
    assert by_position[0] == 0.0
    assert set(by_position[2:]) == {1.0}


def test_exact_match_needs_every_symbol() -> None:
    tokenizer, task = byte_tokenizer(), parse_task("copy:score=exact")
    sample = task.samples(tokenizer, 121, 1, 0)[0]
    assert run(task, tokenizer, sample)[0].score == 1.0
    outcome, _ = run(task, tokenizer, sample, places(task, tokenizer, sample)[-1:])
    assert outcome.score == 0.0
    assert outcome.detail["symbols_right"] > 0.9


def test_logits_that_are_no_numbers_are_a_failure() -> None:
    tokenizer, task = byte_tokenizer(), parse_task("copy")
    outcome = broken(task, tokenizer, task.samples(tokenizer, 100, 1, 0)[0])
    assert (outcome.score, outcome.failed) == (0.0, True)


def test_a_guess_is_right_by_chance() -> None:
    tokenizer, task = byte_tokenizer(), parse_task("copy:symbols=4,copies=1")
    outcome = task.run(llama(), tokenizer, task.samples(tokenizer, 300, 1, 0)[0], FakeMeter())
    assert outcome.detail["chance"] == 0.25
    assert outcome.score < 0.25  # a random model says no letters at all


def test_too_short_a_length_says_what_is_needed() -> None:
    tokenizer, task = byte_tokenizer(), parse_task("copy")
    with pytest.raises(SpecError, match="at least 28 tokens is needed, not 20"):
        task.samples(tokenizer, 20, 1, 0)
    assert len(whole(task, tokenizer, task.samples(tokenizer, 28, 1, 0)[0])) == 28
