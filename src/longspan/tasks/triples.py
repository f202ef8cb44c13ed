"""Instructions with inputs and outputs: generated kinds, and files in Alpaca's format."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from longspan.tasks.answers import WORDS
from longspan.util.errors import SpecError
from longspan.util.textfiles import read_text

SUFFIXES = (".json", ".jsonl")
_SYLLABLES = ("ka", "mo", "ti", "ru", "se", "lo", "na", "vi", "du", "pe", "zo", "fa")


class Triple(NamedTuple):
    """One instruction with its output; `input` may be empty; `kind` names its generator or file."""

    kind: str
    instruction: str
    input: str
    output: str


Draw = Callable[[random.Random], tuple[str, str, str]]
"""Draws instruction, input and output."""


def draw(kind: str, rng: random.Random) -> Triple:
    """A random instruction of a kind in `SEEN` or `UNSEEN`."""
    return Triple(kind, *(SEEN | UNSEEN)[kind](rng))


# Kinds. A text is some words, all different.


def _words(rng: random.Random, least: int = 3, most: int = 6) -> list[str]:
    return rng.sample(WORDS, rng.randint(least, most))


def _upper(rng: random.Random) -> tuple[str, str, str]:
    text = " ".join(_words(rng))
    said = rng.choice(("Write the text in capital letters.", "Turn every letter into a capital."))
    return said, text, text.upper()


def _title(rng: random.Random) -> tuple[str, str, str]:
    text = " ".join(_words(rng))
    said = rng.choice(("Begin every word with a capital letter.", "Write each word with a capital at its start."))
    return said, text, text.title()


def _reverse_words(rng: random.Random) -> tuple[str, str, str]:
    words = _words(rng)
    said = rng.choice(("Write the words in reverse order.", "Give the words from the last to the first."))
    return said, " ".join(words), " ".join(words[::-1])


def _reverse_letters(rng: random.Random) -> tuple[str, str, str]:
    word = rng.choice(WORDS)
    return rng.choice(("Spell the word backwards.", "Write the letters in reverse order.")), word, word[::-1]


def _count_letter(rng: random.Random) -> tuple[str, str, str]:
    text = " ".join(_words(rng))
    letter = rng.choice([c for c in text if c != " "])
    return f"How many times is the letter {letter} in the text?", text, str(text.count(letter))


def _count_words(rng: random.Random) -> tuple[str, str, str]:
    words = _words(rng, 2, 9)
    return rng.choice(("How many words are there?", "Count the words.")), " ".join(words), str(len(words))


def _nth_word(rng: random.Random) -> tuple[str, str, str]:
    words = _words(rng, 4, 7)
    at = rng.randrange(len(words))
    return rng.choice((f"Give word number {at + 1}.", f"Which word is at place {at + 1}?")), " ".join(words), words[at]


def _number(rng: random.Random) -> tuple[str, str, str]:
    words, number = _words(rng), str(rng.randint(10, 999))
    words.insert(rng.randint(0, len(words)), number)
    return rng.choice(("Which number is in the text?", "Give only the number.")), " ".join(words), number


def _translate(rng: random.Random) -> tuple[str, str, str]:
    words = _words(rng, 4, 5)
    foreign = dict(zip(words, ("".join(pair) for pair in _pairs(rng, len(words))), strict=True))
    listed = ", ".join(f"{word} is {other}" for word, other in foreign.items())
    text = rng.sample(words, 3)
    return f"Translate by this dictionary: {listed}.", " ".join(text), " ".join(foreign[w] for w in text)


def _pairs(rng: random.Random, number: int) -> list[tuple[str, str]]:
    return rng.sample([(a, b) for a in _SYLLABLES for b in _SYLLABLES], number)


def _replace(rng: random.Random) -> tuple[str, str, str]:
    words = _words(rng)
    old, new = rng.choice(words), rng.choice([w for w in WORDS if w not in words])
    return f"Replace {old} by {new}.", " ".join(words), " ".join(new if w == old else w for w in words)


def _leave_out(rng: random.Random) -> tuple[str, str, str]:
    words = _words(rng)
    gone = rng.choice(words)
    return f"Leave out the word {gone}.", " ".join(words), " ".join(w for w in words if w != gone)


def _add(rng: random.Random) -> tuple[str, str, str]:
    a, b = rng.randint(1, 50), rng.randint(1, 49)
    return rng.choice((f"Add {a} to the number.", f"What is {a} more than the number?")), str(b), str(a + b)


def _sort(rng: random.Random) -> tuple[str, str, str]:
    words = _words(rng)
    return "Put the words in alphabetical order.", " ".join(words), " ".join(sorted(words))


def _first_letters(rng: random.Random) -> tuple[str, str, str]:
    words = _words(rng)
    return "Write only the first letter of every word.", " ".join(words), " ".join(w[0] for w in words)


def _repeat(rng: random.Random) -> tuple[str, str, str]:
    text, times = " ".join(_words(rng, 1, 2)), rng.randint(2, 4)
    return f"Write the text {times} times.", text, " ".join([text] * times)


def _hyphens(rng: random.Random) -> tuple[str, str, str]:
    words = _words(rng)
    return "Join the words with hyphens.", " ".join(words), "-".join(words)


def _around(rng: random.Random) -> tuple[str, str, str]:
    words = _words(rng)
    word = rng.choice([w for w in WORDS if w not in words])
    return f"Write {word} before and after the text.", " ".join(words), " ".join([word, *words, word])


SEEN: dict[str, Draw] = {
    "upper": _upper,
    "title": _title,
    "reverse-words": _reverse_words,
    "reverse-letters": _reverse_letters,
    "count-letter": _count_letter,
    "count-words": _count_words,
    "nth-word": _nth_word,
    "number": _number,
    "translate": _translate,
    "replace": _replace,
    "leave-out": _leave_out,
    "add": _add,
}
UNSEEN: dict[str, Draw] = {
    "sort": _sort,
    "first-letters": _first_letters,
    "repeat": _repeat,
    "hyphens": _hyphens,
    "around": _around,
}


# Files


def data_files(name: str, task: str) -> list[Path]:
    """The file `name`, or the .json and .jsonl files of a folder, in order.

    Raises `SpecError` without any.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if files := sorted(p for p in path.iterdir() if p.is_file() and p.suffix in SUFFIXES):
            return files
        raise SpecError(f"{task}: data={name} is a folder without any .json or .jsonl file")
    if not path.is_file() or path.suffix not in SUFFIXES:
        raise SpecError(f"{task}: data={name} must be a .json or .jsonl file in Alpaca's format, or a folder of them")
    return [path]


