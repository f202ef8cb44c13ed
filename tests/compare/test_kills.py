"""SIGKILL at random moments: no finished cell is lost, none is there twice, and the figures are those of an unbroken run.

One kill in the suite; LONGSPAN_KILLS=100 makes a hundred.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from longspan.compare import Run
from longspan.compare.storing import CELLS, read_cells

HERE = Path(__file__).parent
KILLS = int(os.environ.get("LONGSPAN_KILLS", "1"))


def start(tiny: Path, out: Path) -> subprocess.Popen:
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import compare_tiny; compare_tiny.main(*sys.argv[1:])"
    return subprocess.Popen([sys.executable, "-c", code, str(tiny), str(out)], stderr=subprocess.PIPE, text=True)


def finished(out: Path) -> dict[str, str]:
    """The finished cells by key, as text; fails on a cell that is there twice."""
    records, _ = read_cells(out)
    keys = [r["key"] for r in records]
    assert len(keys) == len(set(keys)), "a cell is in the file twice"
    return {r["key"]: json.dumps(r, sort_keys=True) for r in records}


def figures(out: Path) -> list[tuple]:
    """All that is not cost: it must not depend on how often a run was broken off."""
    run = Run(out)
    samples = {c["key"]: c["samples"] for c in run.cells()}
    return [
        (r["key"], r["status"], r["score"], r["interval"], r["difference"], r["difference_interval"], samples[r["key"]])
        for r in run.table()
    ]


def run_and_kill(tiny: Path, out: Path, chance: random.Random) -> bool:
    """Starts the comparison and kills it at a random moment: at any time at all, or soon after a cell was written, where
    most of the work is. False where it ended by itself before."""
    process = start(tiny, out)
    size = (out / CELLS).stat().st_size if (out / CELLS).exists() else 0
    delay = chance.uniform(0, 12)
    if chance.random() < 0.6:
        while process.poll() is None and not ((out / CELLS).exists() and (out / CELLS).stat().st_size > size):
            time.sleep(0.001)
        delay = chance.choice([0, chance.uniform(0, 0.02), chance.uniform(0, 2)])
    try:
        process.wait(delay)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    error = process.stderr.read()
    process.stderr.close()
    assert process.returncode in (0, -9), error
    return process.returncode == -9


@pytest.mark.slow
@pytest.mark.timeout(300 + 120 * KILLS)
def test_kills_lose_nothing_and_change_nothing(tiny, tmp_path):
    chance = random.Random(7)
    assert start(tiny, tmp_path / "unbroken").wait() == 0
    expected = figures(tmp_path / "unbroken")
    assert len(expected) == 8
    kills = rounds = cells = torn = 0
    while kills < KILLS or rounds == 0:
        out = tmp_path / f"round-{rounds}"
        before: dict[str, str] = {}
        killed = True
        while killed:
            killed = run_and_kill(tiny, out, chance) if kills < KILLS else start(tiny, out).wait() != 0
            kills += killed
            now = finished(out) if out.exists() else {}
            assert before.items() <= now.items(), "a finished cell was lost or changed"
            before = now
        assert figures(out) == expected
        torn += (out / f"{CELLS}.torn").exists()
        cells += len(before)
        rounds += 1
    print(
        f"{kills} kills in {rounds} runs: {cells} cells, none lost, none twice, figures identical; torn tails: {torn}"
    )
