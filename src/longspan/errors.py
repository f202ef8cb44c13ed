"""What goes wrong, said so that the user can mend it.

Every error that a user can cause is a `LongspanError`: the command line prints it in one line and exits with code 2, and
Python callers can catch it as the `ValueError` that it is. A message says what was asked, why that cannot be, and the
nearest thing that works.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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
