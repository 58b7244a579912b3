"""The field's files, read and written: runs, qrels, queries, corpora, rank_llm requests.

Every reader accepts `.gz`, and names file, line and what was expected when a line is wrong.
Ids with white space are percent-encoded at this edge only; inside they are as they came.
"""

from __future__ import annotations

import gzip
import json
import math
import re
import urllib.parse
import zlib
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from harness.types import Candidate, DataError, MissingResourceError

TAG = "rerank-harness"
BOM = b"\xef\xbb\xbf"
QRELS_HEADS = ("query-id", "query_id", "qid")
TEXT_KEYS = ("text", "segment", "contents", "content", "body", "passage")
DOCID_KEYS = ("docid", "id", "_id")


@dataclass(frozen=True, slots=True)
class Topic:
    """A query with its candidates as a request file holds them."""

    qid: str
    text: str
    candidates: tuple[Candidate, ...]


# --- lines and JSON ---------------------------------------------------------------------------


def open_bytes(path: Path) -> IO[bytes] | gzip.GzipFile:
    """A file for reading, gunzipped when its name ends in .gz."""
    if not path.is_file():
        raise MissingResourceError(f"{path}: no such file")
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number, text) of every line that is not blank: UTF-8, LF or CRLF, a BOM is dropped.

    Each line is decoded on its own, so that a bad byte is reported where it is.
    """
    number = 0
    try:
        with open_bytes(path) as file:
            for number, raw in enumerate(file, 1):
                line = (raw.removeprefix(BOM) if number == 1 else raw).decode("utf-8")
                if line.strip():
                    yield number, line.removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise DataError(f"expected UTF-8 text: {error}", path=path, line=number) from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot be read: {error}", path=path, line=number + 1) from error


def records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of a JSON Lines file."""
    for number, line in lines(path):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"not JSON: {error}", path=path, line=number) from error
        yield number, _object(record, path, number)


def _array(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of the elements of one JSON array.

    Read element by element, so that a wrong one is reported on the line where it begins.
    """
    rows = dict(lines(path))
    text = "\n".join(rows.get(number, "") for number in range(1, max(rows) + 1))
    ends = [match.start() for match in re.finditer("\n", text)]
    decoder, at = json.JSONDecoder(), text.index("[")
    empty = text[_next(text, at + 1) :].startswith("]")
    at = _next(text, at + 1) if empty else at
    while text[at : at + 1] in ("[", ","):
        start = _next(text, at + 1)
        number = bisect_left(ends, start) + 1
        try:
            value, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError) as error:
            number = getattr(error, "lineno", number)
            raise DataError(f"not JSON: {error}", path=path, line=number) from error
        yield number, _object(value, path, number)
        at = _next(text, end)
    if text[at:].strip() != "]":
        number = bisect_left(ends, at) + 1
        raise DataError("not JSON: expected `,` or the array's end", path=path, line=number)


def _next(text: str, at: int) -> int:
    """Where the next character that is no white space stands."""
    while text[at : at + 1].isspace():
        at += 1
    return at


def _object(value: Any, path: Path, line: int) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"expected a JSON object, got {_short(value)}", path=path, line=line)
    return value


def _field(record: Mapping[str, Any], names: tuple[str, ...], path: Path, line: int) -> str:
    """The first of the keys that holds a text or a whole number."""
    for name in names:
        value = record.get(name)
        if isinstance(value, str | int) and not isinstance(value, bool):
            return _sound(str(value), path, line)
    expected = " or ".join(map(repr, names))
    raise DataError(
        f"expected the key {expected} with a text, got {_short(record)}", path=path, line=line
    )


def _id(record: Mapping[str, Any], names: tuple[str, ...], path: Path, line: int) -> str:
    name = _field(record, names, path, line)
    if not name.strip():
        raise DataError(f"expected an id that is not empty, got {name!r}", path=path, line=line)
    return name


def _sound(text: str, path: Path, line: int) -> str:
    """JSON can spell half a character (`"\\ud800"`), which no file of ours could hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"expected Unicode text: {error}", path=path, line=line) from error
    return text


def _number(text: str, what: str, path: Path, line: int) -> float:
    try:
        value = float(text) if "_" not in text else math.nan  # Python alone reads 1_0 as a number
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError(
            f"expected a finite number as {what}, got {_short(text)}", path=path, line=line
        )
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


# --- runs -------------------------------------------------------------------------------------


