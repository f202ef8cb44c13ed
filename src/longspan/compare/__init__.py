"""Methods × tasks × lengths, measured for quality and cost: `compare` makes a run, `Run` reads one.

The names are imported on first use, since tasks, which a comparison needs, are themselves measured by `compare.cost`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longspan.compare.runner import compare as compare
    from longspan.compare.store import Run as Run

__all__ = ["Run", "compare"]

_WHERE = {"Run": "longspan.compare.store", "compare": "longspan.compare.runner"}


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'longspan.compare' has no attribute {name!r}")
