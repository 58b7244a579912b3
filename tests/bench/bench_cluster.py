"""What an answer costs the driver of a cluster: heard, kept in a cache file, its cell written.

`nox -s bench` runs this. Two cores cannot hold a driver and the workers that would keep it busy:
`Teller` stands in for a worker that has its answers ready, and the driver's own processor time is
what counts. Real workers with the fake engine are measured beside it.
"""

from __future__ import annotations

import pickle
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from bench_loop import queries
from conftest import gate, thousand_units

from harness import cell as cells
from harness import matrix, schedule
from harness.cache import Cache
from harness.cluster import RayExecutor, driver
from harness.cluster.worker import Assignment, Family, News, sealed
from harness.data import Collection
from harness.engines.fake import FakeEngine
from harness.specs import Registry
from harness.types import Cell, Completion, DatasetSpec, Outcome, Protocol, Request, Serving

ray = pytest.importorskip("ray", reason="ray is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own

QUERIES, CELLS = 300, 2
THOUGHT = "<think> " + "Passage [3] answers the question and [7] does not. " * 11 + "</think> "
MADE_WITH = {"harness": "0", "python": "3", "packages": {}, "gpus": []}


class Thoughtful(FakeEngine):
    """The fake engine with answers of some 600 bytes."""

    def answer(self, request: Request) -> Completion:
        said = super().answer(request)
        return replace(said, text=THOUGHT + said.text)


def jobs() -> list[cells.Job]:
    """Cells of Rank-R1's method over the same queries of a hundred passages."""
    registry, asked = Registry(), queries(QUERIES)
    qrels = {query.qid: {query.candidates[n].docid: 1 for n in range(5)} for query in asked}
    data = Collection(asked, qrels, "bm25", "r", "d", {}, has_texts=True)
    dataset = DatasetSpec("bench", "requests", measures=("nDCG@10", "AP"))
    out = []
    for number in range(CELLS):
        model = replace(registry.models["rank-r1-7b"], name=f"m{number}", engine="fake")
        cell = Cell(model, dataset, "bm25", 100, None, Protocol(concurrency=256))
        out.append(cells.resolve(cell, registry.prompt(model.prompt), data))
    return out


@dataclass
class Told:
    """News on its way: a worker's pickling is done, the driver's unpickling is not."""

    blob: bytes

    def __reduce__(self) -> Any:
        return pickle.loads, (self.blob,)


class Teller:
    """Stands in for a worker: what it is given to do has been done, and is told in lumps."""

    lump, path = 0, Path()

    def __init__(self, serving: Serving) -> None:
        self.done: dict[str, dict[str, Outcome]] = pickle.loads(self.path.read_bytes())
        self.news: deque[Told] = deque()

    def home(self) -> tuple[str, dict[str, Any]]:
        import ray

        return ray.get_runtime_context().get_node_id(), MADE_WITH

    def take(self, shard: Assignment, family: Family) -> None:
        news, size = News(), 0
        for number, asked in shard.queries.items():
            for query in asked:
                outcome = self.done[family.jobs[number].cell.model.name][query.qid]
                told = outcome.calls
                news.answers += [(key_of(call.key), call.completion) for call in told]
                news.outcomes.append(sealed(shard.ticket, number, outcome, Counter()))
                if (size := size + len(told)) >= self.lump:
                    self.news.append(Told(pickle.dumps(news, 5)))
                    news, size = News(), 0
        self.news.append(Told(pickle.dumps(news, 5)))

    def poll(self) -> Any:
        if self.news:
            return self.news.popleft()
        time.sleep(0.05)  # a worker waits until it has something to tell
        return Told(pickle.dumps(News(), 5))


def key_of(name: str) -> Any:
    from harness.cache import Key

    key = Key(bytes.fromhex(name))
    key.origin = ORIGIN
    return key


ORIGIN = '{"engine": "fake", "settings": "' + "x" * 900 + '"}'


def answered(jobs: list[cells.Job]) -> dict[str, dict[str, Outcome]]:
    """Every outcome as a worker would tell it."""
    out = {}
    for job in jobs:
        engine = Thoughtful(job.cell.model)
        done = schedule.run(
            ((q.qid, cells.flow(job, q, engine, Counter())) for q in job.queries),
            engine,
            Cache(None),
            key=cells.identity(job.cell, engine).key,
            concurrency=engine.capacity,
        )
        out[job.cell.model.name] = {o.qid: o for o in done}
    return out


class Watch:
    """Clocks of this process from the first cell's start to the last answer and the end."""

    def __init__(self) -> None:
        self.begun: tuple[float, float] | None = None
        self.heard = self.ended = (0.0, 0.0)
        self.failures: list[Any] = []

    def now(self) -> tuple[float, float]:
        return time.perf_counter(), time.process_time()

    def started(self) -> None:
        self.begun = self.begun or self.now()

    def finished(self, result: Any) -> None:
        self.ended = self.now()

    def failed(self, error: Any) -> None:
        self.failures.append(error)

    def skipped(self) -> None: ...
    def progress(self, done: int, total: int, calls: int) -> None:
        self.heard = self.now()


@pytest.fixture(scope="module")
def workers() -> Iterator[None]:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this
    ray.init(
        "local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR"
    )
    yield
    ray.shutdown()


def took(jobs: list[cells.Job], folder: Path, workers: int) -> tuple[int, float, float]:
    """Completions, seconds to the last of them, and processor seconds of this process in all."""
    watch, cache = Watch(), Cache(folder / "cache.sqlite")
    entries = [matrix.Entry(job, "", watch) for job in jobs]
    crew = RayExecutor(Serving(), workers=workers)
    crew.__dict__["ray"] = ray
    done = matrix.run(entries, cache, folder / "results", crew)
    assert not watch.failures, str(watch.failures[0])
    assert watch.begun
    calls = sum(cell.record["efficiency"]["calls"] for cell in done.results)
    assert cache.count() == calls
    cache.close()
    return calls, watch.heard[0] - watch.begun[0], watch.ended[1] - watch.begun[1]


def unit() -> float:
    """Seconds of processor time of one SHA-256 over 10 kB."""
    spent = []
    for _ in range(5):
        begun = time.process_time()
        thousand_units()
        spent.append(time.process_time() - begun)
    return min(spent) / 1000


@pytest.mark.parametrize(("lump", "most"), [(16, None), (128, 14.5)])
def test_an_answer_costs_the_driver_little(
    workers: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lump: int, most: float | None
) -> None:
    asked, path = jobs(), tmp_path / "answers"
    path.write_bytes(pickle.dumps(answered(asked)))
    kind = type("Ready", (Teller,), {"lump": lump, "path": path})
    monkeypatch.setattr(driver, "Worker", kind)
    least = []
    for n in range(2):
        units = unit()
        calls, wall, own = took(asked, tmp_path / str(n), 1)
        least.append((own / calls / units, own / calls, calls / wall))
    units, each, rate = min(least)
    note = f"{1 / each:,.0f}/s of processor time, {rate:,.0f}/s kept by the clock"
    gate(
        f"C1 driver of a cluster, {lump} answers a message, units an answer",
        units,
        most=most,
        note=note,
    )


def test_real_workers_on_these_cores(workers: None, tmp_path: Path) -> None:
    calls, wall, own = took(jobs(), tmp_path, 2)
    gate(
        "C2 the same with two real workers, units an answer",
        own / calls / unit(),
        note=f"{calls / wall:,.0f}/s kept by the clock, {calls / own:,.0f}/s of the driver's processor time",
    )
