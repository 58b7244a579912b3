"""Tables of finished cells: one model of a table, and every format printed from it.

A number is rounded once, when its Value is made, so no two formats can disagree. It must not know
how a cell was run: it reads records and per-query rows alone.
"""

from __future__ import annotations

import contextlib
import csv
import html
import io
import json
import math
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain, groupby
from textwrap import wrap
from typing import Any, Literal

from harness.stats import align, holm, minimal_detectable, sign_flip
from harness.types import CellResult, DataError

SANITY = ("first-stage", "random", "reverse", "oracle")  # ask no model, compete for no mark
ALPHA = 0.05
ABSENT = "—"
SIGNIFICANT, PARTIAL, IN_DOMAIN, FAKE = "†", "‡", "§", "¶"
MEASURE = "nDCG@10"
Mark = Literal["", "best", "second"]


@dataclass(frozen=True, slots=True)
class Column:
    """key: machine name; head: what is printed; group: the heading above several columns."""

    key: str
    head: str
    group: str = ""
    better: Literal["", "high", "low"] = ""


@dataclass(frozen=True, slots=True)
class Value:
    """number: unrounded, None when absent; text: rounded; note: footnote signs, set superscript."""

    number: float | None
    text: str
    mark: Mark = ""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """label: the model; group: the block it stands in; cells: one Value a column."""

    label: str
    group: str
    cells: tuple[Value, ...]


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of one group are neighbours. notes: one sentence each, for below the table."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    caption: str = ""


def rounded(number: float, digits: int, signed: bool = False) -> str:
    """The one rounding function. Never prints a negative zero."""
    text = f"{number:+.{digits}f}" if signed else f"{number:.{digits}f}"
    return text if any(c in "123456789" for c in text) else text.lstrip("+-")


def value(number: float | None, digits: int, *, signed: bool = False, note: str = "") -> Value:
    """A printable number; None becomes an em-dash, never 0."""
    if number is None:
        return Value(None, ABSENT, note=note)
    return Value(number, rounded(number, digits, signed), note=note)


# --- cells ------------------------------------------------------------------------------------


def is_sanity(cell: CellResult) -> bool:
    """Is it a baseline that asks no model?"""
    return cell.record["model"]["method"] in SANITY


def part(cell: CellResult, name: str) -> Mapping[str, Any]:
    """A section of the record; empty where a failed or imported cell has none."""
    return cell.record.get(name) or {}


def is_fake(cell: CellResult) -> bool:
    """Did the test engine answer? Such a cell is never a result."""
    engine = part(cell, "environment").get("engine") or {}
    return bool(engine.get("engine") == "fake")


def is_latency(cell: CellResult) -> bool:
    """Was it run one query at a time, for its times?"""
    return bool(part(cell, "protocol").get("kind") == "latency")


def first_stage_of(cell: CellResult) -> str:
    """The first stage without its depth, which has a column of its own."""
    return re.sub(r"\+depth=\d+$", "", cell.first_stage)


def block_of(cell: CellResult) -> str:
    """First stage and depth: what has to be equal before two numbers are compared."""
    return f"{first_stage_of(cell)}, top {cell.record['depth']}"


def short(cell: CellResult) -> str:
    """The dataset as a column head."""
    dataset, limit = cell.record["dataset"], cell.record.get("limit")
    name = str(dataset.get("short") or dataset["name"])
    return name if limit is None else f"{name}, first {limit}"


def ordered(cells: Iterable[CellResult]) -> list[CellResult]:
    """First stage, the other baselines, models as given, the oracle last."""
    place = {"first-stage": 0, "random": 1, "reverse": 1, "oracle": 3}
    return sorted(cells, key=lambda cell: place.get(str(cell.record["model"]["method"]), 2))


def shown(cells: Iterable[CellResult], fakes: bool = False) -> list[CellResult]:
    """The cells that a report may show, in table order."""
    return [cell for cell in ordered(cells) if fakes or not is_fake(cell)]


def score(cell: CellResult, measure: str = MEASURE) -> float | None:
    """The cell's mean, None when it failed or has no such measure."""
    return cell.measures.get(measure) if cell.record["state"] != "failed" else None


def cost(cell: CellResult, key: str) -> float | None:
    """An efficiency total divided by the number of queries."""
    total, queries = part(cell, "efficiency").get(key), cell.record.get("queries")
    return None if total is None or not queries else total / queries


