"""The figures of a report: positions, depths, quality against cost, native length.

Each figure has a caption, a text alternative and a table of its numbers.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from longspan.compare.report.results import BARE, STATUS, Record, Results, TaskFacts, curve, depths, pareto
from longspan.compare.report.shares import right_by_position
from longspan.compare.statistics import Interval
from longspan.util.drawing import (
    INK,
    SOFT,
    Panel,
    Picture,
    Table,
    draw,
    lengths_axis,
    name_ends,
    name_points,
    save_png,
    styles,
)
from longspan.util.errors import LongspanError
from longspan.util.units import duration, size, tokens

DEPTH_ROWS = 10
"""Most rows of a heat map; more depths are grouped into as many equal stretches."""


def pictures(results: Results) -> list[Picture]:
    """Every figure for which the run has the numbers, in the order of the page."""
    kinds = (loss_by_position, right_by_position, by_depth)
    drawn = [kind(results, t) for kind in kinds for t in results.tasks]
    drawn += [quality_and_cost(results), at_native_length(results)]
    return [picture for picture in drawn if picture is not None]


# Loss by position


def loss_by_position(results: Results, task: TaskFacts) -> Picture | None:
    """A figure of the loss over positions, one line a method.

    None where the task does not record it.
    """
    lines = _lines(results, task)
    if not lines:
        return None
    longest = max(span for _, _, span in lines.values())
    collapse = _collapse(results, lines)
    wide = draw(lambda axes: _draw_losses(axes, results, task, lines, True), (9.4, max(4.3, 1 + 0.19 * len(lines))))
    narrow = draw(lambda axes: _draw_losses(axes, results, task, lines, False), (4.2, 3.9))
    label = f"Line chart: loss by position up to {longest:,} tokens for {len(lines)} methods. {collapse}"
    if results.native < longest:
        caption = (
            "The dashed line is the end of the model's native window. To the right of it the loss of a method that "
        )
        caption += f"reads the whole input stays level or falls; the loss of one that fails there rises. {collapse}"
    else:
        caption = "All positions are within the model's native window: a level or falling line is good."
    return Picture(
        name=f"positions-{task.spec}",
        title=f"Loss by position: {task.spec}",
        caption=caption + _shorter(results, lines, longest),
        protocol=results.protocol_line(task, results.target),
        panels=[Panel("", wide, label, narrow)],
        table=_loss_table(task, lines, longest),
        methods=list(lines),
    )


Line = tuple[np.ndarray, np.ndarray, int]
"""Positions (buckets,), losses (buckets,) with NaN for none, and the number of tokens that they cover."""


def _lines(results: Results, task: TaskFacts) -> dict[str, Line]:
    """The line of each method at the longest length that it finished.

    None where the task records no positions.
    """
    lines = {}
    for method in results.methods:
        done = [c for n in results.lengths if (c := results.ok(method, task, n))]
        if done and (found := curve(done[-1])):
            means, span = np.array([np.nan if v is None else v for v in found[0]], dtype=float), found[1]
            lines[method] = ((np.arange(len(means)) + 0.5) / len(means) * span, means, span)
    return lines


def _draw_losses(axes: Axes, results: Results, task: TaskFacts, lines: dict[str, Line], labelled: bool) -> None:
    how = styles(results.methods)
    longest = max(length for _, _, length in lines.values())
    for method, (x, y, _) in lines.items():
        style = how[method]
        axes.plot(
            x, y, color=style.colour, linestyle=style.dash, linewidth=style.width, zorder=3 if method == BARE else 2
        )
    axes.set_xlim(0, longest)
    lengths_axis(axes, longest)
    axes.set_xlabel("position in the input, tokens")
    axes.set_ylabel(f"mean loss, {task.metric}")
    if results.native < longest:
        axes.axvline(results.native, color=SOFT, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        axes.annotate(
            f"native window {results.native:,}",
            (results.native, 1),
            xytext=(5, -2),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            va="top",
            color=SOFT,
        )
        low, high = axes.get_ylim()
        axes.set_ylim(low, high + 0.08 * (high - low))  # room for that line of text
    if labelled:
        _name_ends(axes, results, {m: (x, y) for m, (x, y, _) in lines.items()})


def _name_ends(axes: Axes, results: Results, lines: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    how, ends = styles(results.methods), []
    for method, (x, y) in lines.items():
        if (known := np.flatnonzero(np.isfinite(y))).size:
            ends.append((results.labels[method], float(x[known[-1]]), float(y[known[-1]]), how[method].colour))
    name_ends(axes, ends)


def _collapse(results: Results, lines: dict[str, Line]) -> str:
    """A sentence about the bare model's loss within and beyond its window."""
    if BARE not in lines:
        return ""
    x, y, length = lines[BARE]
    inside, outside = y[x <= results.native], y[x > results.native]
    if length <= results.native or not np.isfinite(inside).any() or not np.isfinite(outside).any():
        return ""
    last = outside[np.isfinite(outside)][-1]
    return f"The plain model goes from {np.nanmean(inside):.2f} within its window to {last:.2f} at {length:,} tokens."


