"""Where a dataset's queries, candidates and judgements come from, and what was odd about them.

A Collection is complete: whoever holds one needs no file, index or network any more.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from harness.data import formats, prepared
from harness.data.formats import Qrels, Run
from harness.types import (
    Candidate,
    DataError,
    DatasetSpec,
    MissingPackageError,
    MissingResourceError,
    Query,
    digest,
)

Documents = Mapping[str, Candidate]
Ranks = dict[str, list[tuple[int, float]]]

EXCLUDED = -100  # ir_datasets' mark for documents that BRIGHT takes out of a query's candidates


@dataclass(frozen=True)
class Collection:
    """Queries with candidates, judgements, and the hash of all of it.

    queries     in file order; exactly the declared set that a mean is taken over
    first_stage the name that goes into the cell
    run_sha256  over (qid, docids, scores) of the candidates; sha256 over texts and judgements too
    warnings    what the audit found and let pass, with counts
    """

    queries: tuple[Query, ...]
    qrels: Qrels
    first_stage: str
    run_sha256: str
    sha256: str
    warnings: Mapping[str, int]
    has_texts: bool


@dataclass(frozen=True)
class Raw:
    """What a source delivers, before it is checked and cut."""

    topics: Mapping[str, str]
    candidates: Mapping[str, Iterable[Candidate]]
    qrels: Qrels
    first_stage: str
    notes: Mapping[str, int] = field(default_factory=dict)  # warnings of what was done before
    depth: int | None = None  # as deep as it was prepared


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
    return collect(spec, SOURCES[spec.source](spec, first_stage), depth, limit)


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
    )


def checked(
    candidates: Iterable[Candidate], judgements: Mapping[str, int], warnings: Counter[str]
) -> list[Candidate]:
    """Excluded documents and repeats leave before the cut to the depth; both are counted."""
    kept: dict[str, Candidate] = {}
    for c in candidates:
        if judgements.get(c.docid) == EXCLUDED:
            warnings["excluded_candidates_removed"] += 1
        elif c.docid in kept:
            warnings["duplicate_candidates_removed"] += 1
        else:
            kept[c.docid] = c
    return list(kept.values())


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


def without_excluded(judgements: Mapping[str, int]) -> dict[str, int]:
    return {docid: grade for docid, grade in judgements.items() if grade != EXCLUDED}


def judgements(spec: DatasetSpec, qrels: Path | None = None) -> Qrels:
    """A dataset's judgements (or those of the file given in their place) without its candidates."""
    if qrels is not None:
        return formats.read_qrels(qrels)
    if spec.source == "folder":
        return formats.read_qrels(_qrels_path(spec))
    if spec.source == "irds" and spec.irds:
        return irds_qrels(spec)
    raise MissingResourceError(f"{spec.name}: has no judgements here: add --qrels FILE")


# --- the sources ------------------------------------------------------------------------------


def _requests(spec: DatasetSpec, first_stage: str | None) -> Raw:
    """A rank_llm request file with a qrels file beside it."""
    if not spec.qrels:
        raise DataError("a request file needs judgements: add --qrels FILE", path=spec.location)
    topics = formats.read_requests(Path(spec.location))
    qrels = formats.read_qrels(Path(spec.qrels))
    return _raw(topics, qrels, first_stage or spec.first_stage)


def _raw(topics: Sequence[Query], *rest: Any) -> Raw:
    return Raw({t.qid: t.text for t in topics}, {t.qid: t.candidates for t in topics}, *rest)


