"""Streams: which line is asked for, which answers count, and what a bounded cache knows of them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from oracles import broken, check_samples, digest, places, run, whole
from tasks_tiny import FakeMeter, byte_tokenizer, llama

import longspan as ls
from longspan.tasks.base import Task, parse_task
from longspan.tasks.questions import generated, read_questions
from longspan.util.errors import SpecError

SPECS = ["stream-eval", "stream-eval:every=3,distance=4,digits=2", "stream-qa"]


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    rows: list[dict[str, Any]] = [
        {
            "question": "Which gas do plants take in?",
            "answer": "carbon dioxide",
            "choices": ["oxygen", "carbon dioxide"],
        },
        {"question": "How many legs has a spider?", "answer": "eight"},
        {"question": "What melts?", "answer": "ice", "choices": ["ice", "stone", "glass", "air"]},
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return path


@pytest.mark.parametrize("spec", SPECS)
def test_streams_are_whole_turns_that_fit(spec: str) -> None:
    tokenizer, task = byte_tokenizer(), parse_task(spec)
    for length in (1300, 4000):
        for sample in check_samples(task, tokenizer, length):
            ids, spans = whole(task, tokenizer, sample), sample.meta["spans"]
            assert spans[-1] == (len(sample.tokens), len(ids))
            assert task.answered(sample) == spans[:-1]
            assert length - len(ids) < 700  # a turn more would not fit
            for start, end in spans:
                assert str(tokenizer.decode(ids[:start])).endswith("Answer:")
                assert re.fullmatch(r" \S+", str(tokenizer.decode(ids[start:end])))


@pytest.mark.parametrize("spec", SPECS)
def test_a_shorter_stream_is_the_beginning_of_a_longer(spec: str) -> None:
    tokenizer, task = byte_tokenizer(), parse_task(spec)
    short, long = (task.samples(tokenizer, n, 2, 0) for n in (1500, 9000))
    for a, b in zip(short, long, strict=True):
        ids = whole(task, tokenizer, a)
        assert b.tokens[: len(ids)] == ids
        assert b.meta["spans"][: len(a.meta["spans"])] == a.meta["spans"]


@pytest.mark.parametrize(
    ("spec", "every", "distance"), [(SPECS[0], 10, 20), (SPECS[1], 3, 4), ("stream-eval:distance=0", 10, 0)]
)
def test_the_line_asked_for_is_so_many_lines_back(spec: str, every: int, distance: int) -> None:
    tokenizer, task = byte_tokenizer(), parse_task(spec)
    sample = task.samples(tokenizer, 6000, 1, 0)[0]
    text = str(tokenizer.decode(whole(task, tokenizer, sample)))
    numbers: list[str] = []
    asked = 0
    for line in text.split("\n"):
        if found := re.fullmatch(r"Line (\d+): the number is (\d+)\.", line):
            numbers.append(found[2])
            assert int(found[1]) == len(numbers)
        elif found := re.fullmatch(r"Question: What is the number in line (\d+)\? Answer: (\d+)\.?", line):
            assert len(numbers) % every == 0
            assert int(found[1]) == len(numbers) - distance
            assert numbers[int(found[1]) - 1] == found[2]
            asked += 1
    assert asked == len(sample.meta["spans"]) > 5


def test_first_samples_stay_what_they_are() -> None:
    tokenizer = byte_tokenizer()
    found = {s: digest(parse_task(s), tokenizer, parse_task(s).samples(tokenizer, 2000, 1, 0)[0]) for s in SPECS}
    assert found == dict(zip(SPECS, ["f7d176fe4a452c04", "2c2b3c9c534c50ca", "4b28875cc7990f1c"], strict=True))


@pytest.mark.parametrize("spec", SPECS)
def test_an_answer_counts_whole_and_every_question_counts(spec: str) -> None:
    tokenizer, task = byte_tokenizer(), parse_task(spec)
    sample = task.samples(tokenizer, 3000, 1, 0)[0]
    spans = sample.meta["spans"]
    outcome, meter = run(task, tokenizer, sample)
    assert (outcome.score, outcome.failed, outcome.detail["questions"]) == (1.0, False, len(spans))
    assert sum(outcome.detail["asked_by_position"]) == len(spans)
    read = sum(n for kind, n in meter.calls if kind in ("prefill", "decode"))
    assert read == len(whole(task, tokenizer, sample))  # every token once
    outcome, _ = run(task, tokenizer, sample, {spans[0][1] - 1, spans[-1][0]})
    assert outcome.score == pytest.approx(1 - 2 / len(spans))


def test_a_collapse_is_seen_by_position() -> None:
    tokenizer, task = byte_tokenizer(), parse_task("stream-qa")
    sample = task.samples(tokenizer, 4000, 1, 0)[0]
    late = {at for at in places(task, tokenizer, sample) if at >= 2000}
    detail = run(task, tokenizer, sample, late)[0].detail
    assert {s for s in detail["right_by_position"][:16] if s is not None} == {1.0}
    assert {s for s in detail["right_by_position"][16:] if s is not None} == {0.0}


@pytest.mark.parametrize("spec", SPECS)
def test_logits_that_are_no_numbers_are_a_failure(spec: str) -> None:
    tokenizer, task = byte_tokenizer(), parse_task(spec)
    outcome = broken(task, tokenizer, task.samples(tokenizer, 1500, 1, 0)[0])
    assert (outcome.score, outcome.failed) == (0.0, True)


def test_a_streaming_cache_reads_a_stream_in_constant_memory() -> None:
    tokenizer, task, model = byte_tokenizer(), parse_task("stream-eval"), llama()
    ls.apply(model, "streaming:sinks=4,window=60")
    kept: list[int] = []
    meter = FakeMeter()
    meter.cache = lambda past: kept.append(past.layers[0].keys.shape[2])  # type: ignore[method-assign]
    sample = task.samples(tokenizer, 2500, 1, 0)[0]
    outcome = task.run(model, tokenizer, sample, meter)
    assert not outcome.failed
    assert len(kept) == len(sample.meta["spans"])
    assert set(kept) == {64}


def test_generated_questions_have_the_answers_that_they_have() -> None:
    import random

    rng, kinds = random.Random(0), set()
    for _ in range(400):
        text, answer = generated(rng)
        kinds.add(text.split()[1])
        if found := re.fullmatch(r"What is (\d+) plus (\d+)\?", text):
            assert int(answer) == int(found[1]) + int(found[2])
        elif found := re.fullmatch(r"Which number is larger, (\d+) or (\d+)\?", text):
            assert answer == max(found[1], found[2])
        elif found := re.fullmatch(r"Which letter comes after (\w) in the alphabet\?", text):
            assert ord(answer) == ord(found[1]) + 1
        elif found := re.fullmatch(r"What is the first word of this list: (\w+), \w+, \w+\?", text):
            assert answer == found[1]
        else:
            assert re.match(r"Which (day|month) comes after|What is the opposite of", text)
    assert kinds == {"is", "number", "letter", "day", "month"}


def test_a_users_questions_are_asked_again_and_again(questions: Path) -> None:
    tokenizer, task = byte_tokenizer(), parse_task(f"stream-qa:data={questions}")
    [sample] = check_samples(task, tokenizer, 2000, 1)
    text = str(tokenizer.decode(whole(task, tokenizer, sample)))
    assert "Question: Which gas do plants take in?\nA. oxygen\nB. carbon dioxide\nAnswer: B\n\nQuestion:" in text
    assert "Question: How many legs has a spider?\nAnswer: eight" in text
    parts = text.removeprefix("<s>").split("\n\n")
    assert len(parts) > 6
    for i in range(0, len(parts) - 2, 3):
        assert len(set(parts[i : i + 3])) == 3  # all of them before any again
    assert task.data_digest() != parse_task("stream-qa").data_digest() == ""


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("", "no questions in it"),
        ("{", "line 1 is not JSON"),
        ('{"question": "a", "answer": "b"}\n["a"]', "line 2 must be an object"),
        ('{"question": "a"}', "needs answer"),
        ('{"question": " ", "answer": "b"}', "needs question"),
        ('{"question": "a", "answer": "b", "choices": ["c", "d"]}', "must be one of the choices"),
        ('{"question": "a", "answer": "b", "choices": ["b", "b"]}', "must be one of the choices"),
        ('{"question": "a", "answer": "b", "choices": "bc"}', "a list of at most 26"),
    ],
)
def test_files_that_are_none_are_refused(tmp_path: Path, rows: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(rows)
    with pytest.raises(SpecError, match=message):
        parse_task(f"stream-qa:data={path}")
    with pytest.raises(SpecError, match="cannot be read"):
        read_questions(str(tmp_path / "none.jsonl"), "stream-qa")


@pytest.mark.parametrize("spec", SPECS)
def test_too_short_a_length_says_what_is_needed(spec: str) -> None:
    tokenizer, task = byte_tokenizer(), parse_task(spec)
    with pytest.raises(SpecError, match=r"at least (\d+) tokens is needed for one question") as error:
        task.samples(tokenizer, 20, 1, 0)
    least = int(re.findall(r"at least (\d+)", str(error.value))[0])
    assert isinstance(task, Task)
    assert len(whole(task, tokenizer, task.samples(tokenizer, least, 1, 0)[0])) == least
