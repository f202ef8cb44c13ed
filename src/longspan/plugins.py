"""Loads a user's own files of methods and tasks, in this process and in every worker process.

`--include my_method.py` imports the file as a module; the subclasses of `Method` and `Task` that it defines register themselves.
Worker processes get the paths in the environment variable LONGSPAN_INCLUDE.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from longspan.core.registry import Registered
from longspan.util.errors import LongspanError

VARIABLE = "LONGSPAN_INCLUDE"


def include(paths: Iterable[str | Path]) -> None:
    """Imports each file, and adds it to the environment variable for processes that are started later.

    Raises `LongspanError` as `load_user_file` does.
    """
    for path in paths:
        load_user_file(path)
        known = [p for p in os.environ.get(VARIABLE, "").split(os.pathsep) if p]
        if (full := str(Path(path).resolve())) not in known:
            os.environ[VARIABLE] = os.pathsep.join([*known, full])


def load_from_environment() -> None:
    """Imports the files that a parent process included; for the start of a worker process."""
    for path in filter(None, os.environ.get(VARIABLE, "").split(os.pathsep)):
        load_user_file(path)


def load_user_file(path: str | Path) -> ModuleType:
    """The file at `path` as a module, which is imported once.

    Raises `LongspanError` where the file cannot be read or imported, or defines neither a method nor a task.
    """
    full = Path(path).resolve()
    name = f"longspan_user_{hashlib.sha256(str(full).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    if full.suffix != ".py" or not full.is_file():
        raise LongspanError(f"--include needs a Python file that defines a Method or a Task; {str(path)!r} is not one")
    spec = importlib.util.spec_from_file_location(name, full)
    assert spec is not None, "a .py file always has a loader"
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        _check_defines_something(module, path)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, Exception) and not isinstance(error, LongspanError):
            raise LongspanError(f"{path} cannot be included: {_where(error, full)}") from error
        raise
    return module


def _check_defines_something(module: ModuleType, path: str | Path) -> None:
    defined = [v for v in vars(module).values() if isinstance(v, type) and v.__module__ == module.__name__]
    if not any(issubclass(cls, Registered) and cls.__dict__.get("name") for cls in defined):
        raise LongspanError(
            f"{path} defines no Method and no Task with a name, so including it has no effect; set `name` in its class"
        )


def _where(error: Exception, path: Path) -> str:
    """The error as text, with the line of the user's file that raised it."""
    frames = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    line, message = (error.lineno, error.msg) if isinstance(error, SyntaxError) else (frames and frames[-1], str(error))
    return f"line {line}: {type(error).__name__}: {message}" if line else f"{type(error).__name__}: {message}"
