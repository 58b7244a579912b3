"""The field's files, read and written: runs, qrels, queries, corpora, rank_llm requests.

Every reader accepts `.gz`, and names file, line and what was expected when a line is wrong.
Document ids with white space are percent-encoded at this edge only; inside they are as they came.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import re
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from harness.types import Candidate, DataError, MissingResourceError

RUN_LINE = re.compile(r"^(\S+)\s+(\S+)\s+(\S.*?)\s+(\S+)\s+(\S+)\s+(\S+)\s*$")
TAG = "rerank-harness"


@dataclass(frozen=True, slots=True)
class Topic:
    """A query with its candidates as a request file holds them."""

    qid: str
    text: str
    candidates: tuple[Candidate, ...]


def open_text(path: Path) -> IO[str]:
    """A text file for reading, gunzipped when its name ends in .gz; UTF-8, a BOM is dropped."""
    if not path.is_file():
        raise MissingResourceError(f"{path}: no such file")
    raw = gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # noqa: SIM115
    return io.TextIOWrapper(raw, encoding="utf-8-sig", newline="\n")


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number, text) of every line that is not blank."""
    with open_text(path) as file:
        number = 0
        try:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line.rstrip("\n").rstrip("\r")
        except (UnicodeDecodeError, EOFError, gzip.BadGzipFile) as error:
            raise DataError(f"cannot be read: {error}", path=path, line=number + 1) from error


def encode_docid(docid: str) -> str:
    """A docid as one run column: white space and literal `%xx` are percent-encoded."""
    return re.sub(
        r"\s|%(?=[0-9A-Fa-f]{2})", lambda m: urllib.parse.quote(m.group(0), safe=""), docid
    )


def decode_docid(column: str) -> str:
    return urllib.parse.unquote(column)


def read_run(path: Path) -> dict[str, list[Candidate]]:
    """A TREC run: per query, candidates by falling score, ties in order of rank.

    Six columns split by tabs or spaces; a docid may itself hold spaces. `#` lines are comments.
    Docids are decoded only in runs that this harness wrote (their tag says so).
    """
    out: dict[str, list[tuple[float, float, int, Candidate]]] = {}
    for number, line in lines(path):
        if line.startswith("#"):
            continue
        columns = line.split("\t")
        if len(columns) != 6:
            match = RUN_LINE.match(line)
            if not match:
                raise DataError(
                    f"expected `qid Q0 docid rank score tag`, got {line[:80]!r}",
                    path=path,
                    line=number,
                )
            columns = list(match.groups())
        qid, _, docid, rank, score, tag = columns
        value = _number(score, "score", path, number)
        docid = decode_docid(docid) if tag.strip() == TAG else docid
        place = _number(rank, "rank", path, number)
        out.setdefault(qid, []).append((-value, place, number, Candidate(docid, "", "", value)))
    return {
        qid: [c for _, _, _, c in sorted(rows, key=lambda r: r[:3])] for qid, rows in out.items()
    }


def _number(text: str, what: str, path: Path, line: int) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"expected a finite number as {what}, got {text!r}", path=path, line=line)
    return value


def write_run(rankings: Mapping[str, Iterable[tuple[str, float]]]) -> str:
    """The text of a TREC run: six columns, one space, ranks from 1, tag `rerank-harness`."""
    return "".join(
        f"{qid} Q0 {encode_docid(docid)} {rank} {score:g} {TAG}\n"
        for qid, docs in rankings.items()
        for rank, (docid, score) in enumerate(docs, 1)
    )


def read_qrels(path: Path) -> dict[str, dict[str, int]]:
    """TREC qrels (`qid 0 docid grade`) or BEIR's three columns with a header line.

    The same pair twice is an error unless the grades agree.
    """
    out: dict[str, dict[str, int]] = {}
    for number, line in lines(path):
        columns = line.split("\t")
        if len(columns) not in (3, 4):
            columns = line.split()
        if number == 1 and columns[0] in ("query-id", "query_id", "qid"):
            continue
        if len(columns) < 3 or (len(columns) > 3 and not columns[1]):
            raise DataError(
                f"expected `qid 0 docid grade`, got {line[:80]!r}", path=path, line=number
            )
        qid, grade = columns[0], columns[-1]
        docid = columns[1] if len(columns) == 3 else " ".join(columns[2:-1])
        if not re.fullmatch(r"[+-]?\d+", grade.strip()):
            raise DataError(f"expected a whole grade, got {grade!r}", path=path, line=number)
        known = out.setdefault(qid, {}).setdefault(docid, int(grade))
        if known != int(grade):
            raise DataError(
                f"{qid} {docid} was judged {known} before and {grade} here", path=path, line=number
            )
    return out


