"""The command `longspan`."""

from longspan.cli.main import main

__all__ = ["main"]
