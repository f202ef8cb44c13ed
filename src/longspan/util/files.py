"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from longspan.util.errors import LongspanError, writing


def write_atomically(path: Path, text: str) -> None:
    """Writes `text` so that a reader finds either the old content or the new, also after a kill; one writer at a time.

    Raises `OSError` that names the file.
    """
    temporary = path.with_name(f".{path.name}.new")
    try:
        with writing(path), open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()  # on a full disk its part is in the way
        raise
    sync_folder(path.parent)


@contextlib.contextmanager
def filling(place: Path) -> Iterator[Path]:
    """A new folder beside `place` that replaces it when the block succeeds; `place` stays as it was when the block raises."""
    part = place.with_name(f".{place.name}.{uuid.uuid4().hex[:8]}")
    old = part.with_suffix(".old")
    try:
        part.mkdir(parents=True)
        yield part
        if place.is_dir():
            place.rename(old)
        part.rename(place)
    except OSError:
        if old.is_dir() and not place.exists():
            old.rename(place)
        raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def read_object(path: Path, remedy: str) -> dict[str, Any]:
    """The JSON object in a file that longspan wrote.

    remedy: what to do about a damaged file, for the error. Raises `LongspanError` where the file cannot be read, is not JSON or
    holds no object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LongspanError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise LongspanError(f"{path} is damaged ({error}); {remedy}") from error
    if not isinstance(value, dict):
        raise LongspanError(f"{path} is damaged (it holds no JSON object); {remedy}")
    return value


def sync_folder(folder: Path) -> None:
    """Flushes a folder's entries to disk, where the file system allows it."""
    with contextlib.suppress(OSError):  # some file systems do not let folders be synced
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
