"""`bench attention` at small sizes: who takes part, what is counted and fitted, what is printed and written."""

from __future__ import annotations

import functools
import json
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from longspan.attention.window import Window
from longspan.bench import attention as bench_attention
from longspan.bench import contenders as bench_contenders
from longspan.bench.attention import AttentionBench, Row, attention, shape_of
from longspan.bench.contenders import Contender, Work, contenders
from longspan.cli.main import run
from longspan.core.method import catalogue
from longspan.engine.call import AttentionShape
from longspan.engine.core import reference_attention
from longspan.lm.base import Attention, Full, Pattern
from longspan.util.errors import SpecError
from longspan.util.growth import Point, growth

SHAPE = shape_of(2, 1, 16, None, "cpu")


@pytest.fixture(autouse=True)
def short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_attention, "RUN_S", 0.0)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("pattern", [Window(5), Window(7, 3), Full()], ids=lambda p: p.spec)
def test_pairs_are_those_that_are_seen(pattern: Pattern, causal: bool) -> None:
    for length, close in ((40, 0), (3000, 0.02)):
        grid, number = AttentionShape(3, length, 0, causal), torch.arange(length)[None]
        seen = pattern.mask(number, number, grid)[0, 0]
        seen = seen.tril() if causal else seen
        assert pattern.pairs(grid) == pytest.approx(3 * int(seen.sum()), rel=close)


def test_everything_in_the_catalogue_takes_part() -> None:
    skipped: dict[str, str] = {}
    names = {c.name.partition(":")[0] for c in contenders([], SHAPE, skipped, peers=False)}
    known = {n for n, cls in catalogue().items() if issubclass(cls, Attention)} - {"full"}
    assert names | {s.partition(":")[0] for s in skipped} == known | {"dense SDPA", "full, layer"}


def test_growth_and_rates() -> None:
    made = AttentionBench({}, [Row("a", "layer", "causal", n, forward_s=1e-9 * n**2) for n in (2, 4, 8, 16)])
    grows = made.growth("a", "forward_s")
    assert grows is not None and grows.exponent == pytest.approx(2) and made.growth("a", "backward_s") is None
    assert (grows.low, grows.high, grows.lengths) == (pytest.approx(2), pytest.approx(2), 4)
    assert made.to_dict()["growth"]["a"] == {"forward_s": asdict(grows), "backward_s": None, "peak_bytes": None}
    made = attention(lengths=[32, 64, 128], specs=["window:size=8,sinks=2"], shape=SHAPE, peers=False)
    assert made.names() == ["dense SDPA", "full, layer", "window:size=8,sinks=2"]
    assert all(row.forward_s and row.backward_s and not row.note for row in made.rows)
    dense, window = made.rows[2], made.rows[-1]
    assert dense.forward_tflops == pytest.approx(4 * 16 * 2 * 128 * 129 / 2 / dense.forward_s / 1e12)
    assert window.way == "masks" and "CUDA" in window.why and window.mask_share is not None
    json.dumps(made.to_dict())


def test_growth_has_an_interval_or_is_not_told() -> None:
    """Student's interval of the slope, by the formula; three lengths, or a busy machine, tell no exponent."""
    few = [Point(n, float(n)) for n in (1024, 2048, 4096)]
    assert growth(few) is None and growth([*few, Point(8192, 8192.0)]) is not None
    noise = np.array([0.03, -0.04, 0.01, 0.05, -0.05])
    x = np.log([1024, 2048, 4096, 8192, 16384])
    found = growth([Point(round(np.exp(a)), float(np.exp(1.3 * a + e))) for a, e in zip(x, noise, strict=True)])
    x, noise = x[1:], noise[1:]  # the longer half, and four at least
    slope = ((x - x.mean()) * noise).sum() / ((x - x.mean()) ** 2).sum()
    rest = noise - noise.mean() - slope * (x - x.mean())
    half = 4.303 * np.sqrt((rest**2).sum() / 2 / ((x - x.mean()) ** 2).sum())
    assert found is not None and found.exponent == pytest.approx(1.3 + slope)
    assert (found.low, found.high) == (pytest.approx(1.3 + slope - half), pytest.approx(1.3 + slope + half))
    busy = [Point(n, t) for n, t in ((1024, 4.0), (2048, 1.0), (4096, 3.0), (8192, 2.0), (16384, 2.5))]
    assert growth(busy) is None


