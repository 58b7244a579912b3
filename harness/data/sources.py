"""Where a dataset's queries, candidates and judgements come from, and what was odd about them.

A Collection is complete: whoever holds one needs no file, index or network any more.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.data import formats, libraries, prepared
from harness.data.formats import Qrels
from harness.data.libraries import Raw, checked, without_excluded
from harness.types import DataError, DatasetSpec, MissingResourceError, Query, component, digest


@dataclass(frozen=True)
class Collection:
    """Queries with candidates, judgements, and the hash of all of it.

    queries     in file order; exactly the declared set that a mean is taken over
    first_stage the name that goes into the cell; stated: its parameters, where they are known
    run_sha256  over (qid, docids, scores) of the candidates; sha256 over texts and judgements too
    warnings    what was odd and let pass, with counts; audit: the figures of the input audit
    """

    queries: tuple[Query, ...]
    qrels: Qrels
    first_stage: str
    run_sha256: str
    sha256: str
    warnings: Mapping[str, int]
    has_texts: bool
    stated: str = ""
    audit: Mapping[str, Any] = field(default_factory=dict)


def load(
    spec: DatasetSpec, first_stage: str | None = None, depth: int = 100, limit: int | None = None
) -> Collection:
    """Read a dataset with the named first stage, cut to `depth` candidates and `limit` queries.

    first_stage is a name the source knows (`bm25s`) or the path of a TREC run file.
    Raises DataError or MissingResourceError; never drops anything without a warning count.
    """
    for what, number in (("depth", depth), ("limit", limit)):
        if number is not None and number < 1:
            raise DataError(f"expected a {what} of at least 1, got {number}", path=spec.location)
    return collect(spec, SOURCES[spec.source](spec, first_stage, depth), depth, limit)


def collect(spec: DatasetSpec, raw: Raw, depth: int, limit: int | None = None) -> Collection:
    """Check, cut and hash what a source delivered."""
    if raw.depth is not None and raw.depth < depth:
        raise MissingResourceError(
            f"{spec.name}: {raw.first_stage} is prepared to depth {raw.depth}, asked for {depth}:"
            f" harness prepare -d {spec.name} --depth {depth}"
        )
    warnings: Counter[str] = Counter(raw.notes)
    judged = {qid: real for qid, rels in raw.qrels.items() if (real := without_excluded(rels))}
    if not judged:
        raise DataError("no query has a judgement", path=spec.qrels or spec.location)
    warnings["queries_without_judgements"] = len(raw.topics.keys() - judged.keys())
    warnings["judged_queries_without_a_query_text"] = len(judged.keys() - raw.topics.keys())
    queries = []
    for qid in [qid for qid in {**raw.topics, **judged} if qid in judged][:limit]:
        kept = checked(raw.candidates.get(qid, ()), raw.qrels[qid], warnings)[:depth]
        queries.append(Query(qid, raw.topics.get(qid, ""), tuple(kept), spec.name))
    if not any(q.candidates for q in queries):
        raise DataError("no query has a candidate", path=spec.location)
    _count_oddities(queries, depth, warnings)
    qrels = {q.qid: judged[q.qid] for q in queries}
    return Collection(
        queries=tuple(queries),
        qrels=qrels,
        first_stage=raw.first_stage,
        run_sha256=digest([[q.qid, [[c.docid, c.score] for c in q.candidates]] for q in queries]),
        sha256=_hash(queries, qrels),
        warnings={name: count for name, count in sorted(warnings.items()) if count},
        has_texts=any(c.text for q in queries for c in q.candidates),
        stated=raw.stated,
    )


def _count_oddities(queries: Sequence[Query], depth: int, warnings: Counter[str]) -> None:
    """Short lists, ties, empty texts, repeated queries, ids that need encoding in a run."""
    sizes, shown = [len(q.candidates) for q in queries], [c for q in queries for c in q.candidates]
    warnings["queries_without_candidates"] = sizes.count(0)
    warnings["queries_under_depth"] = sum(0 < size < depth for size in sizes)
    distinct = {(q.qid, c.score) for q in queries for c in q.candidates}
    warnings["tied_first_stage_scores"] = len(shown) - len(distinct)
    empty = sum(not c.text.strip() for c in shown)
    warnings["candidates_with_empty_text"] = empty if any(c.text for c in shown) else 0
    asked = Counter(q.text for q in queries if q.text)
    warnings["identical_queries"] = sum(n for n in asked.values() if n > 1)
    ids = {q.qid for q in queries} | {c.docid for c in shown}
    warnings["ids_with_white_space"] = sum(len(name.split()) > 1 for name in ids)


def _hash(queries: Iterable[Query], qrels: Qrels) -> str:
    """One hash over everything a result can depend on, independent of the file format."""
    state = hashlib.sha256()
    for q in queries:
        rows = [[c.docid, c.title, c.text, c.score] for c in q.candidates]
        judged = sorted(qrels[q.qid].items())
        state.update(digest([q.qid, q.text, rows, judged]).encode())
    return state.hexdigest()


# --- the sources ------------------------------------------------------------------------------


def _requests(spec: DatasetSpec, first_stage: str | None, depth: int) -> Raw:
    """A rank_llm request file with a qrels file beside it."""
    path = Path(spec.location)
    if not spec.qrels:
        raise DataError("a request file needs judgements: add --qrels FILE", path=path)
    if not path.is_file() and spec.note:
        raise MissingResourceError(f"{path}: no such file: {spec.note}")
    topics = formats.read_requests(path)
    return _raw(topics, libraries.judgements(spec), first_stage or spec.first_stage)


def _raw(topics: Sequence[Query], *rest: Any) -> Raw:
    return Raw({t.qid: t.text for t in topics}, {t.qid: t.candidates for t in topics}, *rest)


def _kept(spec: DatasetSpec, first_stage: str | None, depth: int) -> Raw:
    """What `harness prepare` has written, which needs no source any more; or a run file."""
    if libraries.run_path(spec, first_stage):
        return libraries.gather(spec, first_stage, depth)
    found = prepared.read(prepared_folder(spec), first_stage, spec.first_stage)
    if found is None:
        note = f" ({spec.note})" if spec.source == "pyserini" and spec.note else ""
        raise MissingResourceError(
            f"{spec.name}: the first stage {first_stage or spec.first_stage!r} is not prepared in"
            f" {prepared.data_folder()}: harness prepare -d {spec.name}{note}; or give a TREC run"
            " file with --first-stage FILE, or a request file as the dataset"
        )
    qrels, facts = libraries.judgements(spec) if spec.qrels else found.qrels, found.facts
    notes = {k: n for k, n in facts["warnings"].items() if k.endswith("removed")}
    stated = facts.get("parameters", "")
    return _raw(found.topics, qrels, found.first_stage, stated, notes, facts["depth"])


def prepared_folder(spec: DatasetSpec, data: Path | None = None) -> Path:
    return (data or prepared.data_folder()) / component(spec.name)


SOURCES = {"requests": _requests, "folder": libraries.gather, "irds": _kept, "pyserini": _kept}
