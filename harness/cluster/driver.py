"""The driver of one run: it hires workers, hands out shards, and writes what comes back."""

from __future__ import annotations

import contextlib
import pickle
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import cell as cells
from harness import matrix, schedule
from harness.cache import Cache
from harness.cluster import placement
from harness.cluster.placement import Board, Hand, Shard, Work
from harness.cluster.worker import BEAT, Assignment, Family, Finished, News, Worker
from harness.types import (
    Candidate,
    CellResult,
    Completion,
    EngineError,
    HarnessError,
    Query,
    digest,
)

if TYPE_CHECKING:
    from harness.cluster import RayExecutor

PATIENCE = 60.0  # seconds that a cluster may be without any node that could hold a worker


def bare(job: cells.Job) -> cells.Job:
    """A job without its data."""
    return replace(job, collection=replace(job.collection, queries=(), qrels={}, audit={}))


def _measured(packed: bytes) -> CellResult:
    """A Ray task on the driver's own node, which can hear workers meanwhile: write a cell."""
    job, candidates, engine, command, started, finished, results, made_with = pickle.loads(packed)
    queries = [
        Query(qid, "", tuple([Candidate(docid, "") for docid in docids]), dataset)
        for qid, dataset, docids in candidates
    ]
    job = replace(job, collection=replace(job.collection, queries=tuple(queries)))
    run = cells.Run(cells.Task(job, cells.Elsewhere(**engine), command), 0)
    run.started = started
    for one in finished:
        outcome, notes = one.opened
        run.notes.update(notes)
        run.take(outcome)
    return run.finish(results, made_with)


def first_line(error: BaseException) -> str:
    """What went wrong, without a remote traceback."""
    cause = getattr(error, "cause", None) or error
    return (str(cause).strip() or type(cause).__name__).splitlines()[0]


@dataclass(eq=False)
class _Hired:
    """A worker as the driver sees it; `tickets` are the shards it holds."""

    actor: Any
    hand: Hand
    group: Any = None  # the placement group of several GPUs
    node: str = ""
    environment: Mapping[str, Any] = field(default_factory=dict)
    tickets: dict[int, Shard] = field(default_factory=dict)


