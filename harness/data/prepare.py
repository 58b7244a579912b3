"""Retrieves a dataset's candidates once and keeps them as a portable file.

Owns first stages over whole collections. It must not know models or how the file is used.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from harness import env
from harness.data import formats, prepared, sources
from harness.data.formats import Qrels, Run
from harness.types import Candidate, DataError, DatasetSpec, RegistryError, UsageError

RETRIEVAL_PACKAGES = ("ir_datasets", "bm25s", "pyserini")
SMALL = 300_000  # documents; above, bm25s would hold more than a workstation likes to give


def prepare(spec: DatasetSpec, first_stage: str | None, depth: int, data: Path) -> Path:
    """Write a dataset's candidates under `data`; returns the candidate file.

    first_stage is `bm25` (Lucene), `bm25s`, either with `+` and a rewritten query of the dataset
    (`bm25+gpt4_reason`), or a TREC run file.
    """
    if spec.source == "irds":
        collection = sources.collect(spec, _irds(spec, first_stage, depth), depth)
    else:
        collection = sources.load(spec, first_stage, depth)
    if not collection.has_texts:
        raise DataError(f"{spec.name}: no candidate has a text, so there is nothing to prepare")
    facts = {
        "depth": depth,
        "queries": len(collection.queries),
        "candidates": sum(len(query.candidates) for query in collection.queries),
        "collection_sha256": collection.sha256,
        "source": {"irds": spec.irds, "index": spec.index},
        "made_with": {k: v for k, v in env.versions().items() if k in RETRIEVAL_PACKAGES},
        "warnings": dict(collection.warnings),
    }
    folder = sources.prepared_folder(spec, data)
    name = collection.first_stage
    return prepared.write(folder, name, collection.queries, collection.qrels, facts)


def _irds(spec: DatasetSpec, first_stage: str | None, depth: int) -> sources.Raw:
    """Ranks first, then what is excluded leaves, then the cut, and only then any text."""
    stage, qrels = first_stage or spec.first_stage, sources.irds_qrels(spec)
    with sources.fetching(spec):
        dataset = sources.irds_load(spec)
        queries = [
            q for q in dataset.queries_iter() if sources.without_excluded(qrels.get(q.query_id, {}))
        ]
        if Path(stage).is_file():
            run, name = formats.read_run(Path(stage)), sources.stage_name(Path(stage))
        else:
            run, name = _retrieved(spec, dataset, queries, stage, depth, qrels), stage
        notes: Counter[str] = Counter()
        cut = {q.query_id: _allowed(spec, q.query_id, run, qrels, notes)[:depth] for q in queries}
        topics = {q.query_id: sources.irds_text(q) for q in queries}
        return sources.Raw(topics, sources.irds_texts(spec, dataset, cut), qrels, name, notes)


def _allowed(
    spec: DatasetSpec, qid: str, run: Run, qrels: Qrels, notes: Counter[str]
) -> list[Candidate]:
    """Without excluded documents, and as BEIR does, without the one that is the query itself."""
    rows = sources.checked(run.get(qid, ()), qrels[qid], notes)
    kept = [c for c in rows if spec.family != "beir" or c.docid != qid]
    notes["candidates_that_are_the_query_removed"] += len(rows) - len(kept)
    return kept


def _retrieved(
    spec: DatasetSpec, dataset: Any, queries: list[Any], stage: str, depth: int, qrels: Qrels
) -> Run:
    """Enough candidates that `depth` are left when the excluded ones are gone."""
    name, _, variant = stage.partition("+")
    if name not in RETRIEVERS:
        expected = f"a TREC run file, {' or '.join(RETRIEVERS)}"
        raise RegistryError(f"unknown first stage {stage!r}: expected {expected}")
    asked = {q.query_id: _asked(q, variant) for q in queries}
    extra = (sum(g == sources.EXCLUDED for g in qrels[qid].values()) for qid in asked)
    return RETRIEVERS[name](spec, dataset, asked, depth + 1 + max(extra, default=0))


def _asked(query: Any, variant: str) -> str:
    """What is searched for: the query, or one of its rewritten forms, which every query needs."""
    if not variant:
        return sources.irds_text(query)
    field = re.sub(r"\W", "_", variant).lower()
    if field not in query._fields:
        raise RegistryError(f"unknown query {variant!r}", known=query._fields, given=field)
    text = str(getattr(query, field))
    if not text.strip():
        raise DataError(f"query {query.query_id!r} has no {variant}")
    return text


def _bm25s(spec: DatasetSpec, dataset: Any, topics: Mapping[str, str], most: int) -> Run:
    """The documents are streamed: no text of them is kept. Of equal ids the first counts."""
    ids: dict[str, None] = {}

    def texts() -> Iterator[str]:
        for doc in dataset.docs_iter():
            c = sources.irds_candidate(doc)
            if c.docid not in ids:
                ids[c.docid] = None
                yield f"{c.title} {c.text}".strip()
            if len(ids) > SMALL:
                raise UsageError(f"{spec.name}: over {SMALL:,} documents, use bm25, not bm25s")

    ranks = sources.bm25s_ranks(topics, texts(), most)
    names = list(ids)
    return {q: [Candidate(names[i], "", "", n) for i, n in rows] for q, rows in ranks.items()}


def _lucene(spec: DatasetSpec, dataset: Any, topics: Mapping[str, str], most: int) -> Run:
    from harness.data import lucene

    return lucene.search(spec.index, topics, most)


RETRIEVERS = {"bm25": _lucene, "bm25s": _bm25s}
