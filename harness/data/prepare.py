"""Retrieves a dataset's candidates once and keeps them as a portable file.

Owns what is recorded of how they were made. It must not know models or how the file is used.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harness import env
from harness.data import libraries, prepared, sources
from harness.types import DataError, DatasetSpec, MissingResourceError

RETRIEVAL_PACKAGES = ("ir_datasets", "bm25s", "pyserini")


def ready(spec: DatasetSpec, first_stage: str | None, depth: int, data: Path) -> Path | None:
    """The candidate file, if it was made from the same, at least as deep, and is intact.

    Local files are read anew each time: that costs little, and they may have changed.
    """
    if spec.source not in ("irds", "pyserini"):
        return None
    run = libraries.run_path(spec, first_stage)
    name = libraries.layout(run).first_stage if run else first_stage or spec.first_stage
    folder = sources.prepared_folder(spec, data)
    try:
        found = prepared.read(folder, name, name)
    except (DataError, MissingResourceError):
        return None
    if found and found.facts["source"] == _source(spec, run) and found.facts["depth"] >= depth:
        return folder / str(found.facts["file"])
    return None


def prepare(spec: DatasetSpec, first_stage: str | None, depth: int, data: Path) -> Path:
    """Write a dataset's candidates under `data`; returns the candidate file.

    first_stage is `bm25` (Lucene), `bm25s`, either with `+` and a rewritten query of the dataset
    (`bm25+gpt4_reason`), or a TREC run file.
    """
    if spec.source == "requests":
        collection = sources.load(spec, first_stage, depth)
    else:
        collection = sources.collect(spec, libraries.gather(spec, first_stage, depth), depth)
    if not collection.has_texts:
        raise DataError(f"{spec.name}: no candidate has a text, so there is nothing to prepare")
    facts = {
        "depth": depth,
        "parameters": collection.stated,
        "queries": len(collection.queries),
        "candidates": sum(len(query.candidates) for query in collection.queries),
        "collection_sha256": collection.sha256,
        "source": _source(spec, libraries.run_path(spec, first_stage)),
        "made_with": {k: v for k, v in env.versions().items() if k in RETRIEVAL_PACKAGES},
        "warnings": dict(collection.warnings),
    }
    folder = sources.prepared_folder(spec, data)
    name = collection.first_stage
    return prepared.write(folder, name, collection.queries, collection.qrels, facts)


def _source(spec: DatasetSpec, run: Path | None) -> dict[str, Any]:
    ids = {"irds": spec.irds, "index": spec.index, "topics": spec.topics}
    return ids | ({"run_sha256": prepared.sha256(run)} if run else {})
