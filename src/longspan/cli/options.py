"""Arguments and options that several commands share, and how their values are read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from longspan.util.errors import SpecError


def _include(paths: list[Path] | None) -> list[Path] | None:
    from longspan.plugins import include

    include(paths or [])
    return paths


Include = Annotated[
    list[Path] | None,
    typer.Option(callback=_include, is_eager=True, help="Python file with methods or tasks of your own."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Model = Annotated[str, typer.Argument(help="Built-in name, folder, hub id or .gguf file.")]
OneMethod = Annotated[str, typer.Option("--method", "-m", help="Spec, for example [b]yarn:factor=4[/b].")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 …")]
MaxNew = Annotated[int, typer.Option(help="Longest answer, in tokens.")]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token.")]
TopP = Annotated[float, typer.Option(help="Share of probability to sample from.")]
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.")]


def token_count(text: str, option: str = "length") -> int:
    """The number of tokens that an option's text such as "16k" means.

    Raises `SpecError` below 1.
    """
    from longspan.util.units import read_size

    if (size := read_size(text, option)) < 1:
        raise SpecError(f"{option} must be at least 1 token, not {text}")
    return size
