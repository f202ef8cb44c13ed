"""The extrapolation study: every position scheme trained alike, then read far past the length it was trained on.

    longspan study small.yaml -p rope -p alibi -p kerple --seeds 3 --out runs/extrapolation

One recipe trains each scheme with each seed; all else is the same, the order of the data too. Every model is then tested at
multiples of its training length on the same text, under two protocols that differ in how much context a token has:

    non-overlapping  disjoint windows of the length (ALiBi's default): early tokens of a window have little before them
    sliding          a window of the length moved by a stride: every counted token has nearly the whole length before it

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
"""A scheme holds where its loss past the training length is at most so many nats above its loss at it."""
FIELD_TIMES = 8
"""The receptive field is taken within so many training lengths."""
TALL = 3.0
"""Nats above the best that a plot still shows."""
SLIDES = 8
"""Strides that the longest sliding window makes over one sample."""

_ASKED = ("scheme", "seed", "protocol", "length", "text", "samples", "weights")
"""What a measurement is of."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """What a study measures: lengths as multiples of the training length, samples of each, seeds from 0 on."""

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
    """A scheme's figures by length, in nats a token, over seeds: mean, lowest, highest; None where it has no positions."""

    scheme: str
    protocol: str
    lengths: list[int] = field(default_factory=list)
    mean: list[float | None] = field(default_factory=list)
    low: list[float | None] = field(default_factory=list)
    high: list[float | None] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """Whether the loss at every length is at most `HOLDS` above that at the training length."""
        first = self.mean[0]
        return first is not None and all(m is not None and m <= first + HOLDS for m in self.mean)


def study(
    recipe: str | Path | dict[str, Any], settings: Settings, out: str | Path, say: Say = print, **overrides: Any
) -> Path:
    """Trains, tests and draws; returns the folder. What is there already is not done again.

    recipe: of `longspan.train`, for a model of type longspan; its `out`, `seed` and `model.position` are the study's.
    """

    folder, asked = Path(out).expanduser(), []
    for seed in range(settings.seeds):
        for scheme in settings.schemes:
            own = {
                "out": str(folder / "models" / f"{_plain(scheme)}-seed{seed}"),
                "seed": seed,
                "model.position": scheme,
            }
            asked.append((scheme, seed, read_recipe(recipe, {**overrides, **own}.items())))
    for _, _, one in asked[: len(settings.schemes)]:  # what the last cannot have is said before the first is trained
        check(one)
    folder.mkdir(parents=True, exist_ok=True)
    weights = set()
    for scheme, seed, one in asked:
        say(f"{scheme}, seed {seed}: training")
        trained = train(one)
        weights.add(_measure(Path(trained.model), scheme, seed, settings, folder, say))
    return report(folder, settings, weights)


def _plain(scheme: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in scheme)


def _measure(model_folder: Path, scheme: str, seed: int, settings: Settings, folder: Path, say: Say) -> str:
    """Adds what is not yet in `results.jsonl` of one model, whose fingerprint is returned."""
    done = {tuple(r.get(key) for key in _ASKED) for r in read_results(folder)}
    weights = fingerprint(model_folder)
    model: PreTrainedModel | None = None
    tokenizer: Any = None
    window = read_config(model_folder).max_position_embeddings
    for label, method, (protocol, length, size, task) in _readings(scheme, window, settings):
        asked = (label, seed, protocol, length, settings.text, settings.samples, weights)
        if asked in done:
            continue
        if model is None:
            model, tokenizer = load(model_folder)
        with applied(model, method):
            figures = _figures(model, tokenizer, task, size, settings.samples)
        append_line(folder / "results.jsonl", dict(zip(_ASKED, asked, strict=True)) | figures)
        shown = f"{figures['score']:.3f}" if figures["score"] is not None else figures["reason"]
        say(f"{label}, seed {seed}: {protocol} at {length:,} tokens: {shown}")
    return weights


def _readings(scheme: str, window: int, settings: Settings) -> Iterator[tuple[str, str, tuple[str, int, int, Task]]]:
    """(a curve's name, the method that is put on for it, measurement)."""
    for asked in _tasks(window, settings):
        yield scheme, "none", asked
    if method := read_position(scheme)[0].read_with:
        for asked in _tasks(window, settings):
            if asked[0] in ("non-overlapping", "sliding"):
                yield f"{scheme}, {method}", method, asked


