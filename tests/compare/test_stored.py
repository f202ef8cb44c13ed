"""The stored run behind the README: what the page says of it, and that the README quotes it rightly."""

import json
from pathlib import Path

import pytest

from longspan.compare.advice import advise
from longspan.compare.results import Results

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


def test_the_readme_quotes_the_stored_speeds():
    rows = json.loads((ROOT / "reproductions" / "speed" / "decode.json").read_text())["rows"]
    ms = {row["name"]: 1e3 * row["seconds"] for row in rows}
    readme = (ROOT / "README.md").read_text()
    for said, name in {
        "longspan, rolling cache, step of fixed shape": "longspan rolling cache, fixed step",
        "transformers, static cache, compiled": "stock generate, static cache, compiled",
        "transformers `generate`, dynamic cache": "stock generate, dynamic cache",
        "the window recomputed for every token": "window recomputed for every token",
    }.items():
        shown = readme.split(f"| {said} | ")[1].split(" |")[0].strip("*")
        assert shown == f"{ms[name]:.{len(shown.partition('.')[2])}f}"


def test_the_readme_quotes_the_stored_study():
    made = json.loads((ROOT / "reproductions" / "extrapolation" / "study.json").read_text())
    readme = (ROOT / "README.md").read_text()
    said = readme.split("loss in nats a token: ")[1].split("\n\n")[0].replace("\n", " ")
    curves = made["curves"]["non-overlapping"]
    assert made["settings"]["seeds"] == 3 and curves[0]["lengths"][0] == 512 and curves[0]["lengths"][-1] == 16384
    for curve in curves:
        first, last = (f"{curve['mean'][i]:.2f}" for i in (0, -1))
        assert (
            f"`{curve['scheme']}` goes from {first} to {last}" in said
            or f"`{curve['scheme']}` {first} to {last}" in said
        )
