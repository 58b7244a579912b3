"""What a collection is worth before any engine sees it: counts, coverage, the best reachable score.

Owns the audit's figures. It knows neither models nor how a finding is shown.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from harness import measure
from harness.data import prepared
from harness.data.sources import Collection
from harness.types import DataError, DatasetSpec, digest

SCHEMA = 1  # counts up when the same collection would get other figures
COUNTED = (
    "queries_without_candidates", "queries_under_depth", "queries_without_judgements",
    "identical_queries", "candidates_with_empty_text", "duplicate_candidates_removed",
    "excluded_candidates_removed", "tied_first_stage_scores", "ids_with_white_space",
)  # fmt: skip


def audit(spec: DatasetSpec, collection: Collection, depth: int) -> dict[str, Any]:
    """Figures of a collection cut to `depth`; `errors` is empty unless running it is pointless.

    Shares and measures are means over all queries; without candidates a query counts 0.
    """
    recall = next((m for m in spec.measures if m.startswith("R(")), "R").partition("@")[0]
    names = ("nDCG@10", "Judged@10", f"Judged@{depth}", f"{recall}@{depth}")
    orders = {q.qid: {c.docid: None for c in q.candidates} for q in collection.queries}
    qrels, counts = collection.qrels, [len(docids) for docids in orders.values()]
    ideal = {q: sorted(docids, key=lambda d: -qrels[q].get(d, 0)) for q, docids in orders.items()}
    [best] = measured(ideal, qrels, ("nDCG@10",)).values()
    scores = measured({q: list(docids) for q, docids in orders.items()}, qrels, names)
    found = {name: measure.mean(values) for name, values in scores.items()}
    away = [g for q, rels in qrels.items() for docid, g in rels.items() if docid not in orders[q]]
    return {
        "dataset": spec.name,
        "first_stage": collection.first_stage,
        "first_stage_parameters": collection.stated or None,
        "depth": depth,
        "queries": len(counts),
        "queries_in_the_registry": spec.queries,
        "candidates": sum(counts),
        "candidates_min": min(counts),
        "candidates_median": statistics.median(counts),
        "candidates_max": max(counts),
        "texts": collection.has_texts,
        "first_stage_measures": found,
        "oracle_nDCG@10": measure.mean(best),
        "judged_documents_no_candidates": len(away),  # which no reranking can reach
        "relevant_documents_no_candidates": sum(grade > 0 for grade in away),
        "errors": _errors(collection, found),
        "warnings": dict.fromkeys(COUNTED, 0) | dict(collection.warnings),
        "text_sha256": _text_hash(collection),
        "run_sha256": collection.run_sha256,
        "sha256": collection.sha256,
    }


def checked(
    spec: DatasetSpec, collection: Collection, depth: int, limit: int | None = None
) -> dict[str, Any]:
    """The audit of what is to be run; kept by content beside the prepared data.

    Raises DataError where running it is pointless; a few queries may well have nothing judged.
    """
    state = [SCHEMA, collection.sha256, dict(collection.warnings), asdict(spec), depth]
    path = prepared.data_folder() / "audits" / f"{digest(state)}.json"
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = audit(spec, collection, depth)
        with suppress(OSError):  # a folder that cannot be written costs time, not a result
            path.parent.mkdir(parents=True, exist_ok=True)
            prepared.replace_file(path, json.dumps(found).encode())
    if found["errors"] and limit is None:
        raise DataError(f"{spec.name}: {'; '.join(found['errors'])}")
    return found


def rows(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One figure a row; those of a table under its name."""
    out = []
    for name, value in figures.items():
        inner = value.items() if isinstance(value, dict) else [("", value)]
        out += [{"figure": f"{name}: {key}" if key else name, "value": v} for key, v in inner]
    return [row for row in out if row["value"] != []]


def measured(
    orders: Mapping[str, Sequence[str]],
    qrels: Mapping[str, Mapping[str, int]],
    names: Iterable[str],
) -> dict[str, dict[str, float]]:
    """Measures by query of lists of docids that are taken as they stand."""
    run = {qid: {d: float(-n) for n, d in enumerate(docids)} for qid, docids in orders.items()}
    return measure.per_query(run, qrels, names, list(run))


def _errors(collection: Collection, found: Mapping[str, float]) -> list[str]:
    """What makes every number over this collection meaningless."""
    errors = []
    if not any(grade > 0 for rels in collection.qrels.values() for grade in rels.values()):
        errors.append("no document is judged relevant")
    if not any(value for name, value in found.items() if name.startswith("Judged")):
        errors.append("no candidate is judged: run and judgements use different document ids")
    return errors


def _text_hash(collection: Collection) -> str:
    """Over what a model would read, whatever its order, scores and judgements."""
    shown = {c.docid: [c.title, c.text] for q in collection.queries for c in q.candidates}
    return digest([sorted((q.qid, q.text) for q in collection.queries), sorted(shown.items())])
