"""Intervals, paired tests and their correction for per-query values.

Everything is seeded and gives the same digits on every run. It knows arrays of numbers and the
per-query rows of a CellResult; it must not know tables, plots or how a cell was made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from harness.types import DEFAULT_SEED, CellResult, DataError

CHUNK = 4_000_000  # most numbers in one array of resamples: tens of megabytes
TIE = 1e-12  # values that differ by less are equal: sums in another order differ by this much


@dataclass(frozen=True, slots=True)
class Interval:
    """A confidence interval in the units of its values."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Paired:
    """System a against system b over the same n queries.

    difference  mean of a - b with its 95 % bootstrap interval [low, high]
    t_p         two-sided paired Student t      fisher_p  two-sided sign-flip randomisation
    d_z         mean difference / its standard deviation, with Hedges' small-sample correction
    """

    difference: float
    low: float
    high: float
    t_p: float
    fisher_p: float
    d_z: float
    wins: int
    ties: int
    losses: int
    n: int


def by_query(cell: CellResult, measure: str) -> dict[str, float]:
    """The cell's value of every query that has one."""
    return {str(row["qid"]): row[measure] for row in cell.per_query if row.get(measure) is not None}


def align(a: CellResult, b: CellResult, measure: str) -> tuple[list[float], list[float]]:
    """Both cells' per-query values in a's order; raises DataError where the queries differ."""
    left, right = by_query(a, measure), by_query(b, measure)
    if left.keys() != right.keys() or not left:
        raise DataError(f"{a.model} and {b.model} on {a.dataset} do not answer the same queries")
    return list(left.values()), [right[qid] for qid in left]


def bootstrap_interval(
    values: Sequence[float], level: float = 0.95, resamples: int = 10_000, seed: int = DEFAULT_SEED
) -> Interval:
    """BCa interval of the mean (Efron 1987); (nan, nan) for fewer than two values."""
    import numpy as np
    from scipy.stats import bootstrap

    data = np.asarray(values, dtype=float)
    if len(data) < 2 or np.ptp(data) <= TIE:  # no spread to resample
        mean = float(data[0]) if len(data) > 1 else math.nan
        return Interval(mean, mean)
    rng, batch = np.random.Generator(np.random.PCG64(seed)), max(1, CHUNK // len(data))
    found = bootstrap(
        (data,), np.mean, confidence_level=level, n_resamples=resamples, batch=batch,
        method="BCa", random_state=rng,
    ).confidence_interval  # fmt: skip
    return Interval(float(found.low), float(found.high))


_once = lru_cache(maxsize=None)(bootstrap_interval)


def interval_of(cell: CellResult, measure: str) -> Interval:
    """Of a cell's mean over its queries; computed once, however many reports show it."""
    return _once(tuple(by_query(cell, measure).values()))


def sign_flip(a: Sequence[float], b: Sequence[float], seed: int = DEFAULT_SEED) -> float:
    """Fisher's two-sided randomisation test on paired values: p = (extreme + 1) / (B + 1).

    B is 100 000 up to 200 pairs and 10 000 above; p is never 0.
    """
    import numpy as np

    d = _differences(a, b)
    flips, size = 100_000 if len(d) <= 200 else 10_000, max(1, CHUNK // len(d))
    rng, extreme = np.random.Generator(np.random.PCG64(seed)), 0
    for done in range(0, flips, size):
        signs = rng.choice((-1.0, 1.0), (min(size, flips - done), len(d)))
        extreme += int(np.sum(np.abs(signs @ d) >= abs(d.sum()) - TIE))
    return (extreme + 1) / (flips + 1)


def _differences(a: Sequence[float], b: Sequence[float]) -> Any:
    import numpy as np

    if len(a) != len(b) or not len(a):
        raise ValueError(f"paired values need the same queries, got {len(a)} and {len(b)}")
    return np.asarray(a, dtype=float) - np.asarray(b, dtype=float)


def paired(a: Sequence[float], b: Sequence[float], seed: int = DEFAULT_SEED) -> Paired:
    """Compare two systems query by query; a and b hold the same queries in the same order."""
    import numpy as np
    from scipy.stats import t

    d = _differences(a, b)
    n, mean, interval = len(d), float(d.mean()), bootstrap_interval(d, seed=seed)
    t_p, d_z = (1.0, 0.0) if abs(mean) <= TIE else (math.nan, math.nan)  # of equal differences
    if np.ptp(d) > TIE:
        effect = mean / float(np.std(d, ddof=1))
        t_p = float(2 * t.sf(abs(effect) * n**0.5, n - 1))
        d_z = effect * (1 - 3 / (4 * (n - 1) - 1))
    wins, losses = int(np.sum(d > TIE)), int(np.sum(d < -TIE))
    fisher_p, counts = sign_flip(a, b, seed), (wins, n - wins - losses, losses, n)
    return Paired(mean, interval.low, interval.high, t_p, fisher_p, d_z, *counts)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p values, in the order given."""
    adjusted, worst, m = [0.0] * len(p_values), 0.0, len(p_values)
    for rank, i in enumerate(sorted(range(m), key=lambda i: p_values[i])):
        worst = max(worst, min(1.0, (m - rank) * p_values[i]))
        adjusted[i] = worst
    return adjusted


def minimal_detectable(sd: float, n: int, alpha: float = 0.05, power: float = 0.8) -> float:
    """Smallest mean difference that a two-sided paired t test over n queries finds.

    sd is that of the per-query differences; the answer is in its units, nan for n < 2. From the
    central t distribution, which is within 1 % of the non-central one from 20 queries on.
    """
    from scipy.stats import t

    if n < 2:
        return float("nan")
    needed = t.ppf(1 - alpha / 2, n - 1) + t.ppf(power, n - 1)
    return float(needed) * sd / math.sqrt(n)
