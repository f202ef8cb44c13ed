"""The share of right answers by position in a stream, as figure and as text.

A method that fails beyond its cache or its window answers well up to there, which the share of the whole stream hides.
"""

from __future__ import annotations

import itertools

import numpy as np
from matplotlib.axes import Axes

from longspan.compare.report.results import Results, TaskFacts, shares_right
from longspan.util.drawing import SOFT, Panel, Picture, Table, draw, lengths_axis, name_ends, styles

STRETCHES = 8
"""Parts of a stream whose shares are given as numbers."""
Stretches = dict[str, tuple[np.ndarray, np.ndarray, int]]
"""By method: right answers and questions in each equal stretch of the stream, and the tokens that these cover."""


def right_by_position(results: Results, task: TaskFacts) -> Picture | None:
    """A figure of the share right over positions, one line a method.

    None where the task is not a stream.
    """
    lines = _stretches(results, task)
    if not lines:
        return None
    longest = max(span for _, _, span in lines.values())
    wide = draw(lambda axes: _draw(axes, results, lines, True), (9.4, max(4.0, 1 + 0.19 * len(lines))))
    narrow = draw(lambda axes: _draw(axes, results, lines, False), (4.2, 3.7))
    said = "; ".join(f"{results.labels[m]} {_words(hits, questions)}" for m, (hits, questions, _) in lines.items())
    label = f"Line chart: share right by position up to {longest:,} tokens. In eighths: {said}."
    edges = np.linspace(0, longest, STRETCHES + 1)
    head = ["method", *(f"{a:,.0f}–{b:,.0f}" for a, b in itertools.pairwise(edges))]
    rows = [[m, *_figures(hits, questions, span / longest)] for m, (hits, questions, span) in lines.items()]
    ended = [f"{results.labels[m]} at {n:,}" for m, (_, _, n) in lines.items() if n < longest]
    return Picture(
        name=f"stream-{task.spec}",
        title=f"Answered by position: {task.spec}",
        caption="A method that reads on without end stays level; one that fails beyond its cache or its window falls to "
        "zero where that ends."
        + (" The dashed line is the model's native window." if results.native < longest else "")
        + (f" Lines that end early did not finish a longer cell: {', '.join(ended)}." if ended else ""),
        protocol=results.protocol_line(task, results.target),
        panels=[Panel("", wide, label, narrow)],
        table=Table(head, rows),
        methods=list(lines),
    )


def terminal_lines(results: Results, task: TaskFacts) -> list[str]:
    """Lines with the shares in eighths of the stream, one a method.

    None where the task is not a stream.
    """
    return [
        f"{task.spec}, right in each eighth of {span:,} tokens: {results.labels[m]} {_words(hits, questions)}"
        for m, (hits, questions, span) in _stretches(results, task).items()
    ]


def _stretches(results: Results, task: TaskFacts) -> Stretches:
    """The stretches of each method at the longest length that it finished."""
    found = {}
    for method in results.methods:
        done = [r for n in results.lengths if (r := results.ok(method, task, n))]
        for record in done:  # the last is the longest
            if (shares := shares_right(record)) is not None:
                found[method] = (np.array(shares[0]), np.array(shares[1]), int(record["length"]))
    return found


def _figures(hits: np.ndarray, questions: np.ndarray, part: float) -> list[str]:
    """Shares in `STRETCHES` parts of the longest stream, of which this one covers `part`.

    A dash for parts without questions.
    """
    place = (np.arange(len(hits)) + 0.5) / len(hits) * part * STRETCHES
    sums = [
        (hits[(place >= i) & (place < i + 1)].sum(), questions[(place >= i) & (place < i + 1)].sum())
        for i in range(STRETCHES)
    ]
    return [f"{right / n:.2f}" if n else "–" for right, n in sums]


def _words(hits: np.ndarray, questions: np.ndarray) -> str:
    return " ".join(_figures(hits, questions, 1.0))


def _draw(axes: Axes, results: Results, lines: Stretches, labelled: bool) -> None:
    how, ends = styles(results.methods), []
    longest = max(span for _, _, span in lines.values())
    for method, (hits, questions, span) in lines.items():
        style, known = how[method], questions > 0
        x = ((np.arange(len(questions)) + 0.5) / len(questions) * span)[known]
        y = hits[known] / questions[known]
        axes.plot(
            x, y, color=style.colour, linestyle=style.dash, linewidth=style.width, marker=style.marker, markersize=3.5
        )
        ends.append((results.labels[method], float(x[-1]), float(y[-1]), style.colour))
    axes.set_xlim(0, longest)
    axes.set_ylim(-0.04, 1.06)
    lengths_axis(axes, longest)
    axes.set_xlabel("position in the stream, tokens")
    axes.set_ylabel("share of questions right")
    if results.native < longest:
        axes.axvline(results.native, color=SOFT, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    if labelled:
        name_ends(axes, ends)
