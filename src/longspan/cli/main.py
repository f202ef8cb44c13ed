"""The command line: its commands in the order of the help.

A command parses, calls and prints. It imports what it needs when it runs, so that help costs no time; what it does lives
in the module that it calls. Exit codes: `longspan.cli.errors`.
"""

from __future__ import annotations

import io
import os
import sys
from typing import Annotated

import typer

from longspan.cli import apply, bench, catalogues, compare, generate, memory, plan, train
from longspan.cli.errors import Commands
from longspan.util.version import __version__

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Long-context methods on language models, measured for quality and cost in one table.",
)
for _command in (
    catalogues.methods,
    catalogues.tasks,
    catalogues.models,
    compare.compare,
    compare.report,
    apply.apply,
    memory.read,
    generate.generate,
    generate.chat,
    plan.plan,
    train.train,
    train.study,
):
    app.command()(_command)
app.add_typer(bench.app, name="bench")


def _show_version(requested: bool) -> None:
    if requested:
        typer.echo(f"longspan {__version__}")
        raise typer.Exit


@app.callback()
def _settings(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Version.")] = False,
) -> None:
    # longspan's own messages say what matters; transformers' remarks would come between table and answer.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _set_stream_errors() -> None:
    """Makes output and input survive a locale that is not Unicode (LC_ALL=C, latin-1).

    A character that standard output cannot encode becomes a question mark; bytes that standard input cannot decode are
    kept as surrogates, which `longspan.cli.text` reads as UTF-8.
    """
    for stream, errors in ((sys.stdout, "replace"), (sys.stdin, "surrogateescape")):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors=errors)


def run(arguments: list[str] | None = None) -> int:
    """Runs the command line (None: the process's own arguments), prints, and returns the exit code."""
    _set_stream_errors()
    try:
        app(arguments, prog_name="longspan")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    return 0


def main() -> None:
    """Runs the command line and ends the process with its exit code."""
    sys.exit(run())
