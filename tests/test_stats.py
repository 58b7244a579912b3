"""Intervals and tests give what scipy gives, and stay sane where scipy gives nan."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
from test_tables import cell

from harness import stats
from harness.types import DataError

RNG = np.random.default_rng(5)
A = RNG.beta(2, 3, 43)
B = np.clip(A + RNG.normal(0.05, 0.15, 43), 0, 1)


def sign_flip(a: Any, b: Any) -> float:
    return stats.sign_flips([[(a, b)]])[0]


def test_the_interval_is_that_of_scipy() -> None:
    ours = stats.bootstrap_interval(A)
    theirs = scipy.stats.bootstrap(
        (A,), np.mean, n_resamples=20_000, method="BCa"
    ).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=3e-3)


def test_the_interval_holds_the_mean_and_widens_with_the_level() -> None:
    narrow, wide = stats.bootstrap_interval(A, 0.8), stats.bootstrap_interval(A, 0.99)
    assert wide.low < narrow.low < A.mean() < narrow.high < wide.high


def test_the_interval_is_the_same_on_every_run() -> None:
    assert stats.bootstrap_interval(A) == stats.bootstrap_interval(list(A))
    assert stats.bootstrap_interval(A, seed=1) != stats.bootstrap_interval(A)


def test_the_interval_of_equal_values_is_the_value() -> None:
    assert stats.bootstrap_interval([0.5] * 9) == stats.Interval(0.5, 0.5)


@pytest.mark.parametrize("values", [[], [0.5]])
def test_fewer_than_two_values_have_no_interval(values: list[float]) -> None:
    interval = stats.bootstrap_interval(values)
    assert math.isnan(interval.low)
    assert math.isnan(interval.high)


def test_sign_flipping_agrees_with_every_flip_counted() -> None:
    differences = [0.3, -0.1, 0.2, 0.05, 0.4, -0.02, 0.15, 0.1]
    flips = itertools.product((1, -1), repeat=len(differences))
    sums = [abs(sum(s * d for s, d in zip(signs, differences, strict=True))) for signs in flips]
    exact = sum(s >= abs(sum(differences)) - 1e-12 for s in sums) / len(sums)
    assert sign_flip(differences, [0.0] * 8) == pytest.approx(exact, abs=0.005)


def test_sign_flipping_agrees_with_scipy() -> None:
    test = scipy.stats.permutation_test(
        (A, B), lambda x, y, axis: np.mean(x - y, axis=axis), permutation_type="samples",
        n_resamples=20_000, vectorized=True, batch=2_000,
    )  # fmt: skip
    assert sign_flip(A, B) == pytest.approx(test.pvalue, abs=0.01)


def test_a_randomisation_p_is_never_zero_and_one_for_equal_systems() -> None:
    assert sign_flip([1.0] * 60, [0.0] * 60) == pytest.approx(1 / 100_001)
    assert sign_flip(A, A) == 1.0


def test_many_queries_take_fewer_flips() -> None:
    assert sign_flip([1.0] * 201, [0.0] * 201) == pytest.approx(1 / 10_001)


def test_paired_has_the_t_test_of_scipy_and_a_corrected_effect_size() -> None:
    [found] = stats.paired([[(B, A)]])
    assert found.t_p == pytest.approx(scipy.stats.ttest_rel(B, A).pvalue)
    d = (B - A).mean() / (B - A).std(ddof=1)
    assert found.d_z == pytest.approx(d * (1 - 3 / (4 * 42 - 1)))
    assert found.difference == pytest.approx((B - A).mean())
    assert found.low < found.difference < found.high
    assert found.n == found.wins + found.ties + found.losses == 43


def test_paired_counts_wins_ties_and_losses_of_the_first() -> None:
    [found] = stats.paired([[([0.5, 0.3, 0.1 + 0.2, 0.9], [0.4, 0.4, 0.3, 0.1])]])
    assert (found.wins, found.ties, found.losses) == (2, 1, 1)


def test_equal_systems_differ_by_nothing() -> None:
    [found] = stats.paired([[([0.1, 0.2, 0.3], [0.1, 0.2, 0.3])]])
    assert (found.difference, found.t_p, found.fisher_p, found.d_z) == (0.0, 1.0, 1.0, 0.0)


def test_pairs_of_unequal_length_are_refused() -> None:
    with pytest.raises(ValueError, match="same queries"):
        stats.paired([[([0.1], [0.1, 0.2])]])


def test_holm_steps_down_and_keeps_the_order() -> None:
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.9, 0.8]) == [1.0, 1.0]
    assert stats.holm([]) == []


def test_bonferroni_multiplies_by_the_size_of_the_family() -> None:
    assert stats.bonferroni([0.01, 0.04, 0.4]) == pytest.approx([0.03, 0.12, 1.0])
    assert stats.bonferroni([]) == []


@pytest.mark.parametrize("name", stats.CORRECTIONS)
def test_corrections_agree_with_statsmodels(name: str) -> None:
    multitest = pytest.importorskip("statsmodels.stats.multitest", reason="statsmodels is missing")
    p_values = list(np.random.default_rng(3).random(20) ** 3)
    theirs = multitest.multipletests(p_values, method=name)[1]
    assert stats.CORRECTIONS[name](p_values) == pytest.approx(list(theirs))


# --- several datasets -------------------------------------------------------------------------

SMALL, LARGE = np.random.default_rng(6).beta(2, 3, (2, 60))
SMALL = SMALL[:12]


def test_a_stratified_interval_is_that_of_scipy_over_several_samples() -> None:
    pairs = [(SMALL + 0.2, SMALL * 0.9), (LARGE, LARGE * 0.8)]

    def mean_of_means(x: Any, y: Any, axis: int) -> Any:
        return (np.mean(x, axis=axis) + np.mean(y, axis=axis)) / 2

    theirs = scipy.stats.bootstrap(
        [a - b for a, b in pairs], mean_of_means, n_resamples=20_000, method="BCa", batch=2_000
    ).confidence_interval
    [ours] = stats.paired([pairs])
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-3)


def test_a_stratified_difference_weighs_datasets_alike_whatever_their_size() -> None:
    [found] = stats.paired([[(SMALL + 0.1, SMALL), (LARGE + 0.3, LARGE)]])
    assert found.difference == pytest.approx(0.2)
    assert (found.n, found.wins) == (72, 72)
    assert math.isnan(found.t_p)
    assert math.isnan(found.d_z)


def test_a_stratified_test_agrees_with_every_flip_counted() -> None:
    strata = [[0.3, -0.1, 0.2], [0.05, 0.4, -0.02, 0.15, 0.1]]
    weights = [1 / len(values) for values in strata for _ in values]
    weighted = [w * d for w, d in zip(weights, itertools.chain(*strata), strict=True)]
    flips = list(itertools.product((1, -1), repeat=8))
    sums = [abs(sum(s * d for s, d in zip(signs, weighted, strict=True))) for signs in flips]
    exact = sum(s >= abs(sum(weighted)) - 1e-12 for s in sums) / len(sums)
    found = stats.sign_flips([[(values, [0.0] * len(values)) for values in strata]])[0]
    assert found == pytest.approx(exact, abs=0.005)
    pooled = sign_flip([*strata[0], *strata[1]], [0.0] * 8)
    assert abs(found - pooled) > 0.02  # another question than that of all queries in one


def test_the_interval_of_one_dataset_is_that_of_its_cell() -> None:
    one, other = cell("a", values=A), cell("a", values=B)
    assert stats.macro_interval([one], "nDCG@10") == stats.bootstrap_interval(A)
    both = stats.macro_interval([one, other], "nDCG@10")
    assert both.low < (A.mean() + B.mean()) / 2 < both.high


# --- all pairs --------------------------------------------------------------------------------


def test_tukey_agrees_with_every_permutation_counted() -> None:
    topics = [[0.1, 0.5, 0.3], [0.2, 0.4, 0.9], [0.3, 0.6, 0.5], [0.1, 0.2, 0.6]]
    rows = [list(itertools.permutations(topic)) for topic in topics]
    ranges = [np.ptp(np.mean(table, axis=0)) for table in itertools.product(*rows)]
    means = np.mean(topics, axis=0)
    found = stats.tukey([np.transpose(topics)], permutations=40_000)
    for i, j in itertools.combinations(range(3), 2):
        exact = np.mean(np.array(ranges) >= abs(means[i] - means[j]) - 1e-12)
        assert found[i, j] == found[j, i] == pytest.approx(exact, abs=0.01)


def test_tukey_of_many_queries_agrees_with_permutations_that_share_nothing() -> None:
    """What its permutations have in common must not show: neither in a p, nor in its spread."""
    topics = A[:, None] + np.random.default_rng(4).normal(0, 0.1, (43, 6)) + np.arange(6) * 0.01
    drawn = np.random.default_rng(0).permuted(np.broadcast_to(topics, (20_000, 43, 6)), axis=2)
    ranges, means = np.ptp(drawn.mean(axis=1), axis=1), topics.mean(axis=0)
    exact = np.mean(ranges[:, None, None] >= np.abs(means[:, None] - means), axis=0)
    found = np.array([stats.tukey([topics.T], seed=seed) for seed in range(20)])
    assert found.mean(axis=0) == pytest.approx(exact, abs=0.01)
    assert np.all(found.std(axis=0) < 1.6 * np.sqrt(exact * (1 - exact) / 5_000) + 5e-4)


def test_tukey_of_two_systems_is_fishers_test() -> None:
    assert stats.tukey([[A, B]])[0, 1] == pytest.approx(sign_flip(A, B), abs=0.01)


def test_tukey_of_two_datasets_is_the_stratified_test() -> None:
    draw = np.random.default_rng(7)
    shifted = [SMALL + draw.normal(0.04, 0.1, 12), LARGE + draw.normal(0.02, 0.1, 60)]
    field = [[SMALL, shifted[0]], [LARGE, shifted[1]]]
    expected = stats.sign_flips([field])[0]
    assert stats.tukey(field)[0, 1] == pytest.approx(expected, abs=0.015)


def test_tukey_is_paired_by_query_where_scipys_is_not() -> None:
    better = A + 0.03 + np.random.default_rng(8).normal(0, 0.02, 43)
    assert scipy.stats.tukey_hsd(A, better).pvalue[0, 1] > 0.3
    assert stats.tukey([[A, better]])[0, 1] < 0.001


def test_rank_groups_span_the_systems_that_cannot_be_told_apart() -> None:
    noise = np.random.default_rng(9).normal(0, 0.05, (4, 43))
    systems = [A + noise[0], A + 0.01 + noise[1], A + 0.4 + noise[2], A - 0.4 + noise[3]]
    assert stats.rank_groups([systems]) == ["2-3", "2-3", "1", "4"]
    assert stats.rank_groups([[A, A, A]]) == ["1-3"] * 3


# --- non-inferiority --------------------------------------------------------------------------


def test_equal_systems_are_not_inferior_whatever_the_margin() -> None:
    found = stats.non_inferiority(A, A, 1e-6)
    assert (found.mean, found.low, found.high, found.verdict) == (0.0, 0.0, 0.0, "pass")


def test_the_bounds_are_the_outer_ones_of_t_and_bootstrap() -> None:
    d = B - A
    student = scipy.stats.ttest_1samp(d, 0).confidence_interval(0.9)
    bca = stats.bootstrap_interval(d, 0.9)
    found = stats.non_inferiority(B, A, 0.01)
    assert found.low == pytest.approx(min(student.low, bca.low))
    assert found.high == pytest.approx(max(student.high, bca.high))
    assert found.mean == pytest.approx(d.mean())


@pytest.mark.parametrize(
    ("shift", "sd", "verdict"),
    [
        (0.0, 0.01, "pass"),
        (0.05, 0.3, "inconclusive"),  # better by chance is no proof
        (-0.005, 0.01, "pass"),  # worse by less than the margin
        (-0.012, 0.05, "inconclusive"),
        (-0.05, 0.05, "fail"),
    ],
)
def test_a_verdict_needs_bounds_that_the_margin_does_not_divide(
    shift: float, sd: float, verdict: str
) -> None:
    noise = np.random.default_rng(2).normal(0, sd, 43)
    found = stats.non_inferiority(A + noise - noise.mean() + shift, A, 0.01)
    assert found.verdict == verdict
    assert found.mean == pytest.approx(shift)


def test_surely_worse_by_less_than_the_margin_passes_and_by_about_it_is_inconclusive() -> None:
    noise = np.random.default_rng(2).normal(0, 0.01, 43)
    noise -= noise.mean()
    assert stats.non_inferiority(A + noise - 0.009, A, 0.01).verdict == "inconclusive"


def test_one_query_decides_nothing() -> None:
    found = stats.non_inferiority([0.1], [0.9], 0.01)
    assert found.verdict == "inconclusive"
    assert math.isnan(found.low)


def test_a_margin_must_be_positive() -> None:
    with pytest.raises(ValueError, match="margin"):
        stats.non_inferiority(A, B, 0.0)


@pytest.mark.parametrize(
    ("n", "sd", "expected"), [(21, 0.10, 0.064), (43, 0.05, 0.022), (97, 0.15, 0.043)]
)
def test_the_detectable_difference_has_the_power_that_was_asked(
    n: int, sd: float, expected: float
) -> None:
    found = stats.minimal_detectable(sd, n)
    assert found == pytest.approx(expected, abs=0.0006)
    edge, shift = scipy.stats.t.ppf(0.975, n - 1), found / sd * math.sqrt(n)
    assert scipy.stats.nct.sf(edge, n - 1, shift) == pytest.approx(0.8, abs=0.005)


def test_cells_are_aligned_by_query_and_not_by_line() -> None:
    a, b = cell("a", values=[0.1, 0.2]), cell("b", values=[0.3, 0.4])
    turned = type(b)(b.record, b.per_query[::-1], b.folder)
    assert stats.align([a, turned], "nDCG@10") == [[0.1, 0.2], [0.3, 0.4]]


def test_many_cells_are_aligned_to_the_first() -> None:
    a, b = cell("a", values=[0.1, 0.2]), cell("b", values=[0.3, 0.4])
    turned = type(b)(b.record, b.per_query[::-1], b.folder)
    assert stats.align([a, turned, b], "nDCG@10") == [[0.1, 0.2], [0.3, 0.4], [0.3, 0.4]]
    assert stats.align([a], "nDCG@10") == [[0.1, 0.2]]


def test_cells_over_other_queries_are_refused() -> None:
    with pytest.raises(DataError, match="same queries"):
        stats.align([cell("a", values=[0.1]), cell("b", values=[0.1, 0.2])], "nDCG@10")
