"""Metrics of a training: a file of records, a progress line, a picture, and operations against the device's peak (MFU).

`metrics.jsonl` is only appended to. A resumed run first records the step at which it starts; earlier records of higher steps were
lost in a kill and computed again, and `read_metrics` leaves them out, as well as a torn last line.
"""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedConfig, PreTrainedModel

from longspan.core.facts import ModelFacts, facts_of, text_config
from longspan.engine.call import AttentionShape
from longspan.lm import LongspanConfig
from longspan.lm.base import Pattern
from longspan.util.errors import writing
from longspan.util.units import duration, size

Record = dict[str, Any]

METRICS = "metrics.jsonl"
PEAK_FLOPS = {
    "H200": 989.4e12,
    "H100 PCIe": 756.5e12,
    "H100 NVL": 835.5e12,
    "H100": 989.4e12,
    "A100": 312e12,
}
"""Dense bf16 operations a second by a part of the device's name, from NVIDIA's data sheets; the first match counts."""


def peak_flops(device: torch.device, dtype: str) -> float | None:
    """The device's peak operations a second in this dtype; None for an unknown device."""
    if device.type != "cuda" or dtype == "fp32":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


@dataclass(frozen=True)
class Work:
    """Operations of training on one token: products with weights, and attention, which grows with the length."""

    products: float
    attention: float

    @property
    def total(self) -> float:
        return self.products + self.attention


def work(causal: PreTrainedModel, length: int, labelled: float = 1.0) -> Work:
    """Operations of training the model on one token of a sample of `length` tokens.

    Each weight takes two operations forward, two backward for the states and two for its gradient if it trains; attention is
    counted over the visible pairs, once forward and twice backward. Embeddings are looked up and take none unless they are the
    output matrix too. labelled: the share of positions that go through the output matrix. What gradient checkpointing recomputes
    does not count.
    """
    facts = facts_of(causal)
    head, read = causal.get_output_embeddings(), causal.get_input_embeddings()
    tied = head is not None and head.weight is read.weight
    last = None if head is None else head.weight
    sizes = [
        (p.numel() * (labelled if p is last else 1.0), p.requires_grad)
        for p in causal.parameters()
        if tied or p is not read.weight
    ]
    products = sum(n * (6.0 if trains else 4.0) for n, trains in sizes)
    return Work(products, 12.0 * facts.heads * facts.head_dim * _keys_seen(text_config(causal.config), facts, length))


def _keys_seen(config: PreTrainedConfig, facts: ModelFacts, length: int) -> float:
    """Visible keys of a query on average, summed over the layers: half of all keys, or those of the model's patterns.

    A mixer scores no pairs; its sums are few operations beside its weights.
    """
    if not isinstance(config, LongspanConfig):
        return facts.layers * length / 2
    kinds = config.attentions_of(causal=True)
    grids = [AttentionShape(facts.heads, length, layer, causal=True) for layer in range(facts.layers)]
    seen = ((kinds[grid.layer % len(kinds)], grid) for grid in grids)
    return sum(kind.pairs(grid) for kind, grid in seen if isinstance(kind, Pattern)) / (facts.heads * length)


class Journal:
    """Appends records to a run's `metrics.jsonl`, one JSON object a line."""

    def __init__(self, folder: Path):
        self.path = folder / METRICS

    def write(self, record: Record) -> None:
        append_line(self.path, record)


def append_line(path: Path, record: Record) -> None:
    """Appends a record as one line, after a torn line a new one; floats that are not finite become null."""
    safe = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    with writing(path), open(path, "ab+") as file:
        if file.tell():
            file.seek(-1, 2)
            if file.read(1) != b"\n":  # torn by a kill
                file.write(b"\n")
        file.write(json.dumps(safe).encode() + b"\n")


def read_lines(path: Path) -> list[Record]:
    """The JSON objects of a file's complete lines; an empty list without a file."""
    records = list[Record]()
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError):
            if isinstance(record := json.loads(line), dict):
                records.append(record)
    return records


def read_metrics(folder: Path) -> list[Record]:
    """The records of a run in order, without those that a resumed run repeated."""
    found = list[Record]()
    for record in read_lines(folder / METRICS):
        if not isinstance(record.get("step"), int):
            continue
        if record.get("event") == "start":
            found = [r for r in found if r["step"] <= record["step"]]
        found.append(record)
    return found


class Live:
    """The progress line: steps, loss, tokens a second, MFU and the time left; without a terminal, a line for each record."""

    def __init__(self, total: int, show: bool):
        self.console = Console(stderr=True, quiet=not show, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._total = total

    def say(self, text: str) -> None:
        """Prints one line without markup."""
        (self._bar.console if self._bar else self.console).print(text, markup=False)

    def start(self, done: int) -> None:
        if not (self.console.is_terminal and not self.console.quiet):
            return
        columns = (BarColumn(20), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
        self._bar = Progress(*columns, console=self.console, transient=True)
        self._bar.start()
        self._bar.add_task("", total=self._total, completed=done)

    def step(self, done: int) -> None:
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=done)

    def record(self, record: Record) -> None:
        """Shows the newest record."""
        text = describe(record)
        if self._bar and "loss" in record:
            self._bar.update(self._bar.task_ids[0], description=text)
        else:
            self.say(f"step {record['step']:,} of {self._total:,}: {text}")

    def stop(self) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None


def describe(record: Record) -> str:
    """A record as one line of text."""
    parts = []
    for key, form in (
        ("loss", "loss {:.4g}"),
        ("valid_loss", "valid loss {:.4g}"),
        ("tokens_per_s", "{:,.0f} tokens/s"),
    ):
        if record.get(key) is not None:
            parts.append(form.format(record[key]))
    if record.get("mfu") is not None:
        parts.append(f"MFU {record['mfu']:.1%}")
    if record.get("left_s") is not None:
        parts.append(f"{duration(record['left_s'])} left")
    if record.get("peak_bytes") is not None:
        parts.append(size(record["peak_bytes"]))
    return ", ".join(parts)


def plot(records: list[Record], path: Path, title: str) -> None:
    """Draws training and validation loss against steps into a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for key, label, style in (("loss", "training", "-"), ("valid_loss", "validation", "o-")):
        points = [(r["step"], r[key]) for r in records if r.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=3, linewidth=1)
    axes.set(xlabel="step", ylabel="loss (nats a token)", title=title)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    with writing(path):
        figure.savefig(path, dpi=150)
    pyplot.close(figure)