def companions(cells: Iterable[CellResult], method: str) -> dict[tuple[str, str], CellResult]:
    """The baseline of that method for every (dataset, block)."""
    found = [cell for cell in cells if cell.record["model"]["method"] == method]
    return {(cell.dataset, block_of(cell)): cell for cell in found}


def gain(
    cell: CellResult, baselines: Mapping[tuple[str, str], CellResult], measure: str = MEASURE
) -> float | None:
    """Mean of the cell minus that of its baseline."""
    base = baselines.get((cell.dataset, block_of(cell)))
    ours, theirs = score(cell, measure), score(base, measure) if base else None
    return None if ours is None or theirs is None else ours - theirs


# --- quality ----------------------------------------------------------------------------------

Key = tuple[str, str, str]  # block, model, column


def quality(
    cells: Sequence[CellResult],
    measure: str = MEASURE,
    scale: float = 100,
    digits: int = 1,
    *,
    baseline: str = "",
    _fakes: bool = False,
) -> Table:
    """Models x datasets, a block for each first stage and depth.

    `baseline` names the row (as a rule "first-stage") that the others are tested against.
    """
    used = shown((cell for cell in cells if not is_latency(cell)), _fakes)
    grid = {(block_of(cell), cell.model, cell.dataset): cell for cell in used}
    family = _compared(grid, baseline, measure)
    p_values = holm([sign_flip(*pair) for pair in family.values()])
    signs = {key: SIGNIFICANT for key, p in zip(family, p_values, strict=True) if p < ALPHA}
    numbers = {
        key: n * scale for key, cell in grid.items() if (n := score(cell, measure)) is not None
    }
    numbers |= _averages(numbers, grid)
    marks = _marks(numbers, grid)
    columns = _columns(used)

    def at(key: Key) -> Value:
        note = _note(grid[key]) if key in grid and key in numbers else ""
        found = value(numbers.get(key), digits, note=note + signs.get(key, ""))
        return replace(found, mark=marks.get(key, ""))

    rows = tuple(
        Row(model, block, tuple(at((block, model, column.key)) for column in columns))
        for block in dict.fromkeys(block for block, _, _ in grid)
        for model in dict.fromkeys(model for other, model, _ in grid if other == block)
    )
    unit = measure + (f" x {scale:g}" if scale != 1 else "")
    power = _power(family, {column.key: column.head for column in columns}, scale)
    below = (_signs(rows), _missing(used, rows), _mixed(used), power, _inputs(used))
    notes = (*chain(*below), *_left_out(cells, used))
    caption = _caption(unit, used, baseline, len(family))
    return Table("Ranking quality", columns, rows, notes, caption)


def _caption(unit: str, cells: Sequence[CellResult], baseline: str, family: int) -> str:
    if not cells:
        return "No finished cells."
    depths = sorted({int(cell.record["depth"]) for cell in cells})
    text = (
        f"{unit} after reranking the top {', '.join(map(str, depths))} of each first stage."
        f" Queries: {_queries(cells)}. Best in bold, second best underlined, by block and column."
    )
    if not family:
        return text
    return (
        f"{text} {SIGNIFICANT}: differs from {baseline} (two-sided paired randomisation test over"
        f" queries, alpha {ALPHA}, Holm over the {family} comparisons of this table)."
    )


def _suites(cells: Iterable[CellResult]) -> dict[str, dict[str, CellResult]]:
    """suite -> dataset label -> one cell of it, as first met."""
    suites: dict[str, dict[str, CellResult]] = {}
    for cell in cells:
        dataset = cell.record["dataset"]
        suite = str(dataset.get("suite") or dataset.get("family") or "")
        suites.setdefault(suite, {}).setdefault(cell.dataset, cell)
    return suites


def _averaged(cells: Iterable[CellResult]) -> dict[str, list[str]]:
    """suite -> the datasets that its average is over; only where there are several whole ones."""
    whole = {
        suite: [name for name, cell in datasets.items() if not _is_limited(cell)]
        for suite, datasets in _suites(cells).items()
    }
    return {suite: names for suite, names in whole.items() if len(names) > 1}


def _is_limited(cell: CellResult) -> bool:
    return cell.record.get("limit") is not None


