"""Dictionary look-up: definitions that fit, questions for them, and which values count as found."""

from __future__ import annotations

import re
from typing import Any

import pytest
from oracles import broken, check_samples, digest, places, run, whole
from tasks_tiny import FakeMeter, byte_tokenizer, llama

from longspan.tasks.answers import WORDS
from longspan.tasks.base import parse_task
from longspan.util.errors import SpecError


def read(tokenizer: Any, ids: list[int]) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """The dictionary and the questions of a document, with each line in its form."""
    text = str(tokenizer.decode(ids)).removeprefix("<s>")
    lines = text.split("\n")
    known = [re.fullmatch(r"Key: ([a-z ]+) Value: ([a-z ]+)", x) for x in lines]
    asked = [re.fullmatch(r"Question: ([a-z ]+) Value: ([a-z ]+)", x) for x in lines]
    first = next(i for i, x in enumerate(asked) if x)
    assert all(known[:first])
    assert all(asked[first:])
    pairs = [(x[1], x[2]) for x in known if x]
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs), [(x[1], x[2]) for x in asked if x]


@pytest.mark.parametrize(
    ("spec", "questions", "width", "symbols"),
    [("lookup", 25, 4, 64), ("lookup:questions=3,width=2,symbols=20", 3, 2, 20)],
)
def test_documents_define_what_they_ask_for(spec: str, questions: int, width: int, symbols: int) -> None:
    tokenizer, task = byte_tokenizer(), parse_task(spec)
    for sample in check_samples(task, tokenizer, 5000):
        ids = whole(task, tokenizer, sample)
        known, asked = read(tokenizer, ids)
        assert len(asked) == len({key for key, _ in asked}) == questions
        assert all(known[key] == value for key, value in asked)
        words = [word for pair in known.items() for part in pair for word in part.split()]
        assert set(words) <= set(WORDS[:symbols])
        assert all(len(key.split()) == len(value.split()) == width for key, value in known.items())
        assert len(known) == sample.meta["pairs"]
        assert len(task.answered(sample)) == questions - 1
        for (start, end), (_, value) in zip(sample.meta["spans"], asked, strict=True):
            assert str(tokenizer.decode(ids[start:end])) == f" {value}"
        for at, (key, _) in zip(sample.meta["places"], asked, strict=True):
            assert str(tokenizer.decode(ids[at:])).startswith(f"Key: {key} Value: {known[key]}\n")


def test_documents_fill_the_length_and_shorter_ones_begin_longer_ones() -> None:
    tokenizer, task = byte_tokenizer(), parse_task("lookup:questions=2")
    short, long = (task.samples(tokenizer, n, 2, 0)[0] for n in (1000, 8000))
    assert len(whole(task, tokenizer, long)) > 7800
    first, all_of_them = (
        read(tokenizer, whole(task, tokenizer, short))[0],
        read(tokenizer, whole(task, tokenizer, long))[0],
    )
    assert list(all_of_them.items())[: len(first)] == list(first.items())


def test_first_samples_stay_what_they_are() -> None:
    tokenizer, task = byte_tokenizer(), parse_task("lookup")
    assert digest(task, tokenizer, task.samples(tokenizer, 4000, 1, 0)[0]) == "9411437c3d85ca60"


def test_a_value_counts_whole() -> None:
    tokenizer, task = byte_tokenizer(), parse_task("lookup:questions=5")
    sample = task.samples(tokenizer, 2000, 1, 0)[0]
    outcome, meter = run(task, tokenizer, sample)
    assert (outcome.score, outcome.failed, outcome.detail["questions"]) == (1.0, False, 5)
    assert sum(outcome.detail["asked_by_position"]) == 5
    assert meter.calls[0] == ("prefill", len(whole(task, tokenizer, sample)) - 9)
    spans = sample.meta["spans"]
    one, two = spans[0][1] - 1, spans[3][0]
    outcome, _ = run(
        task, tokenizer, sample, {one, two, spans[1][0] - 1}
    )  # the last is of a question, which nobody asks
    assert outcome.score == pytest.approx(3 / 5)
    assert outcome.detail["tokens_right"] == pytest.approx(1 - 2 / len(places(task, tokenizer, sample)))


def test_where_the_definition_stands_is_told() -> None:
    tokenizer, task = byte_tokenizer(), parse_task("lookup")
    sample = task.samples(tokenizer, 6000, 1, 0)[0]
    half = len(whole(task, tokenizer, sample)) / 4
    wrong = {s for (s, _), at in zip(sample.meta["spans"], sample.meta["places"], strict=True) if at < half}
    assert wrong
    detail = run(task, tokenizer, sample, wrong)[0].detail
    assert {s for s in detail["right_by_position"][:7] if s is not None} == {0.0}
    assert {s for s in detail["right_by_position"][9:] if s is not None} == {1.0}


def test_logits_that_are_no_numbers_are_a_failure() -> None:
    tokenizer, task = byte_tokenizer(), parse_task("lookup:questions=2")
    outcome = broken(task, tokenizer, task.samples(tokenizer, 500, 1, 0)[0])
    assert (outcome.score, outcome.failed) == (0.0, True)


def test_a_random_model_finds_nothing() -> None:
    tokenizer, task = byte_tokenizer(), parse_task("lookup:questions=2")
    outcome = task.run(llama(), tokenizer, task.samples(tokenizer, 400, 1, 0)[0], FakeMeter())
    assert (outcome.score, outcome.failed) == (0.0, False)


def test_what_does_not_fit_says_what_would() -> None:
    tokenizer = byte_tokenizer()
    with pytest.raises(SpecError, match=r"about ([\d,]+) tokens are needed") as error:
        parse_task("lookup").samples(tokenizer, 700, 1, 0)
    need = int(re.findall(r"about ([\d,]+)", str(error.value))[0].replace(",", ""))
    assert len(parse_task("lookup").samples(tokenizer, round(1.2 * need), 1, 0)) == 1
    with pytest.raises(SpecError, match="only 64 keys, too few for this length; use a larger width, such as width=2"):
        parse_task("lookup:width=1,questions=3").samples(tokenizer, 5000, 1, 0)
