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
from collections.abc import Container, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeVar

from harness.types import Candidate, DataError, MissingResourceError, Query

TAG = "rerank-harness"
RUN = "qid Q0 docid rank score tag"
QRELS_HEADS = ("query-id", "query_id", "qid")
TEXT_KEYS = ("text", "segment", "contents", "content", "body", "passage")
BEFORE_ELEMENT = re.compile(r"\s*[\[,]\s*")
KINDS = {
    json.JSONDecodeError: "not JSON: ",
    RecursionError: "not JSON: ",
    UnicodeDecodeError: "expected UTF-8 text: ",
    UnicodeEncodeError: "expected Unicode text: ",
}

Run = dict[str, list[Candidate]]
Qrels = Mapping[str, Mapping[str, int]]
Item = TypeVar("Item")
Found = TypeVar("Found", bound=Sized)


# --- lines and JSON ---------------------------------------------------------------------------


@contextmanager
def at(path: Path, line: int) -> Iterator[None]:
    """What this block finds wrong, a ValueError without a place, is told with file and line."""
    try:
        yield
    except (ValueError, RecursionError) as error:
        told = f"{KINDS.get(type(error), '')}{error}"
        raise DataError(told, path=path, line=line) from error


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number, text) of every line that is not blank: UTF-8, LF or CRLF, a BOM is dropped.

    Each line is decoded on its own, so that a bad byte is reported where it is.
    """
    number = 0
    try:
        with _open(path) as file:
            for number, raw in enumerate(file, 1):
                with at(path, number):
                    line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                if line.strip():
                    yield number, line.removesuffix("\n").removesuffix("\r")
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot be read: {error}", path=path, line=number + 1) from error


def _open(path: Path) -> IO[bytes] | gzip.GzipFile:
    if not path.is_file():
        raise MissingResourceError(f"{path}: no such file")
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of a JSON Lines file."""
    for number, line in lines(path):
        with at(path, number):
            record = _object(json.loads(line))
        yield number, record


