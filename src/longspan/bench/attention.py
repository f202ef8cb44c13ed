"""Time and memory of every attention of the catalogue, by length: `longspan bench attention`.

A contender goes on to the next length until it is out of memory or would take too long; its row says what failed, and the
others continue. Everything that the catalogue knows takes part (`longspan.bench.contenders`), so a new method does by itself.

Every backward that is timed has a forward of its own: compiled attention gives its saved tensors away in its backward, and
cannot run it twice.
"""

from __future__ import annotations

import gc
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from longspan.bench.contenders import DENSE, Contender, Shape, Work, contenders, wait
from longspan.engine.backends import forget_compiled
from longspan.util.errors import LongspanError, SpecError, writing
from longspan.util.failures import is_out_of_memory, one_line
from longspan.util.files import write_atomically
from longspan.util.growth import Growth, growth_of

LENGTHS = {"cuda": tuple(2**n for n in range(10, 25)), "cpu": (1024, 2048, 4096, 8192, 16384)}
RUN_S = 0.2
"""How long one figure is measured for."""
MOST_GRAPHS = 16
"""Backwards of short texts that are timed as one, so that what is timed is not the wait for the device."""
COMPARED_AT = 2**15
MASKS_AT = (2**17, 2**22)
PER_TOKEN_AT = tuple(2**n for n in range(16, 25))
"""Lengths of the figures in `AttentionBench.targets`."""