def read_queries(path: Path) -> dict[str, str]:
    """queries.tsv (`qid<TAB>text`) or queries.jsonl (`_id`/`qid`/`id`, `text`/`query`)."""
    out: dict[str, str] = {}
    if ".jsonl" in path.suffixes:
        pairs = (
            (n, _field(r, ("_id", "qid", "id"), path, n), _field(r, ("text", "query"), path, n))
            for n, r in records(path)
        )
    else:
        pairs = ((n, *_tab(line, path, n)) for n, line in lines(path))
    for number, qid, text in pairs:
        if qid in out:
            raise DataError(f"query {qid!r} appears twice", path=path, line=number)
        if not text.strip():
            raise DataError(f"query {qid!r} has no text", path=path, line=number)
        out[qid] = text
    return out


def _tab(line: str, path: Path, number: int) -> tuple[str, str]:
    qid, tab, text = line.partition("\t")
    if not tab:
        raise DataError(f"expected `qid<TAB>text`, got {line[:80]!r}", path=path, line=number)
    return qid, text


def records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of a JSON Lines file."""
    for number, line in lines(path):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"not JSON: {error}", path=path, line=number) from error
        if not isinstance(record, dict):
            raise DataError("expected a JSON object", path=path, line=number)
        yield number, record


def _field(record: Mapping[str, Any], names: tuple[str, ...], path: Path, line: int | None) -> str:
    for name in names:
        if name in record and isinstance(record[name], str | int):
            return str(record[name])
    raise DataError(f"expected the key {' or '.join(map(repr, names))}", path=path, line=line)


def read_corpus(path: Path) -> Iterator[tuple[int, Candidate]]:
    """corpus.jsonl: `_id`/`id`/`docid`, optional `title`, `text`/`contents`/... ; streamed."""
    for number, record in records(path):
        docid = _field(record, ("_id", "id", "docid"), path, number)
        yield number, document(record, docid, 0.0, path, number)


TEXT_KEYS = ("text", "segment", "contents", "content", "body", "passage")


def document(
    record: Mapping[str, Any] | str, docid: str, score: float, path: Path, line: int | None
) -> Candidate:
    """A candidate from whatever a file calls its text; a missing text is an error."""
    if isinstance(record, str):
        return Candidate(docid, record, "", score)
    text = next((record[k] for k in TEXT_KEYS if isinstance(record.get(k), str)), None)
    if text is None:
        raise DataError(
            f"document {docid!r}: expected one of {', '.join(TEXT_KEYS)}", path=path, line=line
        )
    title = record.get("title")
    return Candidate(docid, text, title if isinstance(title, str) else "", score)


def read_requests(path: Path) -> list[Topic]:
    """rank_llm request files: a JSON array with `hits`, or JSON Lines with `candidates`."""
    with open_text(path) as file:
        first = file.read(1)
        while first.isspace():
            first = file.read(1)
    if first != "[":
        return [_candidates(record, path, number) for number, record in records(path)]
    with open_text(path) as file:
        try:
            items = json.load(file)
        except ValueError as error:
            raise DataError(f"not JSON: {error}", path=path) from error
    return [_hits(item, path, i) for i, item in enumerate(items)]


def _hits(item: Any, path: Path, index: int) -> Topic:
    """One element of `[{"query": "...", "hits": [{"content","qid","docid","rank","score"}]}]`."""
    if not isinstance(item, dict) or not isinstance(item.get("hits"), list):
        if isinstance(item, dict) and "candidates" in item:
            return _candidates(item, path, None)
        raise DataError(f'element {index}: expected {{"query": ..., "hits": [...]}}', path=path)
    query = item.get("query")
    qid = item.get("qid")
    if isinstance(query, dict):
        query, qid = query.get("text"), query.get("qid", qid)
    if qid is None and item["hits"]:
        qid = item["hits"][0].get("qid")
    if qid is None or not isinstance(query, str):
        raise DataError(f"element {index}: expected a query with a qid", path=path)
    found = []
    for hit in item["hits"]:
        docid = _field(hit, ("docid", "id", "_id"), path, None)
        score = _number(str(hit.get("score", 0.0)), f"score of {docid!r}", path, index + 1)
        found.append(document(hit, docid, score, path, None))
    return Topic(str(qid), query, tuple(found))


def _candidates(record: Mapping[str, Any], path: Path, line: int | None) -> Topic:
    """One line of `{"query":{"text","qid"},"candidates":[{"docid","score","doc":{...}}]}`."""
    query = record.get("query")
    if not isinstance(query, dict) or not isinstance(record.get("candidates"), list):
        raise DataError(
            'expected {"query": {"text", "qid"}, "candidates": [...]}', path=path, line=line
        )
    found = []
    for item in record["candidates"]:
        docid = _field(item, ("docid", "id", "_id"), path, line)
        score = _number(str(item.get("score", 0.0)), f"score of {docid!r}", path, line or 0)
        found.append(document(item.get("doc", {}), docid, score, path, line))
    qid, text = _field(query, ("qid", "id"), path, line), _field(query, ("text",), path, line)
    return Topic(qid, text, tuple(found))
