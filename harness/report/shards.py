"""The data files behind the leaderboard page, and the one way anything gets into a script.

Owns their names, their content and their safe spelling. It must not know the page's layout.

A data file is a classic script that calls `__shard(name, content)`: a page opened from disk may
neither fetch nor import modules. There is one for each cell (c...) and each dataset (d...); what
belongs to single queries, calls and passages, is cut into numbered parts beside it.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from harness import store
from harness.prompts import Prompt, prepare
from harness.report.writers import write_file
from harness.specs import build
from harness.types import CellResult, Query, RegistryError, digest

CUT = 4000  # characters of one answer; of a longer one the first and the last half are kept
PART = 1_000_000  # characters after which the next part begins
CALL = (
    "round", "docids", "key", "text", "left_out", "finish", "prompt_tokens", "generated_tokens",
    "reasoning_tokens", "order", "score", "faults", "changed", "seconds", "from_cache",
)  # fmt: skip
_NAME = re.compile(r"[cd][0-9a-f]{16}(-\d+)?\.js")

Texts = Mapping[str, Mapping[str, Query]]  # by dataset label and query id, judgements filled in
Content = Mapping[str, Any]


def write_all(
    cells: Sequence[CellResult], folder: Path, texts: Texts, with_text: bool
) -> list[Path]:
    """Write the data files of these cells, then remove those of cells that are gone."""
    written = []
    for name, content in _shards(cells, texts, with_text):
        written.append(write_shard(folder, name, content))
    _remove_stale(folder, {path.name for path in written})
    return written


def write_shard(folder: Path, name: str, content: Content) -> Path:
    """Write one data file; the name must be this project's own."""
    return write_file(folder / f"{name}.js", f'__shard("{name}",{script_json(content)})\n')


def group(cell: CellResult) -> tuple[str, ...]:
    """Which column: cells are comparable only over the same candidates, judgements and depth,
    and latency runs only with one another."""
    record, kind = cell.record, str(cell.record["protocol"].get("kind"))
    hashes = (str(record["first_stage"].get("sha256")), str(record["dataset"].get("sha256")))
    return (cell.first_stage, f"{int(record['depth']):06}", cell.dataset, *hashes, kind)


def place(cell: CellResult) -> tuple[str, ...]:
    return (*group(cell), cell.model)


def cell_name(cell: CellResult) -> str:
    """A file name made of hashes alone: no name from a registry or a model reaches the disk."""
    return "c" + digest([cell.record.get("key"), *place(cell)])[:16]


def dataset_name(label: str) -> str:
    return "d" + digest(label)[:16]


def _shards(
    cells: Sequence[CellResult], texts: Texts, with_text: bool
) -> Iterator[tuple[str, Content]]:
    """Every data file as (name, content)."""
    for cell in cells:
        name, where, asked = cell_name(cell), dict[str, int](), {}
        if _may_show([cell], with_text):
            asked = dict(_asked(cell, texts.get(cell.dataset, {})))
        calls = _calls(cell.folder).items()
        by_query = ((q, {"calls": found, **asked.get(q, {})}) for q, found in calls)
        yield from _cut(name, by_query, where)
        content = {
            "record": cell.record,
            "columns": list(cell.per_query[0]) if cell.per_query else [],
            "rows": [list(row.values()) for row in cell.per_query],
            "run": _run(cell.folder / "run.trec"),
            "calls": CALL,
            "parts": where,
        }
        yield name, content
    for label in sorted({c.dataset for c in cells} & set(texts)):
        yield from _dataset(label, [c for c in cells if c.dataset == label], texts, with_text)


def _may_show(cells: Sequence[CellResult], with_text: bool) -> bool:
    return with_text or all(c.record["dataset"].get("show_text") for c in cells)