@dataclass
class Row:
    """One contender at one length.

    Seconds are medians of one call, forward without gradients; `peak_bytes` is what a forward and a backward add to
    what was there, on CUDA; tflops count the pairs that a pattern sees, twice two products each (five in the
    backward).
    """

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
    visited_tflops: float | None = None
    """Of a forward, counting all pairs of the blocks of 128 that hold a pair that is seen; None where there are no blocks."""
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

    def add(self, row: Row) -> None:
        """Behind those of its name, in the order of lengths."""
        own = [number for number, other in enumerate(self.rows) if other.name == row.name]
        longer = [number for number in own if self.rows[number].length > row.length]
        self.rows.insert(longer[0] if longer else own[-1] + 1 if own else len(self.rows), row)

    def growth(self, name: str, what: str) -> Growth | None:
        """How a figure grows with the length; None where too few lengths or too much scatter leave that open."""
        return growth_of([asdict(row) for row in self.rows], name, what)

    def to_dict(self) -> dict[str, Any]:
        measured = ("forward_s", "backward_s", "peak_bytes")
        found = {name: {what: self.growth(name, what) for what in measured} for name in self.names()}
        growth = {name: {what: made and asdict(made) for what, made in of.items()} for name, of in found.items()}
        rows = [asdict(row) for row in self.rows]
        made = {"what": "attention", "settings": self.settings, "rows": rows, "growth": growth, "skipped": self.skipped}
        return {**made, "targets": self.targets()}

    @classmethod
    def read(cls, path: Path) -> AttentionBench:
        """What `write` wrote. Raises `SpecError` for any other file."""
        try:
            made = json.loads(path.read_text(encoding="utf-8"))
            return cls(made["settings"], [Row(**row) for row in made["rows"]], made["skipped"])
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise SpecError(f"{path} holds no bench of attentions; give another --out, or delete it") from error

    def write(self, path: Path) -> None:
        """As JSON; a file that is there is replaced in one step."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(self.to_dict(), indent=1) + "\n")

    def targets(self) -> dict[str, Any]:
        """What is read off most: speed at 32k beside dense SDPA, the share of masks at 128k and 4M, and the time a token from 64k
        to 16M, each of those attentions and lengths that were measured."""
        known = {(row.name, row.length): row for row in self.rows if row.forward_s and row.kind == "attention"}
        masks: dict[str, dict[int, float]] = {}
        tokens: dict[str, dict[int, float]] = {}
        for (name, length), row in known.items():
            assert row.forward_s is not None
            if length in MASKS_AT and row.mask_share is not None:
                masks.setdefault(name, {})[length] = row.mask_share
            if length in PER_TOKEN_AT:
                tokens.setdefault(name, {})[length] = 1e9 * row.forward_s / length
        dense = known.get((DENSE, COMPARED_AT))
        compared = {name: _compared(row, dense) for (name, length), row in known.items() if length == COMPARED_AT}
        return {f"at_{COMPARED_AT}": compared, "mask_share": masks, "forward_ns_per_token": tokens}


def _compared(row: Row, dense: Row | None) -> dict[str, float | None]:
    assert row.forward_s is not None
    rate = row.visited_tflops or row.forward_tflops
    base = dense.forward_tflops if dense else None
    return {
        "forward_ms": 1e3 * row.forward_s,
        "backward_over_forward": row.backward_s / row.forward_s if row.backward_s else None,
        "tflops_on_visited_blocks": rate,
        "share_of_dense_tflops": rate / base if rate and base else None,
        "times_faster_than_dense": dense.forward_s / row.forward_s if dense and dense.forward_s else None,
    }


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
    begun: AttentionBench | None = None,
    on_row: Callable[[Row, AttentionBench], None] | None = None,
) -> AttentionBench:
    """specs: which attentions; left out, all of the catalogue.

    most_s: a contender stops before the length at which one call would take longer. begun: an earlier run, of which
    what was measured is not measured again. on_row: is given every row when it is there, and all that there is.
    Raises `SpecError` for what is no attention or no length, or where `begun` has other settings.
    """
    chosen = sorted(set(lengths)) or list(LENGTHS[shape.device.type])
    if chosen[0] < 2:
        raise SpecError(f"a text has at least 2 tokens, not {chosen[0]}")
    made = AttentionBench(_settings(shape, chosen))
    if begun is not None:
        _join(made, begun)
    for contender in contenders(list(specs), shape, made.skipped, peers=peers):
        _climb(made, contender, chosen, shape, most_s, lambda row: on_row(row, made) if on_row else None)
    return made


def _join(made: AttentionBench, begun: AttentionBench) -> None:
    """Takes over what an earlier run measured."""
    then, now = ({**x.settings, "lengths": None} for x in (begun, made))
    if then != now:
        differ = ", ".join(f"{key} {then.get(key)}" for key in now if then.get(key) != now[key])
        raise SpecError(f"the results that are there have {differ}; give another --out, or delete them")
    made.rows = [row for row in begun.rows if row.forward_s]
    made.settings["lengths"] = sorted({*made.settings["lengths"], *(row.length for row in made.rows)})


def _climb(
    made: AttentionBench,
    contender: Contender,
    lengths: list[int],
    shape: Shape,
    most_s: float,
    on_row: Callable[[Row], None],
) -> None:
    known = {row.length: row for row in made.rows if row.name == contender.name}
    done: list[tuple[int, float]] = []
    for length in lengths:
        row = Row(contender.name, contender.kind, "causal" if contender.causal else "bidirectional", length)
        expected = _expected(done, length, 1.0 if contender.linear else 2.0)
        ends = False
        if length in known:
            row = known[length]
        else:
            if ends := expected > most_s:
                row.note = f"would take about {expected:.0f} s"
            else:
                ends = _measure(row, contender, shape)
            made.add(row)
            on_row(row)
        if ends:
            return
        if row.forward_s:
            done.append((length, max(row.forward_s, row.backward_s or 0.0)))


def _expected(done: list[tuple[int, float]], length: int, slope: float) -> float:
    """Seconds of a call at `length`, from how they grew so far; as length^slope while that is unknown."""
    if not done:
        return 0.0
    if len(done) > 1:
        (near, least), (far, most) = done[-2:]
        slope = min(max(math.log(most / least) / math.log(far / near), 1.0), 2.0)
    return done[-1][1] * (length / done[-1][0]) ** slope


def _measure(row: Row, contender: Contender, shape: Shape) -> bool:
    """Fills in a row as far as it goes; True where there was too little memory for a forward."""
    gc.collect()
    forget_compiled()
    if shape.device.type == "cuda":
        torch.cuda.empty_cache()
    try:
        work = contender.prepare(row.length)
        row.way, row.why = work.way, work.why
        with torch.no_grad():
            row.forward_s = _seconds(work.run)
        row.mask_share = None if work.mask_s is None else work.mask_s / row.forward_s
        row.forward_tflops = _tflops(work.pairs, shape, 2, row.forward_s)
        row.visited_tflops = _tflops(work.visited, shape, 2, row.forward_s)
        row.backward_s, row.peak_bytes = _backward(work, shape.device)
        row.backward_tflops = _tflops(work.pairs, shape, 5, row.backward_s)
    except LongspanError as error:
        row.note = str(error)
    except Exception as error:  # whatever one attention does wrong is its result
        if is_out_of_memory(error):
            row.note = "out of memory"
            return row.forward_s is None
        row.note = f"failed: {one_line(error)}"
    return False


def _tflops(pairs: float | None, shape: Shape, products: int, seconds: float) -> float | None:
    """10¹² operations a second, of so many products with so many pairs."""
    return 2 * products * shape.head_dim * pairs / seconds / 1e12 if pairs else None


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
    del out
    return _backward_seconds(work, push, device), peak


def _backward_seconds(work: Work, push: Tensor, device: torch.device) -> float:
    """Median of one backward."""
    count = max(1, min(MOST_GRAPHS, int(RUN_S / 20 / _backwards(work, push, device, 1))))
    times: list[float] = []
    while not times or sum(times) * count < RUN_S:
        times.append(_backwards(work, push, device, count) / count)
    return statistics.median(times)


def _backwards(work: Work, push: Tensor, device: torch.device, count: int) -> float:
    """Seconds of `count` backwards, each of a forward made before."""
    outs = [work.run() for _ in range(count)]
    wait(device)
    start = time.perf_counter()
    while outs:
        torch.autograd.grad(outs.pop(), work.leaves, push, allow_unused=True)
    wait(device)
    return time.perf_counter() - start


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
    with writing(path):
        figure.savefig(path, dpi=120)
