"""Methods × tasks × lengths, measured for quality and cost: `compare` makes a run, `Run` reads one.

planning/     the request, checked against the model, as cells with keys and a forecast
running/      one worker process after another, a cell in each
storing.py    a run on disk
statistics.py scores and differences with their intervals
report/       the advice, the table, the page
"""

from longspan.compare.running.runner import compare
from longspan.compare.storing import Run

__all__ = ["Run", "compare"]
