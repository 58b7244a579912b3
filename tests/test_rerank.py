"""The methods: published sorts and windows, their call counts, and what faults do to them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise as pairwise_of
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.prompts import Limits, Prompt, Turn
from harness.rerank import METHODS, listwise, pairwise, pointwise, setwise
from harness.types import Candidate, Completion, Fault, Flow, Query, Ranking, RegistryError, Request

LABEL = Prompt("p", "test", "label", (Turn("user", "{docs}"),), pattern=r"(\[\d+\])")
ORDER = Prompt("p", "test", "permutation", (Turn("user", "{docs}"),), limits=Limits(max_tokens=9))
YESNO = Prompt("p", "test", "yesno", (Turn("user", "{docs}"),), choices=("yes", "no"))

Answer = Callable[[Request], str | tuple[float, ...]]


def make_query(count: int, qid: str = "q") -> Query:
    return Query(qid, "text", tuple(Candidate(f"d{i}", f"t{i}") for i in range(count)), "data")


def drive(flow: Flow, answer: Answer) -> tuple[Ranking, list[list[Request]]]:
    """Run a flow to its end; returns the ranking and the requests of every round."""
    rounds = []
    try:
        requests = next(flow)
        while True:
            rounds.append(requests)
            said = [answer(r) for r in requests]
            requests = flow.send(
                [Completion(text=s) if isinstance(s, str) else Completion(scores=s) for s in said]
            )
    except StopIteration as stop:
        return stop.value, rounds


def best_of(relevance: list[float]) -> Answer:
    """A perfect judge: the label of the most relevant shown document."""

    def answer(request: Request) -> str:
        grades = [relevance[int(docid[1:])] for docid in request.shown]
        return f"[{grades.index(max(grades)) + 1}]"

    return answer


def sorted_by(relevance: list[float]) -> Answer:
    def answer(request: Request) -> str:
        shown = [relevance[int(docid[1:])] for docid in request.shown]
        order = sorted(range(len(shown)), key=lambda i: -shown[i])
        return " > ".join(f"[{i + 1}]" for i in order)

    return answer


def published_heapsort(relevance: list[float], children: int, k: int) -> tuple[list[int], list]:
    """The published control flow, written out from its description, as the reference."""
    a, asked = list(range(len(relevance))), []

    def heapify(n: int, i: int) -> None:
        if children * i + 1 >= n:
            return
        inds = [i] + [j for j in range(children * i + 1, children * (i + 1) + 1) if j < n]
        asked.append(sorted(a[j] for j in inds))
        winner = max(range(len(inds)), key=lambda w: relevance[a[inds[w]]])
        if inds[winner] != i:
            a[i], a[inds[winner]] = a[inds[winner]], a[i]
            heapify(n, inds[winner])

    n = len(a)
    for i in range(n // children, -1, -1):
        heapify(n, i)
    for ranked, i in enumerate(range(n - 1, 0, -1), 1):
        a[i], a[0] = a[0], a[i]
        if ranked == k:
            break
        heapify(i, 0)
    top = a[::-1][:k]
    return top + [i for i in range(n) if i not in top], asked


def test_heapsort_reproduces_the_golden_trace() -> None:
    relevance = [3, 6, 1, 5, 2, 7, 4]
    flow = setwise.heapsort(make_query(7), LABEL, num_child=2, k=3)
    ranking, rounds = drive(flow, best_of(relevance))
    assert ranking.docids == ("d5", "d1", "d3", "d0", "d2", "d4", "d6")
    asked = [[d[1:] for d in r.shown] for requests in rounds for r in requests]
    assert [list(map(int, s)) for s in asked] == [
        [2, 5, 6], [1, 3, 4], [0, 1, 5], [0, 2, 6], [0, 1, 6], [0, 3, 4], [2, 3, 6], [2, 0, 4],
    ]  # fmt: skip
    assert len(rounds[0]) == 2, "the two nodes of a heap level go out together"


@given(
    st.integers(0, 130), st.integers(1, 25), st.integers(1, 15), st.integers(0, 1000), st.booleans()
)
def test_heapsort_asks_the_published_sets_and_reaches_the_published_ranking(
    count: int, children: int, k: int, seed: int, shuffle: bool
) -> None:
    relevance = [float(x) for x in Random(seed).sample(range(count), count)]
    expected, asked = published_heapsort(relevance, children, k)
    flow = setwise.heapsort(make_query(count), LABEL, num_child=children, k=k, shuffle=shuffle)
    ranking, rounds = drive(flow, best_of(relevance))
    assert [int(d[1:]) for d in ranking.docids] == expected
    shown = [sorted(int(d[1:]) for d in r.shown) for requests in rounds for r in requests]
    assert sorted(shown) == sorted(asked)


@pytest.mark.parametrize(
    ("count", "children", "calls"),
    [(20, 19, 10), (11, 19, 10), (10, 19, 9), (5, 19, 4), (2, 19, 1), (1, 19, 0), (0, 19, 0)],
)
def test_small_lists_cost_the_published_calls(count: int, children: int, calls: int) -> None:
    flow = setwise.heapsort(make_query(count), LABEL, num_child=children, k=10)
    ranking, rounds = drive(flow, best_of([float(i) for i in range(count)]))
    assert len(ranking.parsed) == sum(map(len, rounds)) == calls


@pytest.mark.parametrize(
    ("count", "children", "low", "high", "mean"),
    [
        (100, 19, 19, 25, 23.3),
        (60, 19, 15, 23, 19.9),
        (100, 9, 29, 35, 31.4),
        (100, 3, 75, 85, 81.7),
    ],
)
def test_the_mean_number_of_calls_is_the_published_one(
    count: int, children: int, low: int, high: int, mean: float
) -> None:
    calls = []
    for seed in range(60):
        relevance = [float(x) for x in Random(seed).sample(range(count), count)]
        flow = setwise.heapsort(make_query(count), LABEL, num_child=children, k=10)
        calls.append(len(drive(flow, best_of(relevance))[0].parsed))
    assert low <= min(calls)
    assert max(calls) <= high
    assert sum(calls) / len(calls) == pytest.approx(mean, abs=0.7)


def test_a_list_in_perfect_order_costs_19_calls() -> None:
    flow = setwise.heapsort(make_query(100), LABEL, num_child=19, k=10)
    assert len(drive(flow, best_of([-float(i) for i in range(100)]))[0].parsed) == 19


def test_unparsable_answers_promote_the_tail_under_the_published_policy_only() -> None:
    query = make_query(100)
    root = setwise.heapsort(query, LABEL, num_child=19, k=10, on_unparsable="root")
    ranking, rounds = drive(root, lambda r: "no idea")
    places = [int(d[1:]) for d in ranking.docids[:10]]
    assert places == [0, 99, 98, 97, 96, 95, 94, 93, 92, 91]
    assert sum(map(len, rounds)) == 15
    safe = setwise.heapsort(query, LABEL, num_child=19, k=10)
    ranking, _ = drive(safe, lambda r: "no idea")
    assert ranking.docids == tuple(f"d{i}" for i in range(100))
    assert all(p.faults == (Fault.UNPARSABLE,) for p in ranking.parsed)


def test_retry_asks_an_unparsable_set_a_second_time_and_counts_it() -> None:
    seen: set[Request] = set()

    def second_time_lucky(request: Request) -> str:
        if request.shown in seen:
            return "[2]"
        seen.add(request.shown)
        return "mumble"

    flow = setwise.heapsort(make_query(2), LABEL, num_child=2, on_unparsable="retry")
    ranking, _ = drive(flow, second_time_lucky)
    assert ranking.docids == ("d1", "d0")
    assert ranking.parsed[1].faults == (Fault.RETRIED,)


def test_the_shuffle_depends_on_the_set_asked_and_not_on_history() -> None:
    def shown(qids: list[str]) -> dict[str, list[tuple[str, ...]]]:
        out = {}
        for qid in qids:
            flow = setwise.heapsort(make_query(20, qid), LABEL, num_child=9, k=3, shuffle=True)
            rounds = drive(flow, best_of([float(i * 7 % 20) for i in range(20)]))[1]
            out[qid] = [r.shown for requests in rounds for r in requests]
        return out

    assert shown(["a", "b", "c"]) == dict(reversed(shown(["c", "b", "a"]).items()))
    assert shown(["a"])["a"] != shown(["b"])["b"]
    assert any(list(order) != sorted(order) for order in shown(["a"])["a"])


def test_permutations_vote_and_a_tie_goes_to_the_better_first_stage_document() -> None:
    votes = iter(["[1]", "[2]", "mumble"])
    flow = setwise.heapsort(make_query(2), LABEL, num_child=2, permutations=3)
    ranking, rounds = drive(flow, lambda r: next(votes))
    assert len(rounds[0]) == 3
    assert ranking.docids == ("d0", "d1")


def test_setwise_with_twenty_children_is_refused_by_a_prompt_with_twenty_labels() -> None:
    prompt = Prompt("p", "test", "label", (Turn("user", "{docs}"),), pattern="x", most=20)
    with pytest.raises(Exception, match="labels for 20 passages, 21 were shown"):
        drive(setwise.heapsort(make_query(30), prompt, num_child=20), lambda r: "[1]")


@pytest.mark.parametrize(("children", "mean"), [(2, 463), (3, 306), (9, 97)])
def test_bubblesort_is_exact_and_costs_the_published_calls(children: int, mean: float) -> None:
    calls = []
    for seed in range(12):
        relevance = [float(x) for x in Random(seed).sample(range(100), 100)]
        flow = setwise.bubblesort(make_query(100), LABEL, num_child=children, k=10)
        ranking, _ = drive(flow, best_of(relevance))
        top = sorted(range(100), key=lambda i: -relevance[i])[:10]
        assert [int(d[1:]) for d in ranking.docids[:10]] == top
        calls.append(len(ranking.parsed))
    assert sum(calls) / len(calls) == pytest.approx(mean, rel=0.06)


@given(st.integers(0, 60), st.integers(1, 20), st.integers(1, 12), st.integers(0, 99))
def test_bubblesort_always_ends_with_a_permutation(
    count: int, children: int, k: int, seed: int
) -> None:
    rng = Random(seed)
    flow = setwise.bubblesort(make_query(count), LABEL, num_child=children, k=k)
    ranking, _ = drive(flow, lambda r: f"[{rng.randint(1, len(r.shown))}]")
    assert sorted(ranking.docids) == sorted(f"d{i}" for i in range(count))


def test_unparsable_bubblesort_keeps_the_first_stage() -> None:
    flow = setwise.bubblesort(make_query(30), LABEL, num_child=3)
    ranking, _ = drive(flow, lambda r: "")
    assert ranking.docids == tuple(f"d{i}" for i in range(30))


WINDOWS = [(80, 100), (70, 90), (60, 80), (50, 70), (40, 60), (30, 50), (20, 40), (10, 30), (0, 20)]


@pytest.mark.parametrize(
    ("count", "clamped", "last", "rearank"),
    [(100, 9, (0, 20), 9), (99, 9, (0, 19), 8), (95, 9, (0, 15), 8), (50, 4, (0, 20), 4),
     (25, 2, (0, 15), 1), (20, 1, (0, 20), 1), (19, 1, (0, 19), 0), (10, 1, (0, 10), 0)],
)  # fmt: skip
def test_windows_are_those_of_the_published_table(
    count: int, clamped: int, last: tuple[int, int], rearank: int
) -> None:
    bounds = list(listwise.window_bounds(count, 20, 10))
    assert len(bounds) == clamped
    assert bounds[-1] == last
    assert len(list(listwise.window_bounds(count, 20, 10, "rearank"))) == rearank


def test_a_hundred_candidates_give_the_nine_windows() -> None:
    assert list(listwise.window_bounds(100, 20, 10)) == WINDOWS
    assert list(listwise.window_bounds(100, 20, 10, "rearank")) == WINDOWS


@given(st.integers(0, 300), st.integers(2, 40), st.data())
def test_clamped_windows_show_every_document(count: int, size: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, size - 1))  # without overlap a lone head asks nothing
    bounds = list(listwise.window_bounds(count, size, stride))
    shown = {i for start, end in bounds for i in range(start, end)}
    assert shown == (set(range(count)) if count > 1 else set())
    assert all(0 <= start < end <= count and end - start <= size for start, end in bounds)


def test_the_window_carries_the_best_document_to_the_top() -> None:
    relevance = [float(i) for i in range(100)]
    ranking, rounds = drive(listwise.sliding_window(make_query(100), ORDER), sorted_by(relevance))
    assert ranking.docids[:10] == tuple(f"d{i}" for i in range(99, 89, -1))
    assert len(rounds) == 9


def test_enough_passes_sort_the_whole_list() -> None:
    relevance = [float(i) for i in range(30)]
    flow = listwise.sliding_window(make_query(30), ORDER, size=10, stride=5, passes=6)
    assert drive(flow, sorted_by(relevance))[0].docids == tuple(f"d{29 - i}" for i in range(30))


def test_a_stride_larger_than_the_window_is_an_error() -> None:
    with pytest.raises(RegistryError, match="stride 5 is larger than size 4"):
        drive(listwise.sliding_window(make_query(30), ORDER, size=4, stride=5), lambda r: "")


def test_allpairs_asks_each_pair_in_both_orders_at_once() -> None:
    relevance = [2.0, 5.0, 3.0, 4.0]
    ranking, rounds = drive(pairwise.allpairs(make_query(4), LABEL), best_of(relevance))
    assert [len(r) for r in rounds] == [12]
    assert ranking.docids == ("d1", "d3", "d2", "d0")


def test_a_judge_that_always_says_the_first_decides_nothing() -> None:
    for method in (pairwise.allpairs, pairwise.heapsort):
        ranking, _ = drive(method(make_query(5), LABEL), lambda r: "[1]")
        assert set(ranking.docids) == {f"d{i}" for i in range(5)}
    ranking, _ = drive(pairwise.allpairs(make_query(5), LABEL), lambda r: "[1]")
    assert ranking.docids == tuple(f"d{i}" for i in range(5))


@given(st.integers(0, 25), st.integers(1, 12), st.integers(0, 99))
def test_pairwise_heapsort_finds_the_exact_top(count: int, k: int, seed: int) -> None:
    relevance = [float(x) for x in Random(seed).sample(range(count), count)]
    ranking, _ = drive(pairwise.heapsort(make_query(count), LABEL, k=k), best_of(relevance))
    best = sorted(range(count), key=lambda i: -relevance[i])
    assert [int(d[1:]) for d in ranking.docids[:k]] == best[:k]


def test_pointwise_sorts_by_score_and_unscored_passages_sink() -> None:
    scores = {"d0": (-3.0, 0.0), "d1": (), "d2": (1.0, 0.0), "d3": (-3.0, 0.0)}
    flow = pointwise.score_each(make_query(4), YESNO)
    ranking, rounds = drive(flow, lambda r: scores[r.shown[0]])
    assert ranking.docids == ("d2", "d0", "d3", "d1")
    assert [len(r) for r in rounds] == [4]
    assert ranking.parsed[1].faults == (Fault.UNPARSABLE,)


def test_pointwise_reasoning_closes_a_thought_that_gave_no_verdict() -> None:
    prompt = Prompt(
        "p", "test", "reasoning", text="Is it? <think>", choices=(" true", " false"),
        stop=("</think> true", "</think> false"), limits=Limits(max_tokens=9),
    )  # fmt: skip
    flow = pointwise.reason_then_score(make_query(3), prompt)
    assert len(next(flow)) == 3
    [forced_a, forced_b] = flow.send(
        [
            Completion(text="First. And then", finish="length", scores=(5.0, 0.0)),
            Completion(text="Yes.</think> true", scores=(-0.5, -1.0)),
            Completion(text="Hm. No verdict", scores=(9.0, 0.0)),
        ]
    )
    assert forced_a.text == "Is it? <think>\nFirst.\n</think>"
    assert forced_b.text == "Is it? <think>\nHm.\n</think>"
    assert forced_a.max_tokens == 0
    scored = [Completion(finish="scored", scores=s) for s in ((0.0, -1.0), (-2.0, 0.0))]
    with pytest.raises(StopIteration) as stop:
        flow.send(scored)
    ranking = stop.value.value
    assert ranking.docids == ("d0", "d1", "d2"), "what was scored in a cut-off thought is no score"
    assert [p.faults for p in ranking.parsed] == [
        (Fault.CUT_OFF,), (), (Fault.UNPARSABLE,), (Fault.RETRIED,), (Fault.RETRIED,),
    ]  # fmt: skip


@pytest.mark.parametrize("name", list(METHODS))
@pytest.mark.parametrize("count", [0, 1])
def test_nothing_is_asked_about_less_than_two_candidates_except_by_pointwise(
    name: str, count: int
) -> None:
    if name.startswith("pointwise"):
        prompt = YESNO
    else:
        prompt = ORDER if name.startswith("listwise") else LABEL
    ranking, rounds = drive(METHODS[name].flow(make_query(count), prompt), lambda r: (0.0, 0.0))
    assert ranking.docids == tuple(f"d{i}" for i in range(count))
    assert len(rounds) == (count if name.startswith("pointwise") else 0)


def test_the_oracle_sorts_by_grade_and_keeps_first_stage_order_among_equals() -> None:
    query = Query("q", "", make_query(4).candidates, "d", {"d1": 1, "d3": 3})
    assert drive(METHODS["oracle"].flow(query, None), lambda r: "")[0].docids == (
        "d3", "d1", "d0", "d2",
    )  # fmt: skip


def test_the_random_order_of_a_query_does_not_depend_on_the_other_queries() -> None:
    first = drive(METHODS["random"].flow(make_query(20, "a"), None), lambda r: "")[0]
    again = drive(METHODS["random"].flow(make_query(20, "a"), None), lambda r: "")[0]
    other = drive(METHODS["random"].flow(make_query(20, "b"), None), lambda r: "")[0]
    assert first.docids == again.docids != other.docids


def test_scores_strictly_decrease() -> None:
    scores = make_query(5).ranking([3, 1, 0, 2, 4]).scores
    assert all(a > b for a, b in pairwise_of(scores))


def test_an_order_that_is_no_permutation_is_an_exception() -> None:
    with pytest.raises(ValueError, match="not a permutation"):
        make_query(3).ranking([0, 0, 1])


def test_a_window_that_does_not_fit_is_asked_again_with_fewer_words_and_counted() -> None:
    limits = Limits(unit="words", passage=300, max_tokens=9, context=100, shrink=True)
    prompt = Prompt("p", "test", "permutation", (Turn("user", "{docs}"),), limits=limits)
    long = tuple(Candidate(f"d{i}", "word " * 50) for i in range(2))
    flow = listwise.sliding_window(Query("q", "text", long), prompt)
    requests, asked = next(flow), []
    while True:
        words = len(requests[0].messages[0].content.split())
        asked.append(words)
        fits = words + 10 <= 100
        answer = (
            Completion(text="[2] > [1]")
            if fits
            else Completion(finish="too_long", prompt_tokens=words)
        )
        try:
            requests = flow.send([answer])
        except StopIteration as stop:
            ranking = stop.value
            break
    assert asked == sorted(asked, reverse=True)
    assert len(asked) > 2
    assert ranking.docids == ("d1", "d0")
    assert [p.faults for p in ranking.parsed[:-1]] == [(Fault.SHORTENED,)] * (len(asked) - 1)


def test_shortening_ends_when_even_one_word_does_not_fit() -> None:
    limits = Limits(unit="words", passage=300, max_tokens=9, context=5, shrink=True)
    prompt = Prompt("p", "test", "permutation", (Turn("user", "{docs}"),), limits=limits)
    flow = listwise.sliding_window(
        Query("q", "t", (Candidate("a", "x y"), Candidate("b", "z"))), prompt
    )
    next(flow)
    answers = iter([Completion(finish="too_long", prompt_tokens=99)] * 100)

    def until_it_ends() -> None:
        for answer in answers:
            flow.send([answer])

    with pytest.raises(StopIteration) as stop:
        until_it_ends()
    assert stop.value.value.docids == ("a", "b")
    assert stop.value.value.parsed[-1].faults == (Fault.TOO_LONG,)
    assert next(answers, None) is not None, "it ended by itself"
