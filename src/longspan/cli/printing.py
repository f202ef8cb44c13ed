"""Output of the command line: JSON for programs, tables and catalogue entries for people."""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from longspan.bench.attention import AttentionBench
    from longspan.bench.attention import Row as AttentionRow
    from longspan.bench.timings import Bench, Row

_SHORT = 16
"""Characters of a name that is never wrapped."""
_COLUMN = 14
"""Least characters of a column of a catalogue, its border included."""


def print_catalogue(known: dict[str, type], name: str | None, kind: str, columns: list[str], as_json: bool) -> None:
    """Prints a catalogue as a table, or the entry `name` in full.

    Raises `SpecError` for an unknown name.

    known: classes by name. kind: `method` or `task`. columns: class variables that the table shows.
    """
    if name is not None:
        from longspan.core.method import find

        requested, name = name, find(name, kind, known)
        if requested != name:
            typer.echo(f"{requested} is {name} here", err=True)
    if as_json:
        print_json(_describe(known[name]) if name else {n: _describe(cls) for n, cls in known.items()})
    elif name:
        _print_entry(_describe(known[name]))
    else:
        _print_entries(known, kind, columns)


def _print_entries(known: dict[str, type], kind: str, columns: list[str]) -> None:
    """A table with as many columns as fit the terminal, and a line that names the others."""
    shown = max(1, min(len(columns), (console().width - _SHORT) // _COLUMN))
    rows = [[n, *(_cell(getattr(cls, c)) for c in columns)] for n, cls in known.items()]
    print_table([kind, *columns], rows, 1 + shown)
    if left := columns[shown:]:
        names = ", ".join(c.replace("_", " ") for c in left)
        typer.echo(f"no room for {names}: longspan {kind}s NAME shows all")


def _describe(cls: Any) -> dict[str, Any]:
    """A method or a task as JSON data: class variables, other names, settings, and its docstring."""
    facts = {
        key: sorted(value) if isinstance(value, frozenset) else value
        for base in reversed(cls.__mro__)
        for key, value in vars(base).items()
        if not key.startswith("_") and isinstance(value, str | bool | int | frozenset) and key not in _settings_of(cls)
    }
    doc = cls.__doc__ or ""
    about = (
        "" if doc.startswith(f"{cls.__name__}(") else " ".join(doc.split())
    )  # not the signature that dataclass writes
    also = {"also": list(names)} if (names := getattr(cls, "also", ())) else {}
    return {**facts, **also, **_combines(cls), "settings": list(_settings_of(cls).values()), "about": about}


def _combines(cls: Any) -> dict[str, list[str]]:
    """The methods that a method can be combined with; empty for a task."""
    from longspan.core.method import Method

    if not issubclass(cls, Method):
        return {}
    from longspan.combinable import combinable

    return {"combines_with": combinable(cls)}


def _settings_of(cls: Any) -> dict[str, dict[str, Any]]:
    return {
        f.name: {"name": f.name, "type": f.type if isinstance(f.type, str) else inspect.formatannotation(f.type)}
        | ({"default": f.default} if f.default is not dataclasses.MISSING else {"required": True})
        for f in dataclasses.fields(cls)
    }


def print_json(value: Any) -> None:
    """Prints JSON, with escapes where standard output is not Unicode, so that nothing is lost."""
    takes_all = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().startswith("utf")
    typer.echo(json.dumps(value, indent=2, ensure_ascii=not takes_all, default=str))


def console() -> Console:
    """A console on standard output, 160 columns wide where it is no terminal."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160, highlight=False)


def print_table(columns: list[str], rows: list[list[str]], shown: int | None = None) -> None:
    """Prints rows of text as a table.

    `shown`: the number of columns, all if left out.
    """
    from rich.markup import escape
    from rich.table import Table

    table = Table()
    for column in columns[:shown]:
        table.add_column(column.replace("_", " "), overflow="fold")
    if max((len(row[0]) for row in rows), default=0) <= _SHORT:
        table.columns[0].no_wrap = True
    for row in rows:
        table.add_row(*map(escape, row[:shown]))
    console().print(table)


def _print_entry(entry: dict[str, Any]) -> None:
    """A method or task: one line for each fact, then for each setting."""
    settings = entry.pop("settings")
    for key, value in entry.items():
        if value != "":
            typer.echo(f"{key.replace('_', ' '):>20}  {_cell(value)}")
    for s in settings:
        default = "must be given" if s.get("required") else f"{s['default']} if left out"
        typer.echo(f"{'setting':>20}  {s['name']}: {s['type']}, {default}")


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple | frozenset) else str(value)


def print_attention(bench: AttentionBench, out: Path | None, as_json: bool) -> None:
    """Prints `bench attention` as tables or JSON, and writes `out` with a plot."""
    from longspan.util.growth import UNTOLD

    if out is not None:
        from longspan.bench.attention import draw

        bench.write(out)
        draw(bench, out.with_suffix(".png"))
    if as_json:
        print_json(bench.to_dict())
        return
    columns = ["attention", "timed as", "tokens", "way", "forward ms", "backward ms", "peak MB", "TFLOP/s", "backward"]
    print_table([*columns, "mask share"], [_attention_row(row) for row in bench.rows])
    measured = ("forward_s", "backward_s", "peak_bytes")
    growth = [[name, *(str(bench.growth(name, what) or "") for what in measured)] for name in bench.names()]
    if fitted := [line for line in growth if any(line[1:])]:
        print_table(["grows as length to the power of [95 %]", "forward", "backward", "peak"], fitted)
    if unfitted := [name for name, forward, *_ in growth if not forward]:
        typer.echo(f"grows as length to a power that is left open ({UNTOLD}): {'; '.join(unfitted)}")
    for what, rows in bench.targets().items():
        if what.startswith("at_") and rows:
            columns = [f"{int(what[3:]):,} tokens", "forward ms", "backward / forward", "TFLOP/s on visited blocks"]
            table = [[name, *(_figure(value) for value in row.values())] for name, row in rows.items()]
            print_table([*columns, "share of dense", "times faster"], table)
    for name, reason in bench.skipped.items():
        typer.echo(f"left out: {name}: {reason}")


def _attention_row(row: AttentionRow) -> list[str]:
    forward, backward = (None if t is None else f"{1e3 * t:.4g}" for t in (row.forward_s, row.backward_s))
    times = [forward or row.note, backward or (row.note if forward else "")]
    peak = "" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:,.0f}"
    rates = [_figure(row.forward_tflops), _figure(row.backward_tflops), _figure(row.mask_share)]
    kind = row.kind if row.direction == "causal" else f"{row.kind}, {row.direction}"
    return [row.name, kind, f"{row.length:,}", row.way, *times, peak, *rates]


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def print_bench(bench: Bench, out: Path | None, as_json: bool) -> None:
    """Prints `bench decode` or `bench prefill` as a table or JSON, and writes `out`."""
    if out is not None:
        from longspan.util.files import write_atomically

        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, json.dumps(bench.to_dict(), indent=1) + "\n")
    if as_json:
        return print_json(bench.to_dict())
    columns = [
        bench.what,
        f"median {bench.unit}",
        "quartiles",
        "times slower than the first",
        "first call s",
        "peak MB",
    ]
    return print_table(columns, [_bench_row(bench, row) for row in bench.rows])


def _bench_row(bench: Bench, row: Row) -> list[str]:
    quartiles = f"{row.quartiles[0]:.4g} … {row.quartiles[1]:.4g}" if row.quartiles else ""
    ratio, first, peak = bench.ratio(row), row.first_s, row.peak_bytes
    return [
        row.name,
        f"{row.seconds:.4g}" if row.seconds else row.note,
        quartiles,
        f"{ratio:.2f}" if ratio else "",
        f"{first:.3g}" if first else "",
        f"{peak / 1e6:,.0f}" if peak else "",
    ]
