"""The leaderboard page: one folder that opens from disk, a table first and every call behind it.

Owns what the page and its data files hold, and that nothing in them can run. It must not know how
a cell was made: it reads finished cells, and texts only as far as the caller hands them over.

    out/index.html      table, plots and their data; complete without the rest
    out/data/<id>.js    one cell or one dataset, loaded when asked for (see shards)
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from harness.report import shards
from harness.report.shards import Texts
from harness.stats import bootstrap_interval
from harness.types import CellResult

SCHEMA_VERSION = 1  # of the page's data
MEASURE = "nDCG@10"
BASELINES = ("first-stage", "random", "reverse", "oracle")
UNTYPICAL = ("random", "reverse", "oracle")  # would stretch a column's scale
ASSETS = Path(__file__).parent / "assets"
Board = dict[str, Any]


def render(
    cells: Sequence[CellResult],
    out: Path,
    *,
    texts: Texts | None = None,
    with_text: bool = False,
    allow_fake: bool = False,
) -> list[Path]:
    """Write the page of these cells below `out`; returns the files written, index.html last.

    texts maps a dataset's label to {"queries": {qid: text}, "documents": {docid: text},
    "qrels": {qid: {docid: grade}}}. Documents are shown where the collection's licence allows it
    (`show_text` in the cell's record) or `with_text` says so. Cells of the scripted test engine
    and cells without measures are left out.
    """
    shown = [c for c in cells if c.record.get("measures") and (allow_fake or not _fake(c))]
    by_time = sorted(shown, key=lambda c: str(c.record.get("finished")))
    latest = {shards.place(c): c for c in by_time}
    ordered = [latest[place] for place in sorted(latest)]
    written = shards.write_all(ordered, out / "data", texts or {}, with_text)
    return [*written, shards.write(out / "index.html", _html(_board(ordered, texts or {})))]


def _fake(cell: CellResult) -> bool:
    engine = cell.record.get("environment", {}).get("engine") or {}
    return bool(engine.get("engine") == "fake")


# --- the board --------------------------------------------------------------------------------


def _board(cells: Sequence[CellResult], texts: Texts) -> Board:
    """Columns (groups), rows and cells as plain values, the rows in the order of the table."""
    groups = _columns(cells)
    entries = [_entry(c, groups.index(shards.group(c))) for c in cells]
    inside = [[c for c in cells if shards.group(c) == group] for group in groups]
    heads = [_head(n, some, texts) for n, some in enumerate(inside)]
    rows = {(c.model, shards.kind(c)): _row(c) for c in cells}
    for cell, entry in zip(cells, entries, strict=True):
        rows[cell.model, shards.kind(cell)]["cells"][entry["group"]] = entry
    for group in range(len(groups)):
        _mark(group, list(rows.values()), heads[group])
    names = [(head["first_stage"], head["depth"], head["short"]) for head in heads]
    for head, name in zip(heads, names, strict=True):
        head["twin"] = names.count(name) > 1
    ordered = [row | {"number": n} for n, row in enumerate(sorted(rows.values(), key=_rank))]
    return {
        "schema_version": SCHEMA_VERSION,
        "groups": heads,
        "stages": _stages(heads),
        "rows": ordered,
        "models": sum(not row["baseline"] for row in ordered),
        "references": sum(row["baseline"] for row in ordered),
        "calls": sum(e["total_calls"] for e in entries),
        "finished": max((str(c.record.get("finished", "")) for c in cells), default=""),
        "cut": shards.CUT,
    }


def _columns(cells: Sequence[CellResult]) -> list[tuple[str, ...]]:
    """The first stage and depth with the most cells come first, with all their datasets."""
    stages = Counter(shards.group(c)[:2] for c in cells)
    return sorted({shards.group(c) for c in cells}, key=lambda g: (-stages[g[0], g[1]], g))


def _rank(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Best first in the first column that has the model."""
    place = min(row["cells"])
    return (place, -row["cells"][place]["value"], row["model"], row["kind"])


def _head(number: int, cells: Sequence[CellResult], texts: Texts) -> Board:
    record = cells[0].record
    first = [c for c in cells if c.record["model"]["method"] == "first-stage"]
    return {
        "number": number,
        "dataset": cells[0].dataset,
        "short": _short(cells[0]),
        "first_stage": cells[0].first_stage.removesuffix(f"+depth={record['depth']}"),
        "sha256": str(record["first_stage"].get("sha256") or ""),
        "depth": record["depth"],
        "queries": record["queries"],
        "measure": _measure(cells[0]),
        "digits": 1 if record["queries"] < 100 else 2,  # the interval is wider than more digits
        "first": shards.cell_name(first[0]) if first else None,
        "data": shards.dataset_name(cells[0].dataset) if cells[0].dataset in texts else None,
    }


def _short(cell: CellResult) -> str:
    """The papers' column head, unless the label says more than the dataset's plain name."""
    dataset = cell.record["dataset"]
    return str(
        (dataset.get("short") if dataset.get("name") == cell.dataset else "") or cell.dataset
    )


def _stages(heads: Sequence[Board]) -> list[Board]:
    """The columns under one first stage and depth stand together; the heads come sorted."""
    runs = groupby(heads, key=lambda head: (head["first_stage"], head["depth"]))
    return [
        {"first_stage": name, "depth": depth, "numbers": [head["number"] for head in run]}
        for (name, depth), run in runs
    ]


def _measure(cell: CellResult) -> str:
    return MEASURE if MEASURE in cell.measures else next(iter(cell.measures))


def _row(cell: CellResult) -> Board:
    model = cell.record["model"]
    return {
        "model": cell.model,
        "kind": shards.kind(cell),
        "method": str(model["method"]),
        "baseline": model["method"] in BASELINES,
        "base": str(model.get("base") or ""),
        "parameters": model.get("parameters"),
        "trained_on": [str(name) for name in model.get("trained_on") or ()],
        "cells": {},
    }


def _entry(cell: CellResult, group: int) -> Board:
    """What the table shows of one cell; costs are means over its queries."""
    record, queries = cell.record, max(1, int(cell.record["queries"]))
    measure, costs = _measure(cell), cell.record.get("efficiency") or {}
    low, high = _interval([float(row.get(measure) or 0) for row in cell.per_query])
    counts = {k: v for k, v in (record.get("faults") or {}).items() if k != "no_op_rate"}
    calls = counts.pop("calls", 0)
    return {
        "id": shards.cell_name(cell),
        "group": group,
        "value": cell.measures[measure],
        "low": low,
        "high": high,
        "total_calls": calls,
        "calls": _per(costs.get("calls"), queries),
        "prompt": _per(costs.get("prompt_tokens"), queries),
        "tokens": _per(costs.get("generated_tokens"), queries),
        "seconds": _per(costs.get("seconds"), queries),
        "faults": 100 * sum(counts.values()) / calls if calls else None,
        "in_domain": bool(record["dataset"].get("in_domain")),
        "state": str(record.get("state", "complete")),
        "mark": 0,
        "whisker": None,
        "queries": record["queries"],
    }


def _per(total: float | None, queries: int) -> float | None:
    return None if total is None else total / queries


def _interval(values: Sequence[float]) -> tuple[float | None, float | None]:
    found = bootstrap_interval(values)
    return (None, None) if math.isnan(found.low + found.high) else (found.low, found.high)


def _mark(group: int, rows: Sequence[Board], head: Board) -> None:
    """Best and second by unrounded value, ties alike; and the scale of the column's whiskers."""
    here = [(row, row["cells"][group]) for row in rows if group in row["cells"]]
    ranked = [e for row, e in here if not row["baseline"] and e["state"] == "complete"]
    best = sorted({e["value"] for e in ranked}, reverse=True)
    for entry in ranked:
        entry["mark"] = best.index(entry["value"]) + 1 if entry["value"] in best[:2] else 0
    typical = [e for row, e in here if row["method"] not in UNTYPICAL and e["low"] is not None]
    low = min((e["low"] for e in typical), default=0.0)
    high = max((e["high"] for e in typical), default=1.0)
    head["scale"] = [low, high if high > low else low + 1.0]
    for entry in typical:
        ends = (entry["low"], entry["value"], entry["high"])
        entry["whisker"] = [_along(head["scale"], value) for value in ends]


def _along(scale: Sequence[float], value: float) -> float:
    return round(100 * (value - scale[0]) / (scale[1] - scale[0]), 1)


def _html(board: Board) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    page = Environment(
        loader=FileSystemLoader(ASSETS), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    page.filters["number"] = _number
    code = (ASSETS / "board.js").read_text(encoding="utf-8")
    return page.get_template("index.html.j2").render(
        board=board,
        data=Markup(shards.script_json(board)),
        code=Markup(code),
        style=Markup((ASSETS / "board.css").read_text(encoding="utf-8")),
        policy=_policy(code),
    )


def _policy(code: str) -> str:
    """Only this very script and the data files may run. `file:` is for browsers in which 'self'
    means nothing on a page opened from disk; on a served page they load no file: address."""
    sha256 = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'self' file: 'sha256-{sha256}'; style-src 'unsafe-inline';"
        " img-src data:; base-uri 'none'; form-action 'none'"
    )


def _number(value: float | None) -> str:
    """Three leading digits or so; a dash where there is nothing to know."""
    if value is None:
        return "–"
    digits = 0 if value >= 100 or value == 0 else 1 if value >= 10 else 2
    return f"{value:,.{digits}f}"
