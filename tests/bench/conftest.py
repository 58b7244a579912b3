"""What the benchmarks share: interleaved timing, gates on ratios, and the table at the end."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the tests' own builders

TEN_KB = b"x" * 10_000


@dataclass(frozen=True)
class Gate:
    """A ratio and what it must not pass; `most` or `least`."""

    name: str
    ratio: float
    bound: str
    holds: bool
    note: str


GATES: list[Gate] = []


def gate(
    name: str,
    ratio: float,
    *,
    most: float | None = None,
    least: float | None = None,
    note: str = "",
) -> None:
    """Note a ratio for the table and fail when it is beyond its bound."""
    holds = (most is None or ratio <= most) and (least is None or ratio >= least)
    bound = (
        f"<= {most:g}" if most is not None else f">= {least:g}" if least is not None else "reported"
    )
    GATES.append(Gate(name, ratio, bound, holds, note))
    assert holds, f"{name}: {ratio:.3g} is not {bound}"


def seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def thousand_units() -> None:
    """The normaliser: a unit is one SHA-256 over 10 kB on this machine, now."""
    for _ in range(1000):
        sha256(TEN_KB).digest()


def interleaved(*works: Callable[[], Any], rounds: int = 80) -> tuple[float, ...]:
    """The least seconds of each, their rounds A, B, A, B in this process."""
    taken = [[seconds(work) for work in works] for _ in range(rounds)]
    return tuple(map(min, zip(*taken)))


@pytest.fixture
def paired(benchmark: Any) -> Callable[..., tuple[float, float]]:
    """(A, B): the least seconds of each, their rounds interleaved A, B, A, B in this process."""

    def run(a: Callable[[], Any], b: Callable[[], Any], rounds: int = 7) -> tuple[float, float]:
        other: list[float] = []
        benchmark.pedantic(a, setup=lambda: other.append(seconds(b)), rounds=rounds)
        return benchmark.stats.stats.min, min(other)

    return run


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not GATES:
        return
    terminalreporter.section("ratios and their gates")
    width = max(len(g.name) for g in GATES)
    for g in GATES:
        verdict = "ok" if g.holds else "FAILED"
        terminalreporter.line(
            f"{g.name:<{width}}  {g.ratio:>9.3g}  {g.bound:<9} {verdict:<6} {g.note}"
        )