def _columns(cells: Sequence[CellResult]) -> tuple[Column, ...]:
    """Datasets by suite, each suite's average last."""
    suites, averaged = _suites(cells), _averaged(cells)
    columns: list[Column] = []
    for suite, datasets in suites.items():
        group = suite if len(suites) > 1 else ""
        columns += [Column(name, short(cell), group, "high") for name, cell in datasets.items()]
        if suite in averaged:
            head = f"avg. of {len(averaged[suite])}"
            columns.append(Column(f"average {suite}", head, group, "high"))
    return tuple(columns)


def _averages(numbers: Mapping[Key, float], grid: Mapping[Key, CellResult]) -> dict[Key, float]:
    """Macro averages; none where a dataset of the row is missing or not complete."""
    out: dict[Key, float] = {}
    for suite, names in _averaged(grid.values()).items():
        for block, model in dict.fromkeys((block, model) for block, model, _ in grid):
            keys = [(block, model, name) for name in names]
            if all(key in numbers and grid[key].record["state"] == "complete" for key in keys):
                mean = math.fsum(numbers[key] for key in keys) / len(keys)
                out[block, model, f"average {suite}"] = mean
    return out


def _marks(numbers: Mapping[Key, float], grid: Mapping[Key, CellResult]) -> dict[Key, Mark]:
    """Best and second of every block and column on unrounded values; ties share the mark."""
    barred = {key[:2] for key, cell in grid.items() if is_sanity(cell)}
    races: dict[tuple[str, str], dict[Key, float]] = {}
    for key, number in numbers.items():
        complete = key not in grid or grid[key].record["state"] == "complete"
        if key[:2] not in barred and complete:
            # the last digits of a sum depend on its order
            races.setdefault((key[0], key[2]), {})[key] = round(number, 9)
    marks: dict[Key, Mark] = {}
    for race in races.values():
        if len(race) > 1:
            best, *others = sorted(set(race.values()), reverse=True)
            marks |= {key: "best" for key, number in race.items() if number == best}
            marks |= {key: "second" for key, number in race.items() if number in others[:1]}
    return marks


Pair = tuple[list[float], list[float]]  # per-query values of a cell and of its baseline


def _compared(grid: Mapping[Key, CellResult], baseline: str, measure: str) -> dict[Key, Pair]:
    """Every complete cell beside the baseline of its block and dataset: the family tested."""
    found: dict[Key, Pair] = {}
    for (block, model, dataset), cell in grid.items():
        base = grid.get((block, baseline, dataset))
        if base is None or base is cell or is_sanity(cell):
            continue
        if {base.record["state"], cell.record["state"]} == {"complete"}:
            with contextlib.suppress(DataError):  # other queries: _mixed says so
                found[block, model, dataset] = align(cell, base, measure)
    return found


def _power(family: Mapping[Key, Pair], heads: Mapping[str, str], scale: float) -> Iterator[str]:
    """What the tests could have seen, from the median spread of the differences."""
    spreads: dict[str, list[float]] = {}
    sizes: dict[str, int] = {}
    for (_, _, dataset), (ours, theirs) in family.items():
        if len(ours) > 1:
            differences = [a - b for a, b in zip(ours, theirs)]
            spreads.setdefault(dataset, []).append(statistics.stdev(differences))
            sizes[dataset] = len(ours)
    if spreads:
        least = {
            name: minimal_detectable(statistics.median(sd), sizes[name]) * scale
            for name, sd in spreads.items()
        }
        text = ", ".join(f"{rounded(number, 1)} ({heads[name]})" for name, number in least.items())
        yield f"Least difference that one test finds with power 0.8: {text}."


def _mixed(cells: Sequence[CellResult]) -> Iterator[str]:
    """Rows that must not be compared although their names agree."""
    inputs: dict[tuple[str, str], set[Any]] = {}
    for cell in cells:
        stage = cell.record["first_stage"].get("sha256"), cell.record.get("queries")
        if cell.record["state"] == "complete":
            inputs.setdefault((short(cell), block_of(cell)), set()).add(stage)
    for (dataset, block), kinds in inputs.items():
        if len(kinds) > 1:
            yield f"Not comparable: {dataset} ({block}) has cells over different candidates."


def _note(cell: CellResult) -> str:
    partial = cell.record["state"] != "complete" or _is_limited(cell)
    in_domain = cell.record["dataset"].get("in_domain")
    return PARTIAL * partial + IN_DOMAIN * bool(in_domain) + FAKE * is_fake(cell)


