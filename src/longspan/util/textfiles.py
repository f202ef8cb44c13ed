"""Reads text files: UTF-8, with or without a byte-order mark, with any of the three line endings."""

from __future__ import annotations

import re
from pathlib import Path


def read_text(path: Path) -> str:
    """The text of a file, decoded by `decode`. Raises `OSError` and `UnicodeDecodeError`."""
    return decode(path.read_bytes())


def decode(data: bytes) -> str:
    """The text of UTF-8 bytes, without a byte-order mark and with line feeds alone.

    Raises `UnicodeDecodeError`.

    Marks and carriage returns come from the editor and not from the text, and a model would read them as tokens.
    """
    return re.sub("\r\n?", "\n", data.decode("utf-8-sig"))
