"""A worker's process: one group of engines at a time, and the flows of the shards it is given.

Its answers go to the driver as they come. It keeps nothing on disk.
"""

from __future__ import annotations

import pickle
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from threading import Condition, Thread
from typing import Any

from harness import cell as cells
from harness import env, matrix, schedule
from harness.types import (
    Completion,
    Engine,
    EngineError,
    HarnessError,
    Outcome,
    Query,
    Serving,
    digest,
)

BEAT = 1.0  # seconds of a worker's longest silence


class Sealed:
    """Goes to another process in one piece: Ray's own pickler asks Python about every object."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _unsealed, (pickle.dumps((type(self), vars(self)), 5),)


def _unsealed(whole: bytes) -> Any:
    kind, values = pickle.loads(whole)
    return kind(**values)


@dataclass(frozen=True)
class Family(Sealed):
    """Cells whose engines are to be open at the same time: what they share is loaded once.

    jobs     without queries, by the cell's number
    stated   the fingerprint that each of their engines must have
    """

    name: str
    jobs: Mapping[int, cells.Job]
    stated: Mapping[int, Mapping[str, Any]]


@dataclass(frozen=True)
class Assignment(Sealed):
    """A shard on its way to a worker; `known` are answers that the cache already has."""

    ticket: int
    queries: Mapping[int, Sequence[Query]]
    known: Mapping[bytes, Completion]


@dataclass(frozen=True)
class Finished:
    """A query of a shard is done; `sealed` is opened where its cell is measured, not on the way."""

    ticket: int
    number: int
    qid: str
    calls: int
    sealed: bytes

    @property
    def opened(self) -> tuple[Outcome, Counter[str]]:
        """Its outcome, and what was noted of its inputs."""
        outcome, notes = pickle.loads(self.sealed)
        return outcome, notes


@dataclass
class News(Sealed):
    """What a worker has to tell since it was asked last."""

    answers: list[tuple[bytes, Completion]] = field(default_factory=list)
    outcomes: list[Finished] = field(default_factory=list)
    failed: list[tuple[int, HarnessError]] = field(default_factory=list)
    facts: dict[int, Mapping[str, Any]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.answers or self.outcomes or self.failed)


class Worker:
    """A Ray actor. `take` and `poll` come from the driver while a thread of its own works."""

    def __init__(self, serving: Serving) -> None:
        self.serving, self.changed = serving, Condition()
        self.inbox: deque[tuple[Assignment, Family]] = deque()
        self.news = News()
        self.family, self.engines = "", dict[int, Engine]()
        self.work: Future[None] = Future()
        Thread(target=self._work_on, daemon=True).start()

    def home(self) -> tuple[str, dict[str, Any]]:
        """The node and the environment, for the record."""
        import ray

        return ray.get_runtime_context().get_node_id(), env.environment()

    def take(self, assignment: Assignment, family: Family) -> None:
        with self.changed:
            self.inbox.append((assignment, family))
            self.changed.notify_all()

    def poll(self) -> News:
        """What is new, as soon as there is something; nothing new after a while is news too."""
        with self.changed:
            self.changed.wait_for(lambda: self.news or self.work.done(), BEAT)
            news, self.news = self.news, News()
        if self.work.done():
            self.work.result()  # raises: the driver gives this worker up
        return news

    def _work_on(self) -> None:
        """Until the process ends, or an error that is none of an engine's ends this thread."""
        try:
            while True:
                self._work()
        except BaseException as error:
            self.work.set_exception(error)
            raise

    def _work(self) -> None:
        """One family's shards, as long as they come."""
        with self.changed:
            self.changed.wait_for(lambda: self.inbox)
            _, family = self.inbox[0]
        if family.name != self.family:
            self._let_go()
        begun: list[int] = []
        try:
            _Sitting(self, family, begun).run()
        except HarnessError as error:
            self._let_go()
            with self.changed:
                done = begun or [self.inbox.popleft()[0].ticket]
                self.news.failed += [(ticket, error) for ticket in done]
                self.changed.notify_all()

    def _let_go(self) -> None:
        for engine in self.engines.values():
            engine.close()
        self.family, self.engines = "", {}

    def open(self, family: Family) -> None:
        """Open the engines of a family, unless they are."""
        if self.family == family.name:
            return
        alike: dict[str, Engine] = {}  # cells of one model have one engine
        for number, job in family.jobs.items():
            stated = family.stated[number]
            name = digest(stated)
            alike[name] = alike.get(name) or self._opened(job, stated)
            self.engines[number] = alike[name]
        self.family = family.name

    def _opened(self, job: cells.Job, stated: Mapping[str, Any]) -> Engine:
        engine = matrix.open_for(job, self.serving)
        assert engine is not None
        here = engine.fingerprint
        for name in {**here, **stated}:
            if here.get(name) != stated.get(name):
                raise EngineError(
                    f"{job.cell}: {name} is {here.get(name)!r} on one worker and"
                    f" {stated.get(name)!r} on another"
                )
        return engine


