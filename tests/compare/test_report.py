"""The report of made-up runs whose right answer is known: what is advised, what is shown, and that no run breaks it."""

from __future__ import annotations

import copy
import io
import itertools
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from rich.console import Console
from sample_run import METHODS, PASSKEY, PPL, STREAM, sample_run, write_run

from longspan.cli.main import run as run_command
from longspan.compare import statistics as stats
from longspan.compare.report import figures
from longspan.compare.report import pages as report
from longspan.compare.report.advice import advise
from longspan.compare.report.results import Results, curve, pareto
from longspan.compare.storing import Run
from longspan.util.drawing import name_points, spread, styles, swatch
from longspan.util.errors import LongspanError
from longspan.util.units import duration, size, tokens

STREAMING = "streaming:sinks=4,window=1020"
SELF_EXTEND = "self_extend:group=8,neighbours=1024"


def advice_of(*args: Any, **kwargs: Any) -> Any:
    return advise(Results(*sample_run(*args, **kwargs)))


def cell(cells: list[dict[str, Any]], method: str, task: str, length: int) -> dict[str, Any]:
    return next(c for c in cells if (c["method"], c["task_spec"], c["length"]) == (method, task, length))


def twin(cells: list[dict[str, Any]], method: str, of: str, slower: float) -> None:
    """Gives `method` the results of `of` at `slower` times its cost."""
    for record in (c for c in cells if c["method"] == method):
        same = copy.deepcopy(cell(cells, of, record["task_spec"], record["length"]))
        record |= {k: same[k] for k in ("score", "interval", "n", "samples", "cost")}
        record["cost"]["prefill_s"] *= slower


@pytest.fixture(scope="module")
def run() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """All methods, tasks and lengths; to be read only."""
    return sample_run()


@pytest.fixture(scope="module")
def page(run: Any) -> str:
    return report.render(*run)


@pytest.fixture(scope="module")
def pictures(run: Any) -> list[Any]:
    return figures.pictures(Results(*run))


# Advice


def test_the_sentence_names_model_length_method_cost_reason_and_harm():
    advice = advice_of()
    assert advice.method == "ntk:factor=8"
    for part in (
        "smollm2-135m",
        "32,768 tokens",
        "use ntk:factor=8",
        "18.7 s",
        "34 ms",
        "4.12 GB",
        "because passkey 0.88",
    ):
        assert part in advice.sentence
    assert "at the native 8,192 tokens it does harm (ppl loss +0.25" in advice.sentence
    assert advice.sentence.endswith(".")
    assert advice.sentence.count(". ") == 0  # one sentence


def test_of_equal_methods_the_cheapest_is_advised():
    for slower, faster in (("yarn:factor=4", "ntk:factor=8"), ("ntk:factor=8", "yarn:factor=4")):
        manifest, cells = sample_run(("none", "ntk:factor=8", "yarn:factor=4"))
        twin(cells, slower, faster, 1.5)
        assert advise(Results(manifest, cells)).method == faster


def test_a_loss_that_is_only_slightly_higher_counts_as_equal():
    for more, advised in ((0.005, "yarn:factor=4"), (0.05, "ntk:factor=8")):
        manifest, cells = sample_run(("none", "ntk:factor=8", "yarn:factor=4"), samples=20)
        twin(cells, "yarn:factor=4", "ntk:factor=8", 0.5)
        for record in (c for c in cells if c["method"] == "yarn:factor=4" and c["task"] == "ppl"):
            record["score"] += more
            for sample in record["samples"]:
                sample["score"] += more  # the same in each sample, so the difference is measured without any doubt
        assert advise(Results(manifest, cells)).method == advised


def test_a_cheaper_method_that_is_measurably_worse_is_not_advised():
    manifest, cells = sample_run(("none", "ntk:factor=8", "yarn:factor=4"), samples=200)
    for record in (c for c in cells if c["method"] == "yarn:factor=4"):
        record["cost"]["prefill_s"] /= 10
    assert advise(Results(manifest, cells)).method == "ntk:factor=8"  # 0.88 against 0.50 of 200


def test_between_equal_costs_the_plain_model_comes_first():
    advice = advice_of(("none", "yarn:factor=4"), lengths=[8192])
    assert advice.method == "none"
    assert "use no method: the plain model reads" in advice.sentence


