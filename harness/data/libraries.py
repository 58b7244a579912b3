"""Queries, judgements and documents of a collection, and what a first stage finds in it.

Owns ir_datasets, pyserini and local folders as sources, and bm25s. It must not know how candidates
are checked, measured or kept.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from harness.data import formats, lucene
from harness.data.formats import Qrels, Run
from harness.types import (
    Candidate,
    DataError,
    DatasetSpec,
    MissingPackageError,
    MissingResourceError,
    RegistryError,
    UsageError,
)

Documents = Callable[[Container[str] | None], Iterable[Candidate]]

EXCLUDED = -100  # ir_datasets' mark for documents that BRIGHT takes out of a query's candidates
SMALL = 300_000  # documents; above, bm25s would hold more than a workstation likes to give
BM25 = f"k1={lucene.K1}, b={lucene.B}"


@dataclass(frozen=True)
class Raw:
    """What a source delivers, before it is checked and cut.

    stated  the parameters of a first stage that was searched here, as text
    notes   warnings of what was done before
    depth   as deep as it was prepared
    """

    topics: Mapping[str, str]
    candidates: Mapping[str, Iterable[Candidate]]
    qrels: Qrels
    first_stage: str
    stated: str = ""
    notes: Mapping[str, int] = field(default_factory=dict)
    depth: int | None = None


@dataclass(frozen=True)
class Library:
    """A collection that can be searched.

    topics     per query its `text`, and the forms it was rewritten to, if any
    documents  streams those that are wanted, or all; None where there are no texts at all
    """

    spec: DatasetSpec
    topics: Mapping[str, Mapping[str, str]]
    qrels: Qrels
    documents: Documents | None


@dataclass(frozen=True)
class Found:
    """A first stage's ranks, ids only, and where the texts of its documents are."""

    name: str
    run: Run
    documents: Documents | None
    stated: str = ""


def gather(spec: DatasetSpec, first_stage: str | None, depth: int) -> Raw:
    """Ranks first, then what is excluded leaves, then the cut, and only then any text."""
    library, notes = LIBRARIES[spec.source](spec), Counter[str]()
    found = _found(library, first_stage, depth)
    rows = {
        qid: _allowed(spec, qid, found.run, rels, notes)[:depth]
        for qid, rels in library.qrels.items()
        if without_excluded(rels)
    }
    topics = {qid: topic["text"] for qid, topic in library.topics.items()}
    texts = _with_texts(rows, found.documents, found.name) if found.documents else rows
    return Raw(topics, texts, library.qrels, found.name, found.stated, notes)


def _found(library: Library, first_stage: str | None, depth: int) -> Found:
    """A run file, or enough candidates that `depth` are left when the excluded ones are gone."""
    spec, qrels = library.spec, library.qrels
    if path := run_path(spec, first_stage):
        return Found(layout(path).first_stage, formats.read_run(path), library.documents)
    stage = first_stage or ("bm25s" if spec.source == "folder" else spec.first_stage)
    name, _, variant = stage.partition("+")
    known = ["bm25"] * bool(spec.index) + ["bm25s"] * (spec.source != "pyserini")
    if name not in known:
        expected = f"a TREC run file, {' or '.join(known)}"
        raise RegistryError(f"unknown first stage {stage!r}: expected {expected}")
    judged = [qid for qid in library.topics if without_excluded(qrels.get(qid, {}))]
    asked = {qid: _asked(qid, library.topics[qid], variant) for qid in judged}
    extra = max((sum(g == EXCLUDED for g in qrels[qid].values()) for qid in judged), default=0)
    found = (_bm25 if name == "bm25" else _bm25s)(library, asked, depth + 1 + extra)
    return replace(found, name=stage)


def _asked(qid: str, topic: Mapping[str, str], variant: str) -> str:
    """What is searched for: the query, or one of its rewritten forms, which every query needs."""
    name = re.sub(r"\W", "_", variant).lower() if variant else "text"
    if name not in topic:
        raise RegistryError(f"unknown query {variant!r}", known=topic, given=name)
    if variant and not topic[name].strip():
        raise DataError(f"query {qid!r} has no {variant}")
    return topic[name]


def _allowed(
    spec: DatasetSpec, qid: str, run: Run, judged: Mapping[str, int], notes: Counter[str]
) -> list[Candidate]:
    """Without excluded documents, and as BEIR does, without the one that is the query itself."""
    rows = checked(run.get(qid, ()), judged, notes)
    kept = [c for c in rows if spec.family != "beir" or c.docid != qid]
    notes["candidates_that_are_the_query_removed"] += len(rows) - len(kept)
    return kept


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


