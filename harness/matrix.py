"""A matrix of jobs: what is finished is skipped, what shares an engine's weights runs together.

Owns the order of work and keeps one cell's failure from the others. It prints nothing: whoever
calls it hears of each cell through a Watcher.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from typing import Protocol as Interface

from harness import cell as cells
from harness import store
from harness.cache import Cache
from harness.engines import open_engine
from harness.types import DEFAULT_SEED, Cell, CellResult, Engine, HarnessError, Serving


class Watcher(Interface):
    """Who tells the user about one cell."""

    def skipped(self) -> None: ...
    def started(self) -> None: ...
    def progress(self, done: int, total: int, calls: int) -> None: ...
    def finished(self, result: CellResult) -> None: ...
    def failed(self, error: HarnessError) -> None: ...


@dataclass(frozen=True)
class Entry:
    """A job of the matrix, the command that makes it alone, and who watches it."""

    job: cells.Job
    command: str
    watcher: Watcher


@dataclass
class Done:
    """What a run of the matrix has come to so far; `asked` and `cached` count calls."""

    results: list[CellResult] = field(default_factory=list)
    failures: list[tuple[Cell, HarnessError]] = field(default_factory=list)
    skipped: int = 0
    asked: int = 0
    cached: int = 0

    def fail(self, entry: Entry, error: HarnessError) -> None:
        self.failures.append((entry.job.cell, error))
        entry.watcher.failed(error)

    def finish(self, entry: Entry, result: CellResult) -> None:
        calls = result.record["efficiency"]["calls"]
        cached = result.record["efficiency"]["calls_from_cache"]
        self.results.append(result)
        self.cached, self.asked = self.cached + cached, self.asked + calls - cached
        entry.watcher.finished(result)


def open_for(job: cells.Job, serving: Serving) -> Engine | None:
    """The engine that answers a job's calls; None for a baseline. Loads no weights."""
    spec, replicate = job.cell.model, job.cell.protocol.replicate
    if replicate and spec.sampling.get("temperature"):  # the same draws would repeat nothing
        seed = spec.sampling.get("seed", DEFAULT_SEED) + replicate
        spec = replace(spec, sampling={**spec.sampling, "seed": seed})
    return open_engine(spec.engine or "hf", spec, serving) if job.needs_engine else None


Waiting = list[tuple[Entry, cells.Task]]


class Executor(Interface):
    """Where engines are and who drives them; a context that holds what it needs for that."""

    def __enter__(self) -> Any: ...
    def __exit__(self, *error: Any) -> None: ...

    def open(self, job: cells.Job) -> Engine | None:
        """What tells a job's engine apart; None for a baseline. Loads no weights."""

    def run(self, waiting: Waiting, cache: Cache, results: Path, done: Done) -> None:
        """Run every task to its result or its failure, in `done`; takes from `waiting`."""


@dataclass(frozen=True)
class Local:
    """The executor of this process: one engine group after the other."""

    serving: Serving

    def __enter__(self) -> Local:
        return self

    def __exit__(self, *error: Any) -> None:
        """Engines are closed cell by cell."""

    def open(self, job: cells.Job) -> Engine | None:
        return open_for(job, self.serving)

    def run(self, waiting: Waiting, cache: Cache, results: Path, done: Done) -> None:
        while waiting:
            _run_group(_next_group(waiting), cache, results, done)


def run(
    entries: Iterable[Entry],
    cache: Cache,
    results: Path,
    executor: Executor,
    *,
    force: bool = False,
) -> Done:
    """Run every job whose key is not there yet; a failed one does not stop the others."""
    done = Done()
    waiting: Waiting = []
    try:
        for entry in entries:
            try:
                task = _task(entry, executor)
            except HarnessError as error:
                done.fail(entry, error)
                continue
            if force or not _is_finished(task, results):
                waiting.append((entry, task))
                continue
            _close([task])
            done.skipped += 1
            done.results += [r for r in [store.read(results / entry.job.cell.folder)] if r]
            entry.watcher.skipped()
        executor.run(waiting, cache, results, done)
    finally:
        _close(task for _, task in waiting)
    return done


def _task(entry: Entry, executor: Executor) -> cells.Task:
    engine = executor.open(entry.job)
    return cells.Task(entry.job, engine, entry.command, entry.watcher.progress)


def _is_finished(task: cells.Task, results: Path) -> bool:
    state = store.state(results, task.job.cell, cells.key(task.job, task.engine))
    return state == "complete"


def _close(tasks: Iterable[cells.Task]) -> None:
    for task in tasks:
        if task.engine is not None:
            task.engine.close()


def _next_group(waiting: Waiting) -> Waiting:
    """Take the first task out, with all that may run together with it."""
    group = waiting[0][1].group
    chosen = [w for w in waiting if group and w[1].group == group] or waiting[:1]
    waiting[:] = [w for w in waiting if w not in chosen]
    return chosen


def _run_group(group: Waiting, cache: Cache, results: Path, done: Done) -> None:
    """Run a group; if it fails, each of its unfinished cells alone, so that one is to blame."""
    left = {results / task.job.cell.folder: (entry, task) for entry, task in group}
    for entry, _ in group:
        entry.watcher.started()
    try:
        for result in cells.run_together([task for _, task in group], cache, results):
            done.finish(left.pop(result.folder)[0], result)
    except HarnessError as error:
        if len(group) == 1:
            done.fail(group[0][0], error)
        else:
            for one in list(left.values()):
                _run_group([one], cache, results, done)
    finally:
        _close(task for _, task in group)