def _folder(spec: DatasetSpec, first_stage: str | None) -> Raw:
    """A local folder: queries, corpus, qrels, and run.trec or BM25 built on the spot.

    With a run the corpus may be absent: the candidates then have no texts to show a model.
    """
    folder = Path(spec.location)
    topics = formats.read_queries(_one_of(folder, "queries.tsv", "queries.jsonl"))
    qrels = formats.read_qrels(_qrels_path(spec))
    run_path = _run_path(folder, first_stage)
    if run_path is None:
        return Raw(topics, _bm25s(topics, _one_of(folder, "corpus.jsonl")), qrels, "bm25s")
    run, corpus = formats.read_run(run_path), _found(folder, "corpus.jsonl")
    if corpus:
        wanted = {c.docid for rows in run.values() for c in rows}
        found = {doc.docid: doc for doc in formats.read_corpus(corpus, wanted)}
        run = _with_texts(run, found, corpus, run_path)
    return Raw(topics, run, qrels, stage_name(run_path))


def _qrels_path(spec: DatasetSpec) -> Path:
    folder = Path(spec.location)
    return Path(spec.qrels) if spec.qrels else _one_of(folder, "qrels.txt", "qrels/test.tsv")


def _one_of(folder: Path, *names: str) -> Path:
    path = _found(folder, *names)
    if path is None:
        raise MissingResourceError(f"{folder}: expected {' or '.join(names)}")
    return path


def _found(folder: Path, *names: str) -> Path | None:
    paths = (folder / f"{name}{end}" for name in names for end in ("", ".gz"))
    return next((path for path in paths if path.is_file()), None)


def _run_path(folder: Path, first_stage: str | None) -> Path | None:
    """The run file to read, or None for BM25 on the spot."""
    if first_stage is None or first_stage == "bm25s":
        return None if first_stage else _found(folder, "run.trec")
    path = Path(first_stage).expanduser()
    local = path if path.is_file() else _found(folder, first_stage, f"{first_stage}.trec")
    if local is None:
        raise MissingResourceError(f"first stage {first_stage!r}: neither `bm25s` nor a run file")
    return local


def stage_name(path: Path) -> str:
    return path.name.removesuffix(".gz").rsplit(".", 1)[0]


def _with_texts(run: Run, found: Documents, home: Path | str, path: Path | str = "") -> Run:
    """The run's candidates with the texts of the documents found."""
    out = {}
    for qid, rows in run.items():
        if absent := [c.docid for c in rows if c.docid not in found]:
            message = f"document {absent[0]!r} of query {qid!r} is not in {home}"
            raise DataError(message, path=path)
        out[qid] = [replace(found[c.docid], score=c.score) for c in rows]
    return out


def _bm25s(topics: Mapping[str, str], corpus: Path) -> Run:
    documents = list(formats.read_corpus(corpus))
    texts = [f"{d.title} {d.text}".strip() for d in documents]
    if not any(texts):
        raise DataError("holds no document with a text", path=corpus)
    ranks = bm25s_ranks(topics, texts, 1000)
    return {q: [replace(documents[i], score=n) for i, n in rows] for q, rows in ranks.items()}


def bm25s_ranks(topics: Mapping[str, str], texts: Iterable[str], most: int) -> Ranks:
    """BM25 (k1=0.9, b=0.4, Lucene's formula): (position, score) of the texts that match."""
    import bm25s
    import numpy as np

    model = bm25s.BM25(k1=0.9, b=0.4, method="lucene")
    model.index(bm25s.tokenize(texts, stopwords="en", show_progress=False), show_progress=False)
    out: Ranks = {}
    for qid, text in topics.items():
        [tokens] = bm25s.tokenize([text], stopwords="en", return_ids=False, show_progress=False)
        known = [token for token in tokens if token in model.vocab_dict]
        scores = model.get_scores(known) if known else np.zeros(1)
        order = np.argsort(-scores, kind="stable")[:most]
        out[qid] = [(int(i), float(scores[i])) for i in order if scores[i] > 0]
    return out


# --- prepared files and ir_datasets -----------------------------------------------------------


def prepared_folder(spec: DatasetSpec, data: Path | None = None) -> Path:
    return (data or prepared.data_folder()) / spec.name.replace("/", "_")