def without_excluded(judgements: Mapping[str, int]) -> dict[str, int]:
    return {docid: grade for docid, grade in judgements.items() if grade != EXCLUDED}


def _with_texts(run: Run, documents: Documents, name: str) -> Run:
    """The run's candidates with their texts; of documents with one id the first counts."""
    texts: dict[str, Candidate] = {}
    for doc in documents({c.docid for rows in run.values() for c in rows}):
        texts.setdefault(doc.docid, doc)
    texts = {underscored(docid): doc for docid, doc in texts.items()} | texts
    for qid, rows in run.items():
        if absent := [c.docid for c in rows if c.docid not in texts]:
            told = f"document {absent[0]!r} of query {qid!r} is not in the collection"
            raise DataError(f"first stage {name}: {told}")
    return {q: [replace(texts[c.docid], score=c.score) for c in rows] for q, rows in run.items()}


def underscored(docid: str) -> str:
    """As Rank-R1 writes the docids of BRIGHT's Stack Overflow split, which hold spaces."""
    return docid.replace(" ", "_")


# --- run files --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """What the name of a run file says; `dataset` is empty when it says nothing of it."""

    first_stage: str
    dataset: str = ""


LAYOUTS = (
    # Rank-R1: bm25.biology.filtered.trec, and its runs with the rewritten queries
    (r"bm25_gpt4_run/(?:bm25\.)?(?P<dataset>\w+)(\.filtered)?\.\w+", "bm25+gpt4_reason"),
    (r"bm25\.(?P<dataset>\w+?)(\.filtered)?\.trec", "bm25"),
    # pyserini's two-click reproductions, which Rank-R1 reranks on TREC DL
    (r"run\.[\w.-]+\.bm25-default\.(?P<dataset>[\w-]+)\.txt", "bm25"),
    # ReasonRank: runs/biology/reasonir_gpt4cot_top100.txt
    (r"(?P<dataset>\w+)/reasonir_gpt4cot_top\d+\.\w+", "reasonir+gpt4_reason"),
    (r"runs/(?P<dataset>\w+)/(?P<stage>custom|[\w.-]+(?=_top\d))(_top\d+)?\.txt", ""),
)


def layout(path: Path) -> Layout:
    """The first stage and the dataset that a run file is named after, else its stem."""
    place = str(path.resolve()).removesuffix(".gz")
    for pattern, stage in LAYOUTS:
        if found := re.search(rf"(?:^|/){pattern}$", place):
            return Layout(stage or found["stage"], found["dataset"])
    return Layout(path.name.removesuffix(".gz").rsplit(".", 1)[0])


def run_path(spec: DatasetSpec, first_stage: str | None) -> Path | None:
    """The run file that is meant: a path, or for a folder also a name in it."""
    path = Path(first_stage or "").expanduser()
    if path.is_file():
        return path
    if spec.source != "folder" or first_stage == "bm25s":
        return None
    names = (first_stage, f"{first_stage}.trec") if first_stage else ("run.trec",)
    local = _first_of(Path(spec.location), *names)
    if first_stage and local is None:
        raise MissingResourceError(f"first stage {first_stage!r}: neither `bm25s` nor a run file")
    return local


# --- searching --------------------------------------------------------------------------------


def _bm25(library: Library, topics: Mapping[str, str], most: int) -> Found:
    """Lucene's, whose index holds the texts too."""
    index = library.spec.index
    run = lucene.search(index, topics, most)
    return Found("bm25", run, partial(lucene.documents, index), f"Lucene, {BM25}, Porter stems")


def _bm25s(library: Library, topics: Mapping[str, str], most: int) -> Found:
    """The documents are streamed: no text of them is kept. Of equal ids the first counts."""
    import bm25s
    import numpy as np

    ids: dict[str, bool] = {}
    tokenize = partial(bm25s.tokenize, stopwords="en", show_progress=False)
    tokens = tokenize(_texts(library, ids))
    if not any(ids.values()):
        raise DataError("holds no document with a text", path=library.spec.location)
    model = bm25s.BM25(k1=lucene.K1, b=lucene.B, method="lucene")
    model.index(tokens, show_progress=False)
    names, run = list(ids), {}
    for qid, text in topics.items():
        known = [w for w in tokenize([text], return_ids=False)[0] if w in model.vocab_dict]
        scores = model.get_scores(known) if known else np.zeros(1)
        order = np.argsort(-scores, kind="stable")[:most]
        run[qid] = [Candidate(names[i], "", "", float(scores[i])) for i in order if scores[i] > 0]
    return Found("bm25s", run, library.documents, f"bm25s, {BM25}, English stop words")


