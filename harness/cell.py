"""One cell: specs -> data -> flows -> schedule -> measures -> CellResult.

Owns the identity of a cell (its key) and the record that result.json holds. It prints nothing and
knows neither the command line nor any report.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from harness import budget, costs, env, flops, measure, schedule, specs, store
from harness.cache import Cache, Identity
from harness.data import Collection
from harness.data.formats import write_run
from harness.prompts import Limits, Prompt, prepare
from harness.rerank import METHODS
from harness.specs import bind, limits_for
from harness.types import (
    Cell,
    CellResult,
    DataError,
    Engine,
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

    @cached_property
    def queries(self) -> tuple[Query, ...]:
        """Every query; of a latency run, its fixed sample."""
        every = self.collection.queries
        return costs.sample(every, self.cell.protocol.seed) if self.alone else every

    @property
    def alone(self) -> bool:
        """Is it a latency run, one query at a time?"""
        return self.cell.protocol.kind == "latency"


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
            "protocol": cell.protocol.stated,
            "measures": list(cell.dataset.measures),
        }
    )


@dataclass(frozen=True)
class Task:
    """A job ready to run: its engine (None for a baseline), its command, who hears of progress."""

    job: Job
    engine: Engine | None = None
    command: str = ""
    progress: Progress = lambda done, total, calls: None

    @property
    def group(self) -> str:
        """Tasks of one non-empty group may run together; latency is measured alone."""
        return self.engine.group if self.engine and not self.job.alone else ""


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
    [result] = run_together([Task(job, engine, command, progress)], cache, results)
    return result


def run_together(tasks: Sequence[Task], cache: Cache, results: Path) -> Iterator[CellResult]:
    """Run cells of one group, all their queries in flight; each is written when it is done."""
    runs = [Run(task, len(tasks)) for task in tasks]
    alone, asked = tasks[0].job.alone, tasks[0].job.cell.protocol.concurrency
    steps = schedule.run_together(
        [run.lane() for run in runs],
        runs[0].clock.watch(cache, get_many="cache", put_many="cache"),
        concurrency=1 if alone else asked or runs[0].engine.capacity,
        read_cache=not alone,
    )
    try:
        if alone:
            runs[0].warm_up(cache)
        for lane, outcome in steps:
            if runs[lane].take(outcome):
                yield runs[lane].finish(results)
    except HarnessError as error:
        for run in runs:
            run.fail(results, error)
        raise


class Run:
    """A task on its way to a result.

    together  how many cells share the engine's time; 0 if that passes in other processes
    """

    def __init__(self, task: Task, together: int) -> None:
        self.task, self.together = task, together
        self.engine = task.engine or Elsewhere()
        self.notes: Counter[str] = Counter()
        self.done: dict[str, Outcome] = {}
        self.calls = 0
        self.key = key(task.job, task.engine)
        self.clock, self.started = costs.Clock(), datetime.now(UTC)
        self._begin()

    def _begin(self) -> None:
        self.clock.parts.clear()
        self.begun, self.meter = time.perf_counter(), env.GpuMeter()
        self.loaded = "load_seconds" in self.engine.facts
        self.tokenised = getattr(self.engine, "tokenise_seconds", 0.0)  # before what counts

    def lane(self, most: int | None = None) -> schedule.Lane:
        """The cell's flows, of its first `most` queries or all, with their parts timed."""
        job, clock = self.task.job, self.clock
        prompt = job.prompt and clock.watch(job.prompt, render="render", parse="parse")
        engine = clock.watch(self.engine, submit="tokenise", clip="tokenise", poll="wait")
        begin = clock.timed("render", flow)
        asked, timed = self.task.engine and engine, replace(job, prompt=prompt)
        flows = ((q.qid, begin(timed, q, asked, self.notes)) for q in job.queries[:most])
        return schedule.Lane(flows, engine, identity(job.cell, self.engine).key)

    def warm_up(self, cache: Cache) -> None:
        """Load what the engine needs and answer a few queries; what counts begins after them."""
        lane = self.lane(costs.WARM_UP)
        for _ in schedule.run_together([lane], cache, concurrency=1, read_cache=False):
            pass
        self.notes.clear()
        self._begin()

    def take(self, outcome: Outcome) -> bool:
        """Keep a query's outcome; True when it was the last."""
        total = len(self.task.job.queries)
        self.done[outcome.qid] = outcome
        self.meter.look()
        self.calls += len(outcome.calls)
        self.task.progress(len(self.done), total, self.calls)
        return len(self.done) == total

    def finish(self, results: Path, made_with: Mapping[str, Any] | None = None) -> CellResult:
        """Measure and write the cell; the order is the query file's.

        made_with is the environment of the engine, where it is not this process's.
        """
        wall = time.perf_counter() - self.begun
        job, engine = self.task.job, self.task.engine
        outcomes = [self.done[query.qid] for query in job.queries]
        scores = self.clock.timed("evaluate", measured)(job, outcomes)
        trace = list(trace_rows(outcomes))
        rows = [per_query_row(q, o, scores) for q, o in zip(job.queries, outcomes, strict=True)]
        made_with = {**(made_with or env.environment()), "engine": None}
        if engine:
            made_with |= {"engine": dict(engine.fingerprint), "serving": dict(engine.facts)}
        if self.together > 1:
            made_with["cells_together"] = self.together
        notes = {k: v for k, v in sorted(self.notes.items()) if v}
        record = {
            **record_head(job, self.key, "complete"),
            "queries": len(job.queries),
            "measures": {name: measure.mean(values) for name, values in scores.items()},
            "kendall_tau": costs.mean([row["tau"] for row in rows if row["tau"] is not None]),
            "faults": costs.faults(outcomes),
            "inputs": {**job.collection.warnings, **notes},
            "audit": dict(job.collection.audit),
            "efficiency": self._efficiency(outcomes, wall),
            "budget": list(_budget(job, trace)),
            "environment": made_with,
            **stamps(self.task.command, self.started),
        }
        ranked = {o.qid: list(zip(o.ranking.docids, o.ranking.scores)) for o in outcomes}
        files = store.Files(record, write_run(ranked), rows, trace)
        return CellResult(record, tuple(rows), store.write(results, job.cell, files))

    def _efficiency(self, outcomes: Sequence[Outcome], wall: float) -> dict[str, Any]:
        """What cells cost that ran together, no clock or meter can tell apart."""
        cell, facts, by_itself = self.task.job.cell, self.engine.facts, self.together == 1
        shape = flops.shape(facts.get("config")) or flops.known().get(cell.model.base)
        timed = wall if by_itself else None
        spent = costs.efficiency(outcomes, timed, cell.protocol.kind, shape=shape)
        if by_itself:
            load = None if self.loaded else facts.get("load_seconds")
            apart = getattr(self.engine, "tokenise_seconds", 0.0) - self.tokenised
            self.clock.parts["tokenise"] += apart
            spent["breakdown"] = self.clock.breakdown(outcomes, load)
        if spent["wall_seconds"] and self.engine.fingerprint.get("engine") in ("hf", "vllm"):
            spent |= self.meter.read()  # of any other engine, the GPU is elsewhere
        return spent

    def fail(self, results: Path, error: HarnessError) -> None:
        """Note the failure in the cell's place, unless it was finished before."""
        task, unfinished = self.task, len(self.done) < len(self.task.job.queries)
        if unfinished:
            failed = _failed(task.job, self.key, task.command, self.started, error)
            store.write_failure(results, task.job.cell, failed)