def encode_docid(docid: str) -> str:
    """A docid as one run column: white space and literal `%xx` are percent-encoded."""
    return re.sub(
        r"\s|%(?=[0-9A-Fa-f]{2})", lambda m: urllib.parse.quote(m.group(0), safe=""), docid
    )


def decode_docid(column: str) -> str:
    return urllib.parse.unquote(column)


def _encode_qid(qid: str) -> str:
    """As a docid; a `#` in front would make the line a comment."""
    return f"%23{encode_docid(qid[1:])}" if qid.startswith("#") else encode_docid(qid)


def read_run(path: Path) -> dict[str, list[Candidate]]:
    """A TREC run: per query, candidates by falling score, ties in order of rank.

    Six columns split by tabs or spaces; a docid may itself hold spaces. `#` lines are comments.
    Ids are decoded only in runs that this harness wrote (their tag says so).
    """
    out: dict[str, list[tuple[float, float, int, Candidate]]] = {}
    for number, line in lines(path):
        if line.startswith("#"):
            continue
        columns = _run_columns(line)
        if columns is None:
            raise DataError(
                f"expected `qid Q0 docid rank score tag`, got {_short(line)}",
                path=path,
                line=number,
            )
        qid, _, docid, rank, score, tag = columns
        if tag == TAG:
            qid, docid = decode_docid(qid), decode_docid(docid)
        value = _number(score, "score", path, number)
        place = _number(rank, "rank", path, number)
        out.setdefault(qid, []).append((-value, place, number, Candidate(docid, "", "", value)))
    if not out:
        raise DataError("holds no line of a run", path=path)
    return {
        qid: [c for _, _, _, c in sorted(rows, key=lambda r: r[:3])] for qid, rows in out.items()
    }


def _run_columns(line: str) -> list[str] | None:
    """Six columns; without tabs the docid is what stands between the first two and last three."""
    columns = line.split("\t")
    if len(columns) == 6:
        docid = columns[2]
        columns = [c.strip() for c in columns]
        return [*columns[:2], docid, *columns[3:]] if all(columns) else None
    head = line.split(None, 2)
    tail = head[2].rsplit(None, 3) if len(head) == 3 else []
    return [*head[:2], *tail] if len(tail) == 4 else None


def write_run(rankings: Mapping[str, Iterable[tuple[str, float]]]) -> str:
    """The text of a TREC run: six columns, one space, ranks from 1, tag `rerank-harness`."""
    return "".join(
        f"{_encode_qid(qid)} Q0 {encode_docid(docid)} {rank} {_exact(score)} {TAG}\n"
        for qid, docs in rankings.items()
        for rank, (docid, score) in enumerate(docs, 1)
    )


def _exact(score: float) -> str:
    """The shortest text that reads back as the same number: rounding would make ties."""
    return repr(float(score)).removesuffix(".0")


# --- judgements and queries -------------------------------------------------------------------


def read_qrels(path: Path) -> dict[str, dict[str, int]]:
    """TREC qrels (`qid 0 docid grade`), or BEIR's three columns, which need their header line.

    The same pair twice is an error unless the grades agree.
    """
    out: dict[str, dict[str, int]] = {}
    width, first = 4, True
    for number, line in lines(path):
        names = line.split("\t") if "\t" in line else line.split()
        if first and names[0].strip() in QRELS_HEADS and len(names) in (3, 4):
            width, first = len(names), False
            continue
        first = False
        columns = _qrels_columns(line, width)
        if columns is None:
            form = "`qid 0 docid grade`" if width == 4 else "`qid docid grade`"
            raise DataError(f"expected {form}, got {_short(line)}", path=path, line=number)
        qid, docid, text = columns
        if not re.fullmatch(r"[+-]?[0-9]{1,9}", text):
            raise DataError(
                f"expected a whole number as grade, got {_short(text)}", path=path, line=number
            )
        known = out.setdefault(qid, {}).setdefault(docid, int(text))
        if known != int(text):
            raise DataError(
                f"expected one grade for {qid} {docid}: {known} before, {int(text)} here",
                path=path,
                line=number,
            )
    if not out:
        raise DataError("holds no judgement", path=path)
    return out


def _qrels_columns(line: str, width: int) -> tuple[str, str, str] | None:
    """qid, docid and grade; without tabs the docid is what stands before the last column."""
    columns = line.split("\t")
    if len(columns) == width:
        sound = all(c.strip() for c in columns)
        return (columns[0].strip(), columns[-2], columns[-1].strip()) if sound else None
    head = line.split(None, width - 2)
    tail = head[-1].rsplit(None, 1) if len(head) == width - 1 else []
    return (head[0], tail[0], tail[1]) if len(tail) == 2 else None


