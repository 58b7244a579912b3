"""Tables of finished cells: the model of a table, and what stands in each of them.

A number is rounded once, when its Value is made, so no two formats can disagree. It must not know
how a cell was run, nor any format: it reads records and per-query rows alone.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from operator import sub
from typing import Any, Literal

from harness.published import Published
from harness.stats import align, holm, minimal_detectable, sign_flip
from harness.types import CellResult, DataError

MEASURE = "nDCG@10"
SANITY = ("first-stage", "random", "reverse", "oracle")  # ask no model, compete for no mark
ABSENT, SIGNIFICANT, PARTIAL, IN_DOMAIN, FAKE = "—", "†", "‡", "§", "¶"
SIGNS = {
    IN_DOMAIN: "in-domain: the model was trained on queries of this collection.",
    PARTIAL: "not the whole query set: comparable within its column only.",
    FAKE: "answered by the fake engine: not a result.",
    ABSENT: "not run; no average is printed where a dataset of the row is missing.",
}
Mark = Literal["", "best", "second"]
MARKS: tuple[Mark, ...] = ("", "best", "second")
Better = Literal["", "high", "low"]


@dataclass(frozen=True, slots=True)
class Column:
    """key: machine name; head: what is printed; group: the heading above several columns."""

    key: str
    head: str
    group: str = ""
    better: Better = ""


@dataclass(frozen=True, slots=True)
class Value:
    """number: unrounded, None when absent or a range; note: footnote signs, set superscript."""

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
    kind: Literal["measured", "published"] = "measured"


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
        return Value(None, ABSENT)
    return Value(number, rounded(number, digits, signed), note=note)


# --- cells ------------------------------------------------------------------------------------

Place = tuple[str, str]  # dataset, block


def part(cell: CellResult, *names: str) -> Mapping[str, Any]:
    """A section of the record; empty where a failed or imported cell has none."""
    found = cell.record
    for name in names:
        below = found.get(name)
        found = below if isinstance(below, Mapping) else {}
    return found


def is_sanity(cell: CellResult) -> bool:
    """Is it a baseline that asks no model?"""
    return cell.record["model"]["method"] in SANITY


def is_complete(cell: CellResult) -> bool:
    """Was every query answered?"""
    return bool(cell.record["state"] == "complete")


def is_fake(cell: CellResult) -> bool:
    """Did the test engine answer? Such a cell is never a result."""
    return part(cell, "environment", "engine").get("engine") == "fake"


def is_latency(cell: CellResult) -> bool:
    """Was it run one query at a time, for its times?"""
    return part(cell, "protocol").get("kind") == "latency"


def first_stage_of(cell: CellResult) -> str:
    """The first stage without its depth."""
    return cell.first_stage.removesuffix(f"+depth={cell.record['depth']}")


def block_of(cell: CellResult) -> str:
    """First stage and depth: what has to be equal before two numbers are compared."""
    return f"{first_stage_of(cell)}, top {cell.record['depth']}"


def short(cell: CellResult) -> str:
    """The dataset as a column head."""
    dataset, limit = cell.record["dataset"], cell.record.get("limit")
    name = str(dataset.get("short") or dataset["name"])
    return name if limit is None else f"{name}, first {limit}"


def shown(cells: Iterable[CellResult]) -> list[CellResult]:
    """What a report may show, in the order of its tables."""
    return ordered(cell for cell in cells if not is_fake(cell))


def ordered(cells: Iterable[CellResult]) -> list[CellResult]:
    """By block: first stage, other baselines, models as given, oracle."""
    given = list(cells)
    blocks = list(dict.fromkeys(map(block_of, given)))
    order = {"first-stage": 0, "random": 1, "reverse": 1, "oracle": 3}

    def place(cell: CellResult) -> tuple[int, int]:
        return blocks.index(block_of(cell)), order.get(cell.record["model"]["method"], 2)

    return sorted(given, key=place)


def cost(cell: CellResult, key: str) -> float | None:
    """An efficiency total divided by the number of queries."""
    total, queries = part(cell, "efficiency").get(key), cell.record.get("queries")
    return None if total is None or not queries else total / queries


def companions(cells: Iterable[CellResult], method: str) -> dict[Place, CellResult]:
    """The baseline of that method at every place."""
    found = [cell for cell in cells if cell.record["model"]["method"] == method]
    return {(cell.dataset, block_of(cell)): cell for cell in found}


def gain(
    cell: CellResult, baselines: Mapping[Place, CellResult], measure: str = MEASURE
) -> float | None:
    """Mean of the cell minus that of its baseline; None for the baseline itself."""
    base = baselines.get((cell.dataset, block_of(cell)), cell)
    known = base is not cell and measure in cell.measures and measure in base.measures
    return cell.measures[measure] - base.measures[measure] if known else None


def podium(numbers: Mapping[Any, float]) -> dict[Any, int]:
    """1 for the best and 2 for the second, before rounding; ties share their place."""
    known = {key: round(n, 9) for key, n in numbers.items()}  # sums differ in the last digits
    best = sorted(set(known.values()), reverse=True)[:2]
    return {key: best.index(n) + 1 for key, n in known.items() if n in best}


# --- quality ----------------------------------------------------------------------------------

Key = tuple[str, str, str]  # block, model, column
Grid = Mapping[Key, CellResult]
Tests = Mapping[Key, tuple[list[float], list[float]]]  # per-query values, and the baseline's


def quality(
    cells: Sequence[CellResult], published: Sequence[Published] = (), *, baseline: str = ""
) -> Table:
    """nDCG@10 x 100, models x datasets; a block for each first stage and depth.

    baseline    the row, as a rule "first-stage", that the others are tested against
    published   figures to print below the row of their model
    """
    used = [cell for cell in shown(cells) if not is_latency(cell)]
    grid = {(block_of(cell), cell.model, cell.dataset): cell for cell in used}
    columns, tests = _columns(used), _tests(grid, baseline)
    rows = _rows(grid, columns, tests)
    told = _told([*_warnings(used), *_left_out(cells, used)])
    notes = [*_signs(rows), *_mixed(used), *_power(tests, columns), *told]
    caption = _caption(used, baseline, len(tests)) if used else "No finished cells."
    table = Table("Ranking quality", tuple(columns), tuple(rows), tuple(notes), caption)
    return _with_published(table, published) if published else table


def _columns(cells: Sequence[CellResult]) -> dict[Column, list[str]]:
    """Every column and the datasets it is over: each one by suite, then the suite's average."""
    suites: dict[str, dict[str, CellResult]] = defaultdict(dict)
    for cell in cells:
        dataset = cell.record["dataset"]
        suites[str(dataset.get("suite") or dataset.get("family") or "")][cell.dataset] = cell
    columns: dict[Column, list[str]] = {}
    for suite, found in suites.items():
        group = suite if len(suites) > 1 else ""
        columns |= {Column(name, short(c), group, "high"): [name] for name, c in found.items()}
        whole = [name for name, cell in found.items() if cell.record.get("limit") is None]
        if len(whole) > 1:
            columns[Column(f"average {suite}", f"avg. of {len(whole)}", group, "high")] = whole
    return columns


