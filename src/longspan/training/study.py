"""The extrapolation study: position schemes trained with one recipe, then evaluated far past the training length.

    longspan study small.yaml -p rope -p alibi -p kerple --seeds 3 --out runs/extrapolation

One recipe trains each scheme with each seed, on the same data in the same order. Every model is then evaluated at multiples of
its training length on the same text, under two protocols that differ in the context of a token:

    non-overlapping  disjoint windows of the length (ALiBi's default): early tokens of a window have little context
    sliding          a window of the length moved by a stride: every counted token has nearly the whole length as context

A scheme whose paper reads long texts under another method (`Scheme.read_with`) gets a second curve under that method. Two more
figures are measured: the receptive field, the distance back to the tokens that change the last state, and the resolution of
attention at the first two lengths. Every measurement is one line of `results.jsonl`, so that a stopped study resumes;
`study.json` holds the means, the spread over seeds and a verdict, and `curves.png` draws them.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longspan.apply import applied
from longspan.lm.configuration import read_position
from longspan.meter import Meter
from longspan.models import fingerprint, load, read_config
from longspan.tasks.base import Task, parse_task
from longspan.tasks.text import check_text
from longspan.training.metrics import append_line, read_lines
from longspan.training.recipe import read_recipe
from longspan.training.run import check, train
from longspan.util.errors import NotSupported, SpecError
from longspan.util.files import write_atomically

SCHEMES = (
    "sinusoidal",
    "learned",
    "nope",
    "rope",
    "alibi",
    "kerple",
    "kerple:kind=power",
    "sandwich",
    "xpos",
    "t5",
    "tupe",
)
TIMES = (1, 2, 4, 8, 16, 32)
HOLDS = 0.05
"""A scheme extrapolates where its loss past the training length is at most so many nats above its loss at that length."""
FIELD_TIMES = 8
"""Training lengths within which the receptive field is measured."""
TALL = 3.0
"""Nats above the lowest loss that the plot shows."""
SLIDES = 8
"""Strides of the longest sliding window over one sample."""

_KEY = ("scheme", "seed", "protocol", "length", "text", "samples", "weights")
"""The entries of a record that identify its measurement."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """The settings of a study: lengths as multiples of the training length, samples of each, seeds from 0 on."""

    schemes: tuple[str, ...] = SCHEMES
    seeds: int = 1
    times: tuple[int, ...] = TIMES
    samples: int = 8
    text: str = "prose"
    sliding: bool = True

    def __post_init__(self) -> None:
        for name in self.schemes:
            read_position(name)
        if not self.schemes or len(set(self.schemes)) < len(self.schemes):
            raise SpecError("study: name each position scheme once")
        if self.seeds < 1 or self.samples < 1:
            raise SpecError("study: seeds and samples must be at least 1")
        check_text(self.text, "study")
        if not self.times or sorted(set(self.times)) != list(self.times) or self.times[0] != 1:
            raise SpecError(
                "study: the lengths are multiples of the training length in rising order from 1, such as 1,2,4,8"
            )


@dataclass
class Curve:
    """A scheme's loss by length, in nats a token: mean, lowest and highest over seeds; None where it has no positions."""

    scheme: str
    protocol: str
    lengths: list[int] = field(default_factory=list)
    mean: list[float | None] = field(default_factory=list)
    low: list[float | None] = field(default_factory=list)
    high: list[float | None] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """Whether the loss at every length is at most `HOLDS` above the loss at the training length."""
        first = self.mean[0]
        return first is not None and all(m is not None and m <= first + HOLDS for m in self.mean)


def study(
    recipe: str | Path | dict[str, Any], settings: Settings, out: str | Path, say: Say = print, **overrides: Any
) -> Path:
    """Trains, evaluates and draws all schemes; returns the folder.

    Models and measurements that it has are not repeated.

    recipe: of `longspan.train`, for a model of type longspan; the study sets its `out`, `seed` and `model.position`.
    """

    folder, trainings = Path(out).expanduser(), []
    for seed in range(settings.seeds):
        for scheme in settings.schemes:
            changes = {
                "out": str(folder / "models" / f"{_plain(scheme)}-seed{seed}"),
                "seed": seed,
                "model.position": scheme,
            }
            trainings.append((scheme, seed, read_recipe(recipe, {**overrides, **changes}.items())))
    for _, _, one in trainings[
        : len(settings.schemes)
    ]:  # an impossible last one is refused before the first is trained
        check(one)
    folder.mkdir(parents=True, exist_ok=True)
    weights = set()
    for scheme, seed, one in trainings:
        say(f"{scheme}, seed {seed}: training")
        trained = train(one)
        weights.add(_measure(Path(trained.model), scheme, seed, settings, folder, say))
    return report(folder, settings, weights)