def _queries(cells: Sequence[CellResult]) -> str:
    """As in "43 (DL19), 54 (DL20)"."""
    counts: dict[str, set[int]] = {}
    for cell in cells:
        if queries := cell.record.get("queries"):
            counts.setdefault(short(cell), set()).add(queries)
    return ", ".join(f"{_or(numbers)} ({name})" for name, numbers in counts.items()) or "none"


def _or(numbers: Iterable[int]) -> str:
    return " or ".join(str(number) for number in sorted(numbers))


def _signs(rows: Sequence[Row]) -> Iterator[str]:
    used = {sign for row in rows for v in row.cells for sign in v.note}
    if IN_DOMAIN in used:
        yield f"{IN_DOMAIN} in-domain: the model was trained on queries of this collection."
    if PARTIAL in used:
        yield f"{PARTIAL} not the whole query set: comparable within its column only."
    if FAKE in used:
        yield f"{FAKE} answered by the fake engine: not a result."


def _missing(cells: Sequence[CellResult], rows: Sequence[Row]) -> Iterator[str]:
    if any(v.number is None for row in rows for v in row.cells):
        yield f"{ABSENT} not run; no average is printed where a dataset of the row is missing."
    for cell in cells:
        if cell.record["state"] == "failed":
            error = cell.record.get("error", "no reason recorded")
            yield f"{cell.model} failed on {short(cell)} ({block_of(cell)}): {error}"


def _inputs(cells: Sequence[CellResult]) -> Iterator[str]:
    """What the inputs lost on the way, by model, and what cannot be run again as it was."""
    found: dict[str, dict[str, list[str]]] = {}  # what -> where and how many -> models
    for cell in cells:
        for name, count in part(cell, "inputs").items():
            place = f"{count} on {short(cell)} ({block_of(cell)})"
            found.setdefault(name, {}).setdefault(place, []).append(cell.model)
    for name, places in sorted(found.items()):
        detail = "; ".join(f"{place}: {', '.join(models)}" for place, models in places.items())
        yield f"{name.replace('_', ' ').capitalize()}: {detail}."
    if unpinned := dict.fromkeys(cell.model for cell in cells if _is_unpinned(cell)):
        yield f"Revision not pinned (main): {', '.join(unpinned)}."


def _is_unpinned(cell: CellResult) -> bool:
    engine = part(cell, "environment").get("engine") or {}
    parts = (engine.get("base"), engine.get("adapter"))
    return any(isinstance(found, Mapping) and found.get("revision") == "main" for found in parts)


def _left_out(cells: Sequence[CellResult], used: Sequence[CellResult]) -> Iterator[str]:
    left = [cell for cell in cells if cell not in used and cell.record["state"] != "failed"]
    fakes = sum(is_fake(cell) for cell in left)
    for number, why in (
        (fakes, "answered by the fake engine"),
        (len(left) - fakes, "of latency runs"),
    ):
        if number:
            yield f"Left out: {number} cell{'s' * (number > 1)} {why}."


# --- efficiency and summary -------------------------------------------------------------------

Field = tuple[Column, int, Callable[[CellResult], float | None]]  # head, digits, number


def efficiency(cells: Sequence[CellResult], *, _fakes: bool = False) -> Table:
    """What every model cost and did, one block for dataset and first stage, both protocols."""
    used = [cell for cell in shown(cells, _fakes) if cell.record["state"] != "failed"]
    first, best = companions(used, "first-stage"), companions(used, "oracle")

    def share(cell: CellResult) -> float | None:
        possible = best.get((cell.dataset, block_of(cell)))
        ours, most = gain(cell, first), gain(possible, first) if possible else None
        return None if ours is None or not most or most < 0 else 100 * ours / most

    fields: list[Field] = [
        *_costs(),
        (
            Column("queries_per_second", "queries/s", "", "high"),
            3,
            lambda c: part(c, "efficiency").get("queries_per_second"),
        ),
        (Column("gain_share", "% of gain", "", "high"), 1, share),
        (Column("unparsable", "unparsed %", "", "low"), 1, partial(_fault, name="unparsable")),
        (Column("cut_off", "cut off %", "", "low"), 1, partial(_fault, name="cut_off")),
        (Column("no_op", "no-op %"), 1, _no_op),
        (Column("kendall_tau", "tau"), 2, lambda c: c.record.get("kendall_tau")),
    ]
    if any(_latency(cell, "median") is not None for cell in used):
        for key in ("median", "p90"):
            column = Column(f"latency_{key}", f"{key} s", "", "low")
            fields.append((column, 2, partial(_latency, key=key)))
    notes = (
        "calls/q, rounds/q: engine calls of a query, and those that must wait for one another.",
        "s/q: engine time, a batch's divided among its calls, also of answers from a cache.",
        "queries/s: by the clock, absent as soon as one answer came from a cache.",
        "% of gain: gain over the first stage in nDCG@10, of the gain of a perfect reranking.",
        "unparsed: answers that could not be read. no-op: answers that left the order as it was.",
        "tau: Kendall's rank correlation with the first stage.",
        *_left_out(cells, used),
    )
    models = [cell for cell in used if not is_sanity(cell)]
    return _per_cell("Efficiency", models, fields, notes)


