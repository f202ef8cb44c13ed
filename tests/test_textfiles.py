"""Byte-order marks and line ends are how files store texts: whatever is read, a model sees the same tokens."""

from __future__ import annotations

import gzip
import io
import json
import sys
from pathlib import Path

import pytest

import tiny
from longspan.cli.main import run
from longspan.core.method import parse
from longspan.tasks.questions import read_questions
from longspan.tasks.text import read_text, tokenised
from longspan.tasks.triples import read_triples
from longspan.training.recipe import read_recipe
from longspan.util import textfiles

MARK = b"\xef\xbb\xbf"
STORED = {
    "marked": lambda text: MARK + text.encode(),
    "windows": lambda text: text.replace("\n", "\r\n").encode(),
    "both": lambda text: MARK + text.replace("\n", "\r\n").encode(),
    "old": lambda text: text.replace("\n", "\r").encode(),
}
TEXT = "Grüße\n\none line\nanother\u2028still it\n"
stored = pytest.mark.parametrize("stored", STORED.values(), ids=STORED)


@stored
def test_the_text_is_what_was_written(stored, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(stored(TEXT))
    assert textfiles.read_text(tmp_path / "a") == TEXT


def test_a_mark_within_a_text_stays_and_other_encodings_are_refused() -> None:
    assert textfiles.decode(b"a" + MARK) == "a\ufeff"
    with pytest.raises(UnicodeDecodeError):
        textfiles.decode(TEXT.encode("utf-16"))


@stored
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_texts_of_tasks_and_trainings(stored, name: str, tmp_path: Path) -> None:
    data = stored(TEXT)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    (tmp_path / "plain.txt").write_bytes(TEXT.encode())
    texts = [read_text(str(tmp_path / file), "ppl") for file in (name, "plain.txt")]
    assert texts[0].documents == texts[1].documents and texts[0].sha256 == texts[1].sha256
    assert len({tuple(tokenised(tiny.tokenizer(), text).ids) for text in texts}) == 1


@stored
def test_questions_and_instructions(stored, tmp_path: Path) -> None:
    asked = [{"question": "Who\u2028came?", "answer": "she"}, {"question": "When?", "answer": "late"}]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in asked)
    (tmp_path / "questions.jsonl").write_bytes(stored(lines))
    found = read_questions(str(tmp_path / "questions.jsonl"), "stream-eval")
    assert [(q.text, q.answer) for q in found] == [(row["question"], row["answer"]) for row in asked]
    told = [{"instruction": "Say\u2028it.", "output": "it"}]
    for name, text in (("a.jsonl", json.dumps(told[0], ensure_ascii=False) + "\n"), ("a.json", json.dumps(told))):
        (tmp_path / name).write_bytes(stored(text))
        assert read_triples(str(tmp_path / name), "instructions")[0].instruction == told[0]["instruction"]


@stored
def test_factors_and_recipes(stored, tmp_path: Path) -> None:
    (tmp_path / "factors.json").write_bytes(stored("[1,\n2]\n"))
    assert parse(f"longrope:factor=2,factors={tmp_path / 'factors.json'}").methods[0].read_factors() == [1, 2]
    text = "out: o\nmodel: m\nmethod: |-\n  yarn:factor=2 +\n  streaming\ndata: {train: prose}\n"
    (tmp_path / "recipe.yaml").write_bytes(stored(text))
    assert read_recipe(tmp_path / "recipe.yaml").method == "yarn:factor=2 +\nstreaming"


@stored
def test_generate_reads_a_file_and_standard_input(
    stored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, said = tiny.folder(tmp_path / "model"), []
    (tmp_path / "a.txt").write_bytes(stored(TEXT))
    (tmp_path / "plain.txt").write_bytes(TEXT.encode())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stored(TEXT))))
    for file in (tmp_path / "a.txt", tmp_path / "plain.txt", "-"):
        assert run(["generate", str(folder), "--file", str(file), "--max-new-tokens", "2", "--json"]) == 0
        said.append(json.loads(capsys.readouterr().out))
    assert len({(made["prompt_tokens"], made["text"]) for made in said}) == 1


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", str(tmp_path), "--file", "/proc/self/mem"]) == 2
    assert "error: /proc/self/mem cannot be read: Input/output error" in capsys.readouterr().err
