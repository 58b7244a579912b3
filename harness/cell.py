"""One cell: specs -> data -> flows -> schedule -> measures -> CellResult.

Owns the identity of a cell (its key) and the record that result.json holds. It prints nothing and
knows neither the command line nor any report.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness import env, measure, schedule, store
from harness.cache import Cache, Identity
from harness.data import Collection
from harness.data.formats import write_run
from harness.prompts import Limits, Prompt, prepare
from harness.rerank import METHODS
from harness.specs import bind, limits_for
from harness.types import (
    Call,
    Cell,
    CellResult,
    DataError,
    Engine,
    Fault,
    Flow,
    HarnessError,
    Method,
    Outcome,
    Query,
    RegistryError,
    digest,
)

SCHEMA = 1  # counts up when the same inputs would give another result
Progress = Callable[[int, int, int], None]  # queries done, queries in all, calls answered


@dataclass(frozen=True)
class Job:
    """A cell with everything its names stand for, checked before anything runs."""

    cell: Cell
    method: Method
    options: Mapping[str, Any]
    prompt: Prompt | None
    limits: Limits
    collection: Collection

    @property
    def needs_engine(self) -> bool:
        return bool(self.method.answers)

    @property
    def queries(self) -> tuple[Query, ...]:
        return self.collection.queries


def resolve(cell: Cell, prompt: Prompt | None, collection: Collection) -> Job:
    """Bind the options and check that prompt, method and data fit together."""
    spec, where = cell.model, f"model {cell.model_name}"
    if spec.method not in METHODS:
        raise RegistryError(
            f"unknown method {spec.method!r}", known=METHODS, given=spec.method, where=where
        )
    for name in cell.dataset.measures:  # a wrong one shows before anything is asked
        measure.parse_measure(name)
    method = METHODS[spec.method]
    options = bind(method.flow, spec.options, f"{where}: method {spec.method}")
    if "seed" in options and "seed" not in spec.options:
        options["seed"] = cell.protocol.seed
    if not method.answers:
        return Job(cell, method, options, None, Limits(), collection)
    if prompt is None:
        raise RegistryError(f"method {spec.method} needs a prompt", where=where)
    _check_fit(method, options, prompt, where)
    if not collection.has_texts:
        what = f"{cell.dataset_name}: the candidates have no texts"
        raise DataError(f"{what}; {spec.name} needs them")
    limits = limits_for(spec, prompt)
    return Job(cell, method, options, replace(prompt, limits=limits), limits, collection)


def _check_fit(method: Method, options: Mapping[str, Any], prompt: Prompt, where: str) -> None:
    """Can the method read the prompt's answers, and the prompt label what the method shows?"""
    if prompt.answer not in method.answers:
        raise RegistryError(
            f"prompt {prompt.name} asks for a {prompt.answer},"
            f" the method reads {' or '.join(method.answers)}",
            where=where,
        )
    next(method.flow(Query("", ""), prompt, **options), None)  # options that contradict each other
    shown = options["num_child"] + 1 if "num_child" in options else options.get("size", 1)
    if prompt.most is not None and shown > prompt.most:
        raise RegistryError(
            f"prompt {prompt.name} has labels for {prompt.most} passages, {shown} would be shown",
            where=where,
        )


def key(job: Job, engine: Engine | None) -> str:
    """The identity of a cell: equal keys mean equal results, wherever they were made."""
    cell = job.cell
    return digest(
        {
            "schema": SCHEMA,
            "engine": dict(engine.fingerprint) if engine else None,
            "method": cell.model.method,
            "options": dict(job.options),
            "prompt": job.prompt.wire_format if job.prompt else None,
            "raw_special_tokens": cell.model.raw_special_tokens,
            "data": job.collection.sha256,
            "dataset": cell.dataset.name,
            "family": cell.dataset.family,
            "first_stage": [cell.first_stage, cell.depth],
            "limit": cell.limit,
            "protocol": asdict(cell.protocol),
            "measures": list(cell.dataset.measures),
        }
    )


