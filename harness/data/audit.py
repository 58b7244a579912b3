"""What a collection is worth before any engine sees it: counts, coverage, the best reachable score.

Owns the audit's figures. It knows neither models nor how a finding is shown.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from harness import measure
from harness.data.sources import Collection
from harness.types import DatasetSpec, digest


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
        "warnings": dict(collection.warnings),
        "text_sha256": _text_hash(collection),
        "run_sha256": collection.run_sha256,
        "sha256": collection.sha256,
    }


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
