"""Budget curves: a stored trace, replayed and stopped, between the first stage and the run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from harness import budget, measure, schedule
from harness.cache import Cache, Identity
from harness.engines.fake import FakeEngine
from harness.prompts import Limits, Prompt, Turn
from harness.rerank import listwise, pairwise, pointwise, setwise
from harness.types import Candidate, DataError, Flow, ModelSpec, Outcome, Query

LABEL = Prompt(
    "p", "t", "label", (Turn("user", "{query} {docs}"),), pattern=r"(\[\d+\])",
    limits=Limits(max_tokens=9),
)  # fmt: skip
ORDER = Prompt(
    "p", "t", "permutation", (Turn("user", "{query} [] > [] {docs}"),), limits=Limits(max_tokens=9)
)
SCORE = Prompt("p", "t", "likelihood", text="{query} {text}", continuation=" {query}")
REASON = Prompt(
    "p", "t", "reasoning", text="{query} {text} true false", choices=("true", "false"),
    stop=(" true", " false"), limits=Limits(max_tokens=9),
)  # fmt: skip
METHODS: dict[str, tuple[Callable[..., Flow], Prompt]] = {
    "setwise": (partial(setwise.heapsort, num_child=3, k=5, shuffle=True), LABEL),
    "retrying": (partial(setwise.heapsort, num_child=3, on_unparsable="retry"), LABEL),
    "voting": (partial(setwise.heapsort, num_child=3, permutations=2, shuffle=True), LABEL),
    "root wins": (partial(setwise.heapsort, num_child=3, on_unparsable="root"), LABEL),
    "bubble": (partial(setwise.bubblesort, num_child=3, k=4), LABEL),
    "listwise": (partial(listwise.sliding_window, size=6, stride=3, passes=2), ORDER),
    "duels": (partial(pairwise.heapsort, k=4), LABEL),
    "all pairs": (partial(pairwise.allpairs), LABEL),
    "likelihood": (pointwise.score_each, SCORE),
    "reasoning": (pointwise.reason_then_score, REASON),
}
QUERIES = [
    Query(f"q{n}", "query", tuple(Candidate(f"q{n}-d{i}", f"text {i}") for i in range(count)), "d")
    for n, count in enumerate((1, 4, 11, 12))
]
QRELS = {q.qid: {c.docid: i % 4 for i, c in enumerate(q.candidates)} for q in QUERIES}


def run(name: str, mode: str = "noisy") -> list[Outcome]:
    method, prompt = METHODS[name]
    engine = FakeEngine(ModelSpec("fake", name), mode=mode)
    flows = [(q.qid, method(q, prompt)) for q in QUERIES]
    key = Identity(engine.fingerprint).key
    done = {o.qid: o for o in schedule.run(flows, engine, Cache(None), key=key, concurrency=4)}
    return [done[q.qid] for q in QUERIES]


def trace(outcomes: list[Outcome]) -> list[dict[str, Any]]:
    """The lines of trace.jsonl.gz, as far as a replay reads them."""
    return [
        {
            "qid": o.qid, "docids": list(call.request.shown), "order": list(call.parsed.order),
            "score": call.parsed.score, "faults": [str(f) for f in call.parsed.faults],
            "prompt_tokens": 100, "generated_tokens": 10,
        }
        for o in outcomes for call in o.calls
    ]  # fmt: skip


def curve(name: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    method, prompt = METHODS[name]
    kind = prompt.answer
    return list(budget.curve(method, kind, QUERIES, rows, QRELS, "nDCG@10"))


def ndcg(rankings: dict[str, tuple[str, ...]]) -> float:
    scores = {qid: {d: -float(n) for n, d in enumerate(ids)} for qid, ids in rankings.items()}
    return measure.mean(measure.per_query(scores, QRELS, ["nDCG@10"], list(scores))["nDCG@10"])


@pytest.mark.parametrize("mode", ["noisy", "garbled"])
@pytest.mark.parametrize("name", METHODS)
def test_a_curve_begins_at_the_first_stage_and_ends_at_the_run(name: str, mode: str) -> None:
    outcomes = run(name, mode)
    first, *_, last = curve(name, trace(outcomes))
    assert first["nDCG@10"] == ndcg({q.qid: tuple(c.docid for c in q.candidates) for q in QUERIES})
    assert (first["calls"], first["tokens"]) == (0, 0)
    assert last["nDCG@10"] == ndcg({o.qid: o.ranking.docids for o in outcomes})
    assert last["calls"] == sum(len(o.calls) for o in outcomes) / len(QUERIES)
    assert last["tokens"] == 110 * last["calls"]


@pytest.mark.parametrize("name", METHODS)
def test_the_whole_trace_gives_every_rank_of_the_run(name: str) -> None:
    method, prompt = METHODS[name]
    outcomes = run(name)
    for query, outcome in zip(QUERIES, outcomes):
        docids = budget.stopped(method, prompt.answer, query, trace([outcome]))
        assert docids == outcome.ranking.docids


def test_a_sort_that_is_stopped_keeps_the_ranks_it_has_found() -> None:
    method, query = METHODS["setwise"][0], QUERIES[3]
    outcome = run("setwise", "reversed")[3]
    whole, rows = outcome.ranking.docids, trace([outcome])
    stops = [budget.stopped(method, "label", query, rows[:n]) for n in range(len(rows) + 1)]
    equal = [next((i for i, (a, b) in enumerate(zip(s, whole)) if a != b), 12) for s in stops]
    assert equal == sorted(equal), "no later call takes back a rank that was right"
    assert equal[0] == 0
    assert equal[-1] == 12


def test_a_window_that_was_not_asked_stays_as_it_was() -> None:
    method = METHODS["listwise"][0]
    outcome = run("listwise", "oracle")[3]
    order = budget.stopped(method, "permutation", QUERIES[3], trace([outcome])[:1])
    assert order[:6] == tuple(c.docid for c in QUERIES[3].candidates[:6])
    assert order[6:] != tuple(c.docid for c in QUERIES[3].candidates[6:])


def test_passages_without_a_score_stay_behind_those_with_one() -> None:
    outcome = run("likelihood", "oracle")[2]
    rows = trace([outcome])[:3]
    order = budget.stopped(METHODS["likelihood"][0], "likelihood", QUERIES[2], rows)
    assert set(order[:3]) == {"q2-d0", "q2-d1", "q2-d2"}
    assert order[3:] == tuple(f"q2-d{i}" for i in range(3, 11))


def test_a_long_curve_has_some_twenty_points_and_a_short_one_all() -> None:
    assert [row["budget"] for row in curve("listwise", trace(run("listwise")))] == list(range(7))
    budgets = [row["budget"] for row in curve("all pairs", trace(run("all pairs")))]
    assert len(budgets) == budget.POINTS + 1
    assert budgets[-1] == 12 * 11


def test_a_trace_of_something_else_is_refused() -> None:
    rows = trace(run("setwise"))
    with pytest.raises(DataError, match="did not ask q1-d0: it is of another"):
        curve("likelihood", rows)


def test_a_window_that_was_asked_again_with_fewer_words_costs_both_calls() -> None:
    method, query = METHODS["listwise"][0], QUERIES[3]
    rows = trace([run("listwise", "oracle")[3]])
    too_long = {**rows[0], "order": list(range(6)), "faults": ["shortened"]}
    again = [too_long, *rows]
    whole = budget.stopped(method, "permutation", query, rows)
    assert budget.stopped(method, "permutation", query, again) == whole
    assert budget.stopped(method, "permutation", query, again[:1]) == tuple(
        c.docid for c in query.candidates
    )
