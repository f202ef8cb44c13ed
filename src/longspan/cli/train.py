"""The commands `train` and `study`: one recipe, or one for every position encoding."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Annotated

import typer

from longspan.cli.options import Include, Json
from longspan.cli.printing import console, print_json, print_table

Settings = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="On top of the recipe: training.steps=200")
]


def train(
    recipe: Annotated[Path, typer.Argument(help="YAML file; docs/training.md lists its keys.")],
    settings: Settings = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what it will take.")] = False,
    as_json: Json = False,
    include: Include = None,
) -> None:
    """A model from scratch, or a longer one of a model, as a recipe says.

    The same command resumes.
    """
    from longspan import training
    from longspan.training.recipe import read_overrides, read_recipe

    request = read_recipe(recipe, read_overrides(settings or []).items())
    if dry_run:
        estimate = training.plan_training(request)
        return print_json(estimate.to_dict()) if as_json else training.estimate.terminal(estimate, console())
    result = training.train(request)
    if int(os.environ.get("RANK", "0")):
        return None
    return print_json(result.to_dict()) if as_json else training.run.terminal(result, console())


def study(
    recipe: Annotated[Path, typer.Argument(help="YAML file of a model of type longspan, as train takes it.")],
    settings: Settings = None,
    position: Annotated[
        list[str] | None, typer.Option("--position", "-p", help="Once for each scheme. Left out: all of them.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="How often each scheme is trained.")] = 1,
    times: Annotated[str, typer.Option(help="Lengths tested, as multiples of the training length.")] = "1,2,4,8,16,32",
    samples: Annotated[int, typer.Option(help="Windows of text at each length.")] = 8,
    text: Annotated[
        str, typer.Option(help="prose, code, novel, or a text file or folder that was not trained on.")
    ] = "prose",
    sliding: Annotated[bool, typer.Option(help="Measure the sliding protocol too.")] = True,
    out: Annotated[Path, typer.Option(help="Folder for the models and the results.")] = Path("runs/study"),
    as_json: Json = False,
    include: Include = None,
) -> None:
    """Every position scheme trained alike and read far past its training length.

    The same command resumes.
    """
    from longspan.training import study as studies
    from longspan.training.recipe import read_overrides
    from longspan.util.units import read_size

    multiples = tuple(read_size(part.strip(), "times") for part in times.split(","))
    request = studies.Settings(tuple(position or studies.SCHEMES), seeds, multiples, samples, text, sliding)
    say = functools.partial(typer.echo, err=True)
    folder = studies.study(recipe, request, out, say, **read_overrides(settings or []))
    if as_json:
        return print_json(json.loads((folder / "study.json").read_text(encoding="utf-8")))
    print_table(*studies.table(folder))
    return typer.echo(f"picture: {folder / 'curves.png'}")