def _costs() -> list[Field]:
    heads = (
        ("calls", "calls/q", 1), ("rounds", "rounds/q", 1), ("prompt_tokens", "tokens in/q", 0),
        ("generated_tokens", "tokens out/q", 0), ("seconds", "s/q", 2),
    )  # fmt: skip
    return [
        (Column(key, head, "", "low"), digits, partial(cost, key=key))
        for key, head, digits in heads
    ]


def _fault(cell: CellResult, name: str) -> float | None:
    faults = part(cell, "faults")
    return 100 * faults.get(name, 0) / faults["calls"] if faults.get("calls") else None


def _no_op(cell: CellResult) -> float | None:
    share = part(cell, "faults").get("no_op_rate")
    return None if share is None else 100 * float(share)


def _latency(cell: CellResult, key: str) -> float | None:
    found = part(cell, "efficiency").get("latency")
    return float(found[key]) if found else None


def summary(cells: Sequence[CellResult]) -> Table:
    """What a run came to: quality, cost and faults of every cell, fake ones with a sign."""
    used = shown(cells, fakes=True)
    measure = _main_measure(used)
    first = companions(used, "first-stage")
    costs = [field for field in _costs() if field[0].key != "prompt_tokens"]
    fields: list[Field] = [
        (Column(measure, measure, "", "high"), 4, lambda cell: score(cell, measure)),
        (Column("gain", "+/- first", "", "high"), 4, lambda cell: _change(cell, first, measure)),
        *costs,
        (Column("faults", "faults", "", "low"), 0, _faults),
    ]
    table = _per_cell("Summary", used, fields, ())
    return Table(table.title, table.columns, table.rows, tuple(_signs(table.rows)))


def _main_measure(cells: Sequence[CellResult]) -> str:
    names = [name for cell in cells for name in cell.measures]
    return MEASURE if MEASURE in names or not names else names[0]


def _change(
    cell: CellResult, first: Mapping[tuple[str, str], CellResult], measure: str
) -> float | None:
    itself = cell.record["model"]["method"] == "first-stage"
    return None if itself else gain(cell, first, measure)


def _faults(cell: CellResult) -> float | None:
    counted = {k: n for k, n in part(cell, "faults").items() if k not in ("calls", "no_op_rate")}
    return float(sum(counted.values())) if counted else None


def _per_cell(
    title: str, cells: Sequence[CellResult], fields: Sequence[Field], notes: tuple[str, ...]
) -> Table:
    """One row a cell, one block for dataset, first stage and depth."""
    blocks: dict[str, list[Row]] = {}
    for cell in cells:
        group = f"{cell.dataset}, {block_of(cell)}"
        line = [
            value(get(cell), digits, signed=column.key == "gain") for column, digits, get in fields
        ]
        if is_fake(cell):
            line[0] = Value(line[0].number, line[0].text, "", FAKE)
        blocks.setdefault(group, []).append(Row(cell.model, group, tuple(line)))
    rows = tuple(row for block in blocks.values() for row in block)
    return Table(title, tuple(column for column, _, _ in fields), rows, notes)


# --- formats ----------------------------------------------------------------------------------


def _blocks(table: Table) -> list[tuple[str, list[Row]]]:
    return [(group, list(rows)) for group, rows in groupby(table.rows, lambda row: row.group)]