def _array(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of the elements of one JSON array.

    Read element by element, so that a wrong one is reported on the line where it begins.
    """
    rows = dict(lines(path))
    text = "\n".join(rows.get(number, "") for number in range(1, max(rows) + 1))
    decoder, number, start, end = json.JSONDecoder(), 1, 0, 0
    while ahead := BEFORE_ELEMENT.match(text, end):
        number += text.count("\n", start, ahead.end())
        start = ahead.end()
        with at(path, number):
            value, end = decoder.raw_decode(text, start)
            record = _object(value)
        yield number, record
    rest = text[end:].lstrip()
    if rest.rstrip() != "]":
        number = text.count("\n", 0, len(text) - len(rest)) + 1
        raise DataError("not JSON: expected `,` or the array's end", path=path, line=number)


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {value!r:.80}")
    return value


def _field(record: Mapping[str, Any], *names: str) -> str:
    """The first of the keys that holds a text or a whole number."""
    for name in names:
        value = record.get(name)
        if isinstance(value, str | int) and not isinstance(value, bool):
            return _sound(str(value))
    expected = " or ".join(map(repr, names))
    raise ValueError(f"expected the key {expected} with a text, got {record!r:.80}")


def _id(record: Mapping[str, Any], *names: str) -> str:
    name = _field(record, *names)
    if not name.strip():
        raise ValueError(f"expected an id that is not empty, got {name!r}")
    return name


def _sound(text: str) -> str:
    """JSON can spell half a character (`"\\ud800"`), which no file of ours could hold."""
    text.encode("utf-8")
    return text


def _number(text: str, what: str) -> float:
    with suppress(ValueError):
        value = float(text)
        if math.isfinite(value) and "_" not in text:  # Python alone reads 1_0 as a number
            return value
    raise ValueError(f"expected a finite number as {what}, got {text!r:.80}")


def _columns(line: str, form: str) -> list[str]:
    """The columns that `form` names; without tabs the docid is what the others leave between."""
    names = form.split()
    before, columns = names.index("docid"), line.split("\t")
    if len(columns) == len(names):
        columns = [c if n == before else c.strip() for n, c in enumerate(columns)]
    else:
        *head, rest = line.split(None, before)
        columns = [*head, *rest.rsplit(None, len(names) - before - 1)]
    if len(columns) != len(names) or not all(c.strip() for c in columns):
        raise ValueError(f"expected `{form}`, got {line!r:.80}")
    return columns


def _some(found: Found, what: str, path: Path) -> Found:
    if not found:
        raise DataError(f"holds no {what}", path=path)
    return found


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
    out: dict[str, list[tuple[float, Candidate]]] = {}
    for number, line in lines(path):
        if line.startswith("#"):
            continue
        with at(path, number):
            qid, _, docid, rank, score, tag = _columns(line, RUN)
            value, place = _number(score, "score"), _number(rank, "rank")
        if tag == TAG:
            qid, docid = decode_docid(qid), decode_docid(docid)
        out.setdefault(qid, []).append((place, Candidate(docid, "", "", value)))
    for rows in _some(out, "line of a run", path).values():
        rows.sort(key=lambda row: (-row[1].score, row[0]))
    return {qid: [c for _, c in rows] for qid, rows in out.items()}


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
    form = "qid 0 docid grade"
    for number, line in lines(path):
        names = line.split()
        if not out and names[0] in QRELS_HEADS:
            form = "qid docid grade" if len(names) == 3 else form
            continue
        with at(path, number):
            qid, *_, docid, text = _columns(line, form)
            if not re.fullmatch(r"[+-]?[0-9]{1,9}", text):
                raise ValueError(f"expected a whole number as grade, got {text!r:.80}")
            old = out.setdefault(qid, {}).setdefault(docid, int(text))
            if old != int(text):
                raise ValueError(f"expected one grade for {qid} {docid}: {old} before, {text} here")
    return _some(out, "judgement", path)


def read_queries(path: Path) -> dict[str, str]:
    """queries.tsv (`qid<TAB>text`) or queries.jsonl (`_id`/`qid`/`id`, `text`/`query`)."""
    out: dict[str, str] = {}
    for number, line in lines(path):
        with at(path, number):
            json_lines = ".jsonl" in path.suffixes
            qid, text = _json_query(line) if json_lines else _tsv_pair(line, "qid")
            _add(out, qid, text, text)
    return _some(out, "query", path)


def _json_query(line: str) -> tuple[str, str]:
    record = _object(json.loads(line))
    return _id(record, "_id", "qid", "id"), _field(record, "text", "query")


def _tsv_pair(line: str, what: str) -> tuple[str, str]:
    name, tab, text = line.partition("\t")
    if not tab or not name.strip():
        raise ValueError(f"expected `{what}<TAB>text`, got {line!r:.80}")
    return name.strip(), text


def _add(out: dict[str, Item], qid: str, text: str, item: Item) -> None:
    if not text.strip():
        raise ValueError(f"query {qid!r} has no text")
    if qid in out:
        raise ValueError(f"query {qid!r} appears twice")
    out[qid] = item


# --- corpora and request files ----------------------------------------------------------------


def read_corpus(path: Path, wanted: Container[str] | None = None) -> Iterator[Candidate]:
    """corpus.jsonl (`_id`/`id`/`docid`, optional `title`, `text`/`contents`/...) or corpus.tsv
    (`docid<TAB>text`), or a folder of such files; streamed.

    Only documents that are wanted, each once; one id with two texts is an error.
    """
    seen: dict[str, int] = {}
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        for number, line in lines(file):
            with at(file, number):
                tsv = ".tsv" in file.suffixes
                doc = Candidate(*_tsv_pair(line, "docid")) if tsv else _json_document(line)
                if wanted is not None and doc.docid not in wanted:
                    continue
                mark = hash((doc.title, doc.text))
                if seen.get(doc.docid, mark) != mark:
                    raise ValueError(f"document {doc.docid!r} appears twice with different texts")
            if doc.docid not in seen:
                yield doc
            seen[doc.docid] = mark


def _json_document(line: str) -> Candidate:
    record = _object(json.loads(line))
    return document(record, _id(record, "_id", "id", "docid"))


def document(record: Any, docid: str, score: float = 0.0) -> Candidate:
    """A candidate from whatever a file calls its text; a missing text is a ValueError."""
    fields = record if isinstance(record, dict) else {"text": record}
    text = next((fields[k] for k in TEXT_KEYS if isinstance(fields.get(k), str)), None)
    if text is None:
        keys = ", ".join(TEXT_KEYS)
        raise ValueError(f"document {docid!r}: expected a text under {keys}, got {record!r:.80}")
    title = fields.get("title")
    return Candidate(docid, _sound(text), _sound(title) if isinstance(title, str) else "", score)


def read_requests(path: Path) -> list[Query]:
    """rank_llm request files, a JSON array or JSON Lines, in either of their two forms:

    `{"query": "...", "hits": [{"content", "qid", "docid", "rank", "score"}]}` and
    `{"query": {"text", "qid"}, "candidates": [{"docid", "score", "doc": {...}}]}`.
    """
    _, first = next(lines(path), (0, ""))
    out: dict[str, Query] = {}
    for number, record in _array(path) if first.lstrip().startswith("[") else records(path):
        with at(path, number):
            topic = _topic(record)
            _add(out, topic.qid, topic.text, topic)
    return list(_some(out, "query", path).values())


def _topic(record: Mapping[str, Any]) -> Query:
    rows, query = record.get("candidates", record.get("hits")), record.get("query")
    if not isinstance(rows, list) or not isinstance(query, dict | str):
        raise ValueError(
            'expected {"query": {"text", "qid"}, "candidates": [...]} or'
            f' {{"query": "...", "hits": [...]}}, got {record!r:.80}'
        )
    rows = [_object(row) for row in rows]
    if isinstance(query, str):  # its id stands beside it or in a hit
        query = {"text": query, "qid": {**(rows or [{}])[0], **record}.get("qid")}
    qid, text = _id(query, "qid", "id"), _field(query, "text")
    return Query(qid, text, tuple(_candidate(row) for row in rows))


def _candidate(row: Mapping[str, Any]) -> Candidate:
    """A hit holds its own text; a candidate holds it under `doc`."""
    docid = _id(row, "docid", "id", "_id")
    score = _number(str(row.get("score", 0.0)), f"score of {docid!r}")
    return document(row.get("doc", row), docid, score)
