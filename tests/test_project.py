"""What surrounds the code: versions that agree, links that lead somewhere, templates of new methods that work."""

from __future__ import annotations

import dataclasses
import importlib.resources
import importlib.util
import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from transformers import DynamicCache

import longspan as ls
import tiny
from longspan.core import method
from longspan.hf import compat
from longspan.lm import LongspanConfig, LongspanForCausalLM
from longspan.meter import Meter
from longspan.plugins import load_user_file
from longspan.tasks import base
from longspan.util.errors import NotSupported

ROOT = Path(__file__).parents[1]
Load = Callable[[str], ModuleType]
SKIPPED = {".git", "site", "runs", "build", "dist", "node_modules"}
"""Folders at the root whose files are not the project's own; so are all that begin with .venv."""
PAGES = sorted(
    path
    for path in ROOT.rglob("*.md")
    if (top := path.relative_to(ROOT).parts[0]) not in SKIPPED and not top.startswith(".venv")
)
FENCE = re.compile(r"^( *)(```|~~~).*?^\1\2 *$", re.M | re.S)
LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(<?([^)\s>]+)>?(?: \"[^\"]*\")?\)")


# Versions


def test_versions_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert project["version"] == cited["version"] == ls.__version__
    assert cited["license"] == project["license"]


def test_the_changelog_has_this_version() -> None:
    headings = re.findall(r"^## \[(.+?)\] - (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert ls.__version__ in dict(headings)
    for version, date in headings:
        assert re.fullmatch(r"\d+\.\d+\.\d+", version) and re.fullmatch(r"Unreleased|\d{4}-\d\d-\d\d", date)


def test_types_are_part_of_the_package() -> None:
    assert importlib.resources.files("longspan").joinpath("py.typed").is_file()


def test_every_extra_of_the_site_is_pinned() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.partition("==")[0].lower() for line in lines}
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"][
        "docs"
    ]
    assert {re.match(r"[\w-]+", line)[0].lower() for line in extra} <= pinned


# Links


def anchors(page: Path) -> set[str]:
    """The names of a page's headings, as they are made for links."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.*?) *#*$", text, re.M):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        name = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        number = 0
        while (numbered := f"{name}-{number}" if number else name) in found:
            number += 1
        found.add(numbered)
    return found


def dead_links(page: Path) -> Iterator[str]:
    text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text(encoding="utf-8")))
    for target in LINK.findall(text):
        if re.match(r"\w+:|//", target):
            continue
        path, _, anchor = target.partition("#")
        full = (page.parent / path).resolve() if path else page
        if not full.exists():
            yield f"{target}: there is no such file"
        elif anchor and (full.suffix != ".md" or anchor not in anchors(full)):
            yield f"{target}: there is no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert not list(dead_links(page))


def test_dead_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(
        "# A `b` (c)\n## A `b` (c)\n[here](#a-b-c) [again](#a-b-c-1) [x](#b) [y](none.md) ![z](none.png)\n```\n[w](none)\n```\n"
    )
    assert len(list(dead_links(tmp_path / "page.md"))) == 3


# New methods


@pytest.fixture
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("new_method", ROOT / "tools" / "new_method.py")
    module = sys.modules["new_method"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def load(tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Makes the file of a new method and runs it; what it registers is gone after the test."""
    method.catalogue()  # fills the registries before they are copied
    base.task_catalogue()
    monkeypatch.setattr(method.Method, "registry", dict(method.Method.registry))
    monkeypatch.setattr(base.Task, "registry", dict(base.Task.registry))
    monkeypatch.setenv("LONGSPAN_INCLUDE", "")

    def loaded(kind: str) -> ModuleType:
        path = tmp_path / f"my_{kind}.py"
        path.write_text(tool.source(f"my-{kind}", kind), encoding="utf-8")
        return load_user_file(path)

    return loaded


def test_a_new_pattern_works(load: Load) -> None:
    load("pattern")
    model, ids = tiny.model(), torch.arange(60)[None]
    with torch.no_grad():
        before = model(ids).logits
        with ls.applied(model, "my-pattern:recent=9,step=50"):
            torch.testing.assert_close(model(ids[:, :9]).logits, before[:, :9], rtol=1e-4, atol=1e-4)
            assert not torch.allclose(model(ids).logits, before, atol=1e-4)
    own = LongspanForCausalLM(LongspanConfig(attention="my-pattern:recent=8", hidden_size=32, num_hidden_layers=1))
    own(input_ids=ids, labels=ids).loss.backward()


def test_a_new_scheme_works(load: Load) -> None:
    load("scheme")
    model = LongspanForCausalLM(LongspanConfig(position="my-scheme", hidden_size=32, num_hidden_layers=1))
    ids = torch.arange(20)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.model.place.rates.grad.abs().sum() > 0


def test_a_new_task_works(load: Load) -> None:
    load("task")
    task, tokenizer = base.parse_task("my-task"), tiny.tokenizer()
    first, second = task.samples(tokenizer, 100, 2, 0)
    assert first.tokens != second.tokens and len(first.tokens) + len(task.answer(tokenizer, first)) == 100
    assert task.run(tiny.model(), tokenizer, first, Meter(torch.device("cpu"))).score in (0.0, 1.0)


def test_a_new_memory_works(load: Load) -> None:
    load("memory")
    model, ids = tiny.model(), torch.arange(60)[None]
    with torch.no_grad():
        model(ids, **compat.with_cache(model, plain := DynamicCache(config=model.config)))
    with torch.no_grad(), ls.applied(model, "my-memory:size=12"):
        whole, cache = model(ids).logits, DynamicCache(config=model.config)
        cuts = [(0, 30), (30, 40), *((t, t + 1) for t in range(40, 60))]
        parts = [model(ids[:, a:b], **compat.with_cache(model, cache)).logits for a, b in cuts]
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-4)
        assert cache.layers[0].keys.shape[2] == 11
        with pytest.raises(NotSupported, match="a cache of its own kind"):
            model(ids, **compat.with_cache(model, plain))
    with torch.no_grad(), ls.applied(model, "window:size=12"):
        torch.testing.assert_close(model(ids).logits, whole)


def test_no_setting_hides_what_a_method_says(load: Load) -> None:
    """A setting named like something of `Method`, such as `near` or `cost`, would take its place."""
    for kind in ("pattern", "scheme", "memory"):
        load(kind)
    taken = {name for name in vars(method.Method) if not name.startswith("_")}
    for name, cls in method.catalogue().items():
        assert not taken & {field.name for field in dataclasses.fields(cls)}, name


def test_new_methods_are_told_of_every_list(tool: ModuleType) -> None:
    """Of a method that is in no list each line is named; one of ours that is in all of them lacks nothing."""
    for kind, one in {"pattern": "longnet", "scheme": "alibi", "task": "passkey", "memory": "streaming"}.items():
        assert not tool.missing(one, kind), "tools/new_method.py, or the list that it names, is no longer true"
        assert len(tool.missing("no-such-method", kind)) == len(tool.KINDS[kind].tables)
        assert tool.place(one, kind).parent.is_dir()


def test_a_new_method_is_asked_for_rightly(tool: ModuleType) -> None:
    with pytest.raises(SystemExit, match="KIND must be one of pattern, scheme, task, memory"):
        tool.main("mine", "patern")
    with pytest.raises(SystemExit, match="NAME is written in small letters"):
        tool.main("My Method", "pattern")
