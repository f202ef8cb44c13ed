"""Methods × tasks × lengths, measured for quality and cost: `compare` makes a run, `Run` reads one."""

from longspan.compare.runner import compare
from longspan.compare.store import Run

__all__ = ["Run", "compare"]