def test_a_loss_alone_does_not_decide_where_something_must_be_found():
    advice = advice_of(("none", STREAMING))
    assert advice.method is None
    assert "nothing that was measured works" in advice.sentence
    assert f"{STREAMING} keeps the loss (ppl loss 3.3" in advice.sentence
    assert "but forgets: it cannot find what it dropped (passkey 0.00)" in advice.sentence


def test_a_small_cache_that_was_not_asked_is_said_to_forget():
    advice = advice_of(("none", STREAMING), tasks=[PPL])
    assert advice.method == STREAMING
    assert "it keeps 47.2 MB of 1.51 GB of cache, so it forgets what it dropped" in advice.sentence


def test_where_another_is_advised_forgetting_is_a_note():
    assert any(n.startswith(f"{STREAMING} keeps the loss") and "forgets" in n for n in advice_of().notes)


def test_no_measurable_harm_is_said():
    manifest, cells = sample_run(("none", "yarn:factor=4"), samples=100)
    for task in ("ppl", "passkey"):
        cell(cells, "yarn:factor=4", task, 8192)["samples"] = cell(cells, "none", task, 8192)["samples"]
    assert "does no measurable harm" in advise(Results(manifest, cells)).sentence


@pytest.mark.parametrize(
    ("model", "name"),
    [("runs/a/model", "runs/a/model"), ("/there/mine", "mine"), ("/there/a/model", "a/model"), ("org/it", "org/it")],
)
def test_a_model_goes_by_a_name_that_tells_it_from_others(model: str, name: str) -> None:
    manifest, cells = sample_run()
    assert Results({**manifest, "model": model}, cells).name == name


def test_a_task_that_the_model_fails_everywhere_is_left_aside():
    manifest, cells = sample_run()
    for record in (c for c in cells if c["task"] == "passkey"):
        record["score"] = 0.0
        for sample in record["samples"]:
            sample["score"], sample["detail"]["found"] = 0.0, False
    advice = advise(Results(manifest, cells))
    assert advice.method is not None
    assert (
        "passkey is not informative here: no method scores, nor does the plain model at its native length."
        in advice.notes
    )


def test_collapse_everywhere_is_not_called_working():
    advice = advice_of(("none", "pi:factor=4"))
    assert advice.method is None
    assert "the best ppl loss, of pi:factor=4, is 5.0" in advice.sentence


def test_one_method_gives_nothing_to_choose():
    advice = advice_of(["none"])
    assert advice.method is None
    assert "only the plain model was measured" in advice.sentence


def test_advice_moves_to_the_longest_length_that_finished():
    lost = [(m, t, 32768) for m in METHODS for t in ("ppl", "passkey")]
    results = Results(*sample_run(out_of_memory=lost))
    assert results.target == 16384
    assert "Nothing finished at 32,768 tokens, so the advice is for 16,384." in advise(results).notes


def test_an_unfinished_method_is_not_advised():
    advice = advice_of(("none", "ntk:factor=8"), out_of_memory=[("ntk:factor=8", "ppl", 32768)])
    assert advice.method is None


def test_missing_costs_do_not_break_the_advice():
    manifest, cells = sample_run()
    for record in cells:
        record["cost"] = dict.fromkeys(record["cost"])
    assert "at a cost that was not measured" in advise(Results(manifest, cells)).sentence


def test_a_run_without_a_finished_cell_says_what_to_do():
    manifest, _ = sample_run()
    with pytest.raises(LongspanError, match=r"no finished cell yet.*longspan compare"):
        report.table_json(manifest, [])
    failed = [(m, t, n) for m in METHODS for t in ("ppl", "passkey") for n in (8192, 16384, 32768)]
    with pytest.raises(LongspanError, match="All 42 cells that ran ended without a result; the first: none ppl"):
        report.table_json(*sample_run(failed=failed, out_of_memory=()))


# Numbers


def test_rows_hold_the_paired_difference_to_the_plain_model():
    manifest, cells = sample_run()
    rows = {(r["method"], r["task"], r["length"]): r for r in report.table_json(manifest, cells)["rows"]}
    assert len(rows) == len(manifest["cells"])
    for task in (PPL, PASSKEY):
        a, b = (cell(cells, m, task["spec"], 16384)["samples"] for m in ("ntk:factor=8", "none"))
        right = stats.difference(a, b, stats.Scale(task["higher_is_better"], task["worst"]))
        row = rows["ntk:factor=8", task["spec"], 16384]
        assert (row["difference"], tuple(row["difference_interval"])) == (right.value, right.interval)
        assert rows["none", task["spec"], 16384]["difference"] is None
    assert rows[SELF_EXTEND, "ppl", 32768]["status"] == "out_of_memory"


