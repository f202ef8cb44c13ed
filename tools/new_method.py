"""Writes the source file of a new method, a working example to be changed, and says what else a method of its kind needs.

    make new-method NAME=strided KIND=pattern        # or scheme, task, memory

Where the file is there already, it only says what is still missing. The lists are those that the tests compare with the
catalogue, and the guides' tables.
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


MATRIX = Entry(
    "tests/conformance/matrix.py",
    'Line("{name}:<setting>", "{name}:<setting that changes nothing>") to LINES',
    "which tests it on every model family",
)
PAGE = Entry(
    "docs/conformance.md",
    "its column and row by running `python tests/conformance/matrix.py > docs/conformance.md`",
    "which the tests hold to the results",
)
SLOTS = Entry("docs/decisions.md", "`{name}` to the table of slots", "in each row of a slot that it fills")


@dataclass(frozen=True)
class Kind:
    """What a kind of method is: the folder of its source file, the lists that the tests compare, the tables of the docs."""

    folder: str
    lists: tuple[Entry, ...]
    tables: tuple[Entry, ...]


KINDS = {
    "pattern": Kind(
        "attention",
        (
            Entry(
                "tests/lm/attentions.py", 'Line("{name}:<settings>") to LINES', "which tests it in models of our own"
            ),
            Entry("tools/survey.py", 'Entry(…, "{name}", <exponent>) to OTHERS', "with its complexity and class"),
            Entry("docs/survey.md", "its row by running `python tools/survey.py > docs/survey.md`", "as the test asks"),
            MATRIX,
            PAGE,
            SLOTS,
        ),
        (Entry("docs/attention.md", "`{name}` to the table of attentions", "with what it costs and keeps"),),
    ),
    "scheme": Kind(
        "positions",
        (Entry("tests/lm/schemes.py", 'Line("{name}") to LINES', "which tests it in models of our own"),),
        (
            Entry(
                "docs/positions.md", "`{name}` to the table of schemes", "with where it enters and how far it reaches"
            ),
        ),
    ),
    "task": Kind("tasks", (), ()),
    "memory": Kind(
        "memory", (MATRIX, PAGE, SLOTS), (Entry("docs/memory.md", "`{name}`", "with what it keeps and an example"),)
    ),
}
NOTES = {
    "pattern": "A pattern for models of our own alone derives from Pattern in place of OnTrained; it needs neither the matrix, "
    "the conformance page nor the table of slots.",
    "memory": "A method that needs a model tuned with it has its Line in TRAINED of tests/conformance/forwards.py instead.",
}
DRAWN = (
    "tests/test_method.py: if a setting refuses some values of its type, add it to `special` of `of`, with values that it takes; "
    "the test of specs draws settings from there."
)


def class_name(name: str) -> str:
    """`my-method` as a class is called."""
    return "".join(part[:1].upper() + part[1:] for part in name.split("-"))


def source(name: str, kind: str) -> str:
    """The source file of a new method: the kind's template under its name."""
    text = (TEMPLATES / f"{kind}.py").read_text(encoding="utf-8")
    return text.replace('"template"', f'"{name}"').replace("Template", class_name(name))


def place(name: str, kind: str) -> Path:
    return ROOT / "src" / "longspan" / KINDS[kind].folder / f"{name.replace('-', '_')}.py"


def missing(name: str, kind: str) -> list[str]:
    """A sentence for each line that the method still needs elsewhere."""
    return [e.sentence(name) for e in (*KINDS[kind].lists, *KINDS[kind].tables) if e.missing(name)]


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
    said += [f"  {DRAWN}"] if kind != "task" else []
    said += [NOTES[kind]] if kind in NOTES else []
    return "\n".join([*said, "docs/adding-a-method.md says what a method answers and what to test."])


if __name__ == "__main__":
    print(main(*[*sys.argv[1:], "", ""][:2]))
