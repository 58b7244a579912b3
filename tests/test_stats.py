"""Intervals and tests give what scipy gives, and stay sane where scipy gives nan."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.stats
from test_tables import cell

from harness import stats
from harness.types import DataError

RNG = np.random.default_rng(5)
A = RNG.beta(2, 3, 43)
B = np.clip(A + RNG.normal(0.05, 0.15, 43), 0, 1)


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
    assert stats.sign_flip(differences, [0.0] * 8) == pytest.approx(exact, abs=0.005)


def test_sign_flipping_agrees_with_scipy() -> None:
    test = scipy.stats.permutation_test(
        (A, B), lambda x, y, axis: np.mean(x - y, axis=axis), permutation_type="samples",
        n_resamples=20_000, vectorized=True, batch=2_000,
    )  # fmt: skip
    assert stats.sign_flip(A, B) == pytest.approx(test.pvalue, abs=0.01)


def test_a_randomisation_p_is_never_zero_and_one_for_equal_systems() -> None:
    assert stats.sign_flip([1.0] * 60, [0.0] * 60) == pytest.approx(1 / 100_001)
    assert stats.sign_flip(A, A) == 1.0


def test_many_queries_take_fewer_flips() -> None:
    assert stats.sign_flip([1.0] * 201, [0.0] * 201) == pytest.approx(1 / 10_001)


def test_paired_has_the_t_test_of_scipy_and_a_corrected_effect_size() -> None:
    found = stats.paired(B, A)
    assert found.t_p == pytest.approx(scipy.stats.ttest_rel(B, A).pvalue)
    d = (B - A).mean() / (B - A).std(ddof=1)
    assert found.d_z == pytest.approx(d * (1 - 3 / (4 * 42 - 1)))
    assert found.difference == pytest.approx((B - A).mean())
    assert found.low < found.difference < found.high
    assert found.n == found.wins + found.ties + found.losses == 43


def test_paired_counts_wins_ties_and_losses_of_the_first() -> None:
    found = stats.paired([0.5, 0.3, 0.1 + 0.2, 0.9], [0.4, 0.4, 0.3, 0.1])
    assert (found.wins, found.ties, found.losses) == (2, 1, 1)


def test_equal_systems_differ_by_nothing() -> None:
    found = stats.paired([0.1, 0.2, 0.3], [0.1, 0.2, 0.3])
    assert (found.difference, found.t_p, found.fisher_p, found.d_z) == (0.0, 1.0, 1.0, 0.0)


def test_pairs_of_unequal_length_are_refused() -> None:
    with pytest.raises(ValueError, match="same queries"):
        stats.paired([0.1], [0.1, 0.2])


def test_holm_steps_down_and_keeps_the_order() -> None:
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.9, 0.8]) == [1.0, 1.0]
    assert stats.holm([]) == []


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
    assert stats.align(a, turned, "nDCG@10") == ([0.1, 0.2], [0.3, 0.4])


def test_cells_over_other_queries_are_refused() -> None:
    with pytest.raises(DataError, match="same queries"):
        stats.align(cell("a", values=[0.1]), cell("b", values=[0.1, 0.2]), "nDCG@10")