def _asked(cell: CellResult, queries: Mapping[str, Query]) -> Iterator[tuple[str, Content]]:
    """What the prompt's cleaning and cuts made of each query's texts, where it changed them.

    Cuts in tokens need the model's own tokenizer and are not made here; the page says so.
    """
    record = cell.record
    try:
        prompt = build(Prompt, record.get("prompt") or {}, "")
    except RegistryError:  # none was used, or the record is of another version
        return
    raw = bool(record["model"].get("raw_special_tokens"))
    for qid, query in queries.items():
        ready = prepare(
            query, prompt, prompt.limits, family=str(record["dataset"].get("family")),
            clip=lambda text, tokens: text, raw_special_tokens=raw, notes=Counter(),
        )  # fmt: skip
        pairs = zip(ready.candidates, query.candidates, strict=True)
        texts = {new.docid: new.text for new, old in pairs if new.text != old.text}
        yield qid, {"asked": ready.text, "texts": texts}


def _dataset(
    label: str, cells: Sequence[CellResult], texts: Texts, with_text: bool
) -> Iterator[tuple[str, Content]]:
    """Queries and grades of one dataset, and the passages of its candidates where they may go."""
    name, where, ranked = dataset_name(label), dict[str, int](), _candidates(cells)
    have = {qid: texts[label][qid] for qid in ranked if qid in texts[label]}
    if _may_show(cells, with_text):
        passages = {q: {c.docid: [c.title, c.text] for c in have[q].candidates} for q in have}
        shown = ((qid, _only(found, ranked[qid])) for qid, found in passages.items())
        yield from _cut(name, ((qid, found) for qid, found in shown if found), where)
    grades = {qid: _only(query.judgements, ranked[qid]) for qid, query in have.items()}
    queries = {qid: query.text for qid, query in have.items()}
    yield name, {"queries": queries, "grades": grades, "parts": where}


def _only(values: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: values[name] for name in names if name in values}


def _candidates(cells: Sequence[CellResult]) -> dict[str, list[str]]:
    """Every document that one of the cells ranks, by query."""
    found: dict[str, dict[str, None]] = {}
    for cell in cells:
        for qid, docids in _run(cell.folder / "run.trec").items():
            found.setdefault(qid, {}).update(dict.fromkeys(docids))
    return {qid: sorted(docids) for qid, docids in found.items()}


def _cut(
    name: str, items: Iterable[tuple[str, Any]], where: dict[str, int]
) -> Iterator[tuple[str, Content]]:
    """Numbered files of what belongs to queries; notes in `where` which query is in which."""
    content: dict[str, Any] = {}
    size = number = 0
    for qid, value in items:
        size += len(script_json(value))
        content[qid], where[qid] = value, number
        if size > PART:
            yield f"{name}-{number}", content
            content, size, number = {}, 0, number + 1
    if content:
        yield f"{name}-{number}", content


def _calls(folder: Path) -> dict[str, list[list[Any]]]:
    """The trace by query, one list of CALL's values a call."""
    found: dict[str, list[list[Any]]] = {}
    for line in store.read_trace(folder):
        text = str(line.get("text") or "")
        over = max(0, len(text) - CUT)
        if over:
            line |= {"text": text[: CUT // 2] + "\n…\n" + text[-CUT // 2 :]}
        found.setdefault(str(line["qid"]), []).append(
            [(line | {"left_out": over}).get(k) for k in CALL]
        )
    return found


def _run(path: Path) -> dict[str, list[str]]:
    """The docids of a run that the store wrote: in rank order, white space percent-encoded."""
    found: dict[str, list[str]] = {}
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            qid, _, docid, *_ = line.split()
            found.setdefault(qid, []).append(unquote(docid))
    return found


def script_json(value: Any) -> str:
    """JSON that is safe inside a script element and is a JavaScript literal: ASCII, no < > &."""
    text = json.dumps(_finite(value), separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _finite(value: Any) -> Any:
    """Infinities and NaN as null, which is all that JSON has for them."""
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _remove_stale(folder: Path, keep: set[str]) -> None:
    """Data files of cells that are gone; anything that this module did not name stays."""
    if folder.is_dir():
        for path in sorted(folder.iterdir()):
            if _NAME.fullmatch(path.name) and path.name not in keep:
                path.unlink()