def _spans(table: Table) -> list[tuple[str, int]]:
    """Headings above neighbouring columns and how many each covers; empty without headings."""
    spans = [(group, len(list(some))) for group, some in groupby(table.columns, lambda c: c.group)]
    return spans if any(group for group, _ in spans) else []


def to_text(table: Table, width: int = 100) -> str:
    """Plain columns for a terminal; footnote signs hang to the right of the aligned numbers."""
    left = max(len(plain(label)) for label in ("model", *("  " + r.label for r in table.rows)))
    columns = [_text_column(table, i) for i in range(len(table.columns))]
    head, *lines = zip(*columns, strict=True) if columns else [()]
    out = ["  ".join(["model".ljust(left), *head]).rstrip()]
    numbers = iter(lines)
    for group, rows in _blocks(table):
        out.append(plain(group))
        for row, cells in zip(rows, numbers):
            out.append("  ".join([("  " + plain(row.label)).ljust(left), *cells]).rstrip())
    below = [table.caption] * bool(table.caption) + [f"- {note}" for note in table.notes]
    return "\n".join([*out, *(line for text in below for line in wrap(plain(text), width))])


def _text_column(table: Table, i: int) -> list[str]:
    """Head and values of a column, all of one width, the decimal points below one another."""
    hang = max((len(row.cells[i].note) for row in table.rows), default=0)
    texts = [row.cells[i].text + row.cells[i].note.ljust(hang) for row in table.rows]
    head = plain(table.columns[i].head)
    width = max(len(text) for text in (head, *texts))
    return [text.rjust(width) for text in (head, *texts)]


def plain(text: str) -> str:
    """No control characters: a name from a file must not steer the terminal."""
    return "".join(c if c.isprintable() else " " for c in text)


def to_markdown(table: Table) -> str:
    """A GitHub table; block heads are rows in italics."""
    width = len(table.columns)
    lines = [
        "| " + " | ".join(["Model", *(_markdown(c.head) for c in table.columns)]) + " |",
        "|---" + "|---:" * width + "|",
    ]
    for group, rows in _blocks(table):
        lines.append(f"| *{_markdown(group)}* |" + " |" * width)
        for row in rows:
            cells = [_markdown_value(v) for v in row.cells]
            lines.append("| " + " | ".join([_markdown(row.label), *cells]) + " |")
    title = f"**{_markdown(table.title)}.** " if table.title else ""
    head = [(title + _markdown(table.caption)).strip(), "", *lines]
    return "\n".join([*head, "", *(f"- {_markdown(note)}" for note in table.notes)]).strip() + "\n"


def _markdown(text: str) -> str:
    safe = html.escape(plain(text), quote=False)
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", safe)


def _markdown_value(v: Value) -> str:
    marked = {"": "{}", "best": "**{}**", "second": "<u>{}</u>"}[v.mark].format(v.text)
    return marked + (f"<sup>{v.note}</sup>" if v.note else "")


def to_csv(table: Table) -> str:
    """Wide CSV of the printed numbers; what is absent is empty."""
    head = ["group", "model", *(column.key for column in table.columns)]
    cells = [["" if v.number is None else v.text for v in row.cells] for row in table.rows]
    return csv_text([head, *([r.group, r.label, *c] for r, c in zip(table.rows, cells))])


