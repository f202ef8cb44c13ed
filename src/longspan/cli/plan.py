"""The command `plan`: memory and time before the run."""

from __future__ import annotations

from typing import Annotated

import typer

from longspan.cli.options import Device, Dtype, Include, Json, Model, OneMethod, token_count
from longspan.cli.printing import console, print_json


def plan(
    model: Model,
    length: Annotated[str, typer.Option("--length", "-l", help="Tokens to read, like 32k.")],
    method: OneMethod = "none",
    output_tokens: Annotated[str, typer.Option(help="Tokens to write after them.")] = "256",
    dtype: Dtype = None,
    device: Device = None,
    as_json: Json = False,
    include: Include = None,
) -> None:
    """Before the run: memory, time, and which methods fit this machine."""
    from longspan import plan as planning

    sizes = {"length": token_count(length), "output_tokens": token_count(output_tokens, "output-tokens")}
    forecast = planning.plan(model, method=method, dtype=dtype, device=device, **sizes)
    print_json(forecast.to_dict()) if as_json else planning.terminal(forecast, console())