def _plain(scheme: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in scheme)


def _measure(model_folder: Path, scheme: str, seed: int, settings: Settings, folder: Path, say: Say) -> str:
    """Appends a model's missing measurements to `results.jsonl`; returns the model's fingerprint."""
    done = {tuple(r.get(key) for key in _KEY) for r in read_results(folder)}
    weights = fingerprint(model_folder)
    model: PreTrainedModel | None = None
    tokenizer: Any = None
    window = read_config(model_folder).max_position_embeddings
    for label, method, (protocol, length, size, task) in _readings(scheme, window, settings):
        key = (label, seed, protocol, length, settings.text, settings.samples, weights)
        if key in done:
            continue
        if model is None:
            model, tokenizer = load(model_folder)
        with applied(model, method):
            figures = _figures(model, tokenizer, task, size, settings.samples)
        append_line(folder / "results.jsonl", dict(zip(_KEY, key, strict=True)) | figures)
        shown = f"{figures['score']:.3f}" if figures["score"] is not None else figures["reason"]
        say(f"{label}, seed {seed}: {protocol} at {length:,} tokens: {shown}")
    return weights


def _readings(scheme: str, window: int, settings: Settings) -> Iterator[tuple[str, str, tuple[str, int, int, Task]]]:
    """A scheme's measurements: (name of the curve, method that is applied, measurement)."""
    for measurement in _tasks(window, settings):
        yield scheme, "none", measurement
    if method := read_position(scheme)[0].read_with:
        for measurement in _tasks(window, settings):
            if measurement[0] in ("non-overlapping", "sliding"):
                yield f"{scheme}, {method}", method, measurement


