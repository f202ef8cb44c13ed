"""A pytest plugin, `-p tools.fast`: the part of the tests that `make test-fast` runs.

Of a test with several sets of parameters the first is kept. Files that run things whole are left out: trainings, comparisons in
worker processes, the command line, the scripts of reproductions/. So are tests with a marker in MARKERS.
"""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WHOLE = (
    "tests/**/test_*_script.py",
    "tests/attention/test_movie_reviews.py",
    "tests/attention/test_reformer_duplication.py",
    "tests/compare/test_kills.py",
    "tests/compare/test_memory_tasks.py",
    "tests/compare/test_runner.py",
    "tests/compare/test_trained.py",
    "tests/engine/test_dilated_shards.py",
    "tests/engine/test_single_query.py",
    "tests/test_cli.py",
    "tests/test_export.py",
    "tests/test_small_model.py",
    "tests/training/test_*training.py",
    "tests/training/test_run.py",
    "tests/training/test_study.py",
    "tests/training/test_train_cli.py",
    "tests/training/test_trainer.py",
)
"""Files that are left out; each of these names some."""
MARKERS = ("slow", "model", "browser", "cuda", "kernels")


def _left_out() -> frozenset[Path]:
    found: set[Path] = set()
    for name in WHOLE:
        files = set(ROOT.glob(name))
        if not files:
            raise pytest.UsageError(f"tools/fast.py leaves out {name}, and there is no such file: name it as it is now")
        found |= files
    return frozenset(found)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[LEFT_OUT] = _left_out()


LEFT_OUT: pytest.StashKey[frozenset[Path]] = pytest.StashKey()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return True if collection_path in config.stash[LEFT_OUT] else None


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept: dict[str, pytest.Item] = {}
    for item in items:
        if not any(item.get_closest_marker(name) for name in MARKERS):
            kept.setdefault(item.nodeid.partition("[")[0], item)
    chosen = set(kept.values())
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = [item for item in items if item in chosen]
