"""Writes the table of slots in docs/decisions.md: which methods for trained models fill which slot.

python tools/slots.py
"""

from __future__ import annotations

import re
from pathlib import Path

from longspan.core.method import catalogue

PAGE = Path(__file__).parents[1] / "docs" / "decisions.md"
HEAD = "| slot | filled by |\n|---|---|\n"
NOTES = {
    "span": "how many keys a query meets; `logn` counts on its growth, the others bound it or see it otherwise",
    "cross-attention": "of an encoder-decoder",
}


def table() -> str:
    """The table's rows in Markdown, a slot each, in the order of their names."""
    fills: dict[str, list[str]] = {}
    for name, cls in catalogue().items():
        if cls.__module__.startswith("longspan.") and re.search(
            "pretrained|trained model|encoder-decoders", cls.works_on
        ):
            for slot in cls.slots:
                fills.setdefault(slot, []).append(name)
    rows = []
    for slot, names in sorted(fills.items()):
        note = f" ({NOTES[slot]})" if slot in NOTES else ""
        rows.append(f"| `{slot}`{note} | {' '.join(f'`{name}`' for name in names)} |\n")
    return "".join(rows)


def renewed(page: str) -> str:
    """The page with the table of the installed catalogue."""
    before, head, after = page.partition(HEAD)
    return before + head + table() + after[re.match(r"(?:\|.*\n)*", after).end() :]  # type: ignore[union-attr]


if __name__ == "__main__":
    PAGE.write_text(renewed(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