def read_triples(name: str, task: str) -> list[Triple]:
    """All instructions of a file or a folder: objects with `instruction`, `output` and, optionally, `input`.

    A .json file is one list of them, a .jsonl file has one a line. Raises `SpecError`, which names the entry, for
    anything else.
    """
    found = [_triple(row, path.stem, where) for path in data_files(name, task) for row, where in _rows(path, task)]
    if not found:
        raise SpecError(f"{task}: data={name} has no instructions in it")
    return found


def _rows(path: Path, task: str) -> list[tuple[Any, str]]:
    try:
        text = read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{task}: {path} cannot be read as UTF-8 text: {error}") from error
    whole = path.suffix == ".json"
    parts = [(1, text)] if whole else [(i, x) for i, x in enumerate(text.split("\n"), start=1) if x.strip()]
    rows: list[tuple[Any, str]] = []
    for number, part in parts:
        where = f"{task}: {path}" if whole else f"{task}: {path}, line {number}"
        try:
            value = json.loads(part)
        except json.JSONDecodeError as error:
            raise SpecError(f"{where} is not JSON: {error}") from error
        if whole and not isinstance(value, list):
            raise SpecError(f"{where} must hold a list of objects; one object a line belongs into a .jsonl file")
        rows += [(row, f"{where}, entry {i}") for i, row in enumerate(value, start=1)] if whole else [(value, where)]
    return rows


def _triple(row: Any, kind: str, where: str) -> Triple:
    if not isinstance(row, dict):
        raise SpecError(f"{where} must be an object with instruction, input and output")
    for key in ("instruction", "output"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise SpecError(f"{where} needs {key}, a text that is not empty")
    input_text = row.get("input") or ""
    if not isinstance(input_text, str):
        raise SpecError(f"{where}: input must be a text")
    return Triple(kind, row["instruction"].strip(), input_text.strip(), row["output"].strip())
