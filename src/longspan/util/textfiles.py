"""Text as files hold it: UTF-8, perhaps with a byte-order mark, its lines ended in any of three ways."""

from __future__ import annotations

import re
from pathlib import Path


def read_text(path: Path) -> str:
    """The text of a file; `decode` of its bytes."""
    return decode(path.read_bytes())


def decode(data: bytes) -> str:
    """UTF-8 without its byte-order mark, every line ended by a line feed. Raises `UnicodeDecodeError` for anything else.

    A mark and carriage returns are how an editor stores a text, no part of it: a model would read them as tokens.
    """
    return re.sub("\r\n?", "\n", data.decode("utf-8-sig"))
