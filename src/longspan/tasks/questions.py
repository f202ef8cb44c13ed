"""Short questions with one right answer each: generated, or from the user's file."""

from __future__ import annotations

import json
import random
import string
from pathlib import Path
from typing import Any, NamedTuple

from longspan.tasks.answers import WORDS
from longspan.util.errors import SpecError
from longspan.util.textfiles import read_text

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
OPPOSITES = (
    *(("hot", "cold"), ("big", "small"), ("old", "young"), ("up", "down"), ("left", "right"), ("day", "night")),
    *(("open", "closed"), ("fast", "slow"), ("wet", "dry"), ("full", "empty"), ("early", "late"), ("rich", "poor")),
)


class Question(NamedTuple):
    """A question as the prompt contains it, choices included, and its answer."""

    text: str
    answer: str


def generated(rng: random.Random) -> Question:
    """A random question of one of seven kinds that need no other knowledge."""
    return rng.choice((_sum, _larger, _letter, _day, _month, _opposite, _word))(rng)


def read_questions(name: str, task: str) -> list[Question]:
    """The questions of a JSON-lines file: objects with `question`, `answer` and, optionally, `choices`.

    The answer is one of the choices. Raises `SpecError`, which names the line, for anything else.
    """
    path = Path(name).expanduser()
    try:
        lines = read_text(path).split("\n")  # texts may hold Unicode's own line ends
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{task}: data={name} cannot be read as a file of JSON lines: {error}") from error
    found = [_read(line, f"{task}: {name}, line {i}") for i, line in enumerate(lines, start=1) if line.strip()]
    if not found:
        raise SpecError(f"{task}: data={name} has no questions in it")
    return found


def _read(line: str, where: str) -> Question:
    try:
        row: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise SpecError(f"{where} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise SpecError(f"{where} must be an object with question and answer")
    for key in ("question", "answer"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise SpecError(f"{where} needs {key}, a text that is not empty")
    text, answer, choices = row["question"].strip(), row["answer"].strip(), row.get("choices")
    if choices is None:
        return Question(text, answer)
    if not isinstance(choices, list) or not all(isinstance(c, str) for c in choices) or len(choices) > 26:
        raise SpecError(f"{where}: choices must be a list of at most 26 texts")
    choices = [c.strip() for c in choices]
    if choices.count(answer) != 1:
        raise SpecError(f"{where}: the answer, {answer!r}, must be one of the choices, spelled alike")
    letters = string.ascii_uppercase
    lettered = "".join(f"\n{letter}. {choice}" for letter, choice in zip(letters, choices, strict=False))
    return Question(text + lettered, letters[choices.index(answer)])


def _sum(rng: random.Random) -> Question:
    a, b = rng.randint(1, 9), rng.randint(1, 9)
    return Question(f"What is {a} plus {b}?", str(a + b))


def _larger(rng: random.Random) -> Question:
    a, b = rng.sample(range(10, 100), 2)
    return Question(f"Which number is larger, {a} or {b}?", str(max(a, b)))


def _letter(rng: random.Random) -> Question:
    at = rng.randrange(25)
    letters = string.ascii_uppercase
    return Question(f"Which letter comes after {letters[at]} in the alphabet?", letters[at + 1])


def _day(rng: random.Random) -> Question:
    at = rng.randrange(7)
    return Question(f"Which day comes after {DAYS[at]}?", DAYS[(at + 1) % 7])


def _month(rng: random.Random) -> Question:
    at = rng.randrange(12)
    return Question(f"Which month comes after {MONTHS[at]}?", MONTHS[(at + 1) % 12])


def _opposite(rng: random.Random) -> Question:
    word, other = rng.choice(OPPOSITES)
    return Question(f"What is the opposite of {word}?", other)


def _word(rng: random.Random) -> Question:
    words = rng.sample(WORDS, 3)
    return Question(f"What is the first word of this list: {', '.join(words)}?", words[0])
