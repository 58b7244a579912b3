"""THE LOOP: any number of method generators, the engines of one group, one cache.

Synchronous and single-threaded: it keeps up to `concurrency` queries alive, asks the cache first,
submits the misses, stores every completion before the generator moves on, and closes every
generator whatever happens. It must not know datasets, measures or where results go.

An engine failure leaves as EngineError with the waiting queries named; it never becomes a
half-sorted ranking.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple
from typing import Protocol as Interface

from harness.types import Call, Completion, Engine, EngineError, Flow, Outcome, Ranking, Request


class Store(Interface):
    """Where answers are looked up and kept: cache.Cache, or what stands for it on a worker."""

    def get_many(self, keys: Sequence[bytes]) -> dict[bytes, Completion]: ...
    def put_many(self, items: Iterable[tuple[bytes, Completion]]) -> None: ...


@dataclass(frozen=True)
class Lane:
    """One cell's part in the loop.

    flows   (qid, generator) pairs, drawn only as places become free
    key     the identity of a request (cache.Identity.key)
    """

    flows: Iterable[tuple[str, Flow]]
    engine: Engine
    key: Callable[[Request], bytes]


class Finished(NamedTuple):
    """A finished query and the number of its lane."""

    lane: int
    outcome: Outcome


@dataclass(slots=True)
class _Ask:
    """A request on its way, and its answer once it is there."""

    round: int
    key: bytes
    request: Request
    completion: Completion = field(init=False)
    from_cache: bool = False


@dataclass
class _Query:
    """A query on its way: its generator, its last yield and how much of it is open, every call."""

    lane: int
    qid: str
    flow: Flow
    admitted: float
    round: int = 0
    asks: list[_Ask] = field(default_factory=list)
    open: int = 0
    log: list[_Ask] = field(default_factory=list)


def run(
    flows: Iterable[tuple[str, Flow]],
    engine: Engine,
    cache: Store,
    *,
    key: Callable[[Request], bytes],
    concurrency: int,
    read_cache: bool = True,
) -> Iterator[Outcome]:
    """Drive every flow to its Ranking; outcomes come in the order in which queries finish.

    `flows` and `key` are a Lane's; `read_cache=False` asks the engine for everything.
    """
    lane = Lane(flows, engine, key)
    for finished in run_together([lane], cache, concurrency=concurrency, read_cache=read_cache):
        yield finished.outcome


def run_together(
    lanes: Iterable[Lane | None], cache: Store, *, concurrency: int, read_cache: bool = True
) -> Iterator[Finished]:
    """Drive the flows of several cells, whose engines are of one group, at the same time.

    lanes        drawn only as places become free; None: there may be more later
    concurrency  queries alive at a time, of all lanes; earlier lanes are admitted first
    read_cache   False asks the engine for everything (latency runs) but still stores
    Equal requests in flight at the same time are asked once.
    """
    loop = _Loop(lanes, cache, read_cache)
    try:
        while True:
            more = loop.admit(concurrency)
            yield from loop.advance()
            if loop.ready or (more and len(loop.alive) < concurrency):
                continue
            if loop.alive:
                loop.wait()
            elif not loop.open:
                return
    finally:
        for query in loop.alive.values():
            query.flow.close()


def replay(
    flow: Flow, cache: Store, key: Callable[[Request], bytes]
) -> tuple[dict[bytes, Completion], Request | None]:
    """Go as far as the cache has answers: those, and the first request without one, if any."""
    known: dict[bytes, Completion] = {}
    try:
        requests = next(flow)
        while True:
            keys = [key(request) for request in requests]
            known |= cache.get_many(keys)
            for name, request in zip(keys, requests):
                if name not in known:
                    return known, request
            requests = flow.send([known[name] for name in keys])
    except StopIteration:
        return known, None
    finally:
        flow.close()


class _Loop:
    def __init__(self, lanes: Iterable[Lane | None], cache: Store, read_cache: bool) -> None:
        self.cache, self.read_cache = cache, read_cache
        self.lanes: list[Lane] = []
        self.source = self._drawn(lanes)
        self.open = True
        self.alive: dict[tuple[int, str], _Query] = {}
        self.ready: deque[_Query] = deque()
        self.waiting: dict[bytes, list[tuple[_Query, _Ask]]] = {}
        self.numbers: dict[int, bytes] = {}
        self.submitted = 0

    def _drawn(self, lanes: Iterable[Lane | None]) -> Iterator[tuple[int, str, Flow] | None]:
        for lane in lanes:
            if lane is None:
                yield None
                continue
            self.lanes.append(lane)
            number = len(self.lanes) - 1
            yield from ((number, qid, flow) for qid, flow in lane.flows)
        self.open = False

    def admit(self, concurrency: int) -> bool:
        """Fill the free places; False if there is nothing more for now."""
        while self.open and len(self.alive) < concurrency:
            admitted = time.perf_counter()  # its texts are prepared by `next`
            if (item := next(self.source, None)) is None:
                return False
            query = _Query(*item, admitted)
            self.alive[query.lane, query.qid] = query
            self.ready.append(query)
        return self.open

    def advance(self) -> Iterator[Finished]:
        """Move every ready query one step, then dispatch all their new requests in one batch."""
        fresh: list[tuple[_Query, _Ask]] = []
        for _ in range(len(self.ready)):
            query = self.ready.popleft()
            try:
                fresh += [(query, ask) for ask in self._step(query)]
            except StopIteration as stop:
                del self.alive[query.lane, query.qid]
                yield Finished(query.lane, _outcome(query, stop.value))
        self._dispatch(fresh)

    def _step(self, query: _Query) -> list[_Ask]:
        """One send into the generator; one that breaks the protocol is named."""
        if query.round:
            requests = query.flow.send([ask.completion for ask in query.asks])
        else:
            requests = next(query.flow)
        if not requests:
            raise RuntimeError(f"{_where(query.flow)} yielded no requests for query {query.qid}")
        query.round += 1
        key = self.lanes[query.lane].key
        query.asks = [_Ask(query.round, key(request), request) for request in requests]
        query.open = len(requests)
        query.log += query.asks
        return query.asks

    def _dispatch(self, fresh: list[tuple[_Query, _Ask]]) -> None:
        unseen = list({ask.key: None for _, ask in fresh if ask.key not in self.waiting})
        stored = self.cache.get_many(unseen) if self.read_cache and unseen else {}
        for query, ask in fresh:
            if ask.key in stored:
                self._deliver(query, ask, stored[ask.key], from_cache=True)
            elif ask.key in self.waiting:
                self.waiting[ask.key].append((query, ask))
            else:
                self.waiting[ask.key] = [(query, ask)]
                self.numbers[self.submitted] = ask.key
                self.lanes[query.lane].engine.submit(self.submitted, ask.request)
                self.submitted += 1

    def wait(self) -> None:
        """Block for answers, store them, and only then hand them on."""
        try:
            done = self.lanes[0].engine.poll()
        except EngineError as error:
            names = ", ".join(qid for _, qid in list(self.alive)[:3])
            more = f" and {len(self.alive) - 3} more" if len(self.alive) > 3 else ""
            raise EngineError(f"{error} (in flight: query {names}{more})") from error
        answered = [(self.numbers.pop(number), completion) for number, completion in done]
        # What did not fit one engine's context may fit another's.
        self.cache.put_many([(k, c) for k, c in answered if c.finish != "too_long"])
        for key, completion in answered:
            for i, (query, ask) in enumerate(self.waiting.pop(key)):
                self._deliver(query, ask, completion, from_cache=i > 0)

    def _deliver(
        self, query: _Query, ask: _Ask, completion: Completion, *, from_cache: bool
    ) -> None:
        ask.completion, ask.from_cache = completion, from_cache
        query.open -= 1
        if not query.open:
            self.ready.append(query)


def _outcome(query: _Query, ranking: object) -> Outcome:
    """Join the calls with what the method understood of them; both are in order of asking."""
    if not isinstance(ranking, Ranking) or len(ranking.parsed) != len(query.log):
        raise RuntimeError(
            f"{_where(query.flow)} must return a Ranking with one Parsed for each of its"
            f" {len(query.log)} calls (query {query.qid})"
        )
    calls = tuple(
        Call(ask.round, ask.key.hex(), ask.request, ask.completion, parsed, ask.from_cache)
        for ask, parsed in zip(query.log, ranking.parsed, strict=True)
    )
    seconds = time.perf_counter() - query.admitted
    return Outcome(query.qid, ranking, calls, query.round, seconds)


def _where(flow: Flow) -> str:
    code = getattr(flow, "gi_code", None)
    return f"{code.co_name} ({code.co_filename}:{code.co_firstlineno})" if code else repr(flow)