def _texts(library: Library, ids: dict[str, bool]) -> Iterator[str]:
    """What is searched of each document; its id is noted, and whether there is any text."""
    if library.documents is None:
        raise MissingResourceError(f"{library.spec.location}: expected a corpus for bm25s")
    for c in library.documents(None):
        if c.docid not in ids:
            text = f"{c.title} {c.text}".strip()
            ids[c.docid] = bool(text)
            yield text
        if len(ids) > SMALL:
            raise UsageError(f"{library.spec.name}: over {SMALL:,} documents: use bm25, not bm25s")


# --- local folders ----------------------------------------------------------------------------


def _folder(spec: DatasetSpec) -> Library:
    """BEIR's layout or Anserini's. With a run the corpus may be absent: then there are no texts."""
    folder = Path(spec.location)
    queries = _one_of(folder, "queries.tsv", "queries.jsonl", "topics.tsv", "topics.jsonl")
    corpora = ("corpus.jsonl", "corpus.tsv", "collection.jsonl", "collection.tsv", "collection")
    corpus = _first_of(folder, *corpora)
    topics = {qid: {"text": text} for qid, text in formats.read_queries(queries).items()}
    documents = partial(formats.read_corpus, corpus) if corpus else None
    return Library(spec, topics, judgements(spec), documents)


def _first_of(folder: Path, *names: str) -> Path | None:
    paths = (folder / f"{name}{end}" for name in names for end in ("", ".gz"))
    return next((path for path in paths if path.exists()), None)


def _one_of(folder: Path, *names: str) -> Path:
    path = _first_of(folder, *names)
    if path is None:
        raise MissingResourceError(f"{folder}: expected {' or '.join(names)}")
    return path


# --- ir_datasets and pyserini -----------------------------------------------------------------


def _irds(spec: DatasetSpec) -> Library:
    qrels = judgements(spec)
    with fetching(spec):
        topics = {
            query.query_id: {**query._asdict(), "text": irds_text(query)}
            for query in irds_load(spec).queries_iter()
        }
    return Library(spec, topics, qrels, partial(irds_documents, spec))


def irds_text(query: Any) -> str:
    """A query's words; BRIGHT's queries have no `default_text`."""
    return str(query.default_text() if hasattr(query, "default_text") else query.text)


def irds_documents(spec: DatasetSpec, wanted: Container[str] | None = None) -> Iterator[Candidate]:
    """BRIGHT's corpora repeat ids, which its store answers by chance: they are read in order."""
    with fetching(spec):
        dataset = irds_load(spec)
        if wanted is None or spec.family == "bright":
            rows = dataset.docs_iter()
        else:
            rows = dataset.docs_store().get_many(wanted).values()
        for doc in rows:
            if wanted is None or doc.doc_id in wanted or underscored(doc.doc_id) in wanted:
                title, text = getattr(doc, "title", "") or "", getattr(doc, "text", None)
                yield Candidate(doc.doc_id, doc.default_text() if text is None else text, title)


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
        wrong = type(error).__name__ == "HashVerificationError"
        kind = DataError if wrong else MissingResourceError
        raise kind(f"ir_datasets could not give {spec.irds}: {error}") from error


def _pyserini(spec: DatasetSpec) -> Library:
    """What ir_datasets lacks: topics and judgements that Anserini fetches and does not verify."""
    topics = {qid: {"text": text} for qid, text in lucene.topics(spec.topics).items()}
    if len(topics) != spec.queries:
        raise DataError(
            f"{spec.name}: expected {spec.queries} queries in {spec.topics}, got {len(topics)}:"
            " remove pyserini's copy of that file, so that it is fetched again"
        )
    return Library(spec, topics, judgements(spec), partial(lucene.documents, spec.index))


LIBRARIES = {"folder": _folder, "irds": _irds, "pyserini": _pyserini}


def judgements(spec: DatasetSpec) -> Qrels:
    """A dataset's judgements, or those of the file given in their place."""
    if spec.qrels:
        return formats.read_qrels(Path(spec.qrels))
    if spec.source == "folder":
        names = ("qrels.txt", "qrels/test.tsv", "qrels.tsv")
        return formats.read_qrels(_one_of(Path(spec.location), *names))
    if spec.source == "pyserini":
        return lucene.qrels(spec.topics)
    if spec.source == "irds":
        return irds_qrels(spec)
    raise MissingResourceError(f"{spec.name}: has no judgements here: add --qrels FILE")
