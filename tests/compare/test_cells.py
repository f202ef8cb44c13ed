"""What is planned, and that a cell's key changes with everything that its result depends on."""

from __future__ import annotations

import dataclasses
import pickle

import pytest
import torch
from compare_tiny import TinyHit, TinyLoss, TinyTrouble

import tiny as tiny_model
from longspan.compare.planning import cells, cost, requests
from longspan.compare.planning.cells import Cell, scale_of
from longspan.compare.planning.lengths import choose_lengths
from longspan.compare.planning.plan import make_plan
from longspan.compare.planning.requests import Request, read_lengths, read_methods
from longspan.compare.report.results import by_reason
from longspan.compare.storing import canonical, clean
from longspan.core import method
from longspan.core.facts import facts_of
from longspan.core.method import Method, combination
from longspan.util import environment
from longspan.util.errors import LongspanError, NotSupported, SpecError

FACTS = facts_of(tiny_model.model(window=128))


@dataclasses.dataclass(frozen=True)
class Picky(Method):
    """A method that no model can take; it is in the catalogue only where a test puts it there."""

    name = ""

    def check(self, facts):
        raise NotSupported("picky: not this model; any other works")


def cell(**changes) -> Cell:
    settings = {
        "model": "m",
        "fingerprint": "f",
        "requested": "ntk",
        "method": combination("ntk:factor=4"),
        "task": TinyLoss(),
        "length": 256,
        "samples": 3,
        "seed": 0,
        "dtype": "float32",
        "device": "cpu",
        "processor": "abacus",
    }
    return Cell(**settings | changes)


@pytest.mark.parametrize(
    "change",
    [
        {"fingerprint": "g"},
        {"method": combination("ntk:factor=8")},
        {"task": TinyHit()},
        {"task": TinyTrouble(kind="nan")},
        {"length": 512},
        {"samples": 4},
        {"seed": 1},
        {"dtype": "bfloat16"},
        {"device": "cuda"},
        {"processor": "slide rule"},
    ],
)
def test_the_key_changes_with_the_cell(change):
    assert cell(**change).key != cell().key


def test_the_key_is_the_same_in_another_process_and_under_another_name():
    assert pickle.loads(pickle.dumps(cell())).key == cell().key
    assert cell(requested="ntk:factor=4", model="elsewhere").key == cell().key
    assert len(cell().key) == 64


def test_the_key_changes_with_versions_and_code(monkeypatch):
    before = cell().key
    monkeypatch.setattr(TinyLoss, "version", 2)
    task_version = cell().key
    monkeypatch.setattr(environment, "versions", lambda: {"torch": "0", "python": "3.0.1"})
    versions = cell().key
    monkeypatch.setattr(environment, "versions", lambda: {"torch": "0", "python": "3.0.2"})
    assert cell().key == versions  # a bug-fix release of Python is not another language
    monkeypatch.setattr(cells, "code_digest", lambda: "other sources")
    code = cell().key
    monkeypatch.setattr(cells, "source_digest", lambda cls: "other file")
    assert len({before, task_version, versions, code, cell().key}) == 5


