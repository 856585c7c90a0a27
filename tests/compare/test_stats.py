"""Intervals against what is known of them; verdicts against numbers that leave no doubt."""

import numpy as np
import pytest

from bothways.compare import stats


def test_students_interval_of_two_values():
    got = stats.mean([1.0, 3.0])  # t(0.975, 1) = 12.706; standard error 1
    assert (got.value, got.n) == (2.0, 2)
    assert got.high - got.value == pytest.approx(12.706, abs=1e-3)


@pytest.mark.parametrize(
    ("right", "n", "low", "high"), [(0, 20, 0.0, 0.1611), (10, 20, 0.2993, 0.7007), (20, 20, 0.8389, 1.0)]
)
def test_wilsons_interval(right, n, low, high):
    got = stats.share(right, n)
    assert (got.low, got.high) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


def test_intervals_hold_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    kept = {"student": 0, "wilson": 0, "paired": 0}
    for _ in range(600):
        kept["student"] += stats.mean(rng.normal(3, 2, 4).tolist()).holds(3)
        kept["wilson"] += stats.share(int(rng.binomial(50, 0.2)), 50).holds(0.2)
        shared = rng.normal(0, 5, 4)
        kept["paired"] += stats.difference(shared + rng.normal(1, 1, 4), shared + rng.normal(0, 1, 4)).holds(1)
    for name, count in kept.items():
        assert 0.91 < count / 600 < 0.985, name


def test_a_difference_over_pairs_takes_out_what_they_share():
    shared = np.array([0.0, 100.0, -50.0])
    more = shared + np.array([1.0, 1.1, 0.9])
    assert stats.verdict(stats.difference(more, shared)) == stats.HOLDS
    assert stats.verdict(stats.difference(more, shared[::-1])) == stats.OPEN


def test_a_verdict_wants_an_interval_without_zero():
    assert stats.verdict(stats.Estimate(1, 0.5, 1.5, 3)) == stats.HOLDS
    assert stats.verdict(stats.Estimate(-1, -1.5, -0.5, 3)) == stats.FAILS
    assert stats.verdict(stats.Estimate(1, -0.5, 2.5, 3)) == stats.OPEN
    assert stats.verdict(stats.Estimate(1, 1, 1, 2)) == stats.OPEN  # what shows no spread shows nothing
    assert "not significant" in stats.format_difference(stats.Estimate(1, -0.5, 2.5, 3))
    assert "not significant" not in stats.format_difference(stats.Estimate(1, 0.5, 1.5, 3))


def test_a_claim_of_parts_holds_only_whole():
    assert stats.all_of(stats.HOLDS, stats.HOLDS) == stats.HOLDS
    assert stats.all_of(stats.HOLDS, stats.OPEN) == stats.OPEN
    assert stats.all_of(stats.OPEN, stats.FAILS) == stats.FAILS


def test_differences_are_ranked_by_what_they_say():
    good, bad, open_ = stats.Estimate(1, 0.5, 1.5, 3), stats.Estimate(-1, -1.5, -0.5, 3), stats.Estimate(1, -0.5, 2.5, 3)
    words = stats.ranked({"a": open_, "b": bad, "c": good})
    assert words.index("better at c") < words.index("worse at b") < words.index("not clearly different at a")


def test_newcombes_interval_of_two_shares():
    got = stats.apart(stats.share(56, 70), stats.share(48, 80))  # the first example of Newcombe 1998, method 10
    assert (got.value, got.low, got.high) == (
        pytest.approx(0.2),
        pytest.approx(0.0524, abs=1e-4),
        pytest.approx(0.3339, abs=1e-4),
    )
    sure = stats.apart(stats.share(60, 60), stats.share(0, 60))
    assert stats.verdict(sure) == stats.HOLDS


def test_seeds_and_items_both_widen_an_interval_that_holds_the_truth():
    rng, kept = np.random.default_rng(1), 0
    for trial in range(300):
        values = 3 + rng.normal(0, 0.3, (3, 1)) + rng.normal(0, 1, 40) + rng.normal(0, 0.5, (3, 40))
        kept += stats.two_way(values, seed=trial).holds(3)
    assert kept / 300 == pytest.approx(0.96, abs=0.04)
    items = rng.normal(0, 1, 40)
    alike = stats.two_way(np.stack([items] * 3))
    apart = stats.two_way(np.stack([items - 1, items, items + 1]))
    assert apart.value == pytest.approx(alike.value)
    assert apart.high - apart.low > 4 * (alike.high - alike.low)
    halves = stats.two_way(np.stack([items] * 3), np.full(40, 2.0))
    assert halves.value == pytest.approx(alike.value / 2)


def test_a_share_stays_a_share_and_a_difference_of_shares_one():
    """The accuracies of three fine-tunings on two items: Student's interval alone would leave the scale."""
    a, b = [[1, 1], [0, 0], [1, 1]], [[0, 0], [1, 1], [0, 1]]
    assert stats.mean(a).high > 1
    assert (stats.mean_share(a).low, stats.mean_share(a).high) == (0.0, 1.0)
    assert stats.difference(a, b).high > 1
    got = stats.share_difference(a, b)
    assert (got.value, got.low, got.high) == (pytest.approx(1 / 6), -1.0, 1.0)


def test_draws_of_few_models_are_not_draws_of_one():
    alike, apart = (stats.pooled_share(right, [100] * 3) for right in ([50, 50, 50], [20, 50, 80]))
    assert (alike.low, alike.high) == (stats.share(150, 300).low, stats.share(150, 300).high)
    assert alike.value == apart.value
    assert apart.high - apart.low > 4 * (alike.high - alike.low)
    assert stats.pooled_share([0, 0, 0], [100] * 3).high == stats.share(0, 300).high


def test_a_difference_that_can_be_detected_is_found_four_times_in_five():
    rng, found = np.random.default_rng(2), 0
    size = stats.detectable(0.5, 4)
    for _ in range(1000):
        found += stats.verdict(stats.mean(rng.normal(size, 0.5, 4).tolist())) == stats.HOLDS
    assert found / 1000 == pytest.approx(0.8, abs=0.05)
