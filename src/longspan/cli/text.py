"""Text from arguments, files and standard input, decoded as UTF-8 whatever the system's encoding."""

from __future__ import annotations

import sys
from pathlib import Path

from longspan.util.errors import LongspanError, SpecError


def prompt_text(prompt: str | None, file: Path | None) -> str:
    """The text of --file, of --prompt, or of the file before the prompt.

    Raises `SpecError` where neither is present, and `LongspanError` for what is not UTF-8.
    """
    if prompt is None and file is None:
        raise SpecError("no prompt: give --prompt TEXT, --file PATH, or --file - to read standard input")
    parts = [] if file is None else [read_text(file)]
    return "\n\n".join([*parts, *([as_utf8(prompt, "--prompt")] if prompt is not None else [])])


def as_utf8(text: str, source: str) -> str:
    """An argument or a line of a terminal, its undecodable bytes (surrogates) read as UTF-8.

    Raises `LongspanError`, which names `source`, for bytes that are not UTF-8.
    """
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError as error:
        raise LongspanError(f"{source} is not text in UTF-8") from error


def read_text(file: Path) -> str:
    """The text of a file, or of standard input for `-`.

    Raises `LongspanError` where it cannot be read as UTF-8.
    """
    from longspan.util.textfiles import decode

    try:
        return decode(sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes())
    except UnicodeDecodeError as error:
        raise LongspanError(f"{file} is not text in UTF-8 (byte {error.start:,} is not); convert it first") from error
    except OSError as error:
        raise LongspanError(f"{str(file)[:200]} cannot be read: {error.strerror or error}") from error