def _shorter(results: Results, lines: dict[str, Line], longest: int) -> str:
    ended = [f"{results.labels[m]} at {length:,}" for m, (_, _, length) in lines.items() if length < longest]
    return f" Lines that end early did not finish a longer cell: {', '.join(ended)}." if ended else ""


def _loss_table(task: TaskFacts, lines: dict[str, Line], longest: int, columns: int = 8) -> Table:
    """Means over `columns` equal stretches of the longest input."""
    edges = np.linspace(0, longest, columns + 1)
    rows = []
    for method, (x, y, _) in lines.items():
        parts = [y[(x > a) & (x <= b) & np.isfinite(y)] for a, b in itertools.pairwise(edges)]
        rows.append([method, *(task.number(float(p.mean()) if len(p) else None) for p in parts)])
    return Table(["method", *(f"{a:,.0f}–{b:,.0f}" for a, b in itertools.pairwise(edges))], rows)


# Found by depth and length


def by_depth(results: Results, task: TaskFacts) -> Picture | None:
    """A heat map for each method, depth by length.

    None where the task has no depths.
    """
    records = {(m, n): r for m in results.methods for n in results.lengths if (r := results.ok(m, task, n))}
    found = {key: d for key, record in records.items() if (d := depths(record))}
    if not found:
        return None
    names, edges = _depth_rows([depth for pairs in found.values() for depth, _ in pairs])
    panels, rows = [], []
    for method in results.methods:
        hits, tried = _counts(found, method, results.lengths, edges)
        status = [results.status(method, task, n) for n in results.lengths]
        panels.append(_heat_panel(results, task, method, hits, tried, status, names))
        rows += [
            [method, name, *(f"{h} of {t}" if t else "–" for h, t in zip(hits[i], tried[i], strict=True))]
            for i, name in enumerate(names)
        ]
    windows = _effective_windows(results, task)
    return Picture(
        name=f"depth-{task.spec}",
        title=f"What is found where: {task.spec}",
        caption="Each square is a length of the input, from left to right, and a depth of the key in it, from the beginning "
        "at the top to the end at the bottom. Dark is found, pale is missed. A method that only keeps the end of the input "
        "finds the key in the bottom row alone." + _window_sentence(results, task, windows),
        protocol=results.protocol_line(task, max(n for _, n in found)),
        panels=panels,
        table=Table(["method", "depth", *(f"{n:,}" for n in results.lengths)], rows + _window_rows(windows)),
    )


Windows = dict[str, list[int | None]]
"""The effective windows of each method, one for each length; None where there is none."""


def _effective_windows(results: Results, task: TaskFacts) -> Windows:
    found = {m: [results.effective_window(m, task, n) for n in results.lengths] for m in results.methods}
    return {m: row for m, row in found.items() if any(w is not None for w in row)}


def _window_sentence(results: Results, task: TaskFacts, windows: Windows) -> str:
    """The effective windows at the longest length, after their definition, for the caption."""
    last = [(results.labels[m], row[-1]) for m, row in windows.items() if row[-1] is not None]
    if not last:
        return f" Effective window: the {results.effective_window_words(task)}." if windows else ""
    reached = sorted((-w, label) for label, w in last if w)
    phrases = [f"{-w:,} with {label}" for w, label in reached]
    if len(reached) < len(last):
        phrases.append("0 with all others" if reached else "0 with every method")
    return (
        f" Effective window: the {results.effective_window_words(task)}. At {results.lengths[-1]:,} tokens it is "
        f"{', '.join(phrases)}; the numbers below have those of every length."
    )


def _window_rows(windows: Windows) -> list[list[str]]:
    return [
        [method, "effective window", *("–" if w is None else f"{w:,}" for w in row)] for method, row in windows.items()
    ]