def csv_text(rows: Iterable[Sequence[Any]]) -> str:
    """CSV with line feeds; None is an empty field."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue()


LONG = (
    "model", "dataset", "first_stage", "depth", "protocol", "measure", "value", "queries", "key",
    "calls", "prompt_tokens", "generated_tokens", "seconds",
)  # fmt: skip


def to_long_csv(cells: Sequence[CellResult], *, _fakes: bool = False) -> str:
    """One row per finished cell and measure, unrounded; costs are totals of the cell."""
    rows: list[Sequence[Any]] = [LONG]
    for cell in shown(cells, _fakes):
        record, costs = cell.record, part(cell, "efficiency")
        where = (cell.model, cell.dataset, first_stage_of(cell), record["depth"])
        end = (record.get("queries"), record["key"], *(costs.get(key) for key in LONG[-4:]))
        for name, number in cell.measures.items():
            rows.append((*where, part(cell, "protocol").get("kind"), name, repr(number), *end))
    return csv_text(rows)


_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': "''",
    ABSENT: "---", SIGNIFICANT: r"$^\dagger$", PARTIAL: r"$^\ddagger$", IN_DOMAIN: r"$^\S$",
    FAKE: r"$^\P$",
}  # fmt: skip


def _latex(text: str) -> str:
    return "".join(_LATEX.get(c, c) for c in plain(text))


def to_latex(table: Table, label: str = "tab:results") -> str:
    """A booktabs table: blocks with a head row in italics, best bold, second underlined."""
    width = len(table.columns)
    groups, rules, start = [""], "", 2
    for group, span in _spans(table):
        groups.append(rf"\multicolumn{{{span}}}{{c}}{{{_latex(group)}}}")
        rules += rf"\cmidrule(lr){{{start}-{start + span - 1}}}" if group else ""
        start += span
    lines = [" & ".join(groups) + r" \\", rules] if len(groups) > 1 else []
    lines += [" & ".join(["Model", *(_latex(c.head) for c in table.columns)]) + r" \\"]
    for group, rows in _blocks(table):
        lines += [
            r"\midrule",
            rf"\multicolumn{{{width + 1}}}{{l}}{{\textit{{{_latex(group)}}}}} \\",
        ]
        lines += [
            " & ".join([_latex(row.label), *(_latex_value(v) for v in row.cells)]) + r" \\"
            for row in rows
        ]
    notes = [
        r"\par\smallskip\raggedright\footnotesize",
        *(_latex(n) + r"\par" for n in table.notes),
    ]
    return "\n".join([
        r"% needs \usepackage{booktabs}", r"\begin{table}", r"\centering",
        rf"\caption{{{_latex(table.caption or table.title)}}}",
        rf"\label{{{label}}}", rf"\begin{{tabular}}{{l{'r' * width}}}", r"\toprule", *lines,
        r"\bottomrule", r"\end{tabular}", *(notes if table.notes else ()), r"\end{table}", "",
    ])  # fmt: skip


def _latex_value(v: Value) -> str:
    text = "$-$" * v.text.startswith("-") + _latex(v.text.removeprefix("-"))
    marked = {"": "{}", "best": r"\textbf{{{}}}", "second": r"\underline{{{}}}"}[v.mark].format(
        text
    )
    return marked + _latex(v.note)


def to_html(table: Table) -> str:
    """An escaped <table> and its notes; data-value holds the unrounded number for sorting."""
    e = html.escape
    lines = [
        "<table>",
        f"<caption>{f'<b>{e(table.title)}.</b> {e(table.caption)}'.strip()}</caption>",
    ]
    lines += ["<thead>"]
    if spans := _spans(table):
        above = (f'<th colspan="{n}" scope="colgroup">{e(group)}</th>' for group, n in spans)
        lines += ["<tr><td></td>", *above, "</tr>"]
    heads = (f'<th scope="col" data-better="{c.better}">{e(c.head)}</th>' for c in table.columns)
    lines += ['<tr><th scope="col">Model</th>', *heads, "</tr>", "</thead>"]
    for group, rows in _blocks(table):
        wide = len(table.columns) + 1
        lines += ["<tbody>", f'<tr><th colspan="{wide}" scope="rowgroup">{e(group)}</th></tr>']
        for row in rows:
            cells = "".join(_html_value(v) for v in row.cells)
            lines.append(f'<tr><th scope="row">{e(row.label)}</th>{cells}</tr>')
        lines += ["</tbody>"]
    lines += ["</table>"]
    if table.notes:
        lines += ['<ul class="notes">', *(f"<li>{e(note)}</li>" for note in table.notes), "</ul>"]
    return "\n".join([*lines, ""])


def _html_value(v: Value) -> str:
    tag = {"": "{}", "best": "<strong>{}</strong>", "second": "<u>{}</u>"}[v.mark]
    note = f"<sup>{html.escape(v.note)}</sup>" if v.note else ""
    data = "" if v.number is None else f' data-value="{v.number!r}"'
    return f"<td{data}>{tag.format(html.escape(v.text))}{note}</td>"


def to_json(table: Table) -> str:
    """The table as it stands, unrounded numbers beside the printed ones."""
    return json.dumps(asdict(table), indent=1, ensure_ascii=False) + "\n"


WRITERS: dict[str, Callable[[Table], str]] = {
    "md": to_markdown, "csv": to_csv, "tex": to_latex, "html": to_html, "json": to_json,
}  # fmt: skip
