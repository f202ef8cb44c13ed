"""What goes wrong, said so that the user can mend it.

Every error that a user can cause is a `LongspanError`: the command line prints it in one line and exits with code 2, and
Python callers can catch it as the `ValueError` that it is. A message says what was asked, why that cannot be, and the
nearest thing that works.
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
    """A request that cannot be carried out as it stands."""


class SpecError(LongspanError):
    """A method, task or length that cannot be read: unknown name, unknown setting, impossible value."""


class NotSupported(LongspanError):
    """A request that reads well but cannot work on this model, with this partner, or on this machine."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """A hint that names the closest of `choices` to `word` and lists them all: `did you mean "x"? (choose from …)`."""
    choices = sorted(choices)
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    hint = f'did you mean "{close[0]}"? ' if close else ""
    return f"{hint}(choose from {', '.join(choices)})"


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Has what goes wrong in a write raised as an `OSError` that names the file.

    A failed write or flush says only why, safetensors and tokenizers have classes of their own for it, and torch raises a
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
    """The number and the text of the system's error behind another library's; None where there is none."""
    said = str(error)
    if found := re.search(r"\(os error (\d+)\)", said):  # as Rust writes it
        return int(found[1]), os.strerror(int(found[1]))
    if isinstance(error, RuntimeError) and re.search(r"PytorchStreamWriter|inline_container.*unexpected pos", said):
        return errno.EIO, "the disk took only a part of it"
    return None
