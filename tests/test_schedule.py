"""The loop: nothing is lost, asked twice or answered out of place."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import schedule
from harness.cache import Cache, Identity
from harness.engines.fake import FakeEngine
from harness.prompts import Limits, Prompt, Turn
from harness.rerank import listwise, pairwise, pointwise, setwise
from harness.types import (
    Candidate,
    EngineError,
    Flow,
    ModelSpec,
    Outcome,
    Parsed,
    Query,
    Ranking,
    Request,
)

SPEC = ModelSpec("fake", "setwise.heapsort")
LABEL = Prompt(
    "p", "t", "label", (Turn("user", "{query} {docs}"),), pattern=r"(\[\d+\])",
    limits=Limits(max_tokens=9),
)  # fmt: skip
ORDER = Prompt(
    "p", "t", "permutation", (Turn("user", "{query} [] > [] {docs}"),), limits=Limits(max_tokens=9)
)
SCORE = Prompt("p", "t", "likelihood", text="{query} {text}", continuation=" {query}")


def queries(count: int = 7) -> list[Query]:
    return [
        Query(
            f"q{n}",
            f"query {n}",
            tuple(Candidate(f"q{n}-d{i}", f"text {i}") for i in range(5 * n)),
            "data",
        )
        for n in range(count)
    ]


def flows(kind: str = "setwise") -> Iterator[tuple[str, Flow]]:
    for query in queries():
        if kind == "setwise":
            yield query.qid, setwise.heapsort(query, LABEL, num_child=3, k=5, shuffle=True)
        elif kind == "listwise":
            yield query.qid, listwise.sliding_window(query, ORDER, size=6, stride=3)
        elif kind == "pairwise":
            yield query.qid, pairwise.heapsort(query, LABEL, k=3)
        else:
            yield query.qid, pointwise.score_each(query, SCORE)


def drive(engine: FakeEngine, cache: Cache, kind: str = "setwise", slots: int = 4) -> list[Outcome]:
    key = Identity(engine.fingerprint).key
    return list(schedule.run(flows(kind), engine, cache, key=key, concurrency=slots))


def rankings(outcomes: list[Outcome]) -> dict[str, tuple[str, ...]]:
    return {o.qid: o.ranking.docids for o in outcomes}


@pytest.mark.parametrize("kind", ["setwise", "listwise", "pairwise", "pointwise"])
def test_the_order_of_completions_does_not_change_a_ranking(kind: str) -> None:
    expected = rankings(drive(FakeEngine(SPEC, mode="noisy"), Cache(None), kind, 1))
    for seed in range(8):
        engine = FakeEngine(SPEC, mode="noisy", seed=seed, lump=5)
        assert rankings(drive(engine, Cache(None), kind, 1 + seed)) == expected


@pytest.mark.parametrize("kind", ["setwise", "listwise", "pairwise", "pointwise"])
@pytest.mark.parametrize("mode", ["oracle", "garbled", "cut-off"])
def test_a_replay_asks_the_engine_nothing(kind: str, mode: str) -> None:
    cache = Cache(None)
    first = drive(FakeEngine(SPEC, mode=mode), cache, kind)
    engine = FakeEngine(SPEC, mode=mode)
    second = drive(engine, cache, kind)
    assert engine.asked == []
    assert rankings(second) == rankings(first)
    assert all(call.from_cache for o in second for call in o.calls)
    strip = [
        [(c.round, c.key, c.parsed) for c in o.calls] for o in sorted(first, key=lambda o: o.qid)
    ]
    again = [
        [(c.round, c.key, c.parsed) for c in o.calls] for o in sorted(second, key=lambda o: o.qid)
    ]
    assert strip == again


def test_a_run_resumes_after_the_engine_died_at_every_point() -> None:
    whole = FakeEngine(SPEC)
    expected = rankings(drive(whole, Cache(None)))
    for survive in range(len(whole.asked)):
        cache = Cache(None)
        with pytest.raises(EngineError, match="in flight: query"):
            drive(FakeEngine(SPEC, mode="dying", survive=survive), cache)
        assert cache.count() == survive, "every answer is stored before it is used"
        engine = FakeEngine(SPEC)
        engine.fingerprint = FakeEngine(SPEC, mode="dying").fingerprint
        assert rankings(drive(engine, cache)) == expected
        assert len(engine.asked) == len(whole.asked) - survive


def test_equal_requests_in_flight_are_asked_once() -> None:
    query = queries()[3]
    twins = [
        ("a", setwise.heapsort(query, LABEL, num_child=3)),
        ("b", setwise.heapsort(query, LABEL, num_child=3)),
    ]
    engine, cache = FakeEngine(SPEC), Cache(None)
    key = Identity(engine.fingerprint).key
    outcomes = list(schedule.run(twins, engine, cache, key=key, concurrency=2))
    assert len(set(engine.asked)) == len(engine.asked) == cache.count()
    assert len({o.ranking.docids for o in outcomes}) == 1
    assert sum(c.from_cache for o in outcomes for c in o.calls) == len(engine.asked)


def test_no_more_queries_are_alive_than_asked_for() -> None:
    alive: set[str] = set()
    most = 0

    def watched(qid: str, flow: Flow) -> Flow:
        nonlocal most
        alive.add(qid)
        most = max(most, len(alive))
        ranking = yield from flow
        alive.discard(qid)
        return ranking

    engine = FakeEngine(SPEC)
    key = Identity(engine.fingerprint).key
    source = ((qid, watched(qid, flow)) for qid, flow in flows())
    done = list(schedule.run(source, engine, Cache(None), key=key, concurrency=3))
    assert most == 3
    assert len(done) == 7


def test_generators_are_closed_when_the_engine_fails() -> None:
    closed = []

    def watched() -> Flow:
        try:
            yield [Request(text="a", max_tokens=1)]
        finally:
            closed.append(True)
        return Ranking(())

    engine = FakeEngine(SPEC, mode="dying")
    with pytest.raises(EngineError):
        list(
            schedule.run(
                [("a", watched()), ("b", watched())],
                engine,
                Cache(None),
                key=Identity(engine.fingerprint).key,
                concurrency=2,
            )
        )
    assert closed == [True, True]


def test_rounds_are_the_serial_depth() -> None:
    outcomes = drive(FakeEngine(SPEC), Cache(None), "pointwise")
    assert {o.rounds for o in outcomes if o.qid != "q0"} == {1}
    listwise_rounds = {
        o.qid: (o.rounds, len(o.calls)) for o in drive(FakeEngine(SPEC), Cache(None), "listwise")
    }
    assert listwise_rounds["q6"] == (9, 9)


def test_a_latency_run_does_not_read_the_cache_and_still_stores() -> None:
    cache = Cache(None)
    drive(FakeEngine(SPEC), cache)
    stored, engine = cache.count(), FakeEngine(SPEC)
    key = Identity(engine.fingerprint).key
    done = list(schedule.run(flows(), engine, cache, key=key, concurrency=1, read_cache=False))
    assert len(engine.asked) == stored == cache.count()
    assert not any(call.from_cache for o in done for call in o.calls)


def run_one(flow: Flow) -> None:
    engine = FakeEngine(SPEC)
    key = Identity(engine.fingerprint).key
    list(schedule.run([("q", flow)], engine, Cache(None), key=key, concurrency=1))


def test_a_method_that_forgets_to_explain_a_call_is_named_by_file_and_line() -> None:
    def forgetful() -> Flow:
        yield [Request(text="a", continuation="b", shown=("d",))]
        return Ranking(("d",))

    with pytest.raises(
        RuntimeError, match=r"forgetful .*test_schedule\.py:\d+.* one Parsed for each of its 1"
    ):
        run_one(forgetful())


def test_a_method_that_yields_nothing_is_an_exception_and_not_an_endless_loop() -> None:
    def empty() -> Flow:
        yield []
        return Ranking((), (Parsed(),))

    with pytest.raises(RuntimeError, match="yielded no requests for query q"):
        run_one(empty())


def test_a_file_cache_survives_the_process(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "calls.sqlite")
    expected = rankings(drive(FakeEngine(SPEC), cache))
    cache.close()
    engine = FakeEngine(SPEC)
    assert rankings(drive(engine, Cache(tmp_path / "calls.sqlite"))) == expected
    assert engine.asked == []


def test_a_reversed_judge_reaches_the_mirror_of_the_true_one() -> None:
    def sorted_by_windows(mode: str) -> tuple[str, ...]:
        query = queries()[4]
        flow = listwise.sliding_window(query, ORDER, size=6, stride=3, passes=9)
        engine = FakeEngine(SPEC, mode=mode)
        key = Identity(engine.fingerprint).key
        [done] = schedule.run([("q4", flow)], engine, Cache(None), key=key, concurrency=1)
        return done.ranking.docids

    assert sorted_by_windows("reversed") == sorted_by_windows("oracle")[::-1]
