"""Do answers depend on what else is asked? Stored calls of a cell, asked again alone and together.

Owns what a flip is: an answer that names another document or order; where a passage is scored, one
that makes it change places with another passage of its query. It stores nothing.

Calls are drawn by whole queries, in random order, so that the difference in nDCG@10 is what asking
anew would bring these queries. (A sample that ends within a query leaves the rest of that query's
answers as they were.) Prompts that only follow from a changed answer are asked as well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from random import Random
from typing import Any

from harness import cell, measure, schedule
from harness.cache import Cache
from harness.types import Call, Completion, Engine, Flow, MissingResourceError, Outcome, Request

Answers = Mapping[bytes, Completion]
MEASURE = "nDCG@10"


class Audit:
    """A cell whose stored answers are put to the test."""

    def __init__(self, job: cell.Job, engine: Engine, cache: Cache) -> None:
        self.job, self.engine, self.cache = job, engine, cache
        self.key = cell.identity(job.cell, engine).key
        self.queries = {query.qid: query for query in job.queries}

    def rows(self, most: int, seed: int) -> list[dict[str, Any]]:
        """Answers given alone and in batches against the stored ones, and against each other.

        most bounds the stored calls that are asked again. Raises MissingResourceError when the
        cache answers no whole query.
        """
        stored = self._stored(most, seed)
        calls = {bytes.fromhex(call.key): call for o in stored for call in o.calls}
        keys = Random(seed).sample(list(calls)[:most], min(most, len(calls)))  # other neighbours
        asked = {key: calls[key].request for key in keys}
        before = {key: calls[key].completion for key in keys}
        alone, together = _ask(_Alone(self.engine), asked), _ask(self.engine, asked)
        rows = [
            {"asked": "alone", "against": "stored", **self._flips(stored, before, alone)},
            {"asked": "in batches", "against": "stored", **self._flips(stored, before, together)},
            {"asked": "in batches", "against": "alone", **self._flips(stored, alone, together)},
        ]
        rows[0] |= self._effect(stored, _Alone(self.engine), alone)
        rows[1] |= self._effect(stored, self.engine, together)
        return [dict.fromkeys(rows[0]) | row for row in rows]

    def _flow(self, qid: str) -> Flow:
        return cell.flow(self.job, self.queries[qid], self.engine, Counter())

    def _run(self, qids: Sequence[str], engine: Any, cache: Any) -> list[Outcome]:
        flows = [(qid, self._flow(qid)) for qid in qids]
        most = self.engine.capacity
        found = list(schedule.run(flows, engine, cache, key=self.key, concurrency=most))
        return sorted(found, key=lambda outcome: qids.index(outcome.qid))

    def _stored(self, most: int, seed: int) -> list[Outcome]:
        """Queries that the cache answers wholly, in random order, until their calls are enough."""
        found: list[Outcome] = []
        for qid in Random(seed).sample(list(self.queries), len(self.queries)):
            enough = sum(len(outcome.calls) for outcome in found) >= most
            if not enough and schedule.replay(self._flow(qid), self.cache, self.key)[1] is None:
                found += self._run([qid], self.engine, self.cache)
        if not any(outcome.calls for outcome in found):
            raise MissingResourceError(f"{self.job.cell}: no query is answered yet; run it first")
        return found

    def _flips(self, stored: Sequence[Outcome], old: Answers, new: Answers) -> dict[str, Any]:
        """How many decisions differ, with the rate's 95 % interval (Wilson)."""
        from scipy.stats import binomtest

        flipped = [
            self._decision(outcome, call, old[key]) != self._decision(outcome, call, new[key])
            for outcome in stored
            for call in outcome.calls
            if (key := bytes.fromhex(call.key)) in old
        ]
        rate = sum(flipped) / len(flipped)
        low, high = binomtest(sum(flipped), len(flipped)).proportion_ci(method="wilson")
        interval = [round(float(low), 4), round(float(high), 4)]
        return {"calls": len(flipped), "flips": sum(flipped), "rate": rate, "95%": interval}

    def _decision(self, outcome: Outcome, call: Call, completion: Completion) -> Any:
        """An order, or how many other passages of the query score higher."""
        assert self.job.prompt is not None
        parsed = self.job.prompt.parse(completion, len(call.request.shown))
        if (own := parsed.score) is None:
            return parsed.order
        others = [c.parsed.score for c in outcome.calls if c.key != call.key]
        return sum(score > own for score in others if score is not None)

    def _effect(self, stored: Sequence[Outcome], engine: Any, new: Answers) -> dict[str, Any]:
        """What the new answers make of the rankings."""
        qids = [outcome.qid for outcome in stored]
        again = self._run(qids, engine, _Overlay(self.cache, new))
        changed = sum(a.ranking.docids != b.ranking.docids for a, b in zip(stored, again))
        before, after = self._quality(stored), self._quality(again)
        return {
            "queries": len(qids), "rankings changed": changed,
            f"stored {MEASURE}": before, MEASURE: after, "change": after - before,
        }  # fmt: skip

    def _quality(self, outcomes: Sequence[Outcome]) -> float:
        run = {o.qid: dict(zip(o.ranking.docids, o.ranking.scores)) for o in outcomes}
        [values] = measure.per_query(run, self.job.collection.qrels, [MEASURE], list(run)).values()
        return measure.mean(values)


class _Alone:
    """An engine with one call in flight."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.waiting = engine, list[tuple[int, Request]]()

    def submit(self, number: int, request: Request) -> None:
        self.waiting.append((number, request))

    def poll(self) -> list[tuple[int, Completion]]:
        self.engine.submit(*self.waiting.pop(0))
        return self.engine.poll()


class _Overlay:
    """A cache in which some answers are others; it keeps what is asked for its own life."""

    def __init__(self, cache: Cache, answers: Answers) -> None:
        self.cache, self.new = cache, dict(answers)

    def get_many(self, keys: Sequence[bytes]) -> Answers:
        return self.cache.get_many(keys) | {key: self.new[key] for key in keys if key in self.new}

    def put_many(self, items: Iterable[tuple[bytes, Completion]]) -> None:
        self.new.update(items)


def _ask(engine: Any, asked: Mapping[bytes, Request]) -> Answers:
    for number, request in enumerate(asked.values()):
        engine.submit(number, request)
    keys, answers = list(asked), dict[bytes, Completion]()
    while len(answers) < len(keys):
        answers |= {keys[number]: completion for number, completion in engine.poll()}
    return answers
