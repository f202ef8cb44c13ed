"""Instructions: every kind's output by another way, the split, files in Alpaca's format, loss and exact match."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from oracles import broken, check_samples, digest, places, run
from tasks_tiny import FakeMeter, byte_tokenizer, llama

from longspan.tasks.base import parse_task
from longspan.tasks.triples import SEEN, UNSEEN, Triple, draw
from longspan.util.errors import SpecError


def number_in(text: str) -> int:
    return int(re.findall(r"\d+", text)[0])


def translated(t: Triple) -> str:
    known = dict(re.findall(r"(\w+) is (\w+)", t.instruction))
    return " ".join(known[w] for w in t.input.split())


def replaced(t: Triple) -> str:
    old, new = re.findall(r"Replace (\w+) by (\w+)\.", t.instruction)[0]
    return re.sub(rf"\b{old}\b", new, t.input)


CHECKS: dict[str, Callable[[Triple], str]] = {
    "upper": lambda t: t.input.upper(),
    "title": lambda t: " ".join(w.capitalize() for w in t.input.split()),
    "reverse-words": lambda t: " ".join(reversed(t.input.split())),
    "reverse-letters": lambda t: "".join(reversed(t.input)),
    "count-letter": lambda t: str(len(re.findall(re.findall(r"letter (\w) ", t.instruction)[0], t.input))),
    "count-words": lambda t: str(len(t.input.split())),
    "nth-word": lambda t: t.input.split()[number_in(t.instruction) - 1],
    "number": lambda t: str(number_in(t.input)),
    "translate": translated,
    "replace": replaced,
    "leave-out": lambda t: " ".join(w for w in t.input.split() if w != re.findall(r"word (\w+)", t.instruction)[0]),
    "add": lambda t: str(number_in(t.instruction) + number_in(t.input)),
    "sort": lambda t: " ".join(sorted(t.input.split())),
    "first-letters": lambda t: " ".join(w[0] for w in t.input.split()),
    "repeat": lambda t: " ".join([t.input] * number_in(t.instruction)),
    "hyphens": lambda t: t.input.replace(" ", "-"),
    "around": lambda t: " ".join([(w := re.findall(r"Write (\w+) before", t.instruction)[0]), t.input, w]),
}


@pytest.mark.parametrize("kind", [*SEEN, *UNSEEN])
def test_every_kind_is_right(kind: str) -> None:
    rng = random.Random(kind)
    drawn = [draw(kind, rng) for _ in range(200)]
    for triple in drawn:
        assert triple.output == CHECKS[kind](triple)
        assert triple.instruction.endswith((".", "?"))
    assert len({(t.instruction, t.input) for t in drawn}) > 45


def test_kinds_are_enough_and_those_held_out_are_others() -> None:
    assert len(SEEN) + len(UNSEEN) >= 12
    assert not SEEN.keys() & UNSEEN.keys()
    said = [
        {re.sub(r"\d+|\b[a-z]\b", "", draw(k, random.Random(i)).instruction) for k in kinds for i in range(20)}
        for kinds in (SEEN, UNSEEN)
    ]
    assert not said[0] & said[1]


def test_prompts_have_gistings_form() -> None:
    tokenizer = byte_tokenizer()
    for spec, kinds in (("instructions", SEEN), ("instructions:split=unseen", UNSEEN)):
        task = parse_task(spec)
        for sample in check_samples(task, tokenizer, 400, len(kinds) + 3):
            text = str(tokenizer.decode(sample.tokens))
            assert re.fullmatch(r"<s>Instruction: [^\n]+\nInput: [^\n]+\nOutput:", text)
            assert sample.meta["kind"] in kinds
            head = str(tokenizer.decode(sample.tokens[: sample.meta["instruction_tokens"]]))
            assert head == text.split("\n")[0]
            assert str(tokenizer.decode(task.answer(tokenizer, sample))) == f" {sample.meta['output']}"
        found = [s.meta["kind"] for s in task.samples(tokenizer, 400, 2 * len(kinds), 0)]
        assert found == [*kinds, *kinds]


def test_first_samples_stay_what_they_are() -> None:
    tokenizer = byte_tokenizer()
    found = [
        digest(t, tokenizer, t.samples(tokenizer, 400, 9, 0)[8])
        for t in map(parse_task, ("instructions", "instructions:split=unseen"))
    ]
    assert found == ["08bf261b80069eb2", "2414e601c4fd497e"]


def test_loss_and_exact_match() -> None:
    tokenizer, task = byte_tokenizer(), parse_task("instructions")
    exact = parse_task("instructions:score=exact")
    sample = task.samples(tokenizer, 400, 1, 0)[0]
    at = places(task, tokenizer, sample)
    high = float(F.cross_entropy(torch.eye(258)[:1] * 9, torch.tensor([0])))
    low = float(F.cross_entropy(torch.eye(258)[:1] * 9, torch.tensor([1])))
    assert run(task, tokenizer, sample)[0].score == pytest.approx(high, abs=1e-5)
    outcome, _ = run(task, tokenizer, sample, at[:1])
    assert outcome.score == pytest.approx((low + high * (len(at) - 1)) / len(at), rel=1e-4)
    assert outcome.detail["exact"] is False
    assert run(exact, tokenizer, sample)[0].score == 1.0
    assert run(exact, tokenizer, sample, at[-1:])[0].score == 0.0
    assert (task.higher_is_better, exact.higher_is_better) == (False, True)
    assert (task.metric, exact.metric) == ("NLL (nats a token)", "share exact")


def test_the_loss_is_the_models(model: torch.nn.Module) -> None:
    tokenizer, task = byte_tokenizer(), parse_task("instructions")
    sample = task.samples(tokenizer, 400, 1, 0)[0]
    ids = torch.tensor([[*sample.tokens, *task.answer(tokenizer, sample)]])
    first = len(sample.tokens)
    with torch.no_grad():
        logits = llama()(ids).logits[0, first - 1 : -1]
    expected = float(F.cross_entropy(logits, ids[0, first:]))
    assert task.run(llama(), tokenizer, sample, FakeMeter()).score == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("spec", "worst"), [("instructions", 5.5529), ("instructions:score=exact", 0.0)])
def test_logits_that_are_no_numbers_are_a_failure(spec: str, worst: float) -> None:
    tokenizer, task = byte_tokenizer(), parse_task(spec)
    outcome = broken(task, tokenizer, task.samples(tokenizer, 400, 1, 0)[0])
    assert outcome.failed
    assert outcome.score == pytest.approx(worst, abs=1e-3)


ROWS = [
    {"instruction": "Name a colour.", "input": "", "output": "Red"},
    {"instruction": "Translate.", "input": "ja", "output": "yes"},
    {"instruction": "Say it at length.", "input": "x" * 300, "output": "y"},
]


@pytest.fixture
def alpaca(tmp_path: Path) -> Path:
    (tmp_path / "alpaca.json").write_text(json.dumps(ROWS))
    (tmp_path / "more.jsonl").write_text(
        "\n".join(json.dumps({**r, "instruction": f"Again: {r['instruction']}"}) for r in ROWS[:2])
    )
    (tmp_path / "README.md").write_text("not data")
    return tmp_path


def test_alpacas_format_from_a_file_and_a_folder(alpaca: Path) -> None:
    tokenizer = byte_tokenizer()
    one = parse_task(f"instructions:data={alpaca / 'alpaca.json'}").samples(tokenizer, 1000, 3, 0)
    texts = {str(tokenizer.decode(s.tokens)) for s in one}
    assert "<s>Instruction: Name a colour.\nOutput:" in texts
    assert "<s>Instruction: Translate.\nInput: ja\nOutput:" in texts
    task = parse_task(f"instructions:data={alpaca}")
    assert len({str(s.tokens) for s in check_samples(task, tokenizer, 1000, 5)}) == 5
    assert {s.meta["kind"] for s in task.samples(tokenizer, 1000, 5, 0)} == {"alpaca", "more"}
    assert task.data_digest() != parse_task(f"instructions:data={alpaca / 'alpaca.json'}").data_digest()


def test_what_is_too_long_is_left_out_and_counted(alpaca: Path) -> None:
    tokenizer, task = byte_tokenizer(), parse_task(f"instructions:data={alpaca}")
    samples = task.samples(tokenizer, 100, 4, 1)
    assert all(len(s.tokens) < 100 for s in samples)
    assert {s.meta["left_out"] for s in samples} <= {0, 1}
    assert run(task, tokenizer, samples[0])[0].detail["left_out"] in (0, 1)
    with pytest.raises(SpecError, match=r"4 of the 5 instructions in .* fit into 100 tokens, and 5 are asked for"):
        task.samples(tokenizer, 100, 5, 0)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '{"instruction": "a"}', "must hold a list"),
        ("a.json", "[", "is not JSON"),
        ("a.json", "[]", "no instructions in it"),
        ("a.json", '[{"instruction": "a", "output": "b"}, {"instruction": "a"}]', "entry 2 needs output"),
        ("a.jsonl", '{"instruction": "a", "output": "b"}\n[1]', "line 2 must be an object"),
        ("a.jsonl", '{"instruction": "a", "output": "b", "input": 3}', "input must be a text"),
    ],
)
def test_files_that_are_none_are_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(SpecError, match=message):
        parse_task(f"instructions:data={tmp_path / name}")


def test_settings_without_sense_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a")
    for spec, message in (
        ("instructions:split=test", "one of seen, unseen"),
        ("instructions:score=rouge", "one of nll, exact"),
        (f"instructions:data={tmp_path}", "without any .json or .jsonl"),
        (f"instructions:data={tmp_path / 'a.csv'}", "must be a .json or .jsonl file"),
        (f"instructions:data={tmp_path},split=seen", "with data= leave it out"),
    ):
        with pytest.raises(SpecError, match=message):
            parse_task(spec)


def test_too_short_a_length_says_what_is_needed() -> None:
    with pytest.raises(SpecError, match=r"at least \d+ tokens is needed, not 20"):
        parse_task("instructions").samples(byte_tokenizer(), 20, 1, 0)
