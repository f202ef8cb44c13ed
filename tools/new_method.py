"""Writes the source file of a new method, a working example to be changed, and says what else a method of its kind needs.

    make new-method NAME=strided KIND=pattern        # or scheme, task, memory

Where the file is there already, it only says what is still missing. The tests of all methods take a file up by themselves.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Entry:
    """A line that a method needs in another file. `add` says it, with {name} for the method's; `why` says what it is for."""

    path: str
    add: str
    why: str

    def missing(self, name: str) -> bool:
        """Whether the file does not name the method yet. Raises `FileNotFoundError` where the list has moved."""
        return re.search(rf"""["`]{re.escape(name)}["`:]""", (ROOT / self.path).read_text(encoding="utf-8")) is None

    def sentence(self, name: str) -> str:
        return f"{self.path}: add {self.add.format(name=name)}, {self.why}."


@dataclass(frozen=True)
class Kind:
    """What a kind of method is: the folder of its source file, and the tables of the documentation that are written by hand."""

    folder: str
    tables: tuple[Entry, ...]


KINDS = {
    "pattern": Kind(
        "attention",
        (Entry("docs/attention.md", "`{name}` to the table of attentions", "with its cost and cache"),),
    ),
    "scheme": Kind(
        "positions",
        (
            Entry(
                "docs/positions.md", "`{name}` to the table of schemes", "with where it enters and how far it reaches"
            ),
        ),
    ),
    "task": Kind("tasks", ()),
    "memory": Kind("memory", (Entry("docs/memory.md", "`{name}`", "with what it keeps and an example"),)),
}
NOTES = {
    "task": "No test draws from a task by itself: write tests/tasks/test_NAME.py. `answer` makes it one to train on.",
    "pattern": "Run `make tables`. A pattern for models of our own alone derives from Pattern in place of OnTrained.",
    "memory": "Run `make tables`. A method that needs a tuned model has a line in TRAINED of tests/conformance/forwards.py.",
    "scheme": "A scheme that is not relative, has an end, or is not for encoders has a line in tests/lm/schemes.py that says so.",
}


def class_name(name: str) -> str:
    """`my-method` as a class is called."""
    return "".join(part[:1].upper() + part[1:] for part in name.split("-"))


def source(name: str, kind: str) -> str:
    """The source file of a new method: the kind's template under its name."""
    text = (TEMPLATES / f"{kind}.py").read_text(encoding="utf-8")
    return re.sub('"template(?=[":])', f'"{name}', text).replace("Template", class_name(name))


def place(name: str, kind: str) -> Path:
    return ROOT / "src" / "longspan" / KINDS[kind].folder / f"{name.replace('-', '_')}.py"


def missing(name: str, kind: str) -> list[str]:
    """A sentence for each line that the method still needs elsewhere."""
    return [e.sentence(name) for e in KINDS[kind].tables if e.missing(name)]


def main(name: str, kind: str) -> str:
    """Writes the file, unless it is there, and returns what is to be done next. Ends the program where the request is wrong."""
    if kind not in KINDS:
        sys.exit(f"KIND must be one of {', '.join(KINDS)}, not {kind!r}: make new-method NAME=strided KIND=pattern")
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        sys.exit(f"NAME is written in small letters, digits and hyphens, such as strided or self-extend, not {name!r}")
    path = place(name, kind)
    said = [f"{path.relative_to(ROOT)} is there."]
    if not path.exists():
        path.write_text(source(name, kind), encoding="utf-8")
        said = [
            f"{path.relative_to(ROOT)} is written and works: change its docstring, title, paper, settings and rule."
        ]
    wanted = missing(name, kind)
    said += ["Still missing:", *(f"  {line}" for line in wanted)] if wanted else ["Nothing else is missing."]
    said += [NOTES[kind]] if kind in NOTES else []
    return "\n".join([*said, "docs/adding-a-method.md says what a method answers and what to test."])


if __name__ == "__main__":
    print(main(*[*sys.argv[1:], "", ""][:2]))