def _rows(grid: Grid, columns: Mapping[Column, list[str]], tests: Tests) -> list[Row]:
    places = dict.fromkeys(key[:2] for key in grid)
    numbers = {
        (*place, column.key): number
        for place in places
        for column, datasets in columns.items()
        if (number := _mean([grid.get((*place, name)) for name in datasets])) is not None
    }
    marks, significant = _marks(numbers, grid), _significant(tests)

    def at(key: Key) -> Value:
        note = (_sign(grid[key]) if key in grid else "") + SIGNIFICANT * (key in significant)
        return replace(value(numbers.get(key), 1, note=note), mark=marks.get(key, ""))

    return [
        Row(model, block, tuple(at((block, model, column.key)) for column in columns))
        for block, model in places
    ]


def _mean(cells: Sequence[CellResult | None]) -> float | None:
    """Times 100. None as soon as one is missing; of several, all have to be complete."""
    known = [cell for cell in cells if cell and (len(cells) == 1 or is_complete(cell))]
    values = [100 * cell.measures[MEASURE] for cell in known if MEASURE in cell.measures]
    return math.fsum(values) / len(values) if values and len(values) == len(cells) else None


def _marks(numbers: Mapping[Key, float], grid: Grid) -> dict[Key, Mark]:
    """Best and second of every block and column, before rounding; ties share the mark."""
    barred = {key[:2] for key, cell in grid.items() if is_sanity(cell)}
    races: dict[Place, dict[Key, float]] = defaultdict(dict)
    for key, number in numbers.items():
        if key[:2] not in barred and (key not in grid or is_complete(grid[key])):
            races[key[0], key[2]][key] = number
    contested = [race for race in races.values() if len(race) > 1]
    return {key: MARKS[n] for race in contested for key, n in podium(race).items()}


