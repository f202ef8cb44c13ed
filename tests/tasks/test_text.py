"""Long text without a download, and from a user's files."""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path
from typing import Any

import pytest
from tasks_tiny import byte_tokenizer

import tiny
from longspan.core.tokens import encode
from longspan.tasks.text import Ring, check_text, read_text, tokenised
from longspan.training.data import tokenise
from longspan.util.errors import SpecError


@pytest.mark.parametrize(("name", "least", "word"), [("prose", 1_000_000, "the"), ("code", 3_000_000, "def ")])
def test_built_in_texts_are_long_and_always_the_same(name: str, least: int, word: str) -> None:
    text = read_text(name, "ppl")
    assert sum(map(len, text.documents)) > least
    assert sum(word in d for d in text.documents) > 50
    assert text.sha256 == read_text(name, "ppl").sha256
    assert text.sha256 == hashlib.sha256("".join(text.documents).encode()).hexdigest()


def test_files_folders_and_archives(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes(b"second\r\nline")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("fïrst".encode()))
    (tmp_path / "c.md").write_text("not read")
    assert read_text(str(tmp_path), "ppl").documents == ("fïrst\n\n", "second\nline\n\n")
    assert read_text(str(tmp_path / "b.txt"), "ppl").documents == ("second\nline\n\n",)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "neither a built-in text nor a file"),
        ("x.pdf", b"x", "must be a .txt or .txt.gz file"),
        ("empty.txt", b" \n", "is empty"),
        ("latin.txt", "caf\xe9".encode("latin-1"), "cannot be read as UTF-8"),
        ("broken.txt.gz", b"\x1f\x8bnothing", "cannot be read as UTF-8"),
    ],
)
def test_what_cannot_be_read(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SpecError, match=message):
        read_text(str(tmp_path / name), "ppl")


def test_a_mistyped_name_and_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match='did you mean "prose"'):
        check_text("prse", "ppl")
    with pytest.raises(SpecError, match="folder without any"):
        check_text(str(tmp_path), "ppl")


def test_a_ring_goes_on_at_its_start_and_says_when_it_is_too_short() -> None:
    ring = Ring("mine.txt", "0", list(range(10)))
    assert ring.take(7, 5, "ppl") == [7, 8, 9, 0, 1]
    assert ring.take(0, 10, "ppl") == list(range(10))
    with pytest.raises(SpecError, match=r"11 tokens of text are needed and .* has 10"):
        ring.take(0, 11, "ppl")


def test_control_tokens_in_a_text_are_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a</s>b<s>")
    made = tiny.tokenizer()
    ring = tokenised(made, read_text(str(tmp_path / "a.txt"), "ppl"))
    assert made.decode(ring.ids) == "a</s>b<s>\n\n" and not set(ring.ids) & set(made.all_special_ids)
    tokens = tokenise(["a</s>b<s>", "c"], made, tmp_path / "tokens", title="", show=False)
    assert tokens.document(0).tolist() == [0, *encode(made, "a</s>b<s>"), 1]
    assert tokens.ids.tolist().count(1) == 2  # documents end once


def test_tokens_are_made_once_for_each_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("some text")
    tokenizer, calls = byte_tokenizer(), []
    original = type(tokenizer).__call__

    def count(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(tokenizer), "__call__", count)
    text = read_text(str(tmp_path / "a.txt"), "ppl")
    first, second = tokenised(tokenizer, text), tokenised(tokenizer, text)
    assert first.ids == second.ids
    assert len(first.ids) == len("some text\n\n")
    assert len(calls) == 1
    (tmp_path / "a.txt").write_text("other")
    assert len(tokenised(tokenizer, read_text(str(tmp_path / "a.txt"), "ppl")).ids) == len("other\n\n")