def test_the_code_digest_covers_the_files_that_decide_results(tmp_path, monkeypatch):
    for name in ("core/method.py", "cli/main.py", "positions/a.py", "compare/running/worker.py", "compare/storing.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("x = 1\n")
    monkeypatch.setattr(cells, "__file__", str(tmp_path / "compare" / "planning" / "cells.py"))
    digests = {}
    for name in (
        "nothing",
        "cli/main.py",
        "compare/storing.py",
        "core/method.py",
        "positions/a.py",
        "compare/running/worker.py",
    ):
        with open(tmp_path / name, "a") as file:
            file.write("# changed\n")
        digests[name] = cells.code_digest.__wrapped__()
    assert digests["nothing"] == digests["cli/main.py"] == digests["compare/storing.py"]
    assert len(set(digests.values())) == 4


def test_a_users_own_file_is_part_of_the_key():
    assert cells.source_digest(TinyLoss) is not None
    assert cells.source_digest(method.NoMethod) is None


def test_the_native_length_is_always_among_the_lengths():
    assert read_lengths([512, "1k", 512], FACTS) == [128, 512, 1024]
    assert read_lengths([128], FACTS) == [128]
    for wrong in (0, -4, "four", 1.5, True):
        with pytest.raises(SpecError):
            read_lengths([wrong], FACTS)


def test_the_bare_model_is_always_first_and_none_comes_twice():
    found, left_out = read_methods(["ntk", "ntk:factor=4", "none"], FACTS, 512, "base")
    assert found[0].spec == "none"
    assert len({c.spec for c in found}) == len(found)
    assert left_out == {}


def test_methods_are_resolved_for_the_longest_length():
    (_, ntk), _ = read_methods(["ntk"], FACTS, 1024, "base")
    assert ntk.requested == "ntk"
    assert ntk.spec == combination("ntk").resolve(FACTS, 1024).spec != "ntk"


def test_what_was_asked_for_and_cannot_be_had_is_an_error():
    with pytest.raises(NotSupported, match="any other works"):
        read_methods([Picky()], FACTS, 512, "base")
    with pytest.raises(SpecError, match="there is no method"):
        read_methods(["nkt"], FACTS, 512, "base")


def test_what_was_chosen_automatically_is_left_out_with_the_reason(monkeypatch):
    class Needy(Picky):
        def __init__(self, must):
            pass

    class Scratch(Picky):
        works_on = "from scratch"

    listed = {"ntk": method.catalogue()["ntk"], "picky": Picky, "needy": Needy, "scratch": Scratch}
    monkeypatch.setattr(requests, "catalogue", lambda: listed)
    found, left_out = read_methods(None, FACTS, 512, "base")
    assert [c.requested for c in found] == ["none", "ntk"]
    assert left_out["picky"] == "picky: not this model; any other works"
    assert "needs settings" in left_out["needy"]
    assert "from scratch" in left_out["scratch"]


def test_lengths_are_chosen_by_time_and_memory():
    long = choose_lengths(FACTS, 2, [2, 2], torch.float32, memory=2**40, speed=1e12)
    assert long.lengths[:3] == [128, 256, 512]
    assert "half an hour" in long.why
    slow = choose_lengths(FACTS, 2, [2, 2], torch.float32, memory=2**40, speed=1e7)
    assert slow.lengths[-1] < long.lengths[-1]
    tight = choose_lengths(FACTS, 2, [2, 2], torch.float32, memory=int(1.5 * 2**30), speed=1e12)
    assert cost.memory_needed(FACTS, tight.lengths[-1], torch.float32) <= 0.8 * 1.5 * 2**30
    assert "memory" in tight.why
    none = choose_lengths(FACTS, 2, [2, 2], torch.float32, memory=2**20, speed=1e12)
    assert none.lengths == [128]


def test_where_even_two_lengths_take_long_samples_are_made_fewer_but_not_what_was_asked_for():
    slow = choose_lengths(FACTS, 2, [40, 10], torch.float32, memory=2**40, speed=3e6)
    assert slow.lengths == [128, 256]
    assert 2 <= slow.most_samples < 40
    assert f"at most {slow.most_samples} samples" in slow.why
    asked = choose_lengths(FACTS, 2, [40, 10], torch.float32, memory=2**40, speed=3e6, keep_counts=True)
    assert asked.most_samples is None


def test_a_failed_sample_is_as_bad_as_the_task_says():
    assert scale_of(TinyHit(), 100).worst == 0.0
    assert scale_of(TinyLoss(), 100).worst == pytest.approx(4.605, abs=1e-3)


def test_a_plan_orders_its_cells_and_can_be_stored(tiny):
    plan = make_plan(Request(str(tiny), ["ntk", "yarn"], [TinyLoss(), TinyHit()], [512, 256], samples=2))
    planned = plan.cells()
    assert len(planned) == 3 * 2 * 3 == len({c.key for c in planned})
    assert [c.length for c in planned] == [128] * 2 + [256] * 2 + [512] * 2 + [128] * 4 + [256] * 4 + [512] * 4
    assert [c.method.spec for c in planned[:6]] == ["none"] * 6
    manifest = plan.manifest()
    canonical(clean(manifest))
    assert manifest["native_length"] == 128
    assert manifest["methods"][1]["asked"] == "ntk"
    assert manifest["asked"]["methods"] == ["ntk", "yarn"]
    assert manifest["asked"]["lengths"] == ["512", "256"]
    assert manifest["environment"]["dtype"] == "float32"
    assert manifest["card"]["parameters"] == FACTS.parameters


@pytest.mark.parametrize(
    "wrong",
    [{"seed": -1}, {"seed": 0.5}, {"samples": 0}, {"samples": True}, {"tasks": ["no such task"]}, {"tasks": [7]}],
)
def test_a_wrong_request_is_refused(tiny, wrong):
    with pytest.raises(LongspanError):
        make_plan(Request(str(tiny), **{"lengths": [256], "tasks": [TinyLoss()], "methods": ["ntk"]} | wrong))


def test_the_key_changes_with_the_data_that_samples_are_made_from(monkeypatch):
    before = cell().key
    monkeypatch.setattr(TinyLoss, "data_digest", lambda self: "another text")
    assert cell().key != before


def test_methods_left_out_for_one_reason_share_a_line() -> None:
    assert by_reason({"a": "too big", "b": "for others", "c": "too big"}) == {"a, c": "too big", "b": "for others"}
    _, left_out = read_methods(None, FACTS, 1024, "base")
    lines = by_reason(left_out)
    assert "alibi" in left_out and any({"alibi", "gau"} <= set(names.split(", ")) for names in lines)
    assert sum(len(names.split(", ")) for names in lines) == len(left_out)