def test_intervals_of_growth_hold_the_truth_as_often_as_they_say() -> None:
    generator, held = np.random.default_rng(0), 0
    for _ in range(500):
        points = [Point(2**n, float(2.0**n * np.exp(generator.normal(0, 0.02)))) for n in range(10, 18)]
        found = growth(points)
        assert found is not None and found.lengths == 4
        held += found.low <= 1 <= found.high
    assert 0.92 < held / 500 < 0.98


def test_who_is_too_slow_or_too_large_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(length: int) -> Work:
        if length > 64:
            raise torch.OutOfMemoryError("no memory")
        leaf = torch.ones(2, requires_grad=True)
        return Work(lambda: leaf * 2, [leaf])

    monkeypatch.setattr(bench_attention, "contenders", lambda *given, **more: [Contender("a", "layer", True, prepare)])
    rows = attention(lengths=[32, 64, 128, 256], shape=SHAPE).rows
    assert [row.note for row in rows] == ["", "", "out of memory"]
    rows = attention(lengths=[32, 64], shape=SHAPE, most_s=1e-12).rows
    assert "would take" in rows[1].note and rows[0].forward_s


def test_growth_is_guessed_from_what_a_query_sees() -> None:
    made = {c.name: c for c in contenders(["window:size=64", "longnet", "linear"], SHAPE, {}, peers=False)}
    assert made["window:size=64"].linear and made["longnet"].linear and not made["dense SDPA"].linear
    assert bench_attention._expected([(2**16, 0.01)], 2**24, 1.0) == pytest.approx(2.56)
    assert bench_attention._expected([(2**16, 0.01)], 2**24, 2.0) == pytest.approx(655.36)


