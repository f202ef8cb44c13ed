"""Time and memory of every way to mix tokens, by length: `longspan bench attention`.

A contender goes on to the next length until it is out of memory or would take too long. Everything that the catalogue knows
takes part (`longspan.bench_contenders`), so a new method does by itself.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.benchmark import Timer

from longspan.bench_contenders import Contender, Shape, Work, contenders
from longspan.compare.worker import is_out_of_memory
from longspan.errors import LongspanError, SpecError

LENGTHS = {"cuda": tuple(2**n for n in range(10, 24)), "cpu": (1024, 2048, 4096, 8192, 16384)}
RUN_S = 0.2
"""How long one figure is measured for."""


@dataclass
class Row:
    """One contender at one length. Seconds are medians of one call, forward without gradients; `peak_bytes` is what a forward
    and a backward add to what was there, on CUDA; tflops count the pairs that a pattern sees, twice two products each (five
    in the backward)."""

    name: str
    kind: str
    direction: str
    length: int
    way: str = ""
    why: str = ""
    forward_s: float | None = None
    backward_s: float | None = None
    peak_bytes: int | None = None
    forward_tflops: float | None = None
    backward_tflops: float | None = None
    mask_share: float | None = None
    """Seconds of building the mask, or the tables of blocks that are built once for a length, over those of a forward."""
    note: str = ""


@dataclass
class AttentionBench:
    settings: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    """Who did not take part, and why."""

    def names(self) -> list[str]:
        return list(dict.fromkeys(row.name for row in self.rows))

    def growth(self, name: str, what: str) -> float | None:
        """The exponent e of what ~ length^e, fitted to the longer half of the lengths; None for fewer than three."""
        points = [(row.length, value) for row in self.rows if row.name == name and (value := getattr(row, what))]
        points = points[-max(3, -(-len(points) // 2)) :]
        if len(points) < 3:
            return None
        x, y = np.log([length for length, _ in points]), np.log([value for _, value in points])
        return float(np.polyfit(x, y, 1)[0])

    def to_dict(self) -> dict[str, Any]:
        measured = ("forward_s", "backward_s", "peak_bytes")
        growth = {name: {what: self.growth(name, what) for what in measured} for name in self.names()}
        rows = [asdict(row) for row in self.rows]
        return {"what": "attention", "settings": self.settings, "rows": rows, "growth": growth, "skipped": self.skipped}


def shape_of(heads: int, kv_heads: int, head_dim: int, dtype: str | None, device: str | None) -> Shape:
    """What is asked for in words; left out, the fastest device in the dtype that it is used with. Raises `SpecError`."""
    if min(heads, head_dim, kv_heads) < 1 or heads % kv_heads:
        raise SpecError(f"{heads} heads of {head_dim} cannot share {kv_heads} key-value heads evenly")
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    kind = dtype or ("bfloat16" if place.type == "cuda" else "float32")
    if kind not in ("float32", "bfloat16", "float16"):
        raise SpecError(f"dtype must be float32, bfloat16 or float16, not {kind!r}")
    return Shape(heads, kv_heads, head_dim, getattr(torch, kind), place)


def attention(
    *,
    lengths: Iterable[int] = (),
    specs: Iterable[str] = (),
    shape: Shape,
    most_s: float = 10.0,
    peers: bool = True,
    on_row: Callable[[Row], None] | None = None,
) -> AttentionBench:
    """specs: which attentions; left out, all of the catalogue. most_s: a contender stops before the length at which one call
    would take longer. Raises `SpecError` for what is no attention or no length."""
    chosen = sorted(set(lengths)) or list(LENGTHS[shape.device.type])
    if chosen[0] < 2:
        raise SpecError(f"a text has at least 2 tokens, not {chosen[0]}")
    made = AttentionBench(_settings(shape, chosen))
    for contender in contenders(list(specs), shape, made.skipped, peers=peers):
        _climb(made, contender, chosen, shape, most_s, on_row or (lambda row: None))
    return made


def _climb(
    made: AttentionBench,
    contender: Contender,
    lengths: list[int],
    shape: Shape,
    most_s: float,
    on_row: Callable[[Row], None],
) -> None:
    done: list[tuple[int, float]] = []
    for length in lengths:
        row = Row(contender.name, contender.kind, "causal" if contender.causal else "bidirectional", length)
        expected = _expected(done, length)
        if ends := expected > most_s:
            row.note = f"would take about {expected:.0f} s"
        else:
            ends = _measure(row, contender, shape)
        made.rows.append(row)
        on_row(row)
        if ends:
            return
        if row.forward_s and row.backward_s:
            done.append((length, max(row.forward_s, row.backward_s)))


def _expected(done: list[tuple[int, float]], length: int) -> float:
    """Seconds of a call at `length`, from how they grew so far; with the square while that is unknown."""
    if not done:
        return 0.0
    slope = 2.0
    if len(done) > 1:
        (near, least), (far, most) = done[-2:]
        slope = min(max(math.log(most / least) / math.log(far / near), 1.0), 2.0)
    return done[-1][1] * (length / done[-1][0]) ** slope


def _measure(row: Row, contender: Contender, shape: Shape) -> bool:
    """Fills in a row; True where there was too little memory for it."""
    gc.collect()
    if shape.device.type == "cuda":
        torch.cuda.empty_cache()
    try:
        work = contender.prepare(row.length)
        row.way, row.why = work.way, work.why
        with torch.no_grad():
            row.forward_s = _seconds(work.run)
        row.mask_share = None if work.mask_s is None else work.mask_s / row.forward_s
        row.forward_tflops = _tflops(work, shape, 2, row.forward_s)
        row.backward_s, row.peak_bytes = _backward(work, shape.device)
        row.backward_tflops = _tflops(work, shape, 5, row.backward_s)
    except LongspanError as error:
        row.note = str(error)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        row.note = "out of memory"
        return True
    return False


def _tflops(work: Work, shape: Shape, products: int, seconds: float) -> float | None:
    """10¹² operations a second, of so many products with the pairs that are seen."""
    return 2 * products * shape.head_dim * work.pairs / seconds / 1e12 if work.pairs else None


def _seconds(run: Callable[[], Any]) -> float:
    """Median of one call; the first two warm up."""
    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=RUN_S).median


def _backward(work: Work, device: torch.device) -> tuple[float, int | None]:
    before = 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    out = work.run()
    push = torch.ones_like(out)
    torch.autograd.grad(out, work.leaves, push, allow_unused=True)
    peak = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else None
    out = work.run()
    return _seconds(lambda: torch.autograd.grad(out, work.leaves, push, retain_graph=True, allow_unused=True)), peak


def _settings(shape: Shape, lengths: list[int]) -> dict[str, Any]:
    import transformers

    name = torch.cuda.get_device_name(shape.device) if shape.device.type == "cuda" else "CPU"
    sizes = {"heads": shape.heads, "kv_heads": shape.kv_heads, "head_dim": shape.head_dim, "lengths": lengths}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {**sizes, "dtype": str(shape.dtype).removeprefix("torch."), "device": name, **versions}


def draw(made: AttentionBench, path: Path) -> None:
    """Forward, backward and, where it was measured, memory over length, both axes logarithmic, as a picture."""
    from matplotlib.figure import Figure

    panels = [("forward_s", "forward, ms", 1e3), ("backward_s", "backward, ms", 1e3), ("peak_bytes", "peak, MB", 1e-6)]
    panels = [p for p in panels if any(getattr(row, p[0]) for row in made.rows)]
    figure = Figure(figsize=(5.5 * max(1, len(panels)), 5), layout="constrained")
    for number, (what, label, unit) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), number + 1)
        for line, name in enumerate(made.names()):
            points = [(r.length, getattr(r, what) * unit) for r in made.rows if r.name == name and getattr(r, what)]
            color, dashes = f"C{line % 10}", ("-", "--", ":", "-.")[line // 10 % 4]
            x, y = [x for x, _ in points], [y for _, y in points]
            axes.plot(x, y, label=name, color=color, linestyle=dashes, marker=".")
        axes.set(xscale="log", yscale="log", xlabel="tokens", title=label)
        axes.grid(alpha=0.3)
    if panels:
        figure.legend(
            *figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
