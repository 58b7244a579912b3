"""Candidates as portable files: written once, read without index, network or Java.

Owns the layout of the data folder. It must not know where its content came from.

    <data>/<dataset>/<first stage>.jsonl.gz  qrels.txt  prepared.json (hashes, counts, sources)
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.data import formats
from harness.data.formats import Qrels
from harness.types import DataError, MissingResourceError, Query

VARIABLE = "RERANK_HARNESS_DATA"
FACTS, QRELS = "prepared.json", "qrels.txt"


@dataclass(frozen=True)
class Prepared:
    """One first stage of a dataset as it was written; `facts` is its entry in prepared.json."""

    first_stage: str
    topics: tuple[Query, ...]
    qrels: Qrels
    facts: Mapping[str, Any]


def data_folder() -> Path:
    given = os.environ.get(VARIABLE)
    return Path(given) if given else Path.home() / ".cache" / "rerank-harness" / "data"


def request(topic: Query, texts: bool = True) -> dict[str, Any]:
    """A query and its candidates as one line of a rank_llm request file."""
    candidates = []
    for c in topic.candidates:
        doc = ({"title": c.title} if c.title else {}) | ({"text": c.text} if texts else {})
        candidates.append({"docid": c.docid, "score": c.score, "doc": doc})
    return {"query": {"text": topic.text, "qid": topic.qid}, "candidates": candidates}


def write(
    folder: Path, first_stage: str, queries: Sequence[Query], qrels: Qrels, facts: Mapping[str, Any]
) -> Path:
    """Add a first stage to a dataset's folder. Equal content gives equal bytes.

    prepared.json comes last: stopped half way, what was prepared before is still complete
    or its checksum says that it is not.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{first_stage.replace('/', '_')}.jsonl.gz"
    rows = "".join(json.dumps(request(query), ensure_ascii=False) + "\n" for query in queries)
    replace_file(path, gzip.compress(rows.encode(), 6, mtime=0))
    judged = [(qid, docid, grade) for qid, rels in qrels.items() for docid, grade in rels.items()]
    lines = (f"{qid}\t0\t{docid}\t{grade}\n" for qid, docid, grade in judged)
    replace_file(folder / QRELS, "".join(lines).encode())
    known = _facts(folder)
    known["qrels_sha256"] = sha256(folder / QRELS)
    known["first_stages"][first_stage] = {"file": path.name, "sha256": sha256(path), **facts}
    text = json.dumps(known, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
    replace_file(folder / FACTS, text.encode())
    return path


def read(folder: Path, first_stage: str | None, usual: str) -> Prepared | None:
    """A prepared first stage: the one asked for, else the usual one, else the only one.

    None when it is not there. Raises DataError when a file is not the one that was written.
    """
    facts = _facts(folder)
    stages = facts["first_stages"]
    only = next(iter(stages)) if len(stages) == 1 else usual
    name = first_stage or (usual if usual in stages else only)
    if name not in stages:
        return None
    path = folder / Path(stages[name]["file"]).name
    for file, expected in ((path, stages[name]["sha256"]), (folder / QRELS, facts["qrels_sha256"])):
        if (got := sha256(file)) != expected:
            raise DataError(
                f"expected SHA-256 {expected}, got {got}: prepare the dataset again", path=file
            )
    topics = tuple(formats.read_requests(path))
    return Prepared(name, topics, formats.read_qrels(folder / QRELS), stages[name])


def _facts(folder: Path) -> dict[str, Any]:
    path = folder / FACTS
    if not path.is_file():
        return {"schema_version": 1, "first_stages": {}}
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found["qrels_sha256"], found["first_stages"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"is no record of prepared data: {error!r}", path=path) from error
    return found


def replace_file(path: Path, content: bytes) -> None:
    """The file appears whole or not at all."""
    work = path.with_name(f".writing-{os.getpid()}-{path.name}")
    try:
        work.write_bytes(content)
        work.replace(path)
    finally:
        work.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    if not path.is_file():
        raise MissingResourceError(f"{path}: was prepared and is gone: prepare the dataset again")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
