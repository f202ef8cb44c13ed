"""A run as a table in the terminal, as JSON, and as an HTML page.

All three are computed from the manifest and the cells' records alone: no model is loaded and nothing is measured.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from longspan.compare.report import figures
from longspan.compare.report.advice import Advice, advise
from longspan.compare.report.protocol import environment, first_prompt, methods_requested, task_protocol
from longspan.compare.report.results import (
    BARE,
    COSTS,
    EFFECTIVE_WINDOW,
    STATUS,
    Record,
    Results,
    TaskFacts,
    by_reason,
    failed_samples,
)
from longspan.compare.report.shares import terminal_lines
from longspan.util.drawing import styles, swatch, with_own_names
from longspan.util.files import write_atomically

MOST_FAILURES = 20
"""Failed samples that a page lists."""


@dataclass(frozen=True)
class Score:
    """A cell of the table as text.

    best: the best of its column. near: not measurably worse than the best. independent: the effective number of samples,
    where windows overlap.
    """

    score: str
    interval: str = ""
    independent: str = ""
    difference: str = ""
    failed: int = 0
    best: bool = False
    near: bool = False


@dataclass(frozen=True)
class Cost:
    """A column of costs: key in a record, heading, unit, factor.

    The factor converts seconds or bytes to the unit.
    """

    name: str
    title: str
    unit: str
    factor: float


TRAINING = Cost("seconds", "training", "min", 1 / 60)
"""The column of training time, shown where a row is a trained model."""
COST_COLUMNS = (
    Cost("prefill_s", "read", "s", 1),
    Cost("decode_s_per_token", "write", "ms/token", 1e3),
    Cost("peak_prefill_bytes", "peak read", "GB", 1e-9),
    Cost("peak_decode_bytes", "peak write", "GB", 1e-9),
    Cost("cache_bytes", "cache", "MB", 1e-6),
)


def terminal(manifest: dict[str, Any], cells: Sequence[Record], console: Console) -> None:
    """Prints the advice, its notes, the table and the protocol.

    The table is printed in parts where it is wider than the console.

    Raises `LongspanError` where no cell has finished.
    """
    results = Results(manifest, cells)
    advice = advise(results)
    console.print(Text.assemble(*((text, "bold" if strong else "") for text, strong in advice.parts)))
    for note in advice.notes:
        console.print(Text(f"- {note}", style="dim"))
    for table in _tables(results, advice, console):
        console.print(table)
    console.print(
        Text(
            f"* best; ~ not measurably worse; [95 % interval]; cost at {results.target:,} tokens, from "
            f"{results.cost_task.spec}",
            style="dim",
        )
    )
    for task in results.tasks:
        console.print(Text(results.protocol_line(task, results.target), style="dim"))
    for lines in (terminal_lines, _window_lines):
        for line in (line for task in results.tasks for line in lines(results, task)):
            console.print(Text(line))
    for ending in _endings(results):
        console.print(Text(f"{ending['status']}: {ending['what']}: {ending['error']}", style="dim"))
    for name, reason in by_reason(manifest["left_out"]).items():
        console.print(Text(f"left out: {name}: {reason}", style="dim"))


def table_json(manifest: dict[str, Any], cells: Sequence[Record]) -> dict[str, Any]:
    """The report as JSON data, in seconds and bytes: advice, and a row per cell.

    Missing figures are None. Raises `LongspanError` where no cell has finished.
    """
    results = Results(manifest, cells)
    return {
        "model": results.model,
        "native_length": results.native,
        "target_length": results.target,
        "advice": advise(results).data(),
        "rows": [_row(results, m, t, n) for t in results.tasks for n in results.lengths for m in results.methods],
        "definitions": {"effective_window": EFFECTIVE_WINDOW},
        "left_out": manifest["left_out"],
        "environment": manifest["environment"],
    }


def render(manifest: dict[str, Any], cells: Sequence[Record]) -> str:
    """The HTML page as text; raises `LongspanError` where no cell has finished."""
    results = Results(manifest, cells)
    how = styles(results.methods)
    advice = advise(results)
    page = Environment(
        loader=PackageLoader("longspan.compare.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page.filters["breakable"] = _breakable
    page.filters["units"] = _units
    number = itertools.count()
    page.filters["svg"] = lambda svg: Markup(
        with_own_names(svg, f"d{next(number)}-")
    )  # drawn by this package, so it is safe
    return page.get_template("report.html").render(
        results=results,
        advice=advice,
        overlap=any(results.overlaps(t) for t in results.tasks),
        columns=[(t, n) for t in results.tasks for n in results.lengths],
        rows=[
            {"method": m, "scores": scores, "costs": costs}
            for m, scores, costs in zip(results.methods, _scores(results), _costs(results), strict=True)
        ],
        cost_columns=_columns(results),
        pictures=figures.pictures(results),
        swatches={m: swatch(how[m]) for m in results.methods},
        environment=environment(results),
        tasks=[(t, task_protocol(results, t), first_prompt(results, t)) for t in results.tasks],
        methods=methods_requested(results),
        endings=_endings(results),
        failures=_failures(results),
        most_failures=MOST_FAILURES,
        left_out=by_reason(manifest["left_out"]),
    )


def html(manifest: dict[str, Any], cells: Sequence[Record], path: str | Path) -> Path:
    """Writes the HTML page to `path` and returns the path.

    Raises `LongspanError` where no cell has finished.
    """
    target = Path(path)
    write_atomically(target, render(manifest, cells))
    return target


def _breakable(spec: str) -> Markup:
    """A spec as HTML that wraps after `:`, `,` and `+`, not within a word."""
    return Markup("").join(
        Markup("{}<wbr>").format(part) if part in ":,+" else escape(part) for part in re.split("([:,+])", spec)
    )


def _units(text: str) -> str:
    """Text with no-break spaces between numbers and their units."""
    return re.sub(r"(?<=\d) (?=(?:s|ms|min|h|B|kB|MB|GB|%|tokens)\b|%)", "\u00a0", text)


# Rows


def _row(results: Results, method: str, task: TaskFacts, length: int) -> dict[str, Any]:
    record = results.cell(method, task, length) or {}
    change = results.difference(method, BARE, task, length)
    estimate = results.estimate(method, task, length)
    return {
        "method": method,
        "task": task.spec,
        "length": length,
        "status": results.status(method, task, length),
        **{key: record.get(key) for key in ("error", "score", "n")},
        "interval": list(estimate.interval) if estimate.interval else None,
        "independent": estimate.independent,
        "effective_window": results.effective_window(method, task, length),
        "failed": sum(bool(s["failed"]) for s in record.get("samples") or []),
        "difference": change.value,
        "difference_interval": list(change.interval) if change.interval else None,
        "cost": record.get("cost") or {},
        "training": results.trainings.get(method),
    }


def _scores(results: Results) -> list[list[Score]]:
    """The scores of each method, by task and length."""
    return [[_score(results, m, t, n) for t in results.tasks for n in results.lengths] for m in results.methods]


def _score(results: Results, method: str, task: TaskFacts, length: int) -> Score:
    record = results.ok(method, task, length)
    if record is None:
        return Score(STATUS[results.status(method, task, length)])
    best = results.best(task, length)
    assert best is not None, "this cell has a score"
    change = results.difference(method, BARE, task, length)
    estimate = results.estimate(method, task, length)
    scores = not task.higher_is_better or record["score"] > 0  # 0 is not a best score where more is better
    return Score(
        score=task.number(record["score"]),
        interval=_interval(task, estimate.interval),
        independent=f"n {estimate.independent:.1f} of {estimate.n}" if estimate.overlapping else "",
        difference=task.number(change.value, signed=True) if change.value is not None else "",
        failed=failed_samples(record),
        best=scores and record["score"] == results.score(best, task, length),
        near=scores and not results.worse(method, best, task, length),
    )


def _interval(task: TaskFacts, interval: Sequence[float] | None) -> str:
    return f"{task.number(interval[0])}–{task.number(interval[1])}" if interval else ""


def _costs(results: Results) -> list[list[tuple[str, bool]]]:
    """The costs of each method as text, each with whether it is the lowest.

    Training last, where there was any.
    """
    costs = [results.cost(m) for m in results.methods]
    lowest = {name: min((v for c in costs if (v := c[name]) is not None), default=None) for name in COSTS}
    shown = [
        [
            (_figure(cost[c.name], c.factor), cost[c.name] is not None and cost[c.name] == lowest[c.name])
            for c in COST_COLUMNS
        ]
        for cost in costs
    ]
    if results.trainings:
        for row, method in zip(shown, results.methods, strict=True):
            row.append((_figure(results.trainings.get(method, {}).get(TRAINING.name), TRAINING.factor), False))
    return shown


def _columns(results: Results) -> tuple[Cost, ...]:
    return (*COST_COLUMNS, TRAINING) if results.trainings else COST_COLUMNS


def _figure(value: float | None, factor: float) -> str:
    if value is None:
        return "–"
    value *= factor
    return f"{value:,.0f}" if value >= 999.5 else f"{value:.3g}"


def _window_lines(results: Results, task: TaskFacts) -> list[str]:
    """Lines with each method's effective window by length, after its definition.

    None for tasks without a key.
    """
    lines = []
    for method in results.methods:
        known = [(n, w) for n in results.lengths if (w := results.effective_window(method, task, n)) is not None]
        if known:
            lines.append(f"  {results.labels[method]}: {', '.join(f'{w:,} of {n:,}' for n, w in known)}")
    return [f"{task.spec}, effective window: {results.effective_window_words(task)}", *lines] if lines else []


def _endings(results: Results) -> list[dict[str, str]]:
    """Cells without a result, each with its status and error."""
    return [
        {
            "status": STATUS[c["status"]],
            "what": f"{c['method']}, {c['task_spec']} at {c['length']:,} tokens",
            "error": str(c["error"] or ""),
        }
        for c in results.cells()
        if c["status"] != "ok"
    ]


def _failures(results: Results) -> list[dict[str, str]]:
    """Failed samples of cells that finished."""
    return [
        {
            "what": f"{c['method']}, {c['task_spec']} at {c['length']:,} tokens, sample {s['id']}",
            "error": str((s["detail"] or {}).get("reason", "")),
        }
        for c in results.cells()
        for s in c["samples"]
        if s["failed"]
    ]


# The terminal

Column = tuple[str, list[Text]]
"""A heading, and the column's text for each method."""