def _tests(grid: Grid, baseline: str) -> Tests:
    """Every complete cell beside the baseline of its block and dataset: the family tested."""
    tests = {}
    for (block, model, dataset), cell in grid.items():
        base = grid.get((block, baseline, dataset), cell)
        if base is not cell and not is_sanity(cell) and is_complete(base) and is_complete(cell):
            with contextlib.suppress(DataError):  # other queries: _mixed says so
                tests[block, model, dataset] = align(cell, base, MEASURE)
    return tests


def _significant(tests: Tests) -> set[Key]:
    p_values = holm([sign_flip(*pair) for pair in tests.values()])
    return {key for key, p in zip(tests, p_values) if p < 0.05}


# --- captions and notes -----------------------------------------------------------------------


def _caption(cells: Sequence[CellResult], baseline: str, tests: int) -> str:
    depths = sorted({int(cell.record["depth"]) for cell in cells})
    sizes = dict.fromkeys((cell.record.get("queries"), short(cell)) for cell in cells)
    text = (
        f"{MEASURE} x 100 after reranking the top {', '.join(map(str, depths))} of each first"
        f" stage. Queries: {', '.join(f'{n} ({name})' for n, name in sizes if n) or 'none'}."
        " Best in bold, second best underlined, by block and column."
    )
    test = (
        f" {SIGNIFICANT}: differs from {baseline} (two-sided paired randomisation test over"
        f" queries, alpha 0.05, Holm over the {tests} comparisons of this table)."
    )
    return text + test * bool(tests)


def _sign(cell: CellResult) -> str:
    partial = not is_complete(cell) or cell.record.get("limit") is not None
    in_domain = bool(cell.record["dataset"].get("in_domain"))
    return PARTIAL * partial + IN_DOMAIN * in_domain + FAKE * is_fake(cell)


def _signs(rows: Iterable[Row]) -> list[str]:
    used = {sign for row in rows for v in row.cells for sign in v.note + v.text}
    return [f"{sign} {text}" for sign, text in SIGNS.items() if sign in used]


def _warnings(cells: Sequence[CellResult]) -> Iterator[tuple[str, str]]:
    """What a reader has to know of cells that are shown: the text, and the model it is about."""
    for cell in cells:
        where = f"{short(cell)} ({block_of(cell)})"
        if cell.record["state"] == "failed":
            error = cell.record.get("error", "no reason recorded")
            yield f"Failed on {where}, {error}", cell.model
        for name, count in sorted(part(cell, "inputs").items()):
            yield f"{name.replace('_', ' ').capitalize()}: {count} on {where}", cell.model
        for weights in ("base", "adapter"):
            if part(cell, "environment", "engine", weights).get("revision") == "main":
                yield "Revision not pinned (main)", cell.model


def _left_out(cells: Sequence[CellResult], used: Sequence[CellResult]) -> Iterator[tuple[str, str]]:
    for cell in cells:
        if cell not in used and cell.record["state"] != "failed":
            why = "answered by the fake engine" if is_fake(cell) else "a latency run"
            yield f"Left out, {why}", cell.model


def _told(warnings: Iterable[tuple[str, str]]) -> list[str]:
    """One note for all models that a warning is about."""
    models: dict[str, dict[str, None]] = defaultdict(dict)
    for text, model in warnings:
        models[text][model] = None
    return [f"{text}: {', '.join(found)}." for text, found in models.items()]


def _mixed(cells: Sequence[CellResult]) -> list[str]:
    """Rows that must not be compared although their names agree."""
    kinds: dict[str, set[Any]] = defaultdict(set)
    for cell in filter(is_complete, cells):
        candidates = cell.record["first_stage"].get("sha256"), cell.record.get("queries")
        kinds[f"{short(cell)} ({block_of(cell)})"].add(candidates)
    mixed = [where for where, found in kinds.items() if len(found) > 1]
    return [f"Not comparable: {where} has cells over different candidates." for where in mixed]


