"""Where a dataset's queries, candidates and judgements come from, and what was odd about them.

A Collection is complete: whoever holds one needs no file, index or network any more.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from harness.data import formats, prepared
from harness.types import (
    Candidate,
    DataError,
    DatasetSpec,
    MissingPackageError,
    MissingResourceError,
    Query,
    digest,
)

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
    qrels: Mapping[str, Mapping[str, int]]
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
    qrels: Mapping[str, Mapping[str, int]]
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
    declared = [qid for qid in raw.topics if qid in judged]
    warnings["queries_without_judgements"] += len(raw.topics) - len(declared)
    absent = [qid for qid in judged if qid not in raw.topics]
    warnings["judged_queries_without_a_query_text"] = len(absent)
    queries = []
    for qid in (declared + absent)[:limit]:
        kept = checked(raw.candidates.get(qid, ()), raw.qrels.get(qid, {}), warnings)
        warnings["queries_without_candidates"] += not kept
        warnings["queries_under_depth"] += 0 < len(kept) < depth
        text = raw.topics.get(qid, "")
        queries.append(Query(qid, text, tuple(kept[:depth]), spec.name))
    if not any(q.candidates for q in queries):
        raise DataError("no query has a candidate", path=spec.location)
    texts = any(c.text for q in queries for c in q.candidates)
    _count_oddities(queries, warnings)
    if texts:
        for q in queries:
            warnings["candidates_with_empty_text"] += sum(not c.text.strip() for c in q.candidates)
    qrels = {q.qid: judged.get(q.qid, {}) for q in queries}
    return Collection(
        queries=tuple(queries),
        qrels=qrels,
        first_stage=raw.first_stage,
        run_sha256=digest([[q.qid, [[c.docid, c.score] for c in q.candidates]] for q in queries]),
        sha256=_hash(queries, qrels),
        warnings={name: count for name, count in sorted(warnings.items()) if count},
        has_texts=texts,
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


def _count_oddities(queries: Iterable[Query], warnings: Counter[str]) -> None:
    """Ties, ids that need encoding in a run, and queries that others repeat word for word."""
    scores = [[c.score for c in q.candidates] for q in queries]
    warnings["tied_first_stage_scores"] = sum(len(row) - len(set(row)) for row in scores)
    asked = Counter(q.text for q in queries if q.text)
    warnings["identical_queries"] = sum(n for n in asked.values() if n > 1)
    ids = {q.qid for q in queries} | {c.docid for q in queries for c in q.candidates}
    warnings["ids_with_white_space"] = sum(len(name.split()) > 1 for name in ids)


def _hash(queries: Iterable[Query], qrels: Mapping[str, Mapping[str, int]]) -> str:
    """One hash over everything a result can depend on, independent of the file format."""
    state = hashlib.sha256()
    for q in queries:
        rows = [[c.docid, c.title, c.text, c.score] for c in q.candidates]
        judged = sorted(qrels[q.qid].items())
        state.update(digest([q.qid, q.text, rows, judged]).encode())
    return state.hexdigest()


def without_excluded(judgements: Mapping[str, int]) -> dict[str, int]:
    return {docid: grade for docid, grade in judgements.items() if grade != EXCLUDED}


def judgements(spec: DatasetSpec, qrels: Path | None = None) -> Mapping[str, Mapping[str, int]]:
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
    return Raw(
        {t.qid: t.text for t in topics},
        {t.qid: t.candidates for t in topics},
        formats.read_qrels(Path(spec.qrels)),
        first_stage or spec.first_stage,
    )


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
    candidates = _with_texts(run, corpus, run_path) if corpus else run
    return Raw(topics, candidates, qrels, stage_name(run_path))


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
        return _found(folder, "run.trec") if first_stage is None else None
    path = Path(first_stage).expanduser()
    local = path if path.is_file() else _found(folder, first_stage, f"{first_stage}.trec")
    if local is not None:
        return local
    raise MissingResourceError(f"first stage {first_stage!r}: neither `bm25s` nor a run file")


def stage_name(path: Path) -> str:
    return path.name.removesuffix(".gz").rsplit(".", 1)[0]


def _with_texts(
    run: Mapping[str, list[Candidate]], corpus: Path, run_path: Path
) -> dict[str, list[Candidate]]:
    """The run's candidates with their texts; the corpus is streamed, only what is needed kept."""
    wanted = {c.docid for candidates in run.values() for c in candidates}
    decoded = {formats.decode_docid(docid) for docid in wanted}
    found: dict[str, Candidate] = {}
    for number, doc in formats.read_corpus(corpus):
        if doc.docid in wanted or doc.docid in decoded:
            _keep(found, doc, corpus, number)
    out: dict[str, list[Candidate]] = {}
    for qid, candidates in run.items():
        rows = []
        for c in candidates:
            known = found.get(c.docid) or found.get(formats.decode_docid(c.docid))
            if known is None:
                raise DataError(
                    f"document {c.docid!r} of query {qid!r} is not in {corpus}", path=run_path
                )
            rows.append(replace(known, score=c.score))
        out[qid] = rows
    return out


