"""PoSE's draws: where tokens are put, which text they read, how distances are covered, and that all of it is repeatable."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.positions.pose import PoSE, sampler
from longspan.util.errors import SpecError


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 64), st.integers(0, 200), st.integers(2, 6), st.integers(0, 300), st.integers(0, 2**32))
def test_every_draw_is_what_the_paper_says(window: int, more: int, chunks: int, extra: int, seed: int) -> None:
    chunks = min(chunks, window)
    pose = PoSE(window, window + more, chunks)
    text = window + 1 + extra
    draw = pose.draw(np.random.default_rng(seed), text)
    steps = np.diff(draw.positions)
    assert draw.biases[0] == 0 and draw.positions[0] == 0
    assert (steps >= 1).all() and draw.positions[-1] <= window + more - 1
    assert (np.diff(draw.biases) >= 0).all() and draw.biases[-1] <= more
    assert len(draw.starts) == chunks and draw.starts[0] == 0 and (np.diff(draw.starts) >= 1).all()
    expected = np.ones(window - 1, dtype=int)
    expected[draw.starts[1:] - 1] += np.diff(draw.biases)
    assert (steps == expected).all()
    assert draw.tokens[0] == 0 and (np.diff(draw.tokens) >= 1).all() and draw.tokens[-1] < text
    inside = np.delete(np.diff(draw.tokens), draw.starts[1:] - 1)
    assert (inside == 1).all()


def test_two_chunks_jump_once_and_by_the_bias() -> None:
    draw = PoSE(512, 4096).draw(np.random.default_rng(1), 3000)
    jumps = np.diff(draw.positions) - 1
    assert np.count_nonzero(jumps) == 1 and jumps.max() == draw.biases[1]


def test_distances_are_covered_as_computed_for_the_paper() -> None:
    """From 2,048 to 16,384: each short distance is in every sample; from the window on a share of (Lc - 1) / (Lt - Lc + 1)
    of all samples has a given distance, and none the longest."""
    pose, rng, samples = PoSE(2048, 16384), np.random.default_rng(0), 4000
    seen = np.zeros(16384)
    for _ in range(samples):
        draw = pose.draw(rng, 2049)
        cut, bias = draw.starts[1], draw.biases[1]
        covered = np.zeros(16384, dtype=bool)
        covered[: max(cut, 2048 - cut)] = True
        covered[bias + 1 : bias + 2048] = True
        seen += covered
    share = seen / samples
    assert share[:1024].min() == 1.0
    plateau = 2047 / 14337
    assert share[2100:14300].mean() == pytest.approx(plateau, rel=0.03)
    assert share[15000] == pytest.approx(0.10, abs=0.02)
    assert share[16000] == pytest.approx(0.03, abs=0.012)
    assert share[16383] < 0.002


def test_the_covered_distances_are_those_of_the_positions() -> None:
    """What the test above takes a draw to cover, from the positions themselves."""
    draw = PoSE(40, 200).draw(np.random.default_rng(3), 41)
    apart = {int(a - b) for a in draw.positions for b in draw.positions if a >= b}
    cut, bias = draw.starts[1], draw.biases[1]
    assert apart == set(range(max(cut, 40 - cut))) | set(range(bias + 1, bias + 40))


def test_the_control_reads_the_same_text_at_ordinary_positions() -> None:
    one = PoSE(64, 512).draw(sampler(0, 1, 2), 300)
    two = PoSE(64, 512, skips=False).draw(sampler(0, 1, 2), 300)
    assert (two.positions == np.arange(64)).all()
    assert (one.tokens == two.tokens).all() and (one.starts == two.starts).all()


def test_contiguous_text_has_no_gap() -> None:
    draw = PoSE(64, 512, content="contiguous").draw(np.random.default_rng(0), 300)
    assert (np.diff(draw.tokens) == 1).all()


def test_a_target_of_the_window_is_ordinary_training() -> None:
    assert (PoSE(64, 64).draw(np.random.default_rng(0), 300).positions == np.arange(64)).all()


def test_draws_depend_on_seed_epoch_and_sample_alone() -> None:
    pose = PoSE(64, 4096)
    keys = [(s, e, i) for s in range(2) for e in range(2) for i in range(3)]
    first = [pose.draw(sampler(*k), 200).positions for k in keys]
    again = [pose.draw(sampler(*k), 200).positions for k in reversed(keys)][::-1]
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert len({tuple(p) for p in first}) == len(keys)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"window": 64, "target": 32}, "at least the window"),
        ({"window": 64, "target": 128, "chunks": 1}, "2 is the paper's"),
        ({"window": 4, "target": 128, "chunks": 5}, "from 2 to the window's 4"),
        ({"window": 1, "target": 128}, "at least 2 tokens"),
    ],
)
def test_impossible_settings_are_refused(settings: dict, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        PoSE(**settings)
