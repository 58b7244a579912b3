"""What a cell cost and what went wrong in it, from the records of its calls and one clock.

Every figure comes from calls that were answered; what was not measured is None, never 0. It must
not know how cells are run: it counts what it is handed.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from harness import flops
from harness.types import Call, Fault, Outcome, Query, digest

SAMPLE, WARM_UP = 100, 2  # queries of a latency run, and how many of them go first, untimed
PARTS = ("render", "tokenise", "wait", "parse", "cache", "evaluate")  # of a run's own clock
METERED = ("breakdown", "energy_joules", "gpu_memory_gib")


def mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def at(share: float, values: Sequence[float]) -> float:
    """The smallest value that this share of the values does not exceed (nearest rank)."""
    return sorted(values)[math.ceil(share * len(values)) - 1]


def sample(queries: Sequence[Query], seed: int) -> tuple[Query, ...]:
    """The fixed sample of a latency run: the SAMPLE queries with the lowest SHA-256 of the JSON
    list [seed, dataset, qid], in the order given; all of them when there are no more."""
    places = {q.qid: digest([seed, q.dataset, q.qid]) for q in queries}
    chosen = set(sorted(places, key=places.__getitem__)[:SAMPLE])
    return tuple(query for query in queries if query.qid in chosen)


def answered(calls: Sequence[Call]) -> list[Call]:
    """Without the prompts that did not fit: the engine never ran them."""
    return [call for call in calls if call.completion.finish != "too_long"]


def faults(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """How many calls had each fault, and the share of calls whose answer changed nothing."""
    calls = [call for o in outcomes for call in o.calls]
    counted = Counter(fault for call in calls for fault in set(call.parsed.faults))
    sorting = [call for call in calls if call.parsed.score is None]
    still = sum(not call.parsed.changed for call in sorting)
    return {
        **{str(fault): counted.get(fault, 0) for fault in Fault},
        "calls": len(calls),
        "no_op_rate": round(still / len(sorting), 6) if sorting else None,
    }


def efficiency(
    outcomes: Sequence[Outcome], wall: float | None, kind: str, *, shape: flops.Shape | None = None
) -> dict[str, Any]:
    """Totals from call records; what depends on this run's clock is None as soon as one answer
    came from a cache, or where wall is None.

    seconds        recorded engine time, also of calls answered before; what is replayed is by it
    flops          of whole prompts, whatever a prefix cache spared; flops_spared is what it did
    METERED        for who runs the cell to fill
    """
    calls = answered([call for o in outcomes for call in o.calls])
    done = [call.completion for call in calls]
    cached = sum(call.from_cache for call in calls)
    timed = wall if calls and not cached else None
    seconds = math.fsum(c.seconds for c in done)
    return {
        "calls": len(calls),
        "rounds": sum(o.rounds for o in outcomes),
        "prompt_tokens": sum(c.prompt_tokens for c in done),
        "cached_prompt_tokens": sum(c.cached_tokens for c in done),
        "generated_tokens": sum(c.output_tokens for c in done),
        "reasoning_tokens": sum(c.reasoning_tokens for c in done),
        "tokens": _tokens(calls) if calls else None,
        "seconds": round(seconds, 6),
        "replayed_queries_per_second": round(len(outcomes) / seconds, 4) if seconds else None,
        "wall_seconds": round(timed, 3) if timed else None,
        "queries_per_second": round(len(outcomes) / timed, 4) if timed else None,
        "calls_from_cache": cached,
        **_operations(calls, shape),
        "latency": _latency(outcomes) if kind == "latency" and timed else None,
        **dict.fromkeys(METERED),
    }


def _tokens(calls: Sequence[Call]) -> dict[str, Any]:
    """Per call; cut_off is the share of calls that the limit on generated tokens ended."""
    done = [call.completion for call in calls]
    columns = {
        "prompt": [c.prompt_tokens for c in done],
        "cached_prompt": [c.cached_tokens for c in done],
        "reasoning": [c.reasoning_tokens for c in done],
        "answer": [c.output_tokens - c.reasoning_tokens for c in done],
    }
    ended = [c.completion.finish == "length" and not c.request.exact_length_of for c in calls]
    return {name: _spread(values) for name, values in columns.items()} | {
        "cut_off": round(sum(ended) / len(ended), 6)
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    average, middle = round(statistics.mean(values), 3), statistics.median(values)
    return {"mean": average, "median": middle, "p95": at(0.95, values), "max": max(values)}


def _operations(calls: Sequence[Call], shape: flops.Shape | None) -> dict[str, float | None]:
    """Exact, spared by a prefix cache, and by the published estimator; None without a shape."""
    names = ("flops", "flops_spared", "flops_published")
    if shape is None:
        return dict.fromkeys(names)

    def of(call: Call) -> tuple[float, float, float]:
        done = call.completion
        size = shape, done.prompt_tokens, done.output_tokens
        scored = len(done.scores) if call.request.continuation is not None else 1
        whole = flops.of_call(*size, scored=scored)
        spared = whole - flops.of_call(*size, scored=scored, cached=done.cached_tokens)
        return whole, spared, flops.published(*size)

    sums = map(math.fsum, zip(*map(of, calls))) if calls else (0.0,) * len(names)
    return dict(zip(names, sums))


def _latency(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Wall-clock seconds of a query, from its admission to its ranking, one at a time."""
    seconds = [o.seconds for o in outcomes]
    return {
        "median": statistics.median(seconds),
        "p90": at(0.90, seconds),
        "p99": at(0.99, seconds),
        "rounds": mean([o.rounds for o in outcomes]),
        "queries": len(seconds),
        "sample": SAMPLE,
        "warm_up": min(WARM_UP, len(seconds)),
    }


class Clock:
    """Where the seconds of a run go, by part; a part inside another counts for itself alone."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = defaultdict(float)
        self._inside = 0.0

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its seconds counted as the part's."""

        def call(*args: Any, **options: Any) -> Any:
            outside, self._inside = self._inside, 0.0
            started = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                spent = time.perf_counter() - started
                self.parts[part] += spent - self._inside
                self._inside = outside + spent

        return call

    def watch(self, thing: Any, **parts: str) -> Any:
        """The thing, with the seconds of some of its methods counted: method=part."""
        return _Watched(
            thing, {name: self.timed(p, getattr(thing, name)) for name, p in parts.items()}
        )

    def breakdown(self, outcomes: Sequence[Outcome], load: float | None) -> dict[str, Any]:
        """Seconds of this run by part; load is None where the engine does not tell.

        wait: blocked for answers, without the load if it is known. tokenise: passages are cut in
        the loop, prompts tokenised in a thread of the engine's while the loop goes on or waits.
        queued, prefill, decode: as the engine recorded them for this run's calls, added up; calls
        queue at the same time.
        """
        fresh = [c.completion for o in outcomes for c in o.calls if not c.from_cache]
        parts = {name: self.parts[name] for name in PARTS}
        parts["wait"] -= load or 0.0
        for name in ("queued", "prefill", "decode"):
            parts[name] = math.fsum(getattr(c, name) for c in fresh)
        return {"load": load, **{name: round(spent, 6) for name, spent in parts.items()}}


class _Watched:
    """Stands in for an object some of whose methods are timed."""

    def __init__(self, inner: Any, methods: Mapping[str, Callable[..., Any]]) -> None:
        self._inner = inner
        self.__dict__.update(methods)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)