def _tasks(window: int, settings: Settings) -> Iterator[tuple[str, int, int, Task]]:
    """Every measurement: (protocol, length, tokens of a sample, task).

    The losses of all lengths are of the same texts, so that a curve shows the effect of the length alone.
    """
    longest, text = settings.times[-1] * window, settings.text
    for times in settings.times:
        length = times * window
        task = parse_task(f"ppl:protocol=nonoverlapping,window={length},text={text}")
        yield "non-overlapping", length, longest + 1, task
        if settings.sliding:
            stride = max(1, min(256, window // 2))
            task = parse_task(f"ppl:protocol=sliding,window={length},stride={stride},text={text}")
            yield "sliding", length, longest + SLIDES * stride + 1, task
    for times in settings.times[:2]:
        yield "resolution", times * window, times * window, parse_task(f"resolution:text={text}")
    field = min(FIELD_TIMES, settings.times[-1]) * window
    yield "field", field, field, parse_task(f"field:text={text}")


def _figures(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, size: int, count: int
) -> dict[str, Any]:
    """The mean score over samples of `size` tokens, their scores, and the task's details by position or distance, averaged.

    `score` is None, with a `reason`, where the model cannot read so many tokens.
    """
    scores, details = [], []
    for sample in task.samples(tokenizer, size, count, 0):
        try:
            with torch.no_grad():
                outcome = task.run(model, tokenizer, sample, Meter(model.device))
        except NotSupported as error:
            return {"score": None, "reason": str(error)}
        scores.append(outcome.score)
        details.append(outcome.detail)
    figures: dict[str, Any] = {"score": statistics.fmean(scores), "scores": scores}
    for name in ("nll_by_position", "share_within", "distances"):
        if name in details[0]:
            columns = zip(*(d[name] for d in details), strict=True)
            figures[name] = [statistics.fmean(c) if None not in c else None for c in columns]
    return figures


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Every finished measurement, without a line that a stop cut short."""
    return read_lines(folder / "results.jsonl")


def curves(records: Sequence[dict[str, Any]], protocol: str) -> list[Curve]:
    """One curve for each scheme, in the order of measurement."""
    drawn = []
    of_protocol = [r for r in records if r["protocol"] == protocol]
    for scheme in dict.fromkeys(r["scheme"] for r in of_protocol):
        curve = Curve(scheme, protocol)
        of_scheme = [r for r in of_protocol if r["scheme"] == scheme]
        for length in sorted({r["length"] for r in of_scheme}):
            scores = [r["score"] for r in of_scheme if r["length"] == length and r["score"] is not None]
            curve.lengths.append(length)
            curve.mean.append(statistics.fmean(scores) if scores else None)
            curve.low.append(min(scores) if scores else None)
            curve.high.append(max(scores) if scores else None)
        drawn.append(curve)
    return drawn


def _of_one_kind(records: Sequence[dict[str, Any]], settings: Settings, weights: Set[str]) -> list[dict[str, Any]]:
    """The measurements on these samples, one model's for each scheme and seed: of one in `weights`, or else the last."""
    mine = [r for r in records if (r.get("text"), r.get("samples")) == (settings.text, settings.samples)]
    of: dict[tuple[str, int], str] = {}
    for r in mine:
        if of.get((r["scheme"], r["seed"])) not in weights:
            of[r["scheme"], r["seed"]] = r["weights"]
    return [r for r in mine if r["weights"] == of[r["scheme"], r["seed"]]]


def report(folder: Path, settings: Settings, weights: Set[str]) -> Path:
    """Writes `study.json` and `curves.png` from the measurements; returns the folder.

    weights: fingerprints of the models whose measurements come before those of others.
    """
    import transformers

    records = _of_one_kind(read_results(folder), settings, weights)
    protocols = ["non-overlapping", *(["sliding"] if settings.sliding else [])]
    drawn = {protocol: curves(records, protocol) for protocol in protocols}
    fields = {c.scheme: c.mean[-1] for c in curves(records, "field")}
    figures = {
        "settings": asdict(settings),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "curves": {p: [{**asdict(c), "holds": c.holds} for c in cs] for p, cs in drawn.items()},
        "field": fields,
        "resolution": {c.scheme: c.mean for c in curves(records, "resolution")},
    }
    write_atomically(folder / "study.json", json.dumps(figures, indent=1))
    _draw(folder / "curves.png", drawn, curves_of_field(records))
    return folder


def curves_of_field(records: Sequence[dict[str, Any]]) -> dict[str, tuple[list[float], list[float]]]:
    """For each scheme (distances, share of the gradient within each), averaged over seeds."""
    found = {}
    fields = [r for r in records if r["protocol"] == "field" and r["score"] is not None]
    for scheme in dict.fromkeys(r["scheme"] for r in fields):
        of_scheme = [r for r in fields if r["scheme"] == scheme]
        shares = [statistics.fmean(column) for column in zip(*(r["share_within"] for r in of_scheme), strict=True)]
        found[scheme] = (of_scheme[0]["distances"], shares)
    return found


def _draw(path: Path, drawn: dict[str, list[Curve]], fields: dict[str, tuple[list[float], list[float]]]) -> None:

    from longspan.util.drawing import save_png, styles  # matplotlib, which takes a second

    names = [c.scheme for c in next(iter(drawn.values()))]
    looks = styles(names)

    def losses(axes: Any, protocol: str) -> None:
        for curve in drawn[protocol]:
            look = looks[curve.scheme]
            points = [(n, m) for n, m in zip(curve.lengths, curve.mean, strict=True) if m is not None]
            if points:
                x, y = zip(*points, strict=True)
                axes.plot(x, y, color=look.colour, linestyle=look.dash, marker=look.marker, ms=3, label=curve.scheme)
        axes.set_xscale("log", base=2)
        lengths = next(iter(drawn[protocol])).lengths
        axes.set_xticks(lengths, [f"{n:,}" for n in lengths])
        reached = [m for c in drawn[protocol] for m in c.mean if m is not None]
        axes.set_ylim(min(reached) - 0.1, min(max(reached), min(reached) + TALL) + 0.1)
        axes.set_title(f"Loss (nats a token), {protocol}")
        axes.set_xlabel("length tested (tokens)")

    def field_curves(axes: Any) -> None:
        for name, (distances, shares) in fields.items():
            look = looks[name]
            axes.plot([d + 1 for d in distances], shares, color=look.colour, linestyle=look.dash, label=name)
        axes.set_xscale("log", base=2)
        axes.set_title("Share of the gradient within a distance")
        axes.set_xlabel("tokens back")
        axes.legend(fontsize=7, frameon=False)

    panels = [lambda axes, p=p: losses(axes, p) for p in drawn]
    save_png([*panels, field_curves], (4.2 * (len(panels) + 1), 3.4), path)


def table(folder: Path) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of a table: scheme, loss at every length in disjoint windows, whether it holds, receptive field."""
    figures = json.loads((folder / "study.json").read_text(encoding="utf-8"))
    found = figures["curves"]["non-overlapping"]
    rows = []
    for curve in found:
        losses = ["–" if m is None else f"{m:.3f}" for m in curve["mean"]]
        field = figures["field"].get(curve["scheme"])
        distance = "–" if field is None else f"{field:,.0f}"
        sharp = ["–" if r is None else f"{r:.3g}" for r in figures["resolution"].get(curve["scheme"], [])]
        verdict = "holds" if curve["holds"] else "does not hold"
        rows.append([curve["scheme"], *losses, verdict, distance, " / ".join(sharp)])
    lengths = [f"{n:,}" for n in found[0]["lengths"]]
    return ["scheme", *lengths, "past the training length", "field", f"resolution at {' / '.join(lengths[:2])}"], rows
