"""The errors that a user can cause, and helpers for their messages.

Each is a `LongspanError`, which is a `ValueError`: the command line prints it in one line and exits with code 2. A message says
what is wrong, with the value; why, where that is not plain; and what to do.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path


class LongspanError(ValueError):
    """A request that cannot be carried out."""


class SpecError(LongspanError):
    """A method, task or length that cannot be parsed: an unknown name, an unknown setting, a value out of range."""


class NotSupported(LongspanError):
    """A valid request that cannot work on this model, with this other method, or on this machine."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """A hint with the closest of `choices` to `word` and all of them: `did you mean "x"? (choose from …)`."""
    choices = sorted(choices)
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    hint = f'did you mean "{close[0]}"? ' if close else ""
    return f"{hint}(choose from {', '.join(choices)})"


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """A context whose failed writes are raised as `OSError`s that name `path`.

    By itself a failed write or flush names no file, safetensors and tokenizers raise classes of their own, and torch raises a
    RuntimeError.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(path)) from error
    except LongspanError:
        raise
    except Exception as error:
        if (failure := _failed_write(error)) is None:
            raise
        raise OSError(*failure, str(path)) from error


def _failed_write(error: Exception) -> tuple[int, str] | None:
    """The errno and the text of the system error behind a library's error; None where there is none."""
    message = str(error)
    if found := re.search(r"\(os error (\d+)\)", message):  # as Rust writes it
        return int(found[1]), os.strerror(int(found[1]))
    if isinstance(error, RuntimeError) and re.search(r"PytorchStreamWriter|inline_container.*unexpected pos", message):
        return errno.EIO, "the disk took only a part of it"
    return None
