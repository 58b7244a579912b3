"""Intervals, paired tests, their correction and rank groups for per-query values.

An average over datasets is tested as such: the statistic is the mean of the datasets' means, and
every resampling, flip or permutation stays within its dataset, however many queries that has.
Everything is seeded and gives the same digits on every run. It knows arrays of numbers and the
per-query rows of a CellResult; it must not know tables, plots or how a cell was made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

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

    Over several datasets t_p and d_z are nan: neither is defined for a mean of means.
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


Verdict = Literal["pass", "fail", "inconclusive"]


@dataclass(frozen=True, slots=True)
class NonInferiority:
    """Is the new system worse than the old one by less than a margin, in the measure's units?

    mean      of new - old       low, high  the outer bounds of its two 90 % intervals, t and BCa
    verdict   pass: low > -margin (one-sided alpha 0.05); fail: high < 0 and mean <= -margin;
              otherwise inconclusive, which asks for more queries and is never a pass
    """

    mean: float
    low: float
    high: float
    margin: float
    verdict: Verdict


def by_query(cell: CellResult, measure: str) -> dict[str, float]:
    """The cell's value of every query that has one."""
    return {str(row["qid"]): row[measure] for row in cell.per_query if row.get(measure) is not None}


def align(a: CellResult, b: CellResult, measure: str) -> tuple[list[float], list[float]]:
    """Both cells' per-query values in a's order; raises DataError where the queries differ."""
    left, right = align_all([a, b], measure)
    return left, right


def align_all(cells: Sequence[CellResult], measure: str) -> list[list[float]]:
    """Per-query values of cells of one dataset, all in the first one's order of queries.

    Raises DataError where the queries differ.
    """
    first, *others = (by_query(cell, measure) for cell in cells)
    for cell, other in zip(cells[1:], others):
        if first.keys() != other.keys() or not first:
            names = f"{cells[0].model} and {cell.model} on {cell.dataset}"
            raise DataError(f"{names} do not answer the same queries")
    return [[values[qid] for qid in first] for values in (first, *others)]


def bootstrap_interval(
    values: Sequence[float], level: float = 0.95, resamples: int = 10_000, seed: int = DEFAULT_SEED
) -> Interval:
    """BCa interval of the mean (Efron 1987); (nan, nan) for fewer than two values."""
    return _bca((values,), level, resamples, seed)