def _keep(found: dict[str, Candidate], doc: Candidate, corpus: Path, number: int) -> None:
    """The first of equal documents stays; one id with two texts is an error."""
    old = found.setdefault(doc.docid, doc)
    if (old.title, old.text) != (doc.title, doc.text):
        raise DataError(
            f"document {doc.docid!r} appears twice with different texts", path=corpus, line=number
        )


def _bm25s(topics: Mapping[str, str], corpus: Path, most: int = 1000) -> dict[str, list[Candidate]]:
    found: dict[str, Candidate] = {}
    for number, doc in formats.read_corpus(corpus):
        _keep(found, doc, corpus, number)
    texts = [f"{d.title} {d.text}".strip() for d in found.values()]
    if not any(texts):
        raise DataError("holds no document with a text", path=corpus)
    documents, ranks = list(found.values()), bm25s_ranks(topics, texts, most)
    return {q: [replace(documents[i], score=n) for i, n in rows] for q, rows in ranks.items()}


def bm25s_ranks(
    topics: Mapping[str, str], texts: Iterable[str], most: int
) -> dict[str, list[tuple[int, float]]]:
    """BM25 (k1=0.9, b=0.4, Lucene's formula): (position, score) of the texts that match."""
    import bm25s
    import numpy as np

    model = bm25s.BM25(k1=0.9, b=0.4, method="lucene")
    model.index(bm25s.tokenize(texts, stopwords="en", show_progress=False), show_progress=False)
    out: dict[str, list[tuple[int, float]]] = {}
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
    candidates = {t.qid: t.candidates for t in found.topics}
    topics = {t.qid: t.text for t in found.topics}
    return Raw(topics, candidates, found.qrels, found.first_stage, kept, found.facts["depth"])


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
    return str(query.default_text() if hasattr(query, "default_text") else query.text)


def irds_texts(
    spec: DatasetSpec, dataset: Any, run: Mapping[str, list[Candidate]]
) -> dict[str, list[Candidate]]:
    """A run with its documents' texts; a first stage that brought its own keeps them."""
    wanted = {c.docid for rows in run.values() for c in rows if not c.text}
    found: dict[str, Candidate] = {}
    for doc in _irds_documents(spec, dataset, wanted):
        found.setdefault(doc.doc_id, irds_candidate(doc))
    if absent := sorted(wanted - found.keys())[:1]:
        raise DataError(f"document {absent[0]!r} is not in {spec.irds}")
    return {
        qid: [replace(found.get(c.docid, c), score=c.score) for c in rows]
        for qid, rows in run.items()
    }


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
    if prepared_folder(spec).is_dir():
        return _prepared(spec, first_stage)
    raise MissingResourceError(
        f"{spec.name}: {spec.note or 'its documents are in a pyserini index only'};"
        " bring a rank_llm request file with --qrels"
    )


SOURCES: dict[str, Callable[[DatasetSpec, str | None], Raw]] = {
    "requests": _requests,
    "folder": _folder,
    "irds": _irds,
    "pyserini": _pyserini,
}