def _tables(results: Results, advice: Advice, console: Console) -> list[Table]:
    """One table, or one for each task and one of costs where the console is too narrow for it."""
    parts = [_quality_columns(results, t) for t in results.tasks] + [_cost_columns(results)]
    whole = _table(results, advice, [column for part in parts for column in part])
    if Measurement.get(console, console.options.update(max_width=10_000), whole).maximum <= console.width:
        return [whole]
    return [_table(results, advice, part) for part in parts]


def _table(results: Results, advice: Advice, columns: Sequence[Column]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("method", overflow="fold", max_width=26)
    for title, _ in columns:
        table.add_column(Text(title, justify="right"), justify="right", overflow="fold")
    for i, method in enumerate(results.methods):
        name = Text(method, style="bold" if method == advice.method else "")
        table.add_row(name, *(texts[i] for _, texts in columns))
    return table


def _quality_columns(results: Results, task: TaskFacts) -> list[Column]:
    native = {results.native: " (native)"}
    return [
        (
            f"{task.label}\n{length:,}{native.get(length, '')}",
            [_score_text(_score(results, m, task, length)) for m in results.methods],
        )
        for length in results.lengths
    ]


def _score_text(score: Score) -> Text:
    text = _marked(score.score, score.best, "*" if score.best else "~" if score.near else "")
    if score.interval:
        text.append(f"\n[{score.interval}]", style="dim")
    if score.independent:
        text.append(f"\n{score.independent}", style="dim")
    if score.failed:
        text.append(f"\n{score.failed} failed", style="red")
    return text


def _cost_columns(results: Results) -> list[Column]:
    costs = _costs(results)
    return [
        (f"{c.title}\n{c.unit}", [_marked(*shown[i], "*" if shown[i][1] else "") for shown in costs])
        for i, c in enumerate(_columns(results))
    ]


def _marked(figure: str, best: bool, mark: str) -> Text:
    return Text.assemble((figure, "bold" if best else ""), mark)
