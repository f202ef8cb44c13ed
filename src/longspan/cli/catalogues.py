"""The commands `methods`, `tasks` and `models`: what there is to choose from."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from longspan.cli.options import Include, Json
from longspan.cli.printing import print_catalogue, print_json, print_table


def methods(
    name: Annotated[str | None, typer.Argument(help="Show one method in full.")] = None,
    as_json: Json = False,
    include: Include = None,
) -> None:
    """The catalogue: what each method fills, costs and works on."""
    from longspan.core.method import catalogue

    print_catalogue(catalogue(), name, "method", ["title", "seam", "works_on", "cost", "exportable", "paper"], as_json)


def tasks(
    name: Annotated[str | None, typer.Argument(help="Show one task in full.")] = None,
    as_json: Json = False,
    include: Include = None,
) -> None:
    """The benchmarks: what each measures and where its data comes from."""
    from longspan.tasks.base import task_catalogue

    columns = ["title", "measures", "metric", "higher_is_better", "offline", "source"]
    print_catalogue(task_catalogue(), name, "task", columns, as_json)


def models(as_json: Json = False) -> None:
    """The built-in models.

    A folder, a hub id and a .gguf file can stand wherever their names can.
    """
    from longspan.models import aliases

    known = {name: dataclasses.asdict(alias) for name, alias in aliases().items()}
    if as_json:
        return print_json(known)
    columns = ["name", "description", "parameters", "window", "download", "licence"]
    return print_table(
        columns, [[f"{a[c]:,}" if isinstance(a[c], int) else a[c] for c in columns] for a in known.values()]
    )