def test_what_a_score_is_the_mean_of_stands_in_the_protocol_line():
    manifest, cells = sample_run(("none", "ntk:factor=8"), out_of_memory=())
    for record in (c for c in cells if c["task"] == "ppl"):
        for sample in record["samples"]:
            sample["detail"] |= {"protocol": "yarn", "mean_of": "the windows' means"}
    said = "protocol yarn; mean of the windows' means; "
    assert said in Results(manifest, cells).protocol_line(Results(manifest, cells).tasks[0], 32768)
    console = Console(file=io.StringIO(), width=400)
    report.terminal(manifest, cells, console)
    assert said in console.file.getvalue()
    assert "mean of" not in Results(*sample_run()).protocol_line(Results(*sample_run()).tasks[0], 32768)


def test_the_effective_window_stands_in_terminal_page_and_json():
    manifest, cells = sample_run(("none", STREAMING, "ntk:factor=8"), tasks=[PPL, PASSKEY])
    for number, sample in enumerate(cell(cells, "ntk:factor=8", "passkey", 32768)["samples"]):
        sample["detail"]["found"] = number >= 3  # of 8, evenly spaced from the beginning to the end
    for number, sample in enumerate(cell(cells, STREAMING, "passkey", 32768)["samples"]):
        sample["detail"]["found"] = number == 7
    data = report.table_json(manifest, cells)
    rows = {(r["method"], r["task"], r["length"]): r["effective_window"] for r in data["rows"]}
    at_three = 32768 - 12 - 30 - round((32768 - 80) * 3 / 7)
    assert rows["ntk:factor=8", "passkey", 32768] == at_three
    assert rows[STREAMING, "passkey", 32768] == 38
    assert (rows["none", "passkey", 32768], rows["none", "ppl", 32768]) == (0, None)
    assert "at least 20 % of the trials find the key" in data["definitions"]["effective_window"]
    console = Console(file=io.StringIO(), width=1000)
    report.terminal(manifest, cells, console)
    said = console.file.getvalue()
    assert f"passkey, effective window: {data['definitions']['effective_window']}; 8 distances, 1 trial at each" in said
    assert f"{at_three:,} of 32,768" in said
    page = report.render(manifest, cells).replace("\u00a0", " ")
    assert data["definitions"]["effective_window"] in page
    assert f"At 32,768 tokens it is {at_three:,} with ntk, 38 with streaming, 0 with all others" in page
    assert f"<td>effective window</td><td>{rows['ntk:factor=8', 'passkey', 8192]:,}</td>" in page


def test_json_is_json():
    data = report.table_json(*sample_run())
    assert json.loads(json.dumps(data, allow_nan=False))["advice"]["method"] == "ntk:factor=8"


def test_curve_weighs_samples_by_their_tokens():
    def sample(means: list[float | None], counts: list[int]) -> dict[str, Any]:
        return {"detail": {"nll_by_position": means, "tokens_by_position": counts, "window": 90}}

    record = {"length": 100, "samples": [sample([1.0, 4.0, None], [3, 1, 0]), sample([5.0, None, None], [1, 0, 0])]}
    assert curve(record) == ([2.0, 4.0, None], 90)


@given(st.dictionaries(st.text(), st.tuples(st.floats(0, 9), st.floats(0, 9)), min_size=1), st.booleans())
def test_pareto_keeps_what_nothing_beats(run: Any, points: dict[str, tuple[float, float]], higher: bool):
    task = next(t for t in Results(*run).tasks if t.higher_is_better == higher)
    front = pareto(points, task)

    def beaten(name: str) -> bool:
        (cost, score), others = points[name], (points[o] for o in points)
        return any(c <= cost and task.gain(s) >= task.gain(score) and (c, s) != (cost, score) for c, s in others)

    assert {points[n] for n in front} == {points[n] for n in points if not beaten(n)}


@given(st.lists(st.floats(0, 10), min_size=1, max_size=12), st.floats(0.01, 0.8))
def test_spread_keeps_order_distance_and_bounds(values: list[float], gap: float):
    places = spread(values, gap, 0, 10)
    ranked = [p for _, p in sorted(zip(values, places, strict=True))]
    assert all(b - a >= gap - 1e-6 for a, b in itertools.pairwise(ranked))
    assert min(places) >= -1e-6
    assert max(places) <= 10 + 1e-6