class _Once(torch.autograd.Function):
    """As compiled attention does, gives what it saved away in its backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.run = False
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        if ctx.run:
            raise RuntimeError("non-empty donated buffers")
        ctx.run = True
        return grad * 2


def test_a_backward_is_timed_once_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(length: int) -> Work:
        leaf = torch.ones(2, requires_grad=True)
        return Work(lambda: _Once.apply(leaf), [leaf])

    monkeypatch.setattr(bench_attention, "RUN_S", 0.01)
    monkeypatch.setattr(bench_attention, "contenders", lambda *given, **more: [Contender("a", "layer", True, prepare)])
    (row,) = attention(lengths=[32], shape=SHAPE).rows
    assert row.backward_s and not row.note


def test_what_fails_is_a_result_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(length: int, wrong: str = "") -> Work:
        leaf = torch.ones(2, requires_grad=True)

        class Wrong(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
                return x * 1

            @staticmethod
            def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
                raise torch.OutOfMemoryError("no memory") if wrong == "memory" else KeyError(wrong)

        return Work(lambda: Wrong.apply(leaf) if wrong else leaf * 2, [leaf])

    made = [
        Contender("key", "layer", True, functools.partial(prepare, wrong="a key")),
        Contender("memory", "layer", True, functools.partial(prepare, wrong="memory")),
        Contender("good", "layer", True, prepare),
    ]
    monkeypatch.setattr(bench_attention, "contenders", lambda *given, **more: made)
    rows = attention(lengths=[32, 64], shape=SHAPE).rows
    assert [(row.name, row.note) for row in rows] == [
        ("key", "failed: KeyError: 'a key'"),
        ("key", "failed: KeyError: 'a key'"),
        ("memory", "out of memory"),
        ("memory", "out of memory"),
        ("good", ""),
        ("good", ""),
    ]
    assert all(row.forward_s for row in rows) and not any(row.backward_s for row in rows[:4])


@pytest.mark.cuda
def test_every_way_has_its_backward_on_a_gpu() -> None:
    """Compiled FlexAttention too, which cannot run a backward twice."""
    shape = shape_of(4, 4, 64, None, "cuda")
    made = attention(lengths=[1024, 2048], specs=["window:size=256", "longnet"], shape=shape, peers=False)
    assert not [row for row in made.rows if row.note or not row.backward_s]
    assert {"FlexAttention", "window:size=256, FlexAttention"} <= set(made.names())


def test_targets_are_read_off() -> None:
    def row(name: str, length: int, forward: float, **more: float) -> Row:
        return Row(name, "attention", "causal", length, forward_s=forward, **more)

    rows = [
        row("dense SDPA", 2**15, 0.008, forward_tflops=600.0),
        row("window:size=1024", 2**15, 0.001, backward_s=0.0025, forward_tflops=200.0, visited_tflops=300.0),
        row("window:size=1024", 2**17, 0.004, mask_share=0.01),
        row("window:size=1024", 2**22, 0.128, mask_share=0.02),
        row("longnet", 2**16, 0.001),
        row("longnet", 2**24, 0.512),
        Row("longnet", "attention", "causal", 2**23, note="out of memory"),
        Row("linear", "layer", "causal", 2**15, forward_s=1.0),
    ]
    found = AttentionBench({}, rows).to_dict()["targets"]
    window = found["at_32768"]["window:size=1024"]
    assert window["forward_ms"] == pytest.approx(1) and window["backward_over_forward"] == pytest.approx(2.5)
    assert window["share_of_dense_tflops"] == pytest.approx(0.5) and window["times_faster_than_dense"] == pytest.approx(
        8
    )
    assert set(found["at_32768"]) == {"dense SDPA", "window:size=1024"}
    assert found["mask_share"] == {"window:size=1024": {2**17: 0.01, 2**22: 0.02}}
    per_token = found["forward_ns_per_token"]["longnet"]
    assert per_token[2**24] / per_token[2**16] == pytest.approx(2)


def test_visited_blocks_hold_the_pairs() -> None:
    rows = attention(lengths=[512], specs=["window:size=100"], shape=SHAPE, peers=False).rows
    window = rows[-1]
    assert window.forward_tflops and window.visited_tflops
    blocks = 2 * 128**2 * (1 + 3 * 2)  # two heads; the first block sees itself, the others the one before as well
    assert window.visited_tflops == pytest.approx(4 * 16 * blocks / window.forward_s / 1e12)


def test_patterns_with_kernels_of_their_own_say_what_they_visit() -> None:
    rows = attention(lengths=[1024], specs=["longnet", "bigbird", "bigbird:globals=64"], shape=SHAPE, peers=False).rows
    longnet, bigbird, etc = (next(r for r in rows if r.name == n) for n in ("longnet", "bigbird", "bigbird:globals=64"))
    assert longnet.visited_tflops and longnet.forward_tflops and longnet.visited_tflops > longnet.forward_tflops
    assert bigbird.visited_tflops == pytest.approx(bigbird.forward_tflops, rel=0.01) and etc.visited_tflops is None


def test_what_was_measured_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "made" / "bench.json"

    def keep(row: Row, made: AttentionBench) -> None:
        made.write(out)

    first = attention(lengths=[32, 128], specs=["window:size=8"], shape=SHAPE, peers=False, on_row=keep)
    begun = AttentionBench.read(out)
    assert begun.to_dict() == first.to_dict()
    measured: list[tuple[str, int]] = []
    measure = bench_attention._measure

    def measuring(row: Row, *rest: Any) -> bool:
        measured.append((row.name, row.length))
        return measure(row, *rest)

    monkeypatch.setattr(bench_attention, "_measure", measuring)
    begun.rows[-1].forward_s, begun.rows[-1].note = None, "failed: of a cosmic ray"
    again = attention(
        lengths=[64, 128], specs=["window:size=8", "linear"], shape=SHAPE, peers=False, begun=begun, on_row=keep
    )
    names = list(dict.fromkeys(row.name for row in first.rows))
    wanted = [(name, 64) for name in names] + [("linear", 64), ("linear", 128), (first.rows[-1].name, 128)]
    assert sorted(measured) == sorted(wanted)
    assert [(r.name, r.length) for r in again.rows] == [(n, t) for n in names for t in (32, 64, 128)] + [
        ("linear", 64),
        ("linear", 128),
    ]
    assert again.settings["lengths"] == [32, 64, 128]
    assert AttentionBench.read(out).to_dict() == again.to_dict()


def test_results_of_another_bench_are_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    attention(lengths=[32], specs=["window:size=8"], shape=SHAPE, peers=False).write(out)
    with pytest.raises(SpecError, match=r"heads 2.*another --out"):
        attention(lengths=[32], shape=shape_of(4, 1, 16, None, "cpu"), begun=AttentionBench.read(out))
    out.write_text("{}")
    with pytest.raises(SpecError, match="no bench of attentions"):
        AttentionBench.read(out)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a" / "b.json"
    sizes = ["-l", "32", "-l", "64", "-l", "128", "--heads", "2", "--head-dim", "16", "--device", "cpu", "--no-peers"]
    assert run(["bench", "attention", "-p", "window:size=8", *sizes, "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert "window:size=8" in said.out and "grows as length" in said.out and "window:size=8, 128" in said.err
    assert "left open (needs 4 lengths" in said.out  # and not three short ones on a busy CPU
    assert json.loads(out.read_text())["growth"]["window:size=8"]["forward_s"] is None
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert run(["bench", "attention", "-p", "window:size=8", *sizes, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["heads"] == 2
    for wrong in (["-p", "yarn:factor=2"], ["--heads", "3", "--kv-heads", "2"], ["--dtype", "int8"], ["-l", "1"]):
        assert run(["bench", "attention", "-p", "window:size=8", *sizes, *wrong]) == 2
        assert capsys.readouterr().err.count("error:") == 1


def test_command_tells_growth_with_its_interval(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(row: Row, *rest: Any) -> bool:
        row.forward_s = 1e-9 * row.length**2
        return False

    monkeypatch.setattr(bench_attention, "_measure", measure)
    lengths = [part for n in (32, 64, 128, 256) for part in ("-l", str(n))]
    out = ["--device", "cpu", "--no-peers", "--out", f"{tmp_path}/b.json"]
    assert run(["bench", "attention", "-p", "linear", *lengths, *out]) == 0
    assert "2.00 [2.00–2.00]" in capsys.readouterr().out
    assert json.loads((tmp_path / "b.json").read_text())["growth"]["linear"]["forward_s"]["high"] == pytest.approx(2)


def test_masks_of_another_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is timed under them is what they are called; on a CPU they are left out with the reason."""
    masks = ModuleType("attn_gym.masks")
    masks.generate_sliding_window = lambda back: lambda b, h, q, k: (q >= k) & (q - k <= back)  # type: ignore[attr-defined]
    masks.generate_global_sliding_window = (  # type: ignore[attr-defined]
        lambda side, wide: lambda b, h, q, k: ((q - k).abs() <= side) | wide[q] | wide[k]
    )
    monkeypatch.setitem(sys.modules, "attn_gym", ModuleType("attn_gym"))
    monkeypatch.setitem(sys.modules, "attn_gym.masks", masks)
    skipped: dict[str, str] = {}
    names = [c.name for c in contenders(["window:size=8"], SHAPE, skipped, peers=True)]
    gym = {"attention-gym, window of 1024", "attention-gym, Longformer's mask"}
    assert not gym & set(names) and all("CPU" in skipped[name] for name in gym)
    monkeypatch.setattr(bench_contenders, "_need_cuda", lambda shape: None)
    monkeypatch.setattr(bench_contenders, "create_block_mask", lambda *x, _compile, **y: create_block_mask(*x, **y))
    monkeypatch.setattr(torch, "compile", lambda f, **settings: f)
    made = {c.name: c for c in contenders(["window:size=8"], SHAPE, {}, peers=True) if c.name in gym}
    number = torch.arange(1300)[None]
    wanted = {True: Window(1024).mask(number, number, AttentionShape(2, 1300, 0, True)).tril()}
    wanted[False] = ((number.T - number).abs() <= 256) | (number == 0) | (number.T == 0)
    for contender in made.values():
        work = contender.prepare(1300)
        query, key, value = (x.requires_grad_(False) for x in work.leaves)  # on a CPU it has no backward
        with torch.no_grad():
            out = work.run()
            mask = wanted[contender.causal].view(1, 1, 1300, 1300)
            torch.testing.assert_close(out, reference_attention(query, key, value, mask, 0.25), rtol=1e-4, atol=1e-4)
        assert work.visited and work.visited >= 2 * int(mask.sum()) and work.mask_s


def test_a_length_that_one_cannot_have_is_said() -> None:
    made = attention(lengths=[64, 512], specs=["window:size=8"], shape=shape_of(2, 2, 16, None, "cpu"))
    rows = {(row.name, row.length): row for row in made.rows}
    assert "512" in rows["transformers Longformer", 64].note and rows["transformers Longformer", 512].forward_s
    assert "1,024" in rows["transformers BigBird", 512].note
    assert rows["transformers Reformer", 512].backward_s
    with pytest.raises(SpecError):
        attention(lengths=[64], specs=["none"], shape=SHAPE)