def read_queries(path: Path) -> dict[str, str]:
    """queries.tsv (`qid<TAB>text`) or queries.jsonl (`_id`/`qid`/`id`, `text`/`query`)."""
    out: dict[str, str] = {}
    for number, qid, text in _json_queries(path) if ".jsonl" in path.suffixes else _tsv(path):
        if qid in out:
            raise DataError(f"query {qid!r} appears twice", path=path, line=number)
        if not text.strip():
            raise DataError(f"query {qid!r} has no text", path=path, line=number)
        out[qid] = text
    if not out:
        raise DataError("holds no query", path=path)
    return out


def _json_queries(path: Path) -> Iterator[tuple[int, str, str]]:
    for number, record in records(path):
        qid = _id(record, ("_id", "qid", "id"), path, number)
        yield number, qid, _field(record, ("text", "query"), path, number)


def _tsv(path: Path) -> Iterator[tuple[int, str, str]]:
    for number, line in lines(path):
        qid, tab, text = line.partition("\t")
        if not tab or not qid.strip():
            raise DataError(f"expected `qid<TAB>text`, got {_short(line)}", path=path, line=number)
        yield number, qid.strip(), text


# --- corpora and request files ----------------------------------------------------------------


def read_corpus(path: Path) -> Iterator[tuple[int, Candidate]]:
    """corpus.jsonl: `_id`/`id`/`docid`, optional `title`, `text`/`contents`/... ; streamed."""
    for number, record in records(path):
        docid = _id(record, ("_id", "id", "docid"), path, number)
        yield number, document(record, docid, 0.0, path, number)


def document(record: Any, docid: str, score: float, path: Path, line: int) -> Candidate:
    """A candidate from whatever a file calls its text; a missing text is an error."""
    if isinstance(record, str):
        return Candidate(docid, _sound(record, path, line), "", score)
    fields = record if isinstance(record, dict) else {}
    text = next((fields[k] for k in TEXT_KEYS if isinstance(fields.get(k), str)), None)
    if text is None:
        raise DataError(
            f"document {docid!r}: expected a text under {', '.join(TEXT_KEYS)},"
            f" got {_short(record)}",
            path=path,
            line=line,
        )
    title = fields.get("title")
    title = _sound(title, path, line) if isinstance(title, str) else ""
    return Candidate(docid, _sound(text, path, line), title, score)


def read_requests(path: Path) -> list[Topic]:
    """rank_llm request files, a JSON array or JSON Lines, in either of their two forms:

    `{"query": "...", "hits": [{"content", "qid", "docid", "rank", "score"}]}` and
    `{"query": {"text", "qid"}, "candidates": [{"docid", "score", "doc": {...}}]}`.
    """
    _, first = next(lines(path), (0, ""))
    out: dict[str, Topic] = {}
    for number, record in _array(path) if first.lstrip().startswith("[") else records(path):
        topic = _topic(record, path, number)
        if topic.qid in out:
            raise DataError(f"query {topic.qid!r} appears twice", path=path, line=number)
        out[topic.qid] = topic
    if not out:
        raise DataError("holds no query", path=path)
    return list(out.values())


def _topic(record: Mapping[str, Any], path: Path, line: int) -> Topic:
    rows, query = record.get("candidates", record.get("hits")), record.get("query")
    if not isinstance(rows, list) or not isinstance(query, dict | str):
        raise DataError(
            'expected {"query": {"text", "qid"}, "candidates": [...]} or'
            f' {{"query": "...", "hits": [...]}}, got {_short(dict(record))}',
            path=path,
            line=line,
        )
    rows = [_object(row, path, line) for row in rows]
    holders = [query] if isinstance(query, dict) else [record, *rows[:1]]
    holder = next((h for h in holders if "qid" in h), holders[0])
    qid = _id(holder, ("qid", "id"), path, line)
    text = _field({"text": query} if isinstance(query, str) else query, ("text",), path, line)
    if not text.strip():
        raise DataError(f"query {qid!r} has no text", path=path, line=line)
    return Topic(qid, text, tuple(_candidate(row, path, line) for row in rows))


def _candidate(row: Mapping[str, Any], path: Path, line: int) -> Candidate:
    """A hit holds its own text; a candidate holds it under `doc`."""
    docid = _id(row, DOCID_KEYS, path, line)
    score = _number(str(row.get("score", 0.0)), f"score of {docid!r}", path, line)
    return document(row.get("doc", row), docid, score, path, line)
