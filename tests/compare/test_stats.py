"""Intervals against published values and against what they promise: to hold the truth 95 times in 100."""

from __future__ import annotations

import numpy as np
import pytest

from longspan.compare.statistics import (
    Scale,
    bootstrap,
    difference,
    effective_window,
    independent,
    newcombe,
    score,
    wilson,
)

LOSS = Scale(higher_is_better=False, worst=5.0)
SHARE = Scale(higher_is_better=True, worst=0.0)


def samples(*scores, curves=None):
    details = [{"nll_by_position": list(c)} for c in curves] if curves is not None else [{} for _ in scores]
    return [
        {"id": str(i), "score": s, "failed": s is None, "detail": d}
        for i, (s, d) in enumerate(zip(scores, details, strict=True))
    ]


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_values_of_newcombes_paper_on_single_shares(hits, n, low, high):
    assert wilson(hits, n) == pytest.approx((low, high), abs=5e-5)


def test_newcombe_of_paired_shares_holds_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(1)
    held = 0
    for _ in range(2000):
        luck = generator.random(16)  # the same samples: what is easy for one is easy for the other
        a, b = (luck < 0.8).astype(float), (luck < 0.5).astype(float)
        low, high = newcombe(a, b)
        held += low <= 0.3 <= high
    assert 0.92 < held / 2000 <= 1.0


def test_newcombe_is_symmetric_and_stays_open_where_all_samples_agree():
    a, b = np.array([1.0, 1, 1, 0, 1, 0]), np.array([1.0, 0, 0, 0, 1, 1])
    low, high = newcombe(a, b)
    assert newcombe(b, a) == pytest.approx((-high, -low))
    assert low < (a - b).mean() < high
    low, high = newcombe(np.ones(8), np.ones(8))
    assert low < -0.05
    assert high > 0.05


def test_the_bootstrap_holds_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(2)
    held = 0
    for _ in range(400):
        low, high = bootstrap(generator.normal(3.0, 1.0, size=40))
        held += low <= 3.0 <= high
    assert 0.90 < held / 400 < 0.98


def test_the_bootstrap_is_the_same_each_time():
    values = np.arange(10.0)
    assert bootstrap(values) == bootstrap(values)


def test_a_share_of_successes_has_wilsons_interval():
    estimate = score(samples(1.0, 1.0, 0.0, 1.0), SHARE)
    assert estimate.value == 0.75
    assert estimate.interval == wilson(3, 4)
    assert estimate.n == 4


def test_failures_stay_in_the_denominator_as_the_worst_score():
    assert score(samples(1.0, None), SHARE).value == 0.5
    assert score(samples(1.0, None), LOSS).value == 3.0
    flagged = [{"id": "a", "score": 0.9, "failed": True, "detail": {}}]
    assert score(flagged, SHARE).value == 0.0


def test_nothing_measured_is_no_score():
    assert score([], LOSS).value is None
    assert difference(samples(1.0), [], LOSS).n == 0


def test_differences_are_taken_on_the_same_samples():
    mine, theirs = samples(1.0, 2.0, 3.0), samples(1.5, 2.5, 3.5)[1:]
    estimate = difference(mine, theirs, LOSS)
    assert estimate.n == 2
    assert estimate.value == pytest.approx(-0.5)
    assert estimate.interval == pytest.approx((-0.5, -0.5))  # what is hard in a sample cancels


def test_few_windows_are_measured_by_position():
    generator = np.random.default_rng(3)
    trend = np.linspace(2, 8, 64)
    curves = trend + generator.normal(0, 0.1, size=(2, 64))
    estimate = score(samples(*curves.mean(axis=1), curves=curves), LOSS)
    low, high = estimate.interval
    assert low < estimate.value < high
    # the trend inside a stratum widens it a little; between strata it must not: resampling buckets freely gives 0.6
    assert 0.02 < high - low < 0.2


def test_the_interval_by_position_shrinks_with_the_noise_and_cancels_in_differences():
    generator = np.random.default_rng(4)
    text = 3 + generator.normal(0, 0.5, size=(1, 64))
    noise = generator.normal(0, 0.01, size=(1, 64))
    bare = samples(*text.mean(axis=1), curves=text)
    other = samples(*(text + 0.2 + noise).mean(axis=1), curves=text + 0.2 + noise)
    estimate = difference(other, bare, LOSS)
    low, high = estimate.interval
    assert low < 0.2 < high
    assert high - low < 0.02
    wide = score(bare, LOSS).interval
    assert wide[1] - wide[0] > 0.1