def _depth_rows(values: Sequence[float]) -> tuple[list[str], np.ndarray]:
    """Names and edges of the rows: the depths themselves where these are few, else equal stretches."""
    known = sorted({round(v, 3) for v in values})
    if len(known) <= DEPTH_ROWS + 1:
        middles = [(a + b) / 2 for a, b in itertools.pairwise(known)]
        return [f"{100 * d:.0f} %" for d in known], np.array([-0.001, *middles, 1.001])
    edges = np.linspace(0, 1, DEPTH_ROWS + 1)
    return [f"{100 * a:.0f}–{100 * b:.0f} %" for a, b in itertools.pairwise(edges)], edges


def _counts(
    found: dict[tuple[str, int], list[tuple[float, bool]]], method: str, lengths: Sequence[int], edges: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Hits and trials of a method, each (rows of depth, lengths)."""
    hits, tried = np.zeros((2, len(edges) - 1, len(lengths)), dtype=int)
    for column, length in enumerate(lengths):
        for depth, hit in found.get((method, length), []):
            row = min(int(np.searchsorted(edges, depth, side="right")) - 1, len(edges) - 2)
            tried[row, column] += 1
            hits[row, column] += hit
    return hits, tried


def _heat_panel(
    results: Results,
    task: TaskFacts,
    method: str,
    hits: np.ndarray,
    tried: np.ndarray,
    status: list[str],
    names: list[str],
) -> Panel:
    totals = [
        f"{hits[:, i].sum()} of {tried[:, i].sum()} at {n:,}"
        for i, n in enumerate(results.lengths)
        if tried[:, i].sum()
    ]
    label = f"Heat map, {method}: found {', '.join(totals) or 'nothing measured'}."
    inches = (max(2.15, 0.6 + 0.28 * len(results.lengths)), 0.75 + 0.17 * max(6, len(names)))
    svg = draw(lambda axes: _draw_heat(axes, results, hits, tried, status, names), inches)
    return Panel(results.labels[method], svg, label, method=method)


def _draw_heat(
    axes: Axes, results: Results, hits: np.ndarray, tried: np.ndarray, status: list[str], names: list[str]
) -> None:
    rows, columns = hits.shape
    share = np.ma.masked_where(tried == 0, hits / np.maximum(tried, 1))
    axes.set_facecolor("#f3f4f6")
    axes.pcolormesh(
        np.arange(columns + 1),
        np.arange(rows + 1),
        share,
        cmap="Blues",
        vmin=-0.08,
        vmax=1.15,
        edgecolors="white",
        linewidth=1.2,
    )
    if columns <= 4 and tried.max() > 1:
        for row, column in zip(*np.nonzero(tried), strict=True):
            text = f"{hits[row, column]}/{tried[row, column]}"
            colour = "white" if share[row, column] > 0.55 else INK
            axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", color=colour, fontsize=7.5)
    for column, state in enumerate(status):
        if state != "ok":
            words = {"out_of_memory": "out of memory", "failed": "failed", "missing": "not run"}[state]
            axes.text(column + 0.5, rows / 2, words, ha="center", va="center", rotation=90, color=SOFT)
    axes.set_ylim(rows, 0)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_xticks(np.arange(columns) + 0.5, [tokens(n) for n in results.lengths], fontsize=7.5)
    axes.set_yticks(np.arange(rows) + 0.5, names, fontsize=7.5)
    axes.set_xlabel("tokens of input", fontsize=8)
    axes.set_ylabel("depth", fontsize=8)


# Quality against cost


@dataclass(frozen=True)
class _Axis:
    """A kind of cost, its value for each method, and how it is shown."""

    what: str
    values: dict[str, float]
    show: Any


def quality_and_cost(results: Results) -> Picture | None:
    """Scatter plots, one for each task and cost, a point a method.

    None where no cost was measured.
    """
    prefill = {m: v for m in results.methods if (v := results.cost(m)["prefill_s"])}
    peaks = {m: v for m in results.methods if (v := results.peak(m))}
    sides = [
        _Axis("time to read the input", prefill, duration),
        _Axis("highest memory", peaks, size),
    ]
    panels, rows, shown = [], [], []
    for task in results.tasks:
        for side in (s for s in sides if s.values):
            points = {
                m: (side.values[m], y) for m in side.values if (y := results.score(m, task, results.target)) is not None
            }
            if points:
                front = pareto(points, task)
                panels.append(_cost_panel(results, task, side, points, front))
                rows += [
                    [task.spec, m, task.number(y), side.what, side.show(x), "yes" if m in front else ""]
                    for m, (x, y) in points.items()
                ]
                shown += [m for m in points if m not in shown]
    if not panels:
        return None
    return Picture(
        name="cost",
        title="Quality against cost",
        caption="One point a method; bars are 95 % intervals. The grey steps join the methods on the Pareto front: "
        "for any other, one of these is as good for less, or better for the same. Cheap is to the left.",
        protocol=f"Costs are those of {results.cost_task.spec} at {results.target:,} tokens; scores are at the same length."
        + _without_point(results),
        panels=panels,
        table=Table(["task", "method", "score", "cost", "value", "on the front"], rows),
        methods=[m for m in results.methods if m in shown],
    )


def _without_point(results: Results) -> str:
    missing: dict[str, list[str]] = {}
    for task in results.tasks:
        for m in results.methods:
            status = results.status(m, task, results.target)
            if status != "ok":
                missing.setdefault(f"{task.spec}, {STATUS[status]}", []).append(results.labels[m])
    phrases = "; ".join(f"{', '.join(methods)} ({why})" for why, methods in missing.items())
    return f" Without a point: {phrases}." if phrases else ""


def _cost_panel(
    results: Results, task: TaskFacts, side: _Axis, points: dict[str, tuple[float, float]], front: list[str]
) -> Panel:
    svg = draw(lambda axes: _draw_cost(axes, results, task, side, points, front), (4.6, 3.5))
    label = f"Scatter plot: {task.label} against {side.what}. On the front, by cost: {', '.join(front)}."
    return Panel(f"{task.spec} against {side.what}", svg, label)


def _draw_cost(
    axes: Axes,
    results: Results,
    task: TaskFacts,
    side: _Axis,
    points: dict[str, tuple[float, float]],
    front: list[str],
) -> None:
    how = styles(results.methods)
    steps = _steps([points[m] for m in front])
    axes.plot(*zip(*steps, strict=True), color="#aab2bb", linewidth=1.4, zorder=1)
    bars = {m: bar for m in points if (bar := _bar(results, m, task))}
    for method, (x, y) in points.items():
        if method in bars:
            axes.plot([x, x], bars[method], color=how[method].colour, linewidth=1.1, alpha=0.55, zorder=2)
        axes.plot(x, y, how[method].marker, color=how[method].colour, markersize=7, markeredgecolor="white", zorder=3)
    axes.margins(y=0.12)
    axes.set_xlim(0, 1.12 * max(x for x, _ in points.values()))
    if task.higher_is_better and all(0 <= y <= 1 for _, y in points.values()):
        axes.set_ylim(-0.06, 1.06)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: side.show(x) if x > 0 else "0"))
    axes.set_xlabel(f"{side.what} ({results.target:,} tokens)")
    axes.set_ylabel(task.axis)
    lines = [
        *itertools.pairwise(steps),
        *(((points[m][0], low), (points[m][0], high)) for m, (low, high) in bars.items()),
    ]
    name_points(axes, {results.labels[m]: points[m] for m in points}, [results.labels[m] for m in front], lines)


def _steps(front: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The corners of the front as a step function: each cost has the score of the dearest point below it."""
    corners = [front[0]]
    for x, y in front[1:]:
        corners += [(x, corners[-1][1]), (x, y)]
    return corners


def _bar(results: Results, method: str, task: TaskFacts) -> tuple[float, float] | None:
    """The interval of a score at the target length."""
    return results.estimate(method, task, results.target).interval


# Harm at the native length


def at_native_length(results: Results) -> Picture | None:
    """Differences to the bare model at its native length.

    None where no method was measured there.
    """
    panels, rows = [], []
    for task in results.tasks:
        found = {m: results.difference(m, BARE, task, results.native) for m in results.methods}
        changes = {m: (d.value, d.interval) for m, d in found.items() if d.value is not None}
        if changes:
            panels.append(_harm_panel(results, task, changes))
        for m, (value, interval) in changes.items():
            between = f"{task.number(interval[0], True)} to {task.number(interval[1], True)}" if interval else "–"
            rows.append([task.spec, m, task.number(value, True), between, _verdict(task, interval)])
    if not panels:
        return None
    return Picture(
        name="native",
        title=f"What it costs at the native {results.native:,} tokens",
        caption="At this length no method is needed: each method's difference to the plain model on the same samples. A bar that "
        "touches the line is no measurable change; the shaded side is harm.",
        protocol=f"Paired differences at {results.native:,} tokens with 95 % intervals. Settings are those for the longest "
        "length of the run, since a static method is deployed with one setting.",
        panels=panels,
        table=Table(["task", "method", "difference", "95 % interval", "verdict"], rows),
    )


def _verdict(task: TaskFacts, interval: Interval | None) -> str:
    if interval is None:
        return "not known"
    gains = sorted(map(task.gain, interval))
    return "harm" if gains[1] < 0 else "gain" if gains[0] > 0 else "no measurable change"


Changes = dict[str, tuple[float, Interval | None]]
"""A difference and its interval, by method."""


def _harm_panel(results: Results, task: TaskFacts, changes: Changes) -> Panel:
    height = 1.1 + 0.3 * len(changes)
    svg = draw(lambda axes: _draw_harm(axes, results, task, changes), (4.6, height))
    harmed = [m for m, (_, interval) in changes.items() if _verdict(task, interval) == "harm"]
    label = f"Dot plot: change of {task.label} at the native length. Harm: {', '.join(harmed) or 'none measurable'}."
    return Panel(task.label, svg, label)


def _draw_harm(axes: Axes, results: Results, task: TaskFacts, changes: Changes) -> None:
    how = styles(results.methods)
    for row, (method, (value, interval)) in enumerate(changes.items()):
        style = how[method]
        if interval:
            axes.plot(interval, [row, row], color=style.colour, linewidth=1.6, solid_capstyle="butt")
        axes.plot(value, row, style.marker, color=style.colour, markersize=6.5, markeredgecolor="white")
    axes.axvline(0, color=INK, linewidth=1)
    reach = 1.12 * max(abs(x) for value, interval in changes.values() for x in (value, *(interval or ()))) or 1.0
    axes.set_xlim(-reach, reach)
    axes.axvspan(*((-reach, 0) if task.higher_is_better else (0, reach)), color="#f6f1ec", zorder=0)
    axes.set_yticks(range(len(changes)), [results.labels[m] for m in changes])
    axes.set_ylim(len(changes) - 0.5, -0.5)
    axes.xaxis.set_major_locator(MaxNLocator(5, symmetric=True))
    axes.grid(True, axis="x")
    axes.grid(False, axis="y")
    axes.spines["left"].set_visible(False)
    side = "left" if task.higher_is_better else "right"
    axes.set_xlabel(f"change of {task.metric}; harm is to the {side}")


# One picture


def png(manifest: dict[str, Any], cells: Sequence[Record], path: str | Path) -> None:
    """Saves a picture of loss by position and of a score by length.

    One of them where the run has only one. Raises `LongspanError` where it has neither.
    """
    results = Results(manifest, cells)
    loss = next((t for t in results.tasks if _lines(results, t)), None)
    scored = [t for t in results.tasks if t.higher_is_better]
    found = next((t for t in scored if any(results.best(t, n) for n in results.lengths)), None)
    sides = []
    if loss is not None:
        sides.append(lambda axes: _draw_losses(axes, results, loss, _lines(results, loss), labelled=found is None))
    if found is not None:
        sides.append(lambda axes: _draw_by_length(axes, results, found))
    if not sides:
        raise LongspanError("no picture to draw: it needs ppl, or a task with a score where more is better")
    save_png(sides, (5.2 * len(sides) + 1.2, 3.8), path)


def _draw_by_length(axes: Axes, results: Results, task: TaskFacts) -> None:
    """Draws the score over lengths, one line a method, named at its end."""
    how = styles(results.methods)
    lines = {}
    for method in results.methods:
        known = [(n, s) for n in results.lengths if (s := results.score(method, task, n)) is not None]
        if known:
            x, y = np.array([n for n, _ in known], dtype=float), np.array([s for _, s in known], dtype=float)
            style = how[method]
            axes.plot(
                x, y, color=style.colour, linestyle=style.dash, linewidth=style.width, marker=style.marker, markersize=5
            )
            lines[method] = (x, y)
    if len(results.lengths) > 1:
        axes.set_xscale("log", base=2)
    axes.set_xticks(results.lengths, [tokens(n) for n in results.lengths])
    axes.minorticks_off()
    axes.set_xlabel("length of the input, tokens")
    axes.set_ylabel(f"{task.spec}: {task.metric}")
    if all(0 <= s <= 1 for _, y in lines.values() for s in y):
        axes.set_ylim(-0.04, 1.06)
    _name_ends(axes, results, lines)
