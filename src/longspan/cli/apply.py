"""The command `apply`: a checkpoint with a method in it, which plain transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from longspan.cli.options import Include, Json, Model, token_count
from longspan.cli.printing import print_json


def apply(
    model: Model,
    method: Annotated[str, typer.Argument(help="Spec of a method that a checkpoint can hold.")],
    out: Annotated[Path, typer.Option(help="Folder of the new model.")],
    length: Annotated[str | None, typer.Option("--length", "-l", help="Target length, like 32k.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a model that is in the folder.")] = False,
    dtype: Annotated[str | None, typer.Option(help="Of the saved weights. Left out: the model's own.")] = None,
    as_json: Json = False,
    include: Include = None,
) -> None:
    """Saves a model that plain transformers loads."""
    from longspan.export import export

    target = None if length is None else token_count(length)
    saved = export(model, method, out, length=target, dtype=dtype, overwrite=overwrite)
    if as_json:
        return print_json(saved.to_dict())
    typer.echo(f"{saved.method} on {saved.model} is in {saved.folder}: {saved.bytes / 1e6:,.1f} MB in {saved.dtype}")
    typer.echo(f"it reads {saved.reach:,} tokens")
    for note in saved.notes:
        typer.echo(f"note: {note}")
    return typer.echo("\n" + "\n\n".join(filter(None, (saved.python, saved.vllm))))
