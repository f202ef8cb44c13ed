"""`bench attention` at small sizes: who takes part, what is counted and fitted, what is printed and written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from longspan import bench_attention
from longspan.attention.base import Attention, Full, Grid, Pattern
from longspan.attention.window import Window
from longspan.bench_attention import AttentionBench, Row, attention, shape_of
from longspan.bench_contenders import Contender, Work, contenders, visible_pairs
from longspan.cli import run
from longspan.errors import SpecError
from longspan.method import catalogue

SHAPE = shape_of(2, 1, 16, None, "cpu")


@pytest.fixture(autouse=True)
def short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_attention, "RUN_S", 0.0)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("pattern", [Window(5), Window(7, 3), Full()], ids=lambda p: p.spec)
def test_pairs_are_those_that_are_seen(pattern: Pattern, causal: bool) -> None:
    for length, close in ((40, 0), (3000, 0.02)):
        grid, number = Grid(3, length, 0, causal), torch.arange(length)[None]
        seen = pattern.visible(number, number, grid)[0, 0]
        seen = seen.tril() if causal else seen
        assert visible_pairs(pattern, grid) == pytest.approx(3 * int(seen.sum()), rel=close)


def test_everything_in_the_catalogue_takes_part() -> None:
    skipped: dict[str, str] = {}
    names = {c.name.partition(":")[0] for c in contenders([], SHAPE, skipped, peers=False)}
    known = {n for n, cls in catalogue().items() if issubclass(cls, Attention)} - {"full"}
    assert names | {s.partition(":")[0] for s in skipped} == known | {"dense SDPA", "full, layer"}


def test_growth_and_rates() -> None:
    made = AttentionBench({}, [Row("a", "layer", "causal", n, forward_s=1e-9 * n**2) for n in (2, 4, 8, 16)])
    assert made.growth("a", "forward_s") == pytest.approx(2) and made.growth("a", "backward_s") is None
    made = attention(lengths=[32, 64, 128], specs=["window:size=8,sinks=2"], shape=SHAPE, peers=False)
    assert made.names() == ["dense SDPA", "full, layer", "window:size=8,sinks=2"]
    assert all(row.forward_s and row.backward_s and not row.note for row in made.rows)
    dense, window = made.rows[2], made.rows[-1]
    assert dense.forward_tflops == pytest.approx(4 * 16 * 2 * 128 * 129 / 2 / dense.forward_s / 1e12)
    assert window.way == "masks" and "CUDA" in window.why and window.mask_share is not None
    json.dumps(made.to_dict())


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


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a" / "b.json"
    sizes = ["-l", "32", "-l", "64", "-l", "128", "--heads", "2", "--head-dim", "16", "--device", "cpu", "--no-peers"]
    assert run(["bench", "attention", "-p", "window:size=8", *sizes, "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert "window:size=8" in said.out and "grows as length" in said.out and "window:size=8, 128" in said.err
    assert json.loads(out.read_text())["growth"]["window:size=8"]["forward_s"]
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert run(["bench", "attention", "-p", "window:size=8", *sizes, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["heads"] == 2
    for wrong in (["-p", "yarn:factor=2"], ["--heads", "3", "--kv-heads", "2"], ["--dtype", "int8"], ["-l", "1"]):
        assert run(["bench", "attention", "-p", "window:size=8", *sizes, *wrong]) == 2
        assert capsys.readouterr().err.count("error:") == 1


def test_a_length_that_one_cannot_have_is_said() -> None:
    made = attention(lengths=[64, 512], specs=["window:size=8"], shape=shape_of(2, 2, 16, None, "cpu"))
    rows = {(row.name, row.length): row for row in made.rows}
    assert "512" in rows["transformers Longformer", 64].note and rows["transformers Longformer", 512].forward_s
    assert "1,024" in rows["transformers BigBird", 512].note
    assert rows["transformers Reformer", 512].backward_s
    with pytest.raises(SpecError):
        attention(lengths=[64], specs=["none"], shape=SHAPE)