def _prepared(spec: DatasetSpec, first_stage: str | None) -> Raw:
    """What `harness prepare` has written; it needs no ir_datasets any more."""
    found = prepared.read(prepared_folder(spec), first_stage, spec.first_stage)
    if found is None:
        raise MissingResourceError(
            f"{spec.name}: the first stage {first_stage or spec.first_stage!r} is not prepared in"
            f" {prepared.data_folder()}: harness prepare -d {spec.name}; or give a TREC run file"
            " with --first-stage FILE, or a request file as the dataset"
        )
    kept = {k: n for k, n in found.facts["warnings"].items() if k.endswith("removed")}
    return _raw(found.topics, found.qrels, found.first_stage, kept, found.facts["depth"])


def _irds(spec: DatasetSpec, first_stage: str | None) -> Raw:
    """A prepared file; or a run file, with queries, judgements and texts of ir_datasets."""
    path = Path(first_stage or "")
    if not path.is_file():
        return _prepared(spec, first_stage)
    run = formats.read_run(path)
    with fetching(spec):
        dataset = irds_load(spec)
        topics = {q.query_id: irds_text(q) for q in dataset.queries_iter()}
        candidates = irds_texts(spec, dataset, run)
    return Raw(topics, candidates, irds_qrels(spec), stage_name(path))


def irds_text(query: Any) -> str:
    """A query's words; BRIGHT's queries have no `default_text`."""
    return str(query.default_text() if hasattr(query, "default_text") else query.text)


def irds_texts(spec: DatasetSpec, dataset: Any, run: Run) -> Run:
    """A run with its documents' texts; a first stage that brought its own keeps them."""
    found = {c.docid: c for rows in run.values() for c in rows if c.text}
    wanted = {c.docid for rows in run.values() for c in rows} - found.keys()
    for doc in _irds_documents(spec, dataset, wanted):
        found.setdefault(doc.doc_id, irds_candidate(doc))
    return _with_texts(run, found, spec.irds)


def _irds_documents(spec: DatasetSpec, dataset: Any, wanted: set[str]) -> Iterator[Any]:
    """BRIGHT's corpora repeat ids, which its store answers by chance: they are read in order."""
    if wanted and spec.family == "bright":
        yield from (doc for doc in dataset.docs_iter() if doc.doc_id in wanted)
    elif wanted:
        yield from dataset.docs_store().get_many(wanted).values()


def irds_qrels(spec: DatasetSpec) -> dict[str, dict[str, int]]:
    """Judgements by query. Repeated pairs collapse; a document both gold and excluded is gold."""
    out: dict[str, dict[str, int]] = {}
    with fetching(spec):
        for row in irds_load(spec).qrels_iter():
            rels = out.setdefault(row.query_id, {})
            rels[row.doc_id] = max(row.relevance, rels.get(row.doc_id, EXCLUDED))
    return out


def irds_load(spec: DatasetSpec) -> Any:
    import ir_datasets

    return ir_datasets.load(spec.irds)


@contextmanager
def fetching(spec: DatasetSpec) -> Iterator[None]:
    """What ir_datasets raises without a network, a package or a sound download, as ours."""
    try:
        yield
    except ImportError as error:  # BRIGHT's files are parquet, which is an option of ir_datasets
        package = str(getattr(error.__cause__, "name", "pyarrow")).partition(".")[0]
        raise MissingPackageError(package, "bright") from error
    except (OSError, RuntimeError) as error:
        raise MissingResourceError(
            f"{spec.name}: ir_datasets could not give {spec.irds}: {error}"
        ) from error


def irds_candidate(doc: Any) -> Candidate:
    title = getattr(doc, "title", "") or ""
    text = getattr(doc, "text", None)
    return Candidate(doc.doc_id, doc.default_text() if text is None else text, title)


def _pyserini(spec: DatasetSpec, first_stage: str | None) -> Raw:
    raise MissingResourceError(
        f"{spec.name}: {spec.note or 'its documents are in a pyserini index only'};"
        " bring a rank_llm request file with --qrels"
    )


SOURCES = {"requests": _requests, "folder": _folder, "irds": _irds, "pyserini": _pyserini}
