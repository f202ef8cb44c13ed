"""The stored run behind the README: what the page says of it, and that the README quotes it rightly."""

import json
from pathlib import Path

import pytest

from longspan.compare.report import pages as report
from longspan.compare.report.advice import advise
from longspan.compare.report.results import Results

ROOT = Path(__file__).parents[2]
RUN = ROOT / "reproductions" / "rope-scaling"


@pytest.fixture(scope="module")
def results() -> Results:
    cells = [json.loads(line) for line in (RUN / "cells.jsonl").read_text().splitlines()]
    return Results(json.loads((RUN / "run.json").read_text()), cells)


def test_where_nothing_works_the_longest_length_that_does_is_named(results):
    advice = advise(results)
    assert advice.method is None
    assert "nothing that was measured works" in advice.sentence
    assert "Up to 32,768 tokens ntk:factor=8 works" in advice.sentence


def test_up_to_leaves_longer_lengths_out(results):
    shorter = results.up_to(16384)
    assert shorter.target == 16384 and shorter.lengths == [4096, 8192, 16384]
    assert {c["length"] for c in shorter.cells()} == {4096, 8192, 16384}


def test_overlapping_windows_are_said_and_counted_as_fewer(results):
    loss, passkey = results.tasks
    assert results.overlaps(loss) == {
        32768: (20, pytest.approx(18.0, abs=0.1)),
        65536: (20, pytest.approx(11.2, abs=0.1)),
    }
    assert not results.overlaps(passkey)
    for method in results.methods:
        stored, made = results.ok(method, loss, 65536)["interval"], results.estimate(method, loss, 65536).interval
        assert 1.2 < (made[1] - made[0]) / (stored[1] - stored[0]) < 1.45  # stored as if all 20 were independent
        assert results.estimate(method, loss, 16384).interval == tuple(results.ok(method, loss, 16384)["interval"])
    (note,) = (n for n in advise(results).notes if "overlap" in n)
    assert "20 at 65,536 tokens count as 11.2" in note
    assert "20 samples a cell, which overlap and count as 11.2;" in results.protocol_line(loss, 65536)
    assert "overlap" not in results.protocol_line(loss, 16384)


def test_the_stored_page_is_what_report_makes_of_the_cells():
    cells = [json.loads(line) for line in (RUN / "cells.jsonl").read_text().splitlines()]
    manifest = json.loads((RUN / "run.json").read_text())
    rows = [
        r for r in report.table_json(manifest, cells)["rows"] if r["length"] == 65536 and r["task"].startswith("ppl")
    ]
    assert [round(r["independent"], 1) for r in rows] == [11.2] * 5 and {r["n"] for r in rows} == {20}
    page = (RUN / "report.html").read_text()
    for row in rows:
        assert "–".join(f"{x:.3f}" for x in row["interval"]) in page
    assert page.count("n 11.2 of 20") == 5
    assert "20 at 65,536\u00a0tokens count as 11.2" in page


def test_the_readme_quotes_the_stored_scores(results):
    readme = (ROOT / "README.md").read_text()
    loss, passkey = results.tasks
    names = {"none": "the model as it is"} | {m: f"`{m}`" for m in results.methods if m != "none"}
    for method, name in names.items():
        losses = [f"{results.score(method, loss, n):.2f}" for n in (8192, 16384, 32768, 65536)]
        found = [
            f"{results.score(method, passkey, n):.2f}".replace("1.00", "1").lstrip("0")
            for n in (8192, 16384, 32768, 65536)
        ]
        shares = " / ".join("0" if f == ".00" else f for f in found)
        assert f"| {name} | {' | '.join(losses)} | {shares} |" in readme


def test_the_stored_passkeys_have_an_effective_window(results):
    loss, passkey = results.tasks
    found = [results.effective_window("ntk:factor=8", passkey, n) for n in results.lengths]
    assert found[:3] == [4056, 8152, 16344]  # every key is found, the first of them at the prompt's beginning
    assert 0 < found[3] < 32768 and found[4] == 0
    assert results.effective_window("ntk:factor=8", loss, 4096) is None


def test_the_page_on_speed_quotes_the_stored_speeds():
    rows = json.loads((ROOT / "reproductions" / "speed" / "decode.json").read_text())["rows"]
    ms = {row["name"]: 1e3 * row["seconds"] for row in rows}
    readme = (ROOT / "docs" / "speed.md").read_text()
    for said, name in {
        "longspan, rolling cache, step of fixed shape": "longspan rolling cache, fixed step",
        "transformers, static cache, compiled": "stock generate, static cache, compiled",
        "transformers `generate`, dynamic cache": "stock generate, dynamic cache",
        "the window recomputed for every token": "window recomputed for every token",
    }.items():
        shown = readme.split(f"| {said} | ")[1].split(" |")[0].strip("*")
        assert shown == f"{ms[name]:.{len(shown.partition('.')[2])}f}"


def test_the_page_on_methods_quotes_the_stored_study():
    made = json.loads((ROOT / "reproductions" / "extrapolation" / "study.json").read_text())
    readme = (ROOT / "docs" / "methods.md").read_text()
    said = readme.split("loss in nats a token: ")[1].split("\n\n")[0].replace("\n", " ")
    curves = made["curves"]["non-overlapping"]
    assert made["settings"]["seeds"] == 3 and curves[0]["lengths"][0] == 512 and curves[0]["lengths"][-1] == 16384
    for curve in curves:
        first, last = (f"{curve['mean'][i]:.2f}" for i in (0, -1))
        assert (
            f"`{curve['scheme']}` goes from {first} to {last}" in said
            or f"`{curve['scheme']}` {first} to {last}" in said
        )