def _bca(
    strata: Sequence[Sequence[float]], level: float = 0.95, resamples: int = 10_000,
    seed: int = DEFAULT_SEED,
) -> Interval:  # fmt: skip
    """Of the mean of the strata's means; each stratum is resampled within itself."""
    import numpy as np
    from scipy.stats import bootstrap

    data = [np.asarray(values, dtype=float) for values in strata]
    if min(map(len, data), default=0) < 2:
        return Interval(math.nan, math.nan)
    if max(map(np.ptp, data)) <= TIE:  # no spread to resample
        mean = sum(float(values[0]) for values in data) / len(data)
        return Interval(mean, mean)
    rng, batch = np.random.Generator(np.random.PCG64(seed)), max(1, CHUNK // sum(map(len, data)))
    found = bootstrap(
        data, _macro_mean, confidence_level=level, n_resamples=resamples, batch=batch,
        method="BCa", random_state=rng,
    ).confidence_interval  # fmt: skip
    return Interval(float(found.low), float(found.high))


def _macro_mean(*strata: Any, axis: int) -> Any:
    return sum(values.mean(axis=axis) for values in strata) / len(strata)


_once = cache(_bca)


def interval_of(cell: CellResult, measure: str) -> Interval:
    """Of a cell's mean over its queries; computed once, however many reports show it."""
    return macro_interval([cell], measure)


def macro_interval(cells: Sequence[CellResult], measure: str) -> Interval:
    """Of the unweighted mean over several datasets' cells."""
    return _once(tuple(tuple(by_query(cell, measure).values()) for cell in cells))


Pair = tuple[Sequence[float], Sequence[float]]  # two systems' values of the same queries


def sign_flip(a: Sequence[float], b: Sequence[float], seed: int = DEFAULT_SEED) -> float:
    """Fisher's two-sided randomisation test on paired values: p = (extreme + 1) / (B + 1).

    B is 100 000 up to 200 pairs and 10 000 above; p is never 0.
    """
    return macro_sign_flip([(a, b)], seed)


def macro_sign_flip(pairs: Sequence[Pair], seed: int = DEFAULT_SEED) -> float:
    """The same test of the mean over several datasets' mean differences."""
    return sign_flips([pairs], seed)[0]


def sign_flips(tests: Sequence[Sequence[Pair]], seed: int = DEFAULT_SEED) -> list[float]:
    """macro_sign_flip of each; tests over equally many queries see the same flips, drawn once."""
    import numpy as np

    weighted = [_weighted([_differences(a, b) for a, b in pairs]) for pairs in tests]
    rows = [np.concatenate(strata).tobytes() for strata in weighted]
    for size in {len(row) for row in rows}:
        new = tuple({r: None for r in rows if len(r) == size and (r, seed) not in _KNOWN})
        _KNOWN.update({(r, seed): p for r, p in zip(new, _flipped(new, seed) if new else ())})
    return [_KNOWN[row, seed] for row in rows]


_KNOWN: dict[tuple[bytes, int], float] = {}  # a report asks for the same test in several tables


def _flipped(rows: Sequence[bytes], seed: int) -> list[float]:
    """p of every row of differences; all rows are equally long."""
    import numpy as np

    d = np.array([np.frombuffer(row) for row in rows]).T  # queries x tests
    flips, size = 100_000 if len(d) <= 200 else 10_000, max(1, CHUNK // len(d))
    rng, sums = np.random.Generator(np.random.PCG64(seed)), d.sum(axis=0)
    extreme = np.zeros(len(rows), dtype=int)
    for done in range(0, flips, size):
        bits = rng.integers(0, 256, (min(size, flips - done), -(-len(d) // 8)), np.uint8)
        kept = np.unpackbits(bits, axis=1, count=len(d))  # 1: its sign stays, 0: it is flipped
        extreme += np.sum(np.abs(kept @ (2 * d) - sums) >= np.abs(sums) - TIE, axis=0)
    return [(int(count) + 1) / (flips + 1) for count in extreme]


def _weighted(strata: Sequence[Any]) -> list[Any]:
    """Scaled so that the mean over all rows is the mean of the strata's means."""
    n = sum(map(len, strata))
    return [values * (n / (len(strata) * len(values))) for values in strata]


def _differences(a: Sequence[float], b: Sequence[float]) -> Any:
    import numpy as np

    if len(a) != len(b) or not len(a):
        raise ValueError(f"paired values need the same queries, got {len(a)} and {len(b)}")
    return np.asarray(a, dtype=float) - np.asarray(b, dtype=float)


def paired(a: Sequence[float], b: Sequence[float], seed: int = DEFAULT_SEED) -> Paired:
    """Compare two systems query by query; a and b hold the same queries in the same order."""
    return stratified([(a, b)], seed)


def stratified(pairs: Sequence[Pair], seed: int = DEFAULT_SEED) -> Paired:
    """Compare two systems over several datasets, one pair each, by the mean of their means."""
    import numpy as np

    strata = [_differences(a, b) for a, b in pairs]
    d, interval = np.concatenate(strata), _bca(strata, seed=seed)
    mean = float(np.mean([values.mean() for values in strata]))
    t_p, d_z = _student(strata[0]) if len(strata) == 1 else (math.nan, math.nan)
    wins, losses = int(np.sum(d > TIE)), int(np.sum(d < -TIE))
    fisher_p, counts = macro_sign_flip(pairs, seed), (wins, len(d) - wins - losses, losses, len(d))
    return Paired(mean, interval.low, interval.high, t_p, fisher_p, d_z, *counts)


def _student(d: Any) -> tuple[float, float]:
    """The paired t test's p and Hedges' d_z; nan where all differences are equal but not 0."""
    import numpy as np
    from scipy.stats import ttest_1samp

    if np.ptp(d) <= TIE:
        return (1.0, 0.0) if abs(d.mean()) <= TIE else (math.nan, math.nan)
    d_z = float(d.mean() / np.std(d, ddof=1)) * (1 - 3 / (4 * (len(d) - 1) - 1))
    return float(ttest_1samp(d, 0).pvalue), d_z


def non_inferiority(
    new: Sequence[float], old: Sequence[float], margin: float, *, seed: int = DEFAULT_SEED
) -> NonInferiority:
    """Paired test over the same queries in the same order; raises ValueError where they differ."""
    import numpy as np
    from scipy.stats import ttest_1samp

    if not margin > 0:
        raise ValueError(f"margin {margin}: expected a number above 0")
    d = _differences(new, old)
    mean, interval = float(d.mean()), bootstrap_interval(d, 0.9, seed=seed)
    low, high = interval.low, interval.high
    if np.ptp(d) > TIE:
        student = ttest_1samp(d, 0).confidence_interval(0.9)
        low, high = min(low, float(student.low)), max(high, float(student.high))
    verdict: Verdict = "pass" if low > -margin else "inconclusive"
    if high < 0 and mean <= -margin:
        verdict = "fail"
    return NonInferiority(mean, low, high, margin, verdict)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p values, in the order given."""
    adjusted, worst, m = [0.0] * len(p_values), 0.0, len(p_values)
    for rank, i in enumerate(sorted(range(m), key=lambda i: p_values[i])):
        worst = max(worst, min(1.0, (m - rank) * p_values[i]))
        adjusted[i] = worst
    return adjusted


def bonferroni(p_values: Sequence[float]) -> list[float]:
    """Bonferroni's adjusted p values, in the order given."""
    return [min(1.0, len(p_values) * p) for p in p_values]


CORRECTIONS: dict[str, Callable[[Sequence[float]], list[float]]] = {
    "holm": holm, "bonferroni": bonferroni,
}  # fmt: skip


Field = Sequence[Sequence[Sequence[float]]]  # datasets x systems x queries


def tukey(field: Field, permutations: int = 5_000, seed: int = DEFAULT_SEED) -> Any:
    """Randomised Tukey HSD (Carterette 2012): p of every pair of systems, systems x systems.

    Queries are blocks: their values are permuted among the systems, and a pair's difference is
    held against the range of all systems' means, so that no further correction is needed. A
    system far from the others widens that range: the others' small differences then go unseen.
    """
    import numpy as np

    rows = np.concatenate(_weighted([np.asarray(systems, dtype=float).T for systems in field]))
    means, extreme = rows.mean(axis=0), np.zeros((rows.shape[1],) * 2)
    gaps = np.abs(means[:, None] - means) - TIE
    rng, size = np.random.Generator(np.random.PCG64(seed)), max(1, CHUNK // rows.size)
    for done in range(0, permutations, size):
        many = np.broadcast_to(rows, (min(size, permutations - done), *rows.shape))
        ranges = np.ptp(rng.permuted(many, axis=2).mean(axis=1), axis=1)
        extreme += np.sum(ranges[:, None, None] >= gaps, axis=0)
    return (extreme + 1) / (permutations + 1)


def rank_groups(field: Field, alpha: float = 0.05, seed: int = DEFAULT_SEED) -> list[str]:
    """The places that every system may hold among all, as "2" or "1-3".

    From one more than are surely better, to all but those that are surely worse (tukey).
    """
    import numpy as np

    means = np.mean([np.mean(systems, axis=1) for systems in field], axis=0)
    surely, above = tukey(field, seed=seed) < alpha, means > means[:, None]
    first = 1 + np.sum(surely & above, axis=1)
    last = len(means) - np.sum(surely & above.T, axis=1)
    return [f"{a}-{b}" if b > a else f"{a}" for a, b in zip(first, last)]


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
