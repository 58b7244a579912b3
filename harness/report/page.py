"""The leaderboard page: one folder that opens from disk, a table first and every call behind it.

Owns what the page and its data files hold, and that nothing in them can run. It must not know how
a cell was made: it reads finished cells, and texts only as far as the caller hands them over.

    out/index.html      table, plots and their data; complete without the rest
    out/data/<id>.js    one cell or one dataset, loaded when asked for (see shards)
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from harness.published import Published
from harness.report import shards, tables
from harness.report.against import block_of_figure
from harness.report.shards import Texts
from harness.report.tables import MEASURE
from harness.report.writers import write_file
from harness.specs import Registry, in_domain
from harness.stats import Interval, align, by_query, intervals, rank_groups
from harness.types import CellResult, DataError, digest

SCHEMA_VERSION = 1  # of the page's data
UNTYPICAL = ("random", "reverse", "oracle")  # would stretch a column's scale
ASSETS = Path(__file__).parent / "assets"
Board = dict[str, Any]
NOTHING: Board = {  # of a cell: what a published figure does not tell, or no mark can say
    **dict.fromkeys(("low", "high", "calls", "prompt", "tokens", "seconds", "flops", "faults")),
    **dict.fromkeys(("queries", "rank", "most", "sources")),
    "mark": 0,
    "total_calls": 0,
}


def render(
    cells: Sequence[CellResult],
    out: Path,
    *,
    texts: Texts | None = None,
    with_text: bool = False,
    published: Sequence[Published] = (),
    live: str = "",
) -> list[Path]:
    """Write the page of these cells below `out`; returns the files written, index.html last.

    texts      by dataset label and query id: the query with its passages and judgements
    with_text  show passages also where no licence allows it (`show_text` in the cell's record)
    published  figures that get rows of their own, in columns that a measured cell opened
    live       what `data/progress.js` says while this page is up to date; only of a served page

    Cells of the scripted test engine and cells without measures are left out.
    """
    used = sorted((cell for cell in tables.shown(cells) if cell.measures), key=shards.place)
    written = shards.write_all(used, out / "data", texts or {}, with_text)
    board = _board(used, texts or {}, published) | {"live": live}
    return [*written, write_file(out / "index.html", _html(board))]


# --- the board --------------------------------------------------------------------------------


def _board(cells: Sequence[CellResult], texts: Texts, published: Sequence[Published]) -> Board:
    """Columns (groups), rows and cells as plain values, the rows in the order of the table."""
    rows = {
        cell.model: _row(cell.model, "measured", cell.record["model"], tables.is_sanity(cell))
        for cell in cells
    }
    columns, heads = _columns(cells), []
    for number, inside in enumerate(columns):
        whiskers = intervals([[list(by_query(c, _measure(c)).values())] for c in inside])
        entries = {c.model: _entry(c, number, ends) for c, ends in zip(inside, whiskers)}
        _mark(inside, entries)
        heads.append(_head(number, inside, texts) | {"scale": _scale(inside, entries)})
        for model, entry in entries.items():
            rows[model]["cells"][number] = entry
    names = [(head["first_stage"], head["depth"], head["short"]) for head in heads]
    for head, name in zip(heads, names, strict=True):
        head["twin"] = names.count(name) > 1
    every = sorted([*rows.values(), *_published_rows(columns, published)], key=_rank)
    placed = [row | {"number": n} for n, row in enumerate(every)]
    return {
        "schema_version": SCHEMA_VERSION,
        "groups": heads,
        "stages": _stages(heads),
        "rows": placed,
        "counts": Counter("reference" if row["baseline"] else row["kind"] for row in placed),
        "calls": sum(entry["total_calls"] for row in placed for entry in row["cells"].values()),
        "finished": max((str(c.record.get("finished", "")) for c in cells), default=""),
        "cut": shards.CUT,
    }


def _columns(cells: Sequence[CellResult]) -> list[list[CellResult]]:
    """The first stage and depth with the most cells come first, with all their datasets."""
    stages = Counter(shards.group(c)[:2] for c in cells)
    columns = defaultdict(list)
    for cell in cells:
        columns[shards.group(cell)].append(cell)
    return [columns[g] for g in sorted(columns, key=lambda g: (-stages[g[:2]], g))]


def _rank(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Best first in the first column that has the model."""
    place = min(row["cells"])
    return (place, -row["cells"][place]["value"], row["model"])


def _head(number: int, cells: Sequence[CellResult], texts: Texts) -> Board:
    record = cells[0].record
    first = [c for c in cells if c.record["model"]["method"] == "first-stage"]
    return {
        "number": number,
        "dataset": cells[0].dataset,
        "short": tables.short(cells[0]) + ", latency runs" * tables.is_latency(cells[0]),
        "first_stage": tables.first_stage_of(cells[0]),
        "sha256": str(record["first_stage"].get("sha256") or ""),
        "depth": record["depth"],
        "queries": record["queries"],
        "measure": _measure(cells[0]),
        "digits": 1 if record["queries"] < 100 else 2,  # the interval is wider than more digits
        "first": shards.cell_name(first[0]) if first else None,
        "data": shards.dataset_name(cells[0].dataset) if cells[0].dataset in texts else None,
    }


def _stages(heads: Sequence[Board]) -> list[Board]:
    """The columns under one first stage and depth stand together; the heads come sorted."""
    runs = groupby(heads, key=lambda head: (head["first_stage"], head["depth"]))
    return [
        {"first_stage": name, "depth": depth, "numbers": [head["number"] for head in run]}
        for (name, depth), run in runs
    ]


def _measure(cell: CellResult) -> str:
    return MEASURE if MEASURE in cell.measures else next(iter(cell.measures))


def _row(model: str, kind: str, spec: Mapping[str, Any], baseline: bool) -> Board:
    return {
        "model": model,
        "kind": kind,
        "method": str(spec.get("method") or "unknown"),
        "baseline": baseline,
        "base": str(spec.get("base") or ""),
        "parameters": spec.get("parameters"),
        "trained_on": [str(name) for name in spec.get("trained_on") or ()],
        "cells": {},
    }


def _published_rows(
    columns: Sequence[Sequence[CellResult]], published: Sequence[Published]
) -> list[Board]:
    """A row for every published name; sources that differ make a range, sorted by its low end."""
    found: dict[str, dict[int, list[Published]]] = defaultdict(lambda: defaultdict(list))
    for number, inside in enumerate(columns):
        for figure in published:
            if _belongs(figure, inside[0]):
                found[figure.name_as_published][number].append(figure)
    models = Registry().models if found else {}
    rows = []
    for name, places in found.items():
        ours = next(iter(places.values()))[0].model
        base = f"published figures of {ours}" if ours else "published figures"
        spec = (asdict(models[ours]) if ours in models else {}) | {"base": base}
        row = _row(name, "published", spec, ours in tables.SANITY)
        for number, figures in places.items():
            family = str(columns[number][0].record["dataset"].get("family"))
            trained = in_domain(row["trained_on"], figures[0].dataset, family)
            row["cells"][number] = _published_entry(figures, trained, number)
        rows.append(row)
    return rows


def _belongs(figure: Published, cell: CellResult) -> bool:
    """Same dataset, first stage and depth by name; of the candidates a source tells no more."""
    dataset = cell.record["dataset"]["name"] if cell.record.get("limit") is None else ""
    place = (dataset, _measure(cell), tables.block_of(cell))
    return (figure.dataset, figure.measure, block_of_figure(figure)) == place


def _published_entry(figures: Sequence[Published], in_domain: bool, group: int) -> Board:
    low, high = (end(p.value for p in figures) / 100 for end in (min, max))
    return NOTHING | {
        "id": "p" + digest([figures[0].name_as_published, group])[:16],
        "group": group,
        "value": low,
        "most": high,
        "sources": [[f"{p.value:g}", p.source, p.confidence] for p in figures],
        "in_domain": in_domain,
        "state": "published",
    }


def _entry(cell: CellResult, group: int, interval: Interval) -> Board:
    """What the table shows of one cell; costs are means over its queries."""
    record, numbers = cell.record, tables.numbers_of(cell)
    known = not math.isnan(interval.low + interval.high)
    return NOTHING | {
        "id": shards.cell_name(cell),
        "group": group,
        "value": cell.measures[_measure(cell)],
        "low": interval.low if known else None,
        "high": interval.high if known else None,
        "total_calls": tables.part(cell, "faults").get("calls", 0),
        "calls": numbers["calls"],
        "prompt": numbers["prompt_tokens"],
        "tokens": numbers["generated_tokens"],
        "seconds": numbers["seconds"],
        "flops": tables.cost(cell, "flops"),
        "faults": numbers["fault_share"],
        "in_domain": bool(record["dataset"].get("in_domain")),
        "state": str(record["state"]),
        "queries": record["queries"],
    }


def _mark(cells: Sequence[CellResult], entries: Mapping[str, Board]) -> None:
    """Mark a column's best and second, and the ranks that each may hold."""
    rivals = [c for c in cells if tables.is_complete(c) and not tables.is_sanity(c)]
    places = tables.podium({c.model: entries[c.model]["value"] for c in rivals})
    with contextlib.suppress(DataError):  # other queries: no ranks
        field = [align(rivals, _measure(cells[0]))] if len(rivals) > 1 else []
        for cell, ranks in zip(rivals, rank_groups(field) if field else ()):
            entries[cell.model]["rank"] = ranks
    for model, place in places.items():
        entries[model]["mark"] = place


def _scale(cells: Sequence[CellResult], entries: Mapping[str, Board]) -> list[float]:
    """Where a column's whiskers begin and end."""
    usual = [entries[c.model] for c in cells if c.record["model"]["method"] not in UNTYPICAL]
    ends = [entry[end] for entry in usual for end in ("low", "high") if entry[end] is not None]
    low, high = min(ends, default=0.0), max(ends, default=1.0)
    return [low, high if high > low else low + 1]


def _html(board: Board) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    page = Environment(
        loader=FileSystemLoader(ASSETS), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    page.filters |= {"number": _number, "counted": lambda n, word: f"{n:,} {word}{'s' * (n != 1)}"}
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
