"""Figures as SVG and PNG: one style per method, labels that do not overlap, SVG whose text is text.

A method has the same colour, dash and marker in every figure. The colours are those of Okabe and Ito, which can be told apart
with any colour vision; past seven methods the dashes differ.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from matplotlib.transforms import Bbox

from longspan.util.errors import writing
from longspan.util.units import tokens

BARE = "none"
"""The name of the model without a method."""
INK, SOFT, FAINT = "#1f2328", "#59636e", "#d8dde3"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7b61a8")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (5, 1.5, 1.2, 1.5)))
MARKERS = "osD^vPX"
_SETTINGS: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "longspan",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
}
Align = Literal["left", "center", "right"]
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


@dataclass(frozen=True)
class Style:
    """How the line of a method is drawn; `width` in points."""

    colour: str
    dash: Any
    marker: str
    width: float


@dataclass(frozen=True)
class Panel:
    """One drawing.

    label: what it shows, for screen readers; narrow: the drawing for a phone, where its layout differs; method: the
    one whose swatch is in the title.
    """

    title: str
    svg: str
    label: str
    narrow: str = ""
    method: str = ""


@dataclass(frozen=True)
class Table:
    """The numbers of a figure as text."""

    head: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Picture:
    """A figure of the report: drawings, a caption, how the numbers were measured, and the numbers."""

    name: str
    title: str
    caption: str
    protocol: str
    panels: list[Panel]
    table: Table
    methods: list[str] = field(default_factory=list)
    """The methods in the legend."""


def styles(methods: Sequence[str]) -> dict[str, Style]:
    """The style of each method, by its index in the run: the bare model in black, the others in colour."""
    others = [m for m in methods if m != BARE]
    coloured = {
        m: Style(
            COLOURS[i % len(COLOURS)],
            DASHES[i // len(COLOURS) % len(DASHES)],
            MARKERS[(i + i // len(COLOURS)) % len(MARKERS)],
            1.7,
        )
        for i, m in enumerate(others)
    }
    return coloured | {BARE: Style(INK, "-", "o", 2.3)}


def draw(paint: Callable[[Axes], None], inches: tuple[float, float]) -> str:
    """The SVG element of one pair of axes, filled by `paint`; size in inches."""
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=inches, layout="constrained")
        paint(figure.subplots())
        return _svg(figure)


def save_png(paint: Sequence[Callable[[Axes], None]], inches: tuple[float, float], path: Any) -> None:
    """Writes axes side by side into a PNG of 200 dpi on white; size in inches. Raises `OSError` that names the file."""
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=inches, layout="constrained")
        for axes, fill in zip(figure.subplots(1, len(paint), squeeze=False)[0], paint, strict=True):
            fill(axes)
        with writing(path):
            figure.savefig(path, format="png", dpi=200, facecolor="white", metadata={"Software": None})


def _svg(figure: Figure) -> str:
    """The figure as an element for a page, without the prolog of a file."""
    file = io.BytesIO()
    figure.savefig(file, format="svg", transparent=True, metadata=_NO_METADATA)
    text = file.getvalue().decode()
    return text[text.index("<svg") :].strip()


def with_own_names(svg: str, prefix: str) -> str:
    """The SVG with `prefix` before each id and each reference to one, for a page of several drawings."""
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    return re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}", svg)


def swatch(style: Style) -> str:
    """The SVG of a method's line and marker, of the height of a line of text."""

    def paint(axes: Axes) -> None:
        axes.plot(
            [0, 0.5, 1],
            [0, 0, 0],
            color=style.colour,
            linestyle=style.dash,
            linewidth=style.width,
            marker=style.marker,
            markevery=[1],
            markersize=5,
            clip_on=False,  # the axes are lower than a marker
        )
        axes.set_axis_off()

    return draw(paint, (0.42, 0.16))


def lengths_axis(axes: Axes, longest: int) -> None:
    """Sets at most eight ticks on the x axis, at round numbers of tokens up to `longest`."""
    step = 2 ** max(0, (longest // 8 - 1).bit_length())
    axes.xaxis.set_major_locator(FixedLocator(list(range(0, longest + 1, step))))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: tokens(int(x)) if x else "0"))
    axes.xaxis.set_minor_locator(NullLocator())