def identity(cell: Cell, engine: Engine) -> Identity:
    """What the calls of a cell to an engine have in common."""
    protocol, shared = cell.protocol, dict(engine.fingerprint)
    if protocol.strict_cache:
        shared["strict"] = {
            "versions": env.versions(),
            "gpus": env.gpus(),
            "concurrency": protocol.concurrency or engine.capacity,
            "prefix_caching": protocol.prefix_caching,
        }
    return Identity(shared, protocol.replicate)


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


@dataclass
class Elsewhere:
    """Stands for an engine that is in another process; of a baseline, for none at all."""

    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    capacity: int = 64
    group: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    clip: Callable[[str, int], str] = lambda text, tokens: text

    def submit(self, number: int, request: Any) -> None:
        raise AssertionError("nothing is asked here")

    def poll(self) -> list[Any]:
        raise AssertionError("nothing is answered here")

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
        "calls": len(costs.answered(calls)),
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
            "in_domain": specs.in_domain(
                cell.model.trained_on, cell.dataset.name, cell.dataset.family
            ),
        },
        "first_stage": {"name": cell.first_stage_name, "sha256": job.collection.run_sha256},
        "depth": cell.depth,
        "limit": cell.limit,
        "protocol": cell.protocol.stated,
    }


def _public(base: str) -> str:
    """A hub id as it is; of a local folder only its name."""
    local = base.startswith((".", "/", "~")) or Path(base).is_dir()
    return Path(base).name if local else base


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


def _budget(job: Job, trace: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Points of the budget curve; none for a baseline."""
    if job.prompt:
        asks, name = partial(job.method.flow, **job.options), job.cell.dataset.measures[0]
        known = job.queries, trace, job.collection.qrels, name
        yield from budget.curve(asks, job.prompt.answer, *known)


def trace_rows(outcomes: Sequence[Outcome]) -> Iterator[dict[str, Any]]:
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