def _power(tests: Tests, columns: Iterable[Column]) -> Iterator[str]:
    """What the tests could have seen: the median of a column's minimal differences."""
    least: dict[str, list[float]] = defaultdict(list)
    for (_, _, dataset), (ours, theirs) in tests.items():
        if len(ours) > 1:
            spread = statistics.stdev(map(sub, ours, theirs))
            least[dataset].append(100 * minimal_detectable(spread, len(ours)))
    medians = {c.head: statistics.median(least[c.key]) for c in columns if c.key in least}
    if medians:
        text = ", ".join(f"{rounded(number, 1)} ({head})" for head, number in medians.items())
        yield f"Least difference that one test finds with power 0.8: {text}."


# --- published figures ------------------------------------------------------------------------


def _with_published(table: Table, published: Iterable[Published]) -> Table:
    """Put figures below the rows of their model, where first stage and depth agree."""
    heads = {column.key: column.head for column in table.columns}
    figures = [p for p in published if p.measure == MEASURE and p.dataset in heads]
    rows: list[Row] = []
    sources: list[tuple[str, str]] = []
    for block, measured in groupby(table.rows, lambda row: row.group):
        families: dict[str, list[Row]] = defaultdict(list)
        for row in measured:  # a variant of a model stands for the model
            families[row.label.partition("@")[0]].append(row)
        for name, family in families.items():
            some = [p for p in figures if p.model == name]
            here = [p for p in some if _block(p) == block]
            rows += family + [_published_row(name, block, here, heads)] * bool(here)
            sources += _sources(name, block, some, heads)
    caption = f"{table.caption} (published): printed elsewhere, not measured here; never marked."
    notes = (*table.notes, *_told(sources))
    return replace(table, rows=tuple(rows), notes=notes, caption=caption)


def _block(figure: Published) -> str:
    name, _, depth = figure.first_stage.partition("+depth=")
    return f"{name or 'unnamed candidates'}, top {depth or 100}"


def _published_row(
    name: str, block: str, figures: Iterable[Published], datasets: Iterable[str]
) -> Row:
    """Sources that differ in print make a range, which has no number."""
    numbers = [sorted(p.value for p in figures if p.dataset == dataset) for dataset in datasets]
    values = [value(min(some, default=None), 1) for some in numbers]
    tops = [value(max(some, default=None), 1) for some in numbers]
    cells = [
        low if low.text == top.text else Value(None, f"{low.text}-{top.text}")
        for low, top in zip(values, tops)
    ]
    return Row(f"{name} (published)", block, tuple(cells), "published")


def _sources(
    name: str, block: str, figures: Sequence[Published], heads: Mapping[str, str]
) -> Iterator[tuple[str, str]]:
    """Where every figure stands in print; also of those that are over other candidates."""
    covered = {p.dataset for p in figures if _block(p) == block}
    for p in figures:
        if _block(p) == block:
            low = ", low confidence" * (p.confidence == "low")
            text = f"{name} (published), {block}: {p.name_as_published} in {p.source}{low}"
            yield text, f"{heads[p.dataset]} {p.value:g}"
        elif p.dataset not in covered and name != "first-stage":
            text = f"{name} (published), not shown beside {block}, for it is over other candidates"
            yield text, f"{heads[p.dataset]} ({_block(p)})"


# --- efficiency and summary -------------------------------------------------------------------

