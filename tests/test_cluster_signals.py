"""A driver over Ray that is stopped from outside: what it keeps, and what it leaves behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Set
from contextlib import closing
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import pytest
from openai_server import Body, Reply, Served, said, serving

from harness.cache import Cache

pytest.importorskip("ray", reason="ray is not installed")
pytest.importorskip("openai", reason="openai is not installed")

ROOT = Path(__file__).resolve().parent.parent
ENV = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENAI_API_KEY": "x"}
RAY = ("--executor", "ray", "--workers", "1")
CALLS = 8 * 9  # queries, windows of 4 over 20 candidates


class Model:
    """It answers half the calls, then none until it is told to go on: no run ends before that."""

    def __init__(self) -> None:
        self.number, self.goes_on = count(), False

    def __call__(self, path: str, body: Body) -> Reply | Body:
        after = 0.1 if next(self.number) < CALLS // 2 else 600
        return Reply(said("[2] > [1] > [3] > [4]"), after=0 if self.goes_on else after)


def words(server: Served, results: Path) -> list[str]:
    matrix = ["-m", "smollm2-135m-listwise", "-d", "pocket", "--limit", "8", "--size", "4"]
    where = ["--engine", "http", "--base-url", server.url, "--served-model", "tiny"]
    how = ["--stride", "2", "--concurrency", "2", "--results", str(results), "--quiet"]
    return [sys.executable, "-m", "harness", "run", *matrix, *where, *how]


def parents() -> dict[int, int]:
    """The parent of every process of this machine that has not ended."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if state != "Z":
            found[int(stat.parent.name)] = int(parent)
    return found


def descendants(pid: int) -> set[int]:
    found, known = {pid}, parents()
    while more := {child for child, parent in known.items() if parent in found} - found:
        found |= more
    return found - {pid}


def name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def until(condition: Callable[[], object], seconds: float = 120) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return bool(condition())


@dataclass
class Driver:
    """`harness run --executor ray` half way, and the processes it has started."""

    process: subprocess.Popen[str]
    server: Served
    model: Model
    results: Path
    kept: int = 0
    family: Set[int] = field(default_factory=set)

    @property
    def reported(self) -> int:
        """Answers that the driver says it has had."""
        for path in self.results.glob(".running-*.json"):
            return int(json.loads(path.read_text())["crew"].get("calls", 0))
        return 0

    @property
    def workers(self) -> set[int]:
        return {pid for pid in self.family if name(pid).startswith("ray::Worker")}

    def cached(self) -> int:
        with closing(Cache(self.results / ".cache.sqlite")) as cache:
            return cache.count()


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[Driver]:
    model = Model()
    with serving(model) as server:
        results = tmp_path / "results"
        process = subprocess.Popen(
            [*words(server, results), *RAY], env=ENV, text=True, stderr=subprocess.PIPE
        )
        found = Driver(process, server, model, results)
        try:
            assert until(lambda: found.reported or process.poll() is not None)
            found.kept, found.family = found.reported, descendants(process.pid)
            assert {"raylet", "gcs_server"} <= {name(pid) for pid in found.family}
            [priority] = {os.getpriority(os.PRIO_PROCESS, pid) for pid in found.workers}
            assert priority == os.getpriority(os.PRIO_PROCESS, process.pid)
            yield found
        finally:
            for pid in [process.pid, *found.family] if process.poll() is None else []:
                os.kill(pid, signal.SIGKILL)
            process.communicate()


def a_batch_system_asks(driver: Driver) -> None:
    driver.process.terminate()


def control_c(driver: Driver) -> None:
    driver.process.send_signal(signal.SIGINT)


def a_whole_job_is_cancelled(driver: Driver) -> None:
    for pid in [driver.process.pid, *driver.family]:
        os.kill(pid, signal.SIGTERM)


@pytest.mark.parametrize("stop", [a_batch_system_asks, control_c, a_whole_job_is_cancelled])
def test_a_driver_that_is_stopped_keeps_its_answers_and_ends_its_ray(
    driver: Driver, stop: Callable[[Driver], None]
) -> None:
    stop(driver)
    _, told = driver.process.communicate(timeout=60)
    assert driver.process.returncode == 7, told
    assert told.count("\n") == 1
    assert "the same command goes on from there" in told
    assert until(lambda: not driver.family & parents().keys(), 60)
    kept = driver.cached()
    assert driver.kept <= kept < CALLS
    asked, driver.model.goes_on = len(driver.server.bodies), True
    again = subprocess.run(words(driver.server, driver.results), env=ENV, timeout=120)
    assert again.returncode == 0
    assert len(driver.server.bodies) - asked == CALLS - kept


def test_a_driver_that_is_killed_leaves_nothing_that_holds_a_gpu_or_a_port(driver: Driver) -> None:
    # Two agents of the node end a minute later, when they give up reporting to it.
    holding = {pid for pid in driver.family if name(pid) in ("raylet", "gcs_server")}
    holding |= driver.workers
    assert len(holding) >= 3
    driver.process.kill()
    assert until(lambda: not holding & parents().keys(), 60)
    assert driver.kept <= driver.cached() < CALLS


def test_a_driver_that_is_stopped_while_ray_starts_ends_as_any_other(tmp_path: Path) -> None:
    with serving(Model()) as server:
        process = subprocess.Popen(
            [*words(server, tmp_path / "results"), *RAY], env=ENV, text=True, stderr=subprocess.PIPE
        )
        try:
            assert until(lambda: "gcs_server" in {name(pid) for pid in descendants(process.pid)})
            family = descendants(process.pid)
            process.terminate()
            _, told = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 7, told
    assert until(lambda: not family & parents().keys(), 60)