class Drive:
    """One run over the cluster."""

    def __init__(
        self,
        crew: RayExecutor,
        waiting: matrix.Waiting,
        cache: Cache,
        results: Path,
        done: matrix.Done,
    ) -> None:
        self.crew, self.ray, self.cache, self.results = crew, crew.ray, cache, results
        self.done, self.entries = done, [entry for entry, _ in waiting]
        self.runs = {n: cells.Run(task, 0) for n, (_, task) in enumerate(waiting)}  # not finished
        self.works = [self._work(task) for _, task in waiting]
        self.board = Board(placement.cut(self.works, max(1, crew.room(1))))
        self.families: dict[str, Any] = {}  # in Ray's store, sent to a node once
        self.polls: dict[Any, _Hired] = {}
        self.finishing: dict[Any, int] = {}
        self.started = set[int]()
        identities = {n: cells.identity(r.task.job.cell, r.engine) for n, r in self.runs.items()}
        self.known = {n for n, identity in identities.items() if cache.knows(identity)}
        self.served: dict[int, set[_Hired]] = {n: set() for n in self.runs}
        self.finished: dict[int, list[Finished]] = {n: [] for n in self.runs}
        self.tickets = self.calls = self.stillborn = 0
        self.begun = self.looked = time.monotonic()
        self.alive = self.begun  # when a worker was last possible
        self.whole = sum(self.board.left.values())

    def _work(self, task: cells.Task) -> Work:
        cell, collection = task.job.cell, task.job.collection
        qids = [query.qid for query in task.job.queries]
        gpus = cell.model.tensor_parallel
        data = digest([collection.sha256, collection.run_sha256])
        return Work(task.group, data, gpus, qids, self.crew.seconds(task.job))

    def run(self) -> None:
        try:
            self._look()
            while self.runs:
                for ref in self._ready(BEAT):
                    self._written(ref) if ref in self.finishing else self._hear(ref)
                if time.monotonic() > self.looked + BEAT:
                    self._look()
        except HarnessError as error:  # of the cache: nothing can be kept any more
            for number in list(self.runs):
                self._fail(number, error)
        finally:
            self._dismiss()

    def _ready(self, seconds: float) -> list[Any]:
        """Workers' news that have come, all of them, or that come first."""
        refs = [*self.polls, *self.finishing]
        if not refs:
            time.sleep(seconds)
            return []
        self.ray.wait(refs, num_returns=1, timeout=seconds)
        come, _ = self.ray.wait(refs, num_returns=len(refs), timeout=0)
        return list(come)

    # --- workers

    def _look(self) -> None:
        """Once a second: hire where there is room and need, let go who can do nothing more."""
        self.looked = now = time.monotonic()
        waits = self.board.waits
        for hired in list(self.polls.values()):
            if not hired.tickets and hired.hand.gpus not in waits:
                self._forget(hired)
        rooms = {gpus: self.crew.room(gpus) for gpus in sorted(waits, reverse=True)}
        for gpus, room in rooms.items():
            have = sum(hired.hand.gpus == gpus for hired in self.polls.values())
            for _ in range(min(room - have, waits[gpus])):
                self._hire(gpus)
        if not waits or any(rooms.values()):
            self.alive = now
        if now > self.alive + PATIENCE:
            problem = f"for {PATIENCE:g} s no node of the cluster could hold a worker"
            self._give_up(EngineError(problem))
        self._report()

    def _hire(self, gpus: int) -> None:
        options, group = self.crew.options(gpus), None
        if gpus > 1:  # all of them on one node
            from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy as Placed

            group = self.ray.util.placement_group([{"CPU": 1, "GPU": gpus}], "STRICT_PACK")
            options["scheduling_strategy"] = Placed(group)
        kind = self.ray.remote(Worker).options(max_concurrency=3, **options)
        hired = _Hired(kind.remote(self.crew.serving), Hand(gpus), group)
        self.board.join(hired.hand)  # before it is up, so that the first one up leaves it its share
        self.polls[hired.actor.home.remote()] = hired

    def _feed(self, hired: _Hired) -> None:
        """Give a worker that is up what the board has for it."""
        while shard := self.board.next(hired.hand):
            self.tickets += 1
            hired.tickets[self.tickets] = shard
            for number in shard.parts.keys() - self.started:
                self.started.add(number)
                self.entries[number].watcher.started()
            try:
                assignment = self._assignment(self.tickets, shard)
            except HarnessError as error:
                for number in list(shard.parts):
                    self._fail(number, error)
                continue
            hired.actor.take.remote(assignment, self._family(shard))
            run = self.runs[next(iter(shard.parts))]
            hired.hand.room = run.task.job.cell.protocol.concurrency or run.engine.capacity

    def _assignment(self, ticket: int, shard: Shard) -> Assignment:
        queries, known = dict[int, list[Query]](), dict[bytes, Completion]()
        for number, qids in shard.parts.items():
            job, engine = self.runs[number].task.job, self.runs[number].engine
            queries[number] = [query for query in job.queries if query.qid in qids]
            key = cells.identity(job.cell, engine).key
            for query in queries[number] if number in self.known else ():
                flow = cells.flow(job, query, engine, Counter())
                known |= schedule.replay(flow, self.cache, key)[0]
        return Assignment(ticket, queries, known)

    def _family(self, shard: Shard) -> Any:
        """All cells of the shard's weights; after a failure its own alone: it may be theirs."""
        alone = [*shard.parts] if shard.failures else []
        name = " ".join([shard.group, *map(str, alone)])
        if name not in self.families:
            numbers = alone or [n for n in self.runs if self.works[n].group == shard.group]
            jobs = {n: bare(self.runs[n].task.job) for n in numbers}
            stated = {n: self.runs[n].engine.fingerprint for n in numbers}
            self.families[name] = self.ray.put(Family(name, jobs, stated))
        return self.families[name]

    def _hear(self, ref: Any) -> None:
        """Keep a worker's answers, then its outcomes, and ask for more."""
        hired = self.polls.pop(ref)
        errors = self.ray.exceptions.RayError
        try:
            said = self.ray.get(ref)
        except errors as error:
            self._lose(hired, error)
            return
        if isinstance(said, News):
            self._keep(hired, said)
        else:
            hired.node, hired.environment = said
            self.stillborn = 0
        self._feed(hired)
        self.polls[hired.actor.poll.remote()] = hired

    def _lose(self, hired: _Hired, error: Exception) -> None:
        """A worker died. If its node left, that is no fault of what it was at."""
        gone = {node["NodeID"] for node in self.ray.nodes() if not node["Alive"]}
        problem = EngineError(f"a worker died: {first_line(error)}")
        self.stillborn += not hired.node
        for ticket in list(hired.tickets):
            self._return(hired, ticket, problem, failed=hired.node not in gone)
        self._forget(hired)
        if self.stillborn >= placement.TRIES:
            self._give_up(problem)

    def _forget(self, hired: _Hired) -> None:
        self.polls = {ref: other for ref, other in self.polls.items() if other is not hired}
        self.board.leave(hired.hand)
        self.ray.kill(hired.actor)
        if hired.group is not None:
            self.ray.util.remove_placement_group(hired.group)

    def _dismiss(self) -> None:
        """Keep what was on its way, then let every worker go."""
        with contextlib.suppress(HarnessError, self.ray.exceptions.RayError):
            for ref in self._ready(0) if self.polls else ():
                news = self.ray.get(ref, timeout=BEAT)  # its node may have gone
                if isinstance(news, News):
                    self.cache.put_many(news.answers)
        for hired in list(self.polls.values()):
            self._forget(hired)

    # --- cells

    def _keep(self, hired: _Hired, news: News) -> None:
        if news.answers:
            self.cache.put_many(news.answers)
            self.calls += len(news.answers)
        for number, facts in news.facts.items():
            if number in self.runs:
                self.runs[number].engine.facts = facts
        for finished in news.outcomes:
            self._take(hired, finished)
        for ticket, error in news.failed:
            self._return(hired, ticket, error, failed=True)

    def _take(self, hired: _Hired, one: Finished) -> None:
        """A query is finished: perhaps its shard is, and its cell."""
        number, shard = one.number, hired.tickets.get(one.ticket)
        if shard is None or one.qid not in shard.parts.get(number, ()):
            return  # of a cell that has failed
        self.served[number].add(hired)
        if self.board.answered(hired.hand, shard, number, one.qid):
            del hired.tickets[one.ticket]
        task, finished = self.runs[number].task, self.finished[number]
        finished.append(one)
        total = len(task.job.queries)
        task.progress(len(finished), total, sum(query.calls for query in finished))
        if len(finished) == total:
            self._finish(number)

    def _finish(self, number: int) -> None:
        """Have a cell measured and written: a millisecond a call, so not in this process."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

        run = self.runs[number]
        job, shown = run.task.job, ("fingerprint", "facts")
        candidates = [(q.qid, q.dataset, [c.docid for c in q.candidates]) for q in job.queries]
        job = replace(job, collection=replace(job.collection, queries=()))
        engine = {name: dict(getattr(run.engine, name)) for name in shown}
        made = run.task.command, run.started, self.finished.pop(number)
        where = self.results, self._made_with(number)
        here = On(self.ray.get_runtime_context().get_node_id(), soft=False)
        task = self.ray.remote(_measured).options(num_cpus=0, scheduling_strategy=here)
        ref = task.remote(pickle.dumps((job, candidates, engine, *made, *where), 5))
        self.finishing[ref] = number

    def _written(self, ref: Any) -> None:
        number = self.finishing.pop(ref)
        try:
            result = self.ray.get(ref)
        except self.ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None)
            known = cause if isinstance(cause, HarnessError) else EngineError(first_line(error))
            self._fail(number, known)
        else:
            if self.runs.pop(number, None):
                self.done.finish(self.entries[number], result)

    def _made_with(self, number: int) -> dict[str, Any]:
        """One worker's environment, and beside it every other that is not the same."""
        served = self.served[number]
        kinds = {digest(hired.environment): hired.environment for hired in served}
        first, *others = (kinds[name] for name in sorted(kinds))
        ray = {"name": "ray", "version": self.ray.__version__, "workers": len(served)}
        return {**first, "executor": {**ray, "other_environments": others}}

    def _return(self, hired: _Hired, ticket: int, error: HarnessError, *, failed: bool) -> None:
        """A shard comes back; after too many failures its cells have failed."""
        shard = hired.tickets.pop(ticket, None)
        self.known |= shard.parts.keys() if shard else set()  # some of it may have been answered
        if shard and not self.board.give_back(hired.hand, shard, failed=failed):
            for number in list(shard.parts):
                self._fail(number, error)

    def _fail(self, number: int, error: HarnessError) -> None:
        if run := self.runs.pop(number, None):
            self.board.drop(number)
            self.families.clear()  # nobody is to load anything for it again
            for hired in self.polls.values():
                hired.tickets = {t: shard for t, shard in hired.tickets.items() if shard.queries}
            run.fail(self.results, error)
            self.done.fail(self.entries[number], error)

    def _give_up(self, error: HarnessError) -> None:
        for number in list(self.runs):
            self._fail(number, error)

    def _report(self) -> None:
        """How far it is, for who watches."""
        left = sum(self.board.left.values())
        spent, passed = self.whole - left, time.monotonic() - self.begun
        up = [hired for hired in self.polls.values() if hired.node]
        self.crew.tell(
            {
                "shards": len(self.board.open),
                "workers": len(up),
                "calls": self.calls,
                "calls_per_second": round(self.calls / passed, 1) if passed else None,
                "seconds_left": round(passed * left / spent, 1) if spent > 0 else None,
            }
        )