def spread(values: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions nearest to `values` in least squares, in the same order, at least `gap` apart, from `low` to `high`.

    Where that range is too short for all of them they end above `high`.
    """
    order = sorted(range(len(values)), key=lambda i: values[i])
    blocks: list[list[float]] = []  # [sum, number] of values that were pushed together, gaps taken off
    for rank, i in enumerate(order):
        blocks.append([values[i] - rank * gap, 1])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            total, number = blocks.pop()
            blocks[-1][0] += total
            blocks[-1][1] += number
    last = max(low, high - gap * (len(values) - 1))
    flat = [min(max(total / number, low), last) for total, number in blocks for _ in range(int(number))]
    positions = [0.0] * len(values)
    for rank, i in enumerate(order):
        positions[i] = flat[rank] + rank * gap
    return positions


def name_ends(axes: Axes, ends: Sequence[tuple[str, float, float, str]]) -> None:
    """Writes each name to the right of the axes, near the end (x, y) of its line.

    A dotted line joins the two. ends: (name, x, y, colour), in data units.
    """
    low, high = axes.get_ylim()
    figure = axes.get_figure(root=True)
    assert figure is not None, "axes are always part of a figure"
    gap = (high - low) * 13 / (figure.get_size_inches()[1] * 72 * 0.8)  # a line of text, in data units
    positions = spread([y for _, _, y, _ in ends], gap, low, high)
    for (name, x, y, colour), place in zip(ends, positions, strict=True):
        line = {
            "arrowstyle": "-",
            "color": colour,
            "linewidth": 0.9,
            "linestyle": (0, (1, 2)),
        }  # dotted, unlike the data
        line |= {"shrinkA": 0, "shrinkB": 0, "relpos": (0, 0.5)}
        axes.annotate(
            name,
            (x, y),
            xytext=(1.035, place),
            textcoords=("axes fraction", "data"),
            va="center",
            arrowprops=line,
            annotation_clip=False,
        )


def name_points(
    axes: Axes,
    points: dict[str, tuple[float, float]],
    front: Sequence[str],
    lines: Sequence[tuple[tuple[float, float], tuple[float, float]]] = (),
) -> None:
    """Writes a name beside each point where it covers no point, no other name and none of `lines`.

    points (x, y) and lines ((x, y), (x, y)), horizontal or vertical, are in data units. Names in `front` are placed first; a name
    for which there is no room is left out, and the legend has it.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None, "axes are always part of a figure"
    figure.draw_without_rendering()  # settles where points lie
    scale = figure.dpi / 72
    centres = {name: axes.transData.transform(point) for name, point in points.items()}
    taken = [Bbox.from_bounds(x - 5 * scale, y - 5 * scale, 10 * scale, 10 * scale) for x, y in centres.values()]
    for ends in lines:
        (x0, y0), (x1, y1) = axes.transData.transform(ends)
        taken.append(Bbox([[min(x0, x1) - 1, min(y0, y1) - 1], [max(x0, x1) + 1, max(y0, y1) + 1]]))
    inside = axes.get_window_extent()
    for name in sorted(points, key=lambda n: n not in front):
        text = axes.annotate(
            name, points[name], xytext=(0, 0), textcoords="offset points", ha="left", va="center", fontsize=8
        )
        size = text.get_window_extent()
        for dx, dy, shift, align in _PLACES:
            box = size.translated(dx * scale - shift * size.width, dy * scale)
            within = box.x0 >= inside.x0 and box.x1 <= inside.x1 and box.y0 >= inside.y0 and box.y1 <= inside.y1
            if within and not any(box.overlaps(other) for other in taken):
                taken.append(box.padded(4 * scale, 0))  # two names side by side are not read as one
                text.set_position((dx, dy))
                text.set_horizontalalignment(align)
                break
        else:
            text.remove()


_SIDES: tuple[tuple[int, float, Align], ...] = ((6, 0.0, "left"), (0, 0.5, "center"), (-6, 1.0, "right"))
_PLACES: list[tuple[int, int, float, Align]] = [
    (8, 0, 0.0, "left"),
    (-8, 0, 1.0, "right"),
    *((dx, dy, shift, align) for dy in (11, -11, 20, -20) for dx, shift, align in _SIDES),
]
"""Offsets of a name from its point: points right and up, the share of its width to the left of that, its alignment."""
