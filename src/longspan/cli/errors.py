"""Errors of commands in one line, and their exit codes.

Exit codes: 0 done, 2 a request that cannot be carried out (one line, `error: …`), 130 interrupted. A traceback is a
bug.
"""

from __future__ import annotations

from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from longspan.util.errors import LongspanError


class Commands(TyperGroup):
    """A command group that reports errors in one line with exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        """Runs the command of a click context.

        Raises `typer.Exit` with the exit code where it fails.
        """
        try:
            return super().invoke(ctx)
        except typer.Exit:
            raise  # a RuntimeError like out of memory, which is looked for below with torch
        except LongspanError as error:
            _fail(str(error))
        except KeyboardInterrupt:
            typer.echo("\ninterrupted", err=True)
            raise typer.Exit(130) from None
        except BrokenPipeError:
            raise  # the reader of the output has closed it: typer ends quietly
        except OSError as error:
            _fail(f"{error.strerror}: {str(error.filename)[:200]}" if error.strerror and error.filename else str(error))
        except (MemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
            _fail(f"out of memory: {_first_line(error)}; a shorter length, a smaller model or streaming needs less")


def _fail(message: str) -> NoReturn:
    typer.echo(f"{typer.style('error:', fg='red', bold=True)} {message}", err=True)
    raise typer.Exit(2) from None


def _out_of_memory(error: BaseException) -> bool:
    from longspan.util.failures import is_out_of_memory

    return is_out_of_memory(error)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
