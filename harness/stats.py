"""Intervals, paired tests, their correction and rank groups for per-query values.

An average over datasets is tested as such: the statistic is the mean of the datasets' means, and
every resampling, flip or permutation stays within its dataset, however many queries that has.
Everything is seeded and gives the same digits on every run. It knows arrays of numbers and the
per-query rows of a CellResult; it must not know tables, plots or how a cell was made.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from harness.types import DEFAULT_SEED, CellResult, DataError

CHUNK = 4_000_000  # most numbers in one array of resamples: tens of megabytes
TIE = 1e-12  # values that differ by less are equal: sums in another order differ by this much
DIGITS = 12  # that an interval has on every machine
RESAMPLES = 10_000
BLOCKS = 32  # of queries, that a permutation of all of them is put together from


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
    verdict: Verdict


def by_query(cell: CellResult, measure: str) -> dict[str, float]:
    """The cell's value of every query that has one."""
    return {str(row["qid"]): row[measure] for row in cell.per_query if row.get(measure) is not None}


def align(cells: Sequence[CellResult], measure: str) -> list[list[float]]:
    """Per-query values of cells of one dataset, all in the first one's order of queries.

    Raises DataError where the queries differ.
    """
    first, *others = (by_query(cell, measure) for cell in cells)
    for cell, other in zip(cells[1:], others):
        if first.keys() != other.keys() or not first:
            names = f"{cells[0].model} and {cell.model} on {cell.dataset}"
            raise DataError(f"{names} do not answer the same queries")
    return [[values[qid] for qid in first] for values in (first, *others)]


# --- one number for many tests ----------------------------------------------------------------

Strata = Sequence[Any]  # one value of every query, dataset by dataset
Pair = Sequence[Sequence[float]]  # two systems' values of the same queries


def _each(work: Callable[..., Iterable[Any]], tests: Sequence[Strata], *terms: Any) -> list[Any]:
    """work of every test; those over equally many queries share what is drawn at random.

    Kept, as a report asks for the same test in several tables.
    """
    import numpy as np

    arrays = [[np.asarray(values, dtype=float) for values in strata] for strata in tests]
    keys = [(work, terms, *(values.tobytes() for values in strata)) for strata in arrays]
    new: dict[tuple[int, ...], dict[Any, list[Any]]] = defaultdict(dict)
    for key, strata in zip(keys, arrays):
        if key not in _KNOWN:
            new[tuple(map(len, strata))][key] = strata
    for alike in new.values():
        _KNOWN.update(zip(alike, work(list(alike.values()), *terms)))
    return [_KNOWN[key] for key in keys]


_KNOWN: dict[tuple[Any, ...], Any] = {}


def intervals(
    tests: Sequence[Strata], level: float = 0.95, seed: int = DEFAULT_SEED
) -> list[Interval]:
    """BCa bootstrap interval (Efron 1987) of the mean of each test's datasets' means.

    Each dataset is resampled within itself; (nan, nan) where one has fewer than two values.
    """
    return _each(_bca, tests, level, seed)


def bootstrap_interval(
    values: Sequence[float], level: float = 0.95, seed: int = DEFAULT_SEED
) -> Interval:
    """The same of one mean."""
    return intervals([[values]], level, seed)[0]


def macro_interval(cells: Sequence[CellResult], measure: str) -> Interval:
    """Of the unweighted mean over several datasets' cells."""
    return intervals([[list(by_query(cell, measure).values()) for cell in cells]])[0]


def _bca(tests: Sequence[Strata], level: float, seed: int) -> list[Interval]:
    import numpy as np
    from scipy.special import ndtr, ndtri

    if min(map(len, tests[0]), default=0) < 2:
        return [Interval(math.nan, math.nan)] * len(tests)
    rng = np.random.Generator(np.random.PCG64(seed))
    parts = [np.array(values) / len(tests[0]) for values in zip(*tests)]
    means = sum(part.mean(axis=1) for part in parts)
    moved = [part - part.mean(axis=1, keepdims=True) for part in parts]  # each tests x queries
    found = sum(_resampled(part, rng) for part in moved)  # resamples x tests, around 0
    square, cube = (sum(np.sum((x / x.shape[1]) ** n, axis=1) for x in moved) for n in (2, 3))
    skew = cube / (6 * np.maximum(square, TIE**2) ** 1.5)
    below = (np.mean(found < -TIE, axis=0) + np.mean(found <= TIE, axis=0)) / 2
    bias, tails = ndtri(below), ndtri([[(1 - level) / 2], [(1 + level) / 2]])
    shares = ndtr(bias + (bias + tails) / (1 - skew * (bias + tails)))
    ends = (m + np.quantile(column, s) for m, column, s in zip(means, found.T, shares.T))
    return [Interval(*(round(float(end), DIGITS) for end in both)) for both in ends]


def _resampled(values: Any, rng: Any) -> Any:
    """Means of resamples of the queries, resamples x tests."""
    import numpy as np

    n, means = values.shape[1], []
    for size in _chunks(RESAMPLES, n):
        drawn = rng.integers(0, n, (size, n)) + n * np.arange(size)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n)
        means.append(counts @ values.T / n)
    return np.concatenate(means)