def run(
    job: Job,
    engine: Engine | None,
    cache: Cache,
    results: Path,
    *,
    command: str,
    progress: Progress = lambda done, total, calls: None,
) -> CellResult:
    """Run one cell and write its folder. A failure is noted there and raised again."""
    started, clock = datetime.now(UTC), time.perf_counter()
    notes: Counter[str] = Counter()
    identity = key(job, engine)
    try:
        outcomes = _outcomes(job, engine, cache, notes, progress)
    except HarnessError as error:
        store.write_failure(results, job.cell, _failed(job, identity, command, started, error))
        raise
    wall = time.perf_counter() - clock
    scores = measured(job, outcomes)
    rows = [per_query_row(query, o, scores) for query, o in zip(job.queries, outcomes, strict=True)]
    record = {
        **record_head(job, identity, "complete"),
        "queries": len(job.queries),
        "measures": {name: measure.mean(values) for name, values in scores.items()},
        "kendall_tau": _mean([row["tau"] for row in rows if row["tau"] is not None]),
        "faults": _faults(outcomes),
        "inputs": {**job.collection.warnings, **{k: v for k, v in sorted(notes.items()) if v}},
        "efficiency": efficiency(outcomes, wall, job.cell.protocol.kind),
        "environment": env.environment() | {"engine": dict(engine.fingerprint) if engine else None},
        **stamps(command, started),
    }
    ranked = {o.qid: list(zip(o.ranking.docids, o.ranking.scores, strict=True)) for o in outcomes}
    files = store.Files(record, write_run(ranked), rows, _trace(outcomes))
    folder = store.write(results, job.cell, files)
    return CellResult(record, tuple(rows), folder)


# --- running ----------------------------------------------------------------------------------


def _outcomes(
    job: Job, engine: Engine | None, cache: Cache, notes: Counter[str], progress: Progress
) -> list[Outcome]:
    """Every query's outcome, in the order of the query file."""
    latency = job.cell.protocol.kind == "latency"
    flows = ((query.qid, flow(job, query, engine, notes)) for query in job.queries)
    runner = engine or _NoEngine()
    done: dict[str, Outcome] = {}
    calls = 0
    for outcome in schedule.run(
        flows,
        runner,
        cache,
        key=Identity(runner.fingerprint).key,
        concurrency=1 if latency else job.cell.protocol.concurrency or runner.capacity,
        read_cache=not latency,
    ):
        done[outcome.qid] = outcome
        calls += len(outcome.calls)
        progress(len(done), len(job.queries), calls)
    return [done[query.qid] for query in job.queries]


def flow(job: Job, query: Query, engine: Engine | None, notes: Counter[str]) -> Flow:
    """The method's generator over a query whose texts are prepared for its prompt."""
    if job.method.needs_judgements:
        query = replace(query, judgements=dict(job.collection.qrels[query.qid]))
    if job.prompt is None or engine is None:
        return job.method.flow(query, None, **job.options)
    ready = prepare(
        query,
        job.prompt,
        job.limits,
        family=job.cell.dataset.family,
        clip=engine.clip,
        raw_special_tokens=job.cell.model.raw_special_tokens,
        notes=notes,
    )
    return job.method.flow(ready, job.prompt, **job.options)


class _NoEngine:
    """Stands where the baselines' engine would be; nothing is ever asked of it."""

    fingerprint: Mapping[str, Any] = {}
    capacity = 64

    def submit(self, number: int, request: Any) -> None:
        raise AssertionError("a baseline asked an engine")

    def poll(self) -> list[Any]:
        raise AssertionError("a baseline waited for an engine")

    def clip(self, text: str, tokens: int) -> str:
        return text

    def close(self) -> None:
        return None


# --- the record -------------------------------------------------------------------------------


def measured(job: Job, outcomes: Sequence[Outcome]) -> dict[str, dict[str, float]]:
    run = {o.qid: dict(zip(o.ranking.docids, o.ranking.scores, strict=True)) for o in outcomes}
    qids = [query.qid for query in job.queries]
    return measure.per_query(run, job.collection.qrels, job.cell.dataset.measures, qids)


def per_query_row(
    query: Query, outcome: Outcome, scores: Mapping[str, Mapping[str, float]]
) -> dict[str, Any]:
    """One line of per_query.csv."""
    calls = outcome.calls
    faults = Counter(str(fault) for call in calls for fault in call.parsed.faults)
    return {
        "qid": outcome.qid,
        **{name: values[outcome.qid] for name, values in scores.items()},
        "calls": len(_answered(calls)),
        "rounds": outcome.rounds,
        "prompt_tokens": sum(c.completion.prompt_tokens for c in calls),
        "generated_tokens": sum(c.completion.output_tokens for c in calls),
        "seconds": round(sum(c.completion.seconds for c in calls), 6),
        "tau": _tau(query, outcome),
        "faults": ";".join(f"{name}={n}" for name, n in sorted(faults.items())),
    }


def _tau(query: Query, outcome: Outcome) -> float | None:
    """Kendall's tau between the ranking and the first stage; None under two candidates."""
    from scipy.stats import kendalltau

    place = {docid: i for i, docid in enumerate(outcome.ranking.docids)}
    if len(place) < 2:
        return None
    moved = [place[c.docid] for c in query.candidates]
    return round(float(kendalltau(range(len(moved)), moved).statistic), 6)


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _answered(calls: Sequence[Call]) -> list[Call]:
    """Without the prompts that did not fit: the engine never ran them."""
    return [call for call in calls if call.completion.finish != "too_long"]


def _faults(outcomes: Sequence[Outcome]) -> dict[str, Any]:
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