class _Sitting:
    """What a worker runs with one family's engines until nothing is left, as one loop."""

    def __init__(self, worker: Worker, family: Family, begun: list[int]) -> None:
        self.worker, self.family, self.begun = worker, family, begun
        self.known: dict[bytes, Completion] = {}
        self.places: list[tuple[int, int, Mapping[str, Counter[str]]]] = []
        self.left = 0

    def run(self) -> None:
        self.worker.open(self.family)
        [engine, *_], [job, *_] = self.worker.engines.values(), self.family.jobs.values()
        asked = job.cell.protocol.concurrency or engine.capacity
        for lane, outcome in schedule.run_together(self._lanes(), self, concurrency=asked):
            self._tell(lane, outcome)

    def get_many(self, keys: Sequence[bytes]) -> dict[bytes, Completion]:
        return {key: self.known[key] for key in keys if key in self.known}

    def put_many(self, items: Iterable[tuple[bytes, Completion]]) -> None:
        """Another query of this sitting may ask the same; the driver keeps them for good."""
        answers = list(items)
        self.known.update(answers)
        with self.worker.changed:
            self.worker.news.answers += answers
            self.worker.changed.notify_all()

    def _lanes(self) -> Iterator[schedule.Lane | None]:
        """The lanes of every shard that comes for this family, until there is nothing to do."""
        while True:
            with self.worker.changed:
                inbox = self.worker.inbox
                ours = bool(inbox) and inbox[0][1].name == self.family.name
                if not ours and (inbox or not self.left):
                    return
                assignment = inbox.popleft()[0] if ours else None
            if assignment:
                self.begun.append(assignment.ticket)
                self.known.update(assignment.known)
                yield from self._lanes_of(assignment)
            else:
                yield None

    def _lanes_of(self, shard: Assignment) -> Iterator[schedule.Lane]:
        for number, queries in shard.queries.items():
            job, engine = self.family.jobs[number], self.worker.engines[number]
            notes = {query.qid: Counter[str]() for query in queries}
            flows = [(q, notes[q.qid]) for q in queries]
            self.places.append((shard.ticket, number, notes))
            self.left += len(queries)
            yield schedule.Lane(
                ((q.qid, cells.flow(job, q, engine, note)) for q, note in flows),
                engine,
                cells.identity(job.cell, engine).key,
            )

    def _tell(self, lane: int, outcome: Outcome) -> None:
        """Hand an outcome on."""
        ticket, number, notes = self.places[lane]
        self.left -= 1
        told = sealed(ticket, number, outcome, notes[outcome.qid])
        with self.worker.changed:
            self.worker.news.outcomes.append(told)
            self.worker.news.facts[number] = dict(self.worker.engines[number].facts)
            self.worker.changed.notify_all()


def sealed(ticket: int, number: int, outcome: Outcome, notes: Counter[str]) -> Finished:
    """An outcome without the texts of its prompts: nobody reads them there."""
    texts: dict[str, Any] = {"messages": (), "text": None}
    calls = tuple(replace(c, request=replace(c.request, **texts)) for c in outcome.calls)
    told = pickle.dumps((replace(outcome, calls=calls), notes), 5)
    return Finished(ticket, number, outcome.qid, len(calls), told)


def described(job: cells.Job, serving: Serving) -> tuple[dict[str, Any], int, str]:
    """A Ray task on a worker's kind of node: fingerprint, capacity and group of an engine."""
    engine = matrix.open_for(job, serving)
    assert engine is not None
    try:
        return dict(engine.fingerprint), engine.capacity, engine.group
    finally:
        engine.close()