def _chunks(total: int, width: int) -> Iterator[int]:
    """Numbers of rows, as many at once as there is room for."""
    size = max(1, CHUNK // width)
    return (min(size, total - done) for done in range(0, total, size))


def sign_flips(tests: Sequence[Sequence[Pair]], seed: int = DEFAULT_SEED) -> list[float]:
    """Fisher's two-sided randomisation test of each mean over datasets' mean differences.

    p = (extreme + 1) / (B + 1), never 0; B is 100 000 up to 200 pairs and 10 000 above.
    """
    return _each(_flipped, [_differences(pairs) for pairs in tests], seed)


def _flipped(tests: Sequence[Strata], seed: int) -> Iterator[float]:
    import numpy as np

    d = np.array([np.concatenate(_weighted(strata)) for strata in tests]).T  # queries x tests
    flips, extreme = 100_000 if len(d) <= 200 else 10_000, np.zeros(len(tests), dtype=int)
    rng, sums = np.random.Generator(np.random.PCG64(seed)), d.sum(axis=0)
    for size in _chunks(flips, len(d)):
        bits = rng.integers(0, 256, (size, -(-len(d) // 8)), np.uint8)
        kept = np.unpackbits(bits, axis=1, count=len(d))  # 1: its sign stays, 0: it is flipped
        moved = kept @ (2 * d)
        moved -= sums
        extreme += np.count_nonzero(np.abs(moved, out=moved) >= np.abs(sums) - TIE, axis=0)
    return ((int(count) + 1) / (flips + 1) for count in extreme)


def _weighted(strata: Strata) -> list[Any]:
    """Scaled so that the mean over all rows is the mean of the strata's means."""
    n = sum(map(len, strata))
    return [values * (n / (len(strata) * len(values))) for values in strata]


def _differences(pairs: Sequence[Pair]) -> list[Any]:
    import numpy as np

    for a, b in pairs:
        if len(a) != len(b) or not len(a):
            raise ValueError(f"paired values need the same queries, got {len(a)} and {len(b)}")
    return [np.asarray(a, dtype=float) - np.asarray(b, dtype=float) for a, b in pairs]


def paired(tests: Sequence[Sequence[Pair]], seed: int = DEFAULT_SEED) -> list[Paired]:
    """Compare two systems in every test: a pair of equally ordered values for each dataset.

    Over several datasets the difference is the mean of their means.
    """
    strata = [_differences(pairs) for pairs in tests]
    found = zip(strata, intervals(strata, seed=seed), sign_flips(tests, seed))
    return [_paired(*one) for one in found]


def _paired(strata: Strata, interval: Interval, fisher_p: float) -> Paired:
    import numpy as np

    d, mean = np.concatenate(strata), float(np.mean([values.mean() for values in strata]))
    t_p, d_z = _student(d) if len(strata) == 1 else (math.nan, math.nan)
    wins, losses = int(np.sum(d > TIE)), int(np.sum(d < -TIE))
    counts = (wins, len(d) - wins - losses, losses, len(d))
    return Paired(mean, interval.low, interval.high, t_p, fisher_p, d_z, *counts)


def _student(d: Any) -> tuple[float, float]:
    """The paired t test's p and Hedges' d_z; nan where all differences are equal but not 0."""
    import numpy as np
    from scipy.special import stdtr

    if np.ptp(d) <= TIE:
        return (1.0, 0.0) if abs(d.mean()) <= TIE else (math.nan, math.nan)
    d_z, n = float(d.mean() / np.std(d, ddof=1)), len(d)
    return 2 * float(stdtr(n - 1, -abs(d_z) * math.sqrt(n))), d_z * (1 - 3 / (4 * (n - 1) - 1))


def non_inferiority(
    new: Sequence[float], old: Sequence[float], margin: float, *, seed: int = DEFAULT_SEED
) -> NonInferiority:
    """Paired test over the same queries in the same order; raises ValueError where they differ."""
    import numpy as np
    from scipy.special import stdtrit

    if not margin > 0:
        raise ValueError(f"margin {margin}: expected a number above 0")
    [d] = _differences([(new, old)])
    mean, interval = float(d.mean()), bootstrap_interval(d, 0.9, seed)
    low, high = interval.low, interval.high
    if np.ptp(d) > TIE:
        half = float(stdtrit(len(d) - 1, 0.95) * np.std(d, ddof=1)) / math.sqrt(len(d))
        low, high = min(low, mean - half), max(high, mean + half)
    verdict: Verdict = "pass" if low > -margin else "inconclusive"
    if high < 0 and mean <= -margin:
        verdict = "fail"
    return NonInferiority(mean, low, high, verdict)


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

    Queries are blocked: their values are permuted among the systems, and a pair's difference is
    held against the range of all systems' means, so that no further correction is needed. A
    system far from the others widens that range: the others' small differences then go unseen.

    Drawn are 500 tables of permuted values; each of the 5,000 permutations takes every one of 32
    runs of queries from a table of its own. Each is uniform and independent between queries, as
    if drawn alone; p's standard error is that of 5,000 that have no runs in common (a test).
    """
    import numpy as np

    rows = np.concatenate(_weighted([np.asarray(systems, dtype=float).T for systems in field]))
    means, rng = rows.mean(axis=0), np.random.Generator(np.random.PCG64(seed))
    starts = np.unique(np.linspace(0, len(rows), BLOCKS, endpoint=False, dtype=int))
    tables = -(-permutations // 10)
    sums = np.array([np.add.reduceat(rng.permuted(rows, axis=1), starts) for _ in range(tables)])
    taken = rng.integers(0, tables, (len(starts), permutations))
    totals = sum(sums[chosen, run] for run, chosen in enumerate(taken))
    ranges = np.sort(np.ptp(totals, axis=1)) / len(rows)
    gaps = np.abs(means[:, None] - means) - TIE
    return (permutations - np.searchsorted(ranges, gaps) + 1) / (permutations + 1)


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
    from scipy.special import stdtrit

    if n < 2:
        return math.nan
    needed = stdtrit(n - 1, 1 - alpha / 2) + stdtrit(n - 1, power)
    return float(needed) * sd / math.sqrt(n)