def windows(text, starts, length, buckets=64):
    """Samples as perplexity stores them: windows of a ring of token losses."""
    made = []
    for number, start in enumerate(starts):
        losses = text[(start + np.arange(length)) % len(text)]
        parts = np.array_split(losses, buckets)
        detail = {"nll_by_position": [float(p.mean()) for p in parts], "tokens_by_position": [len(p) for p in parts]}
        detail |= {"start": int(start), "text_tokens": len(text)}
        made.append({"id": str(number), "score": float(losses.mean()), "failed": False, "detail": detail})
    return made


def golden(count, tokens, first=0.0):
    return [int((first + i * (5**0.5 - 1) / 2) % 1 * tokens) for i in range(count)]


def width(estimate):
    return estimate.interval[1] - estimate.interval[0]


def test_independent_windows_are_those_without_overlap():
    def known(starts, length, tokens=1000):
        return independent([{"detail": {"start": s, "text_tokens": tokens}} for s in starts], length)

    assert known([0, 100, 950], 50) == pytest.approx(3)
    assert known([0, 0, 0], 50) == pytest.approx(1)
    assert known([980, 0], 40) == pytest.approx(4 / 3)  # 40 tokens once and 20 twice
    assert known([10, 500, 900], 1000) == pytest.approx(1)
    assert known(golden(40, 1000), 100) <= 1000 / 100
    assert independent([{"detail": None}, {"detail": {}}], 50) == 2


def test_a_text_read_forty_times_is_known_no_better_than_one_read_six_times():
    text = np.random.default_rng(5).normal(3, 1.5, size=863)
    many, few = (score(windows(text, golden(n, 863), 863), LOSS, 863) for n in (40, 6))
    assert (many.n, few.n) == (40, 6)
    assert many.independent == pytest.approx(1) and few.independent == pytest.approx(1)
    assert many.overlapping
    assert 0.75 < width(many) / width(few) < 1.33
    once = score(windows(text, [0], 863), LOSS, 863)
    assert 0.75 < width(many) / width(once) < 1.33
    other = windows(text + np.random.default_rng(6).normal(0, 0.2, size=863), golden(40, 863), 863)
    alone = difference(other[:1], windows(text, [0], 863), LOSS, 863)
    assert 0.75 < width(difference(other, windows(text, golden(40, 863), 863), LOSS, 863)) / width(alone) < 1.33


def test_intervals_of_overlapping_windows_hold_the_truth_as_often_as_they_say():
    generator, held = np.random.default_rng(7), {True: 0, False: 0}
    for _ in range(300):
        made = windows(generator.normal(3, 1, size=3000), golden(60, 3000, generator.random()), 250)
        for aware in held:
            estimate = score(made, LOSS, 250 if aware else None)
            held[aware] += estimate.interval[0] <= 3 <= estimate.interval[1]
    assert 0.88 < held[True] / 300 < 0.99
    assert held[False] / 300 < 0.75


def test_effective_window_ends_at_the_first_distance_that_fails():
    def trials(k, hits):
        return [(1 - k / 1000, k, i < hits) for i in range(10)]

    assert effective_window(trials(100, 10) + trials(200, 2) + trials(300, 1) + trials(400, 10)) == 200
    assert effective_window(trials(400, 9) + trials(100, 3)) == 400
    assert effective_window(trials(100, 1) + trials(200, 10)) == 0
    assert effective_window([]) == 0


def test_trials_at_one_depth_are_one_distance_of_the_effective_window():
    """Keys of different tokens lie at one depth and end a token or two apart: one miss among them is no end."""
    trials = [(1.0, 40, True), (1.0, 38, False), (1.0, 38, True), (0.0, 4039, True), (0.0, 4040, False)]
    assert effective_window(trials) == 4039


def test_buckets_count_by_their_tokens_and_empty_ones_do_not():
    details = {"nll_by_position": [1.0, None, *[3.0] * 14], "tokens_by_position": [30, 0, *[5] * 14]}
    one = [{"id": "a", "score": 2.4, "failed": False, "detail": details}]
    estimate = score(one, LOSS)
    assert estimate.interval == pytest.approx((2.4, 2.4))  # in each stratum all buckets agree


def test_a_failed_window_turns_positions_off():
    curves = np.full((2, 64), 3.0)
    mixed = samples(3.0, 3.0, curves=curves)
    mixed[1]["failed"] = True
    assert score(mixed, LOSS).value == pytest.approx(4.0)