def test_spread_leaves_alone_what_is_apart():
    assert spread([3.0, 1.0, 2.0], 0.5, 0, 5) == [3.0, 1.0, 2.0]


def test_numbers_for_people():
    assert [duration(s) for s in (0.024, 3.214, 99.6, 725, 7500)] == [
        "24 ms",
        "3.21 s",
        "2 min",
        "12 min",
        "2 h 05 min",
    ]
    assert [size(b) for b in (12, 47_185_920, 1_509_949_440, 139e9)] == ["12 B", "47.2 MB", "1.51 GB", "139 GB"]
    assert [tokens(n) for n in (100, 8192, 2**20)] == ["100", "8k", "1m"]
    loss = Results(*sample_run(["none"], tasks=[PPL])).tasks[0]
    assert [loss.number(-0.0001, True), loss.number(-0.25, True), loss.number(None)] == ["+0.000", "−0.250", "–"]


def test_nought_is_never_marked_as_best():
    screen = io.StringIO()
    report.terminal(
        *sample_run(("none", "pi:factor=4"), tasks=[PASSKEY], lengths=[32768]), Console(file=screen, width=90)
    )
    assert "0.00 " in screen.getvalue()
    assert not re.search(r"0\.00[*~]", screen.getvalue())


# Figures


def test_a_method_looks_the_same_in_every_figure_and_unlike_the_others(pictures: Any):
    many = ["none", *(f"m{i}" for i in range(20))]
    looks = styles(many)
    assert len({(s.colour, str(s.dash)) for s in looks.values()}) == len(many)
    assert len({(s.colour, s.marker) for s in looks.values()}) == len(many)
    for picture in pictures:
        if picture.name != "depth-passkey":
            for method in picture.methods or [m for m in METHODS if m != "none"]:
                assert any(styles(METHODS)[method].colour in panel.svg for panel in picture.panels), picture.name


def test_every_figure_has_words_numbers_and_real_text(pictures: Any):
    assert [p.name for p in pictures] == ["positions-ppl", "depth-passkey", "cost", "native"]
    for picture in pictures:
        assert len(picture.caption) > 40
        assert picture.protocol
        assert picture.table.rows
        assert {len(r) for r in picture.table.rows} == {len(picture.table.head)}
        assert all("<text" in panel.svg and len(panel.label) > 20 for panel in picture.panels)
    assert len(pictures[1].panels) == len(METHODS)
    assert "native window 8,192" in pictures[0].panels[0].svg
    assert "The plain model goes from 3.1" in pictures[0].caption


def test_a_stream_is_shown_by_position():
    manifest, cells = sample_run(("none", STREAMING), tasks=[STREAM], missing=[(STREAMING, "stream-eval", 32768)])
    picture = figures.pictures(Results(manifest, cells))[0]
    assert picture.name == "stream-stream-eval"
    assert picture.table.rows[0] == ["none", *["1.00"] * 2, *["0.00"] * 6]
    assert picture.table.rows[1] == [STREAMING, *["1.00"] * 4, *["–"] * 4]
    assert "longer cell: streaming at 16,384" in picture.caption
    assert "plain model 1.00 1.00 0.00" in picture.panels[0].label
    assert all(styles(("none", STREAMING))[m].colour in picture.panels[0].svg for m in ("none", STREAMING))
    assert "stream-stream-eval" in report.render(manifest, cells)
    screen = io.StringIO()
    report.terminal(manifest, cells, Console(file=screen, width=200))
    assert "stream-eval, right in each eighth of 32,768 tokens: plain model 1.00 1.00 0.00 0.00" in screen.getvalue()


def test_copies_are_no_stream():
    manifest, cells = sample_run(("none",), tasks=[STREAM])
    for sample in (s for c in cells for s in c["samples"]):
        del sample["detail"]["stream_tokens"]
    assert not any(p.name.startswith("stream") for p in figures.pictures(Results(manifest, cells)))


def test_depths_of_thousands_of_samples_are_gathered():
    picture = figures.pictures(Results(*sample_run(["none"], tasks=[PASSKEY], samples=3000)))[0]
    *rows, window = picture.table.rows
    assert len(rows) == figures.DEPTH_ROWS
    assert rows[0][1] == "0–10 %"
    assert sum(int(row[2].split(" of ")[1]) for row in rows) == 3000
    assert window[1] == "effective window"


