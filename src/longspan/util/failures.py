"""Whether an exception means that memory ran out, and its text in one line."""

from __future__ import annotations

import torch

from longspan.util.errors import LongspanError

_NO_MEMORY = ("out of memory", "DefaultCPUAllocator", "ALLOC_FAILED", "not enough memory")


def is_out_of_memory(error: BaseException | None) -> bool:
    """True where an error, or its cause, means that memory ran out on any device."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            return True
        if isinstance(error, RuntimeError) and any(sign in str(error) for sign in _NO_MEMORY):
            return True
        error = error.__cause__ or error.__context__
    return False


def one_line(error: BaseException) -> str:
    """An error's first line, after its class unless it is a `LongspanError`.

    At most 500 characters.
    """
    lines = str(error).strip().splitlines() or [""]
    kind = "" if isinstance(error, LongspanError) else f"{type(error).__name__}: "
    return f"{kind}{lines[0]}"[:500].removesuffix(": ")