COLUMNS: dict[str, tuple[str, int, Better]] = {  # head, digits; a key that is not here is a measure
    "gain": ("gain", 4, "high"), "calls": ("calls/q", 1, "low"), "rounds": ("rounds/q", 1, "low"),
    "prompt_tokens": ("tokens in/q", 0, "low"), "generated_tokens": ("tokens out/q", 0, "low"),
    "seconds": ("s/q", 2, "low"), "queries_per_second": ("queries/s", 3, "high"),
    "gain_share": ("% of gain", 1, "high"), "unparsable": ("unparsed %", 1, "low"),
    "cut_off": ("cut off %", 1, "low"), "no_op": ("no-op %", 1, ""), "kendall_tau": ("tau", 2, ""),
    "latency_median": ("median s", 2, "low"), "latency_p90": ("p90 s", 2, "low"),
    "faults": ("faults", 0, "low"),
}  # fmt: skip
COSTS = ("calls", "rounds", "prompt_tokens", "generated_tokens", "seconds")
FAULTS = ("unparsable", "cut_off")
EFFICIENCY = (*COSTS, "queries_per_second", "gain_share", *FAULTS, "no_op", "kendall_tau")
SUMMARY = ("gain", "calls", "rounds", "generated_tokens", "seconds", "faults")
EXPLAINED = (
    "calls/q, rounds/q: engine calls of a query, and those that must wait for one another.",
    "s/q: engine time, a batch's divided among its calls, also of answers from a cache.",
    "queries/s: by the clock, absent as soon as one answer came from a cache.",
    "% of gain: gain over the first stage in nDCG@10, of the gain of a perfect reranking.",
    "unparsed: answers that could not be read. no-op: answers that left the order as it was.",
    "tau: Kendall's rank correlation with the first stage.",
)


def efficiency(cells: Sequence[CellResult]) -> Table:
    """What every model cost and did, one block for dataset and first stage, both protocols."""
    used = [cell for cell in shown(cells) if cell.record["state"] != "failed"]
    timed = any(part(cell, "efficiency", "latency") for cell in used)
    keys = (*EFFICIENCY, *("latency_median", "latency_p90") * timed)
    baselines = {cell.model for cell in used if is_sanity(cell)}
    models = [row for row in _per_cell(used, keys) if row.label not in baselines]
    notes = (*EXPLAINED, *_told(_left_out(cells, used)))
    return Table("Efficiency", tuple(map(_column, keys)), tuple(models), notes)


def summary(cells: Sequence[CellResult]) -> Table:
    """What a run came to: quality, cost and faults of every cell, fake ones with a sign."""
    used = ordered(cells)
    names = [name for cell in used for name in cell.measures]
    keys = (MEASURE if MEASURE in names or not names else names[0], *SUMMARY)
    notes = (f"{FAKE} {SIGNS[FAKE]}",) * any(map(is_fake, used))
    return Table("Summary", tuple(map(_column, keys)), tuple(_per_cell(used, keys)), notes)


def _column(key: str) -> Column:
    head, _, better = COLUMNS.get(key, (key, 4, "high"))
    return Column(key, head, "", better)


def _per_cell(cells: Sequence[CellResult], keys: Sequence[str]) -> list[Row]:
    """One row a cell, of one block for dataset, first stage and depth."""
    measure = keys[0] if keys[0] not in COLUMNS else MEASURE
    first, best = companions(cells, "first-stage"), companions(cells, "oracle")
    rows = []
    for cell in cells:
        place = cell.dataset, block_of(cell)
        ours, most = gain(cell, first, measure), gain(best.get(place, cell), first, measure)
        numbers = {**cell.measures, **numbers_of(cell), "gain": ours}
        if place in best and ours is not None and most and most > 0:
            numbers["gain_share"] = 100 * ours / most
        line = [
            value(numbers.get(key), COLUMNS.get(key, ("", 4))[1], signed=key == "gain")
            for key in keys
        ]
        line[0] = replace(line[0], note=FAKE * is_fake(cell))
        rows.append(Row(cell.model, ", ".join(place), tuple(line)))
    groups = list(dict.fromkeys(row.group for row in rows))
    return sorted(rows, key=lambda row: groups.index(row.group))


def numbers_of(cell: CellResult) -> dict[str, float | None]:
    """A cell's own numbers by column: costs per query, faults in percent of the calls."""
    faults, times = dict(part(cell, "faults")), part(cell, "efficiency", "latency")
    calls, no_op = faults.pop("calls", None), faults.pop("no_op_rate", None)
    return {
        **{key: cost(cell, key) for key in COSTS},
        **{key: 100 * faults.get(key, 0) / calls if calls else None for key in FAULTS},
        "queries_per_second": part(cell, "efficiency").get("queries_per_second"),
        "no_op": None if no_op is None else 100 * no_op,
        "kendall_tau": cell.record.get("kendall_tau"),
        "latency_median": times.get("median"),
        "latency_p90": times.get("p90"),
        "faults": sum(faults.values()) if faults else None,
        "fault_share": 100 * sum(faults.values()) / calls if calls else None,
    }