def efficiency(outcomes: Sequence[Outcome], wall: float, kind: str) -> dict[str, Any]:
    """Totals from call records. `seconds` is recorded engine time, also of calls answered before;
    what depends on this run's clock is None as soon as one answer came from a cache."""
    calls = _answered([call for o in outcomes for call in o.calls])
    cached = sum(call.from_cache for call in calls)
    fresh = bool(calls) and not cached
    return {
        "calls": len(calls),
        "rounds": sum(o.rounds for o in outcomes),
        "prompt_tokens": sum(c.completion.prompt_tokens for c in calls),
        "cached_prompt_tokens": sum(c.completion.cached_tokens for c in calls),
        "generated_tokens": sum(c.completion.output_tokens for c in calls),
        "reasoning_tokens": sum(c.completion.reasoning_tokens for c in calls),
        "seconds": round(math.fsum(c.completion.seconds for c in calls), 6),
        "wall_seconds": round(wall, 3) if fresh else None,
        "queries_per_second": round(len(outcomes) / wall, 4) if fresh else None,
        "calls_from_cache": cached,
        "flops": None,
        "latency": _latency(outcomes) if kind == "latency" and fresh else None,
    }


def _latency(outcomes: Sequence[Outcome], warm_up: int = 2) -> dict[str, Any] | None:
    """Seconds per query, one at a time, without the first `warm_up` queries."""
    seconds = sorted(
        math.fsum(c.completion.seconds + c.completion.queued for c in o.calls)
        for o in outcomes[warm_up:]
    )
    if not seconds:
        return None
    return {
        "median": statistics.median(seconds),
        "p90": seconds[math.ceil(0.90 * len(seconds)) - 1],
        "p99": seconds[math.ceil(0.99 * len(seconds)) - 1],
        "queries": len(seconds),
    }


def record_head(job: Job, identity: str, state: str) -> dict[str, Any]:
    """The head of a record: what was run. Paths of this machine stay out."""
    cell = job.cell
    model = asdict(cell.model)
    model["overrides"] = dict(cell.model.overrides)
    model["options"] = dict(job.options)
    model["base"] = model["base"] if model["base"].startswith("wheel:") else _public(model["base"])
    model["adapter"] = _public(model["adapter"])
    dataset = {k: v for k, v in asdict(cell.dataset).items() if k not in ("location", "qrels")}
    return {
        "schema_version": store.SCHEMA_VERSION,
        "key": identity,
        "state": state,
        "model": {"label": cell.model_name, **model},
        "prompt": asdict(job.prompt) if job.prompt else None,
        "dataset": {
            "label": cell.dataset_name,
            **dataset,
            "sha256": job.collection.sha256,
            "in_domain": in_domain(cell),
        },
        "first_stage": {"name": cell.first_stage_name, "sha256": job.collection.run_sha256},
        "depth": cell.depth,
        "limit": cell.limit,
        "protocol": asdict(cell.protocol),
    }


def _public(base: str) -> str:
    """A hub id as it is; of a local folder only its name."""
    local = base.startswith((".", "/", "~")) or Path(base).is_dir()
    return Path(base).name if local else base


def in_domain(cell: Cell) -> bool:
    """Did the model train on this collection's own queries? TREC DL stands on MS MARCO."""
    trained = {name.split(":")[0] for name in cell.model.trained_on}
    return cell.dataset.name in trained or (
        cell.dataset.family == "dl" and "msmarco-passage" in trained
    )


def stamps(command: str, started: datetime) -> dict[str, str]:
    stamp = "%Y-%m-%dT%H:%M:%SZ"
    finished = datetime.now(UTC)
    return {
        "command": command,
        "started": started.strftime(stamp),
        "finished": finished.strftime(stamp),
    }


def _failed(
    job: Job, identity: str, command: str, started: datetime, error: HarnessError
) -> dict[str, Any]:
    head = record_head(job, identity, "failed")
    return {**head, "error": str(error), "measures": {}, **stamps(command, started)}


def _trace(outcomes: Sequence[Outcome]) -> Iterator[dict[str, Any]]:
    """One call per line; the order is the query file's, then the order of asking."""
    for outcome in outcomes:
        for call in outcome.calls:
            completion, parsed = call.completion, call.parsed
            yield {
                "qid": outcome.qid,
                "round": call.round,
                "docids": list(call.request.shown),
                "key": call.key,
                "text": completion.text,
                "finish": completion.finish,
                "prompt_tokens": completion.prompt_tokens,
                "generated_tokens": completion.output_tokens,
                "reasoning_tokens": completion.reasoning_tokens,
                "scores": list(completion.scores),
                "order": list(parsed.order),
                "score": parsed.score,
                "faults": [str(fault) for fault in parsed.faults],
                "changed": parsed.changed,
                "seconds": round(completion.seconds, 6),
                "from_cache": call.from_cache,
            }
