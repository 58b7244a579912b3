"""Cells from the runs of others, and cells as files that others read.

Owns what an imported cell's record says. It knows neither engines nor the command line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from ctypes import c_float
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness import cell as cells
from harness import costs, measure, store
from harness.data import Collection, audit, formats, libraries, load, prepared, sources
from harness.prompts import Limits
from harness.rerank import METHODS
from harness.types import (
    Candidate,
    Cell,
    CellResult,
    DataError,
    DatasetSpec,
    MissingResourceError,
    ModelSpec,
    Outcome,
    Protocol,
    Query,
    UsageError,
    digest,
)

METHOD = "imported"  # of a model that the registry does not know
UNKNOWN = ("calls", "rounds", "prompt_tokens", "generated_tokens", "seconds", "tau")


@dataclass(frozen=True)
class Foreign:
    """A run that another program made, and what its user says about it.

    first_stage  the name of the candidates that were reranked, or a run file that holds them
    depth        candidates a query; None keeps every line
    """

    path: Path
    model: ModelSpec
    dataset: DatasetSpec
    first_stage: str | None = None
    depth: int | None = None


# --- import -----------------------------------------------------------------------------------


def take_in(foreign: Foreign, results: Path) -> CellResult:
    """Measure a foreign run in trec_eval's order and write its cell: quality known, cost unknown.

    Raises DataError when none of its queries is judged.
    """
    run, spec = formats.read_run(foreign.path), foreign.dataset
    depth = foreign.depth or max(spec.depth, *map(len, run.values()))
    qrels = libraries.judgements(spec)
    if not run.keys() & qrels.keys():
        raise DataError("none of its queries is judged", path=foreign.path)
    known = _own_candidates(foreign, depth)
    order = [q.qid for q in known.queries] if known else []
    cut = sum(max(0, len(rows) - depth) for rows in run.values())
    raw = libraries.Raw(
        dict.fromkeys([*order, *qrels, *run], ""),
        {qid: _as_trec_eval(rows) for qid, rows in run.items()},
        qrels,
        _stage_name(foreign, known),
        notes={"candidates_below_the_depth": cut},
    )
    collection = _placed(sources.collect(spec, raw, depth), known)
    cell = Cell(foreign.model, spec, collection.first_stage, depth, None, Protocol())
    _guard(results / cell.folder)
    job = cells.Job(cell, METHODS["first-stage"], {}, None, Limits(), collection)
    return _write(job, results, _ties(job, run))


def _as_trec_eval(rows: Sequence[Candidate]) -> list[Candidate]:
    """trec_eval knows no ranks: score in single precision, then docid descending."""
    return sorted(rows, key=lambda c: (c_float(c.score).value, c.docid), reverse=True)


def _own_candidates(foreign: Foreign, depth: int) -> Collection | None:
    """The dataset with the candidates it has here, if any: they tell what was reranked."""
    spec, stage = foreign.dataset, foreign.first_stage
    usable = stage if spec.source == "folder" and stage and Path(stage).is_file() else None
    try:
        return load(spec, usable, depth)
    except (DataError, MissingResourceError):
        return None


def _stage_name(foreign: Foreign, known: Collection | None) -> str:
    """As the user says, else as the run file says that it is one, else as the dataset has it."""
    name, own = foreign.first_stage, libraries.layout(foreign.path)
    if name and Path(name).is_file():
        return libraries.layout(Path(name)).first_stage
    if name or own.dataset:
        return name or own.first_stage
    return known.first_stage if known else foreign.dataset.first_stage


def _placed(run: Collection, known: Collection | None) -> Collection:
    """A reranking of the dataset's candidates here shares their hashes, so that it stands in their
    column of a table; what any other run reranked is unknown."""
    inputs = {k: n for k, n in run.warnings.items() if k != "tied_first_stage_scores"}
    hashes = "", digest([[qid, sorted(rels.items())] for qid, rels in sorted(run.qrels.items())])
    own = {q.qid: {c.docid for c in q.candidates} for q in known.queries} if known else {}
    if known and all({c.docid for c in q.candidates} <= own[q.qid] for q in run.queries):
        hashes = known.run_sha256, known.sha256
    return replace(run, run_sha256=hashes[0], sha256=hashes[1], warnings=inputs)


def _guard(folder: Path) -> None:
    """A measured cell has calls that were paid for: an import never takes its place."""
    found = store.read(folder)
    if found and found.record["state"] != "failed" and "imported" not in found.record:
        raise UsageError(f"{folder}: holds a measured cell; give the run another --model name")


def _ties(job: cells.Job, run: Mapping[str, Sequence[Candidate]]) -> dict[str, Any]:
    """How many documents share a score with another, and what their ranks would have decided."""
    ties, by_rank = [], {}
    for query in job.queries:
        place = {c.docid: n for n, c in enumerate(run.get(query.qid, ()))}
        by_rank[query.qid] = sorted((c.docid for c in query.candidates), key=place.__getitem__)
        ties.append(len(query.candidates) - len({c_float(c.score).value for c in query.candidates}))
    scores = audit.measured(by_rank, job.collection.qrels, job.cell.dataset.measures)
    return {
        "ties": sum(ties),
        "queries_with_ties": sum(n > 0 for n in ties),
        "measures_in_rank_order": {name: measure.mean(found) for name, found in scores.items()},
    }


def _write(job: cells.Job, results: Path, ties: Mapping[str, Any]) -> CellResult:
    started = datetime.now(UTC)
    outcomes = [Outcome(q.qid, q.ranking(range(len(q.candidates)))) for q in job.queries]
    scores = cells.measured(job, outcomes)
    rows = [
        cells.per_query_row(query, outcome, scores) | dict.fromkeys(UNKNOWN)
        for query, outcome in zip(job.queries, outcomes, strict=True)
    ]
    ranked = {o.qid: list(zip(o.ranking.docids, o.ranking.scores, strict=True)) for o in outcomes}
    record = {
        **cells.record_head(job, digest([cells.key(job, None), ranked]), "complete"),
        "queries": len(rows),
        "measures": {name: measure.mean(values) for name, values in scores.items()},
        "kendall_tau": None,
        "faults": {},
        "inputs": dict(job.collection.warnings),
        "efficiency": dict.fromkeys(costs.efficiency([], 0.0, "quality")),
        "environment": {},
        "imported": dict(ties),
        **cells.stamps("", started),
    }
    files = store.Files(record, formats.write_run(ranked), rows, ())
    return CellResult(record, tuple(rows), store.write(results, job.cell, files))


# --- export -----------------------------------------------------------------------------------


def give_out(cell: CellResult, form: str, dataset: Collection | None = None) -> Iterator[str]:
    """A cell's lines as a run, requests, results or ir-metadata; a dataset at hand adds the texts
    of its documents."""
    if form == "ir-metadata":
        yield store.ir_metadata(cell.record)
    elif form == "run":
        yield (cell.folder / "run.trec").read_text(encoding="utf-8")
    else:
        calls = _calls(cell) if form == "results" else None
        for topic in _topics(cell, dataset):
            row = prepared.request(topic, texts=dataset is not None)
            if calls is not None:
                row["invocations_history"] = calls.get(topic.qid, [])
            yield json.dumps(row, ensure_ascii=False) + "\n"


def _topics(cell: CellResult, dataset: Collection | None) -> Iterator[Query]:
    """The cell's ranking with the texts that are at hand; a query or text not there is empty."""
    queries = {query.qid: query for query in dataset.queries} if dataset else {}
    for qid, rows in formats.read_run(cell.folder / "run.trec").items():
        query = queries.get(qid, Query(qid, ""))
        texts = {c.docid: c for c in query.candidates}
        found = (replace(texts.get(c.docid, c), score=c.score) for c in rows)
        yield Query(qid, query.text, tuple(found))


def _calls(cell: CellResult) -> dict[str, list[dict[str, Any]]]:
    """The trace as rank_llm's invocations; it holds no prompts, `harness prompt` shows them."""
    out: dict[str, list[dict[str, Any]]] = {}
    for row in store.read_trace(cell.folder):
        call = {"prompt": None, "response": row["text"]}
        counts = {"input_token_count": row["prompt_tokens"]}
        counts["output_token_count"] = row["generated_tokens"]
        out.setdefault(row["qid"], []).append(call | counts)
    return out