def test_a_sliding_window_has_positions_of_its_own():
    manifest, cells = sample_run(("none",), tasks=[PPL])
    for sample in (s for c in cells for s in c["samples"]):
        sample["detail"]["window"] = 2048
    picture = figures.pictures(Results(manifest, cells))[0]
    assert picture.table.head[-1] == "1,792–2,048"
    assert "within the model's native window" in picture.caption


@pytest.mark.parametrize("tasks", [(PPL, PASSKEY), (PPL,), (PASSKEY,)])
def test_png_is_a_picture(tmp_path: Path, tasks: Any):
    figures.png(*sample_run(METHODS[:3], tasks=tasks), tmp_path / "shape.png")
    data = (tmp_path / "shape.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    width = int.from_bytes(data[16:20])
    assert width == (2320 if len(tasks) == 2 else 1280)


def test_png_of_a_run_without_either_task_says_so(tmp_path: Path):
    manifest, cells = sample_run(["none"], tasks=[PPL])
    for sample in (s for c in cells for s in c["samples"]):
        del sample["detail"]["nll_by_position"]
    with pytest.raises(LongspanError, match="no picture to draw"):
        figures.png(manifest, cells, tmp_path / "shape.png")


# The page


class Page(HTMLParser):
    """What a page holds: its tags with their attributes, its ids, and the text of its first paragraph."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.first = ""
        self._in_first: bool | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "p" and self._in_first is None:
            self._in_first = True

    def handle_endtag(self, tag: str) -> None:
        if tag == "p":
            self._in_first = False

    def handle_data(self, data: str) -> None:
        if self._in_first:
            self.first += data

    def count(self, name: str) -> int:
        return sum(tag == name for tag, _ in self.tags)


def test_page_opens_with_the_advice_and_needs_nothing_else(run: Any, page: str):
    seen = Page(page)
    assert seen.first.replace("\u00a0", " ") == advise(Results(*run)).sentence
    assert not seen.count("script")
    assert not seen.count("img")
    assert not seen.count("link")
    references = [v for _, a in seen.tags for k, v in a.items() if k in ("src", "href", "xlink:href") and v]
    assert references
    assert all(r.startswith("#") for r in references)
    assert not re.search(r"url\((?!#)|@import", page)
    ids = [a["id"] for _, a in seen.tags if a.get("id")]
    assert len(ids) == len(set(ids))
    assert {r[1:] for r in references} <= set(ids)
    assert seen.count("figure") == seen.count("figcaption") == seen.count("details") == 4
    drawings = [a for _, a in seen.tags if a.get("role") == "img"]
    assert len(drawings) == 1 + len(METHODS) + 4 + 2
    assert all(len(a["aria-label"] or "") > 20 for a in drawings)


def test_page_says_how_it_was_measured(run: Any, page: str):
    for fact in (
        run[0]["fingerprint"],
        "float32",
        "LlamaForCausalLM",
        "Some Processor 9000",
        "torch 2.13.0, transformers 5.23.0",
        "-m &#39;ntk:factor=8&#39;",
        "What is the pass key? The pass key is",
        "&lt;|im_start|&gt;There is an important info",
        "Wilson&#39;s of a share",
        "bootstrap over positions",
        "stand-in for PG-19",
        "works on a model trained for it",
        "12.4 GB were wanted",
    ):
        assert fact in page, fact


def test_page_escapes_what_it_is_told():
    bad = '<img src=x onerror="alert(1)">'
    manifest, cells = sample_run(["none", "yarn:factor=4"], failed=[("yarn:factor=4", "ppl", 16384)], model=bad)
    text = json.dumps([manifest, cells]).replace("yarn:factor=4", "<b>yarn</b>&amp;")
    manifest, cells = json.loads(text)
    manifest["left_out"] = {"<i>x</i>": bad}
    manifest["environment"]["command"] = bad
    for record in cells:
        record["error"] = record["error"] and bad
        if record["first_prompt"]:
            record["first_prompt"]["head"] = "</pre><script>alert(1)</script>"
    page = Page(report.render(manifest, cells))
    assert not page.count("img")
    assert not page.count("script")
    assert not page.count("b")
    assert not page.count("i")


@pytest.mark.parametrize(
    "made",
    [
        {"methods": ["none"]},
        {"lengths": [8192]},
        {"tasks": [PPL]},
        {"tasks": [PASSKEY]},
        {"tasks": [PASSKEY | {"spec": "passkey:template=chat"}, PASSKEY]},
        {"missing": [("none", "ppl", 32768), ("none", "passkey", 8192)]},
        {"out_of_memory": [("none", t, n) for t in ("ppl", "passkey") for n in (8192, 16384, 32768)]},
        {"failed": [(m, "ppl", n) for m in METHODS for n in (8192, 16384, 32768)]},
        {"methods": ["none", "yarn:factor=4 + streaming:sinks=4,window=4096"], "samples": 1},
    ],
    ids=[
        "one method",
        "one length",
        "loss only",
        "passkey only",
        "two settings",
        "gaps",
        "no baseline",
        "no task",
        "one sample",
    ],
)
def test_every_shape_of_run_has_a_report(made: dict[str, Any]):
    manifest, cells = sample_run(**({"methods": METHODS[:3]} | made))
    assert Page(report.render(manifest, cells)).first
    report.terminal(manifest, cells, Console(file=io.StringIO(), width=80))


def test_failed_samples_are_counted_and_listed_up_to_a_limit():
    manifest, cells = sample_run(["none", "yarn:factor=4"], samples=60)
    for sample in cell(cells, "yarn:factor=4", "ppl", 16384)["samples"][:50]:
        sample |= {"failed": True, "score": None, "detail": {"reason": "the model gave <nothing>"}}
    text = report.render(manifest, cells)
    assert "50 failed" in text
    assert text.count("the model gave &lt;nothing&gt;") == report.MOST_FAILURES
    assert "and 30 more" in text


def test_the_page_of_a_run_folder_is_the_same_each_time(tmp_path: Path):
    made = sample_run(["none", "yarn:factor=4"], lengths=[16384])
    run = Run(write_run(tmp_path / "run", *made))
    path = report.html(run.manifest, run.cells(), tmp_path / "report.html")
    assert path.read_text(encoding="utf-8") == report.render(*made)


# The terminal


@pytest.mark.parametrize("width", [60, 80, 240])
def test_terminal_shows_advice_scores_costs_and_endings(width: int):
    made = sample_run()
    screen = io.StringIO()
    report.terminal(*made, Console(file=screen, width=width))
    text = screen.getvalue()
    words = " ".join(text.split())
    assert words.startswith("For smollm2-135m at 32,768 tokens, use ntk:factor=8")
    for part in ("0.88*", "0.50~", "47.2*", "1,510", "out of", "left out: landmark"):
        assert part in words
    assert max(map(len, text.splitlines())) <= width
    assert text.count("method ") >= (1 if width == 240 else 3)  # one table where it fits


def test_terminal_takes_names_as_they_are():
    manifest, cells = json.loads(
        json.dumps(sample_run(["none", "yarn:factor=4"])).replace("yarn:factor=4", "[red]yarn")
    )
    screen = io.StringIO()
    report.terminal(manifest, cells, Console(file=screen, width=200))
    assert "[red]yarn" in screen.getvalue()


def test_names_of_points_are_not_read_as_one() -> None:
    for where in range(60, 75):
        axes = Figure(figsize=(4, 3)).subplots()
        axes.set_xlim(0, 1)
        name_points(axes, {"ntk": (where / 100, 0.5), "streaming": (0.95, 0.5)}, [])
        first, second = sorted((t.get_window_extent() for t in axes.texts), key=lambda box: box.x0)
        assert second.x0 - first.x1 > 4 or not (first.y0 < second.y1 and second.y0 < first.y1)


def test_a_mark_beside_a_name_is_whole() -> None:
    assert all("clip-path" not in swatch(style) for style in styles(METHODS).values())


def test_a_terminal_that_is_not_unicode_costs_neither_the_report_nor_its_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, pages = write_run(tmp_path / "run", *sample_run()), []
    for encoding in ("utf-8", "ascii", "latin-1"):
        raw = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding, write_through=True))
        assert run_command(["report", str(folder)]) == 0
        assert f"page: {folder / 'report.html'}" in raw.getvalue().decode("latin-1").replace("\n", "")
        pages.append((folder / "report.html").read_text(encoding="utf-8"))
        (folder / "report.html").unlink()
    monkeypatch.setattr(report, "terminal", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_command(["report", str(folder)])
    pages.append((folder / "report.html").read_text(encoding="utf-8"))
    assert len(set(pages)) == 1
