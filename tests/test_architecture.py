"""The page on architecture is held to the tree: its paths exist, the package is on it, its layers are those of the contract."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "longspan"
PAGE = (ROOT / "docs" / "architecture.md").read_text()
DECISIONS = (ROOT / "docs" / "decisions.md").read_text()


def section(title: str) -> str:
    return PAGE.partition(f"## {title}\n")[2].partition("\n## ")[0]


@pytest.mark.parametrize("page", [PAGE, DECISIONS], ids=["architecture", "decisions"])
def test_every_path_exists(page: str) -> None:
    """A path is from the package's folder or from the repository's; a name alone is of the folder of its row."""
    named = {p for p in re.findall(r"`([\w/-]+(?:\.py|\.md|/))`", page) if "/" in p.rstrip("/")}
    missing = [p for p in sorted(named) if not (PACKAGE / p).exists() and not (ROOT / p).exists()]
    assert named
    assert not missing


@pytest.mark.parametrize("folder", sorted(p.name for p in PACKAGE.iterdir() if (p / "__init__.py").exists()))
def test_every_file_is_named_in_its_row(folder: str) -> None:
    """Methods and tasks are a file or a folder each, and are not listed."""
    rows = section("What lies where")
    if folder in ("positions", "attention", "memory", "tasks", "prompts"):
        return
    row = next(line for line in rows.splitlines() if line.startswith(f"| `{folder}/`"))
    files = {p.name for p in (PACKAGE / folder).glob("*.py")} - {"__init__.py"}
    folders = {f"{p.name}/" for p in (PACKAGE / folder).iterdir() if (p / "__init__.py").exists()}
    named = set(re.findall(r"`([\w]+(?:\.py|/))`", row))
    assert files <= named, f"not named: {sorted(files - named)}"
    assert all(name in row or f"`{folder}/{name}`" in rows for name in folders)


def test_layers_are_those_of_the_contract() -> None:
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]["layers"]
    expected = [set(re.split(r"\s*:\s*", layer)) for layer in contract]
    lines = section("Layers").partition("```text\n")[2].partition("```")[0].splitlines()
    drawn = [set(re.split(r"\s*·\s*", re.split(r"\s{2,}", line)[0])) for line in lines]
    merged = [
        drawn[i] | drawn[i + 1] if "models" in drawn[i] else drawn[i]
        for i in range(len(drawn))
        if "combinable" not in drawn[i]
    ]
    assert merged == expected


def test_six_files_are_six() -> None:
    assert len(re.findall(r"^\d\. `[\w/]+\.py`", section("Read these six files first"), re.M)) == 6


def test_a_spec_passes_through_at_most_ten_files() -> None:
    rows = re.findall(r"^\| `([\w/]+\.py)`", section("From a spec to a change of a model"), re.M)
    assert len(rows) == len(set(rows)) <= 10