def _tasks(window: int, settings: Settings) -> Iterator[tuple[str, int, int, Task]]:
    """(protocol, length, tokens of a sample, task) of every measurement. The losses of all lengths are of the same texts, in
    windows of `length`, so that a curve shows nothing but what the length does."""
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
    """Mean score over the samples of `size` tokens, their scores, and by position or distance what the task tells; `score`
    None with the reason where the model cannot read so far."""
    scores, details = [], []
    for sample in task.samples(tokenizer, size, count, 0):
        try:
            with torch.no_grad():
                outcome = task.run(model, tokenizer, sample, Meter(model.device))
        except NotSupported as error:
            return {"score": None, "reason": str(error)}
        scores.append(outcome.score)
        details.append(outcome.detail)
    made: dict[str, Any] = {"score": statistics.fmean(scores), "scores": scores}
    for name in ("nll_by_position", "share_within", "distances"):
        if name in details[0]:
            columns = zip(*(d[name] for d in details), strict=True)
            made[name] = [statistics.fmean(c) if None not in c else None for c in columns]
    return made


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Every finished measurement; a line that a stop cut short is left out."""
    return read_lines(folder / "results.jsonl")


def curves(records: Sequence[dict[str, Any]], protocol: str) -> list[Curve]:
    """One curve for each scheme, in the order in which schemes were measured."""
    made = []
    mine = [r for r in records if r["protocol"] == protocol]
    for scheme in dict.fromkeys(r["scheme"] for r in mine):
        curve = Curve(scheme, protocol)
        own = [r for r in mine if r["scheme"] == scheme]
        for length in sorted({r["length"] for r in own}):
            scores = [r["score"] for r in own if r["length"] == length and r["score"] is not None]
            curve.lengths.append(length)
            curve.mean.append(statistics.fmean(scores) if scores else None)
            curve.low.append(min(scores) if scores else None)
            curve.high.append(max(scores) if scores else None)
        made.append(curve)
    return made


def _of_one_kind(records: Sequence[dict[str, Any]], settings: Settings, weights: Set[str]) -> list[dict[str, Any]]:
    """The measurements on these samples, of each scheme and seed those of one model: of one in `weights`, or else the last."""
    mine = [r for r in records if (r.get("text"), r.get("samples")) == (settings.text, settings.samples)]
    of: dict[tuple[str, int], str] = {}
    for r in mine:
        if of.get((r["scheme"], r["seed"])) not in weights:
            of[r["scheme"], r["seed"]] = r["weights"]
    return [r for r in mine if r["weights"] == of[r["scheme"], r["seed"]]]


def report(folder: Path, settings: Settings, weights: Set[str]) -> Path:
    """Writes `study.json` and `curves.png` from the measurements of models of these fingerprints; returns the folder."""
    import transformers

    records = _of_one_kind(read_results(folder), settings, weights)
    protocols = ["non-overlapping", *(["sliding"] if settings.sliding else [])]
    drawn = {protocol: curves(records, protocol) for protocol in protocols}
    fields = {c.scheme: c.mean[-1] for c in curves(records, "field")}
    made = {
        "settings": asdict(settings),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "curves": {p: [{**asdict(c), "holds": c.holds} for c in cs] for p, cs in drawn.items()},
        "field": fields,
        "resolution": {c.scheme: c.mean for c in curves(records, "resolution")},
    }
    write_atomically(folder / "study.json", json.dumps(made, indent=1))
    _draw(folder / "curves.png", drawn, curves_of_field(records))
    return folder


def curves_of_field(records: Sequence[dict[str, Any]]) -> dict[str, tuple[list[float], list[float]]]:
    """Of each scheme, (distances, share of the gradient within them), averaged over seeds."""
    found = {}
    mine = [r for r in records if r["protocol"] == "field" and r["score"] is not None]
    for scheme in dict.fromkeys(r["scheme"] for r in mine):
        own = [r for r in mine if r["scheme"] == scheme]
        shares = [statistics.fmean(column) for column in zip(*(r["share_within"] for r in own), strict=True)]
        found[scheme] = (own[0]["distances"], shares)
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
    """Headings and rows for people: scheme, the loss at every length in disjoint windows, whether it holds, the field."""
    made = json.loads((folder / "study.json").read_text(encoding="utf-8"))
    found = made["curves"]["non-overlapping"]
    rows = []
    for curve in found:
        losses = ["–" if m is None else f"{m:.3f}" for m in curve["mean"]]
        reach = made["field"].get(curve["scheme"])
        far = "–" if reach is None else f"{reach:,.0f}"
        sharp = ["–" if r is None else f"{r:.3g}" for r in made["resolution"].get(curve["scheme"], [])]
        held = "holds" if curve["holds"] else "does not hold"
        rows.append([curve["scheme"], *losses, held, far, " / ".join(sharp)])
    lengths = [f"{n:,}" for n in found[0]["lengths"]]
    return ["scheme", *lengths, "past the training length", "field", f"resolution at {' / '.join(lengths[:2])}"], rows
