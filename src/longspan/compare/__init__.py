"""Methods × tasks × lengths: `compare` makes a run, `Run` reads one.

    planning/      the request, checked against the model, as cells with keys and a forecast
    running/       one worker process after another, a cell in each
    storing.py     a run on disk
    statistics.py  scores and differences with their intervals
    report/        the advice, the table, the page

Both names are imported on first use, since a report needs neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longspan.compare.running.runner import compare as compare
    from longspan.compare.storing import Run as Run

_MODULES = {"Run": "longspan.compare.storing", "compare": "longspan.compare.running.runner"}
__all__ = ["Run", "compare"]


def __getattr__(name: str) -> Any:
    """`Run` or `compare`, imported on first use."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
