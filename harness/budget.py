"""What a ranking is worth when its calls stop earlier: a cell's trace replayed up to a budget.

From the stop on, the first stage answers in the model's place: it names the best document of a
set as it ranked them, leaves a window's order as it is, and gives a passage no score. So a budget
of 0 gives the first stage itself and a full one the cell's own ranking, for every method, and no
method has to know. It must not know engines, caches or results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from harness import measure
from harness.types import Candidate, Completion, DataError, Fault, Flow, Parsed, Query, Request

POINTS = 20  # budgets of a curve beside 0; a method of fewer calls has one for each
Row = Mapping[str, Any]  # a line of trace.jsonl.gz
Asks = Callable[[Query, Any], Flow]  # a method with its options


@dataclass(frozen=True, slots=True)
class _Known(Completion):
    """An answer that was understood before."""

    parsed: Parsed = field(default_factory=Parsed)


class _Replay:
    """Stands in for the prompt."""

    def render(self, query: Query, shown: Sequence[Candidate]) -> Request:
        return Request(text="", shown=tuple(c.docid for c in shown))

    def parse(self, answer: _Known, count: int) -> Parsed:
        return answer.parsed

    def shortened(self, shown: Sequence[Candidate], answer: _Known) -> Sequence[Candidate] | None:
        return shown if answer.parsed.faults == (Fault.SHORTENED,) else None


def stopped(flow: Asks, kind: str, query: Query, rows: Sequence[Row]) -> tuple[str, ...]:
    """The docids that a method returns when the model answers these calls and no more.

    kind is what the method reads: label, permutation or any score. Raises DataError when the
    method asks something else than the trace's calls.
    """
    given, run = iter(rows), flow(query, _Replay())
    place = {c.docid: n for n, c in enumerate(query.candidates)}
    try:
        requests = next(run)
        while True:
            requests = run.send([_answer(next(given, None), kind, place, r) for r in requests])
    except StopIteration as end:
        docids: tuple[str, ...] = end.value.docids
        return docids


def _answer(row: Row | None, kind: str, place: Mapping[str, int], request: Request) -> Completion:
    """The trace's answer; without one, that of the first stage, which ranked by `place`."""
    shown = request.shown
    if row is None:
        order = [min(range(len(shown)), key=lambda n: place[shown[n]])] if kind == "label" else []
        return _Known(parsed=Parsed(tuple(range(len(shown)) if kind == "permutation" else order)))
    if row["docids"] != list(shown):
        raise DataError(
            f"the trace did not ask {', '.join(shown)}: it is of another method or data"
        )
    return _Known(
        parsed=Parsed(tuple(row["order"]), tuple(map(Fault, row["faults"])), row["score"])
    )


def curve(
    flow: Asks, kind: str, queries: Sequence[Query], trace: Sequence[Row], qrels: Any, name: str
) -> Iterator[dict[str, Any]]:
    """The measure at growing budgets of calls a query; what was spent is a mean over queries."""
    calls: dict[str, list[Row]] = {query.qid: [] for query in queries}
    for row in trace:
        calls[row["qid"]].append(row)
    most = max(map(len, calls.values()), default=0)
    for budget in sorted({round(most * n / POINTS) for n in range(POINTS + 1)}):
        spent = [row for rows in calls.values() for row in rows[:budget]]
        orders = {q.qid: stopped(flow, kind, q, calls[q.qid][:budget]) for q in queries}
        run = {qid: {d: -float(n) for n, d in enumerate(ids)} for qid, ids in orders.items()}
        [(measured, values)] = measure.per_query(run, qrels, [name], list(run)).items()
        yield {
            "budget": budget,
            "calls": len(spent) / len(queries),
            "tokens": sum(r["prompt_tokens"] + r["generated_tokens"] for r in spent) / len(queries),
            measured: measure.mean(values),
        }
