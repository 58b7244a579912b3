"""The quality table and its statistics: models x datasets with marks, ranks and paired tests.

It decides what is compared with what, and says so in captions and notes. It must not know how a
cell was run, nor any format; the tests themselves are those of stats.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from operator import itemgetter
from string import ascii_lowercase
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le

from harness import stats
from harness.report import tables
from harness.report.tables import MEASURE, Column, Row, Table, Value, block_of, is_complete, value
from harness.specs import Registry
from harness.types import CellResult, DataError

ALPHA = 0.05
AVERAGE, RANK = "average ", "rank "  # before a suite's name, before a column's key


@dataclass(frozen=True, slots=True)
class Layout:
    """How quality is printed and tested.

    baseline     the row that daggers, and the table of comparisons, are against
    marks        dagger: differs from the baseline; letters: better than the rows so lettered
    correction   of the baseline's tests, over all comparisons of the table
    scale        a measure from 0 to 1 is multiplied by it, and then printed to `digits` places
    """

    baseline: str = "first-stage"
    marks: Literal["dagger", "letters"] = "dagger"
    correction: Literal["holm", "bonferroni"] = "holm"
    scale: Literal[1, 100] = 100
    digits: Annotated[int, Ge(0), Le(6)] = 1


USUAL = Layout()
Line = tuple[str, str]  # block, model
Key = tuple[str, str, str]  # block, model, column


@dataclass(frozen=True, slots=True)
class Frame:
    """The lines of a table and its columns with the datasets of each, cells or no cells."""

    lines: tuple[Line, ...]
    columns: Mapping[Column, tuple[str, ...]]


def columns_of(
    suites: Mapping[str, Mapping[str, str]], averages: Mapping[str, Sequence[str]]
) -> dict[Column, tuple[str, ...]]:
    """suites: name -> datasets with their heads; averages: name -> datasets to average."""
    columns: dict[Column, tuple[str, ...]] = {}
    for suite, heads in suites.items():
        group = suite if len(suites) > 1 else ""
        columns |= {Column(name, head, group): (name,) for name, head in heads.items()}
        if names := tuple(averages.get(suite, ())):
            columns[Column(AVERAGE + suite, f"avg. of {len(names)}", group)] = names
    return columns


def frame_of(cells: Sequence[CellResult]) -> Frame:
    """As the cells come; an average only where a suite that the registry declares is whole."""
    suites: dict[str, dict[str, str]] = defaultdict(dict)
    whole: dict[str, dict[str, None]] = defaultdict(dict)
    for cell in cells:
        dataset = cell.record["dataset"]
        suite = str(dataset.get("suite") or dataset.get("family") or "")
        suites[suite][cell.dataset] = tables.short(cell)
        if cell.record.get("limit") is None:
            whole[suite][cell.dataset] = None
    declared = {name: suite.get("datasets", ()) for name, suite in Registry().suites.items()}
    averages = {
        suite: tuple(found)
        for suite, found in whole.items()
        if len(found) > 1 and found.keys() >= set(declared.get(suite, ()))
    }
    lines = dict.fromkeys((block_of(cell), cell.model) for cell in cells)
    return Frame(tuple(lines), columns_of(suites, averages))


@dataclass(frozen=True)
class Sheet:
    """Cells in the places of a frame."""

    frame: Frame
    layout: Layout
    grid: Mapping[Key, CellResult]

    def at(self, line: Line, column: Column) -> list[CellResult]:
        """The cells behind a number: none as soon as one is missing or, of several, partial."""
        names = self.frame.columns[column]
        found = [self.grid.get((*line, name)) for name in names]
        known = [c for c in found if c and MEASURE in c.measures]
        whole = len(names) == 1 or all(map(is_complete, known))
        return known if whole and len(known) == len(names) else []

    def complete(self, line: Line, column: Column) -> list[CellResult]:
        found = self.at(line, column)
        return found if all(map(is_complete, found)) else []

    @cached_property
    def numbers(self) -> dict[Key, float]:
        """Unrounded, on the printed scale."""
        return {
            (*line, c.key): self.layout.scale * statistics.fmean(x.measures[MEASURE] for x in found)
            for line in self.frame.lines
            for c in self.frame.columns
            if (found := self.at(line, c))
        }

    def rivals(self, also: str = "") -> Iterator[tuple[Column, list[Line]]]:
        """The models of every column and block that compete; of the baselines only `also`."""
        apart = {c.model for c in self.grid.values() if tables.is_sanity(c)} - {also}
        for column in self.frame.columns:
            for _, block in groupby(self.frame.lines, itemgetter(0)):
                rivals = (line for line in block if line[1] not in apart)
                yield column, [line for line in rivals if self.complete(line, column)]

    def field(self, lines: Sequence[Line], column: Column) -> stats.Field:
        """Values as stats takes them; empty for one line, or where queries differ."""
        with contextlib.suppress(DataError):  # _mixed says so
            places = list(zip(*(self.complete(line, column) for line in lines)))
            return [stats.align(cells, MEASURE) for cells in places if len(lines) > 1]
        return []


def sheet_of(cells: Iterable[CellResult], layout: Layout, frame: Frame | None = None) -> Sheet:
    """What a report may show of these cells, in a frame or in one made of them."""
    used = tables.ranked(cells)
    grid = {(block_of(cell), cell.model, cell.dataset): cell for cell in used}
    return Sheet(frame or frame_of(used), layout, grid)


def quality(
    cells: Sequence[CellResult], *, layout: Layout = USUAL, frame: Frame | None = None
) -> Table:
    """nDCG@10, models x datasets; a block for each first stage and depth.

    frame  the rows and columns to print even where no cell is there
    """
    sheet = sheet_of(cells, layout, frame)
    used, tests, ranks = list(sheet.grid.values()), _tests(sheet), _ranks(sheet)
    columns = _with_ranks(sheet.frame.columns, ranks)
    rows = _rows(sheet, columns, tests, ranks)
    told = tables.told([*_warnings(used), *tables.left_out(cells, used)])
    notes = [*_signs(rows), *_mixed(used), *_power(sheet, tests), *told]
    caption = _caption(sheet, len(tests), bool(ranks)) if rows else "No finished cells."
    return Table("Ranking quality", columns, tuple(rows), tuple(notes), caption)


def _rows(
    sheet: Sheet, columns: Iterable[Column], tests: Tests, ranks: Mapping[Key, str]
) -> list[Row]:
    names = _names(sheet)
    notes = _letters(sheet, names) if names else _daggers(tests, sheet.layout)
    numbers, grid, marks = sheet.numbers, sheet.grid, _marks(sheet)

    def at(key: Key) -> Value:
        if key[2].startswith(RANK):
            return Value(None, ranks.get(key, ""))
        note = (_sign(grid[key]) if key in grid else "") + notes.get(key, "")
        printed = value(numbers.get(key), sheet.layout.digits, note=note)
        return replace(printed, mark=marks.get(key, ""))

    labels = {
        line: f"({names[line]}) {line[1]}" if names else line[1] for line in sheet.frame.lines
    }
    return [
        Row(label, line[0], tuple(at((*line, column.key)) for column in columns))
        for line, label in labels.items()
    ]


def _marks(sheet: Sheet) -> dict[Key, tables.Mark]:
    """Best and second of every block and column, before rounding; ties share the mark."""
    marks: dict[Key, tables.Mark] = {}
    for column, lines in sheet.rivals():
        race = {(*line, column.key): sheet.numbers[*line, column.key] for line in lines}
        places = tables.podium(race) if len(race) > 1 else {}
        marks |= {key: tables.MARKS[place] for key, place in places.items()}
    return marks


# --- tests ------------------------------------------------------------------------------------

Tests = Mapping[Key, list[stats.Pair]]  # per-query values and the baseline's, of each dataset


def _tests(sheet: Sheet) -> Tests:
    """Every complete number beside the baseline of its block and column: the family tested."""
    tests: dict[Key, list[stats.Pair]] = {}
    baseline = sheet.layout.baseline
    for column, lines in sheet.rivals():
        for line in lines:
            base = sheet.complete((line[0], baseline), column) if line[1] != baseline else []
            with contextlib.suppress(DataError):  # other queries: _mixed says so
                pairs = zip(sheet.at(line, column), base)
                if found := [stats.align(pair, MEASURE) for pair in pairs]:
                    tests[*line, column.key] = [*found]
    return tests


def _daggers(tests: Tests, layout: Layout) -> dict[Key, str]:
    p_values = stats.sign_flips(list(tests.values()))
    adjusted = stats.CORRECTIONS[layout.correction](p_values)
    return {key: tables.SIGNIFICANT for key, p in zip(tests, adjusted) if p < ALPHA}


def _names(sheet: Sheet) -> dict[Line, str]:
    """What a row is called in superscripts: a to z within its block, [27] and so on beyond."""
    if sheet.layout.marks != "letters":
        return {}
    names = [*ascii_lowercase, *(f"[{n}]" for n in range(27, len(sheet.frame.lines) + 1))]
    blocks = groupby(sheet.frame.lines, itemgetter(0))
    return dict(pair for _, block in blocks for pair in zip(block, names))


def _letters(sheet: Sheet, names: Mapping[Line, str]) -> dict[Key, str]:
    """The names of the rows that a number is better than, the baseline's included."""
    found, numbers = {}, sheet.numbers
    for column, lines in sheet.rivals(sheet.layout.baseline):
        field = sheet.field(lines, column)
        for line, p_values in zip(lines, stats.tukey(field) if field else ()):
            sure = [other for other, p in zip(lines, p_values) if p < ALPHA]
            ours = numbers[*line, column.key]
            worse = [names[o] for o in sure if numbers[*o, column.key] < ours]
            found[*line, column.key] = "".join(worse)
    return found


def _ranks(sheet: Sheet) -> dict[Key, str]:
    """Of every average, and of a dataset that stands alone, among the models of a block."""
    found, groups = {}, Counter(column.group for column in sheet.frame.columns)
    for column, lines in sheet.rivals():
        if groups[column.group] == 1 or column.key.startswith(AVERAGE):
            field = sheet.field(lines, column)
            for line, ranks in zip(lines, stats.rank_groups(field, ALPHA) if field else ()):
                found[*line, RANK + column.key] = ranks
    return found


def _with_ranks(columns: Iterable[Column], ranks: Iterable[Key]) -> tuple[Column, ...]:
    """A rank column after the one it is about, where at least two models could be ranked."""
    used = {key[2] for key in ranks}
    both = ((c, Column(RANK + c.key, "rank", c.group)) for c in columns)
    return tuple(c for pair in both for c in pair if c is pair[0] or c.key in used)


# --- comparison -------------------------------------------------------------------------------

COMPARED = {
    "difference": "diff.", "low": "95% low", "high": "high", "t_p": "p (t)",
    "fisher_p": "p (rand.)", "adjusted": "p (adj.)", "d_z": "d_z", "counts": "win/tie/loss",
    "share": "% of gain",
}  # fmt: skip
COMPARED_NOTES = (
    "diff.: mean over queries, for averages over datasets' means; 95%: its BCa bootstrap interval.",
    "p (t): paired Student t. p (rand.): paired sign-flip randomisation. d_z: Hedges-corrected.",
    "% of gain: of the gain over the first stage that a perfect reranking reaches.",
)


def comparison(cells: Sequence[CellResult], *, layout: Layout = USUAL) -> Table:
    """Every model against the baseline, paired by query: one block for dataset and first stage."""
    sheet = sheet_of(cells, layout)
    tests = _tests(sheet)
    found = dict(zip(tests, stats.paired(list(tests.values()))))
    adjusted = stats.CORRECTIONS[layout.correction]([pair.fisher_p for pair in found.values()])
    rows = [
        Row(key[1], f"{key[2]}, {key[0]}", tuple(_compared(sheet, key, pair, p)))
        for (key, pair), p in zip(found.items(), adjusted)
    ]
    columns = tuple(Column(key, head) for key, head in COMPARED.items())
    caption = (
        f"Change in {_unit(layout)} against {layout.baseline}, paired by query. p (adj.): of the"
        f" randomisation test, {layout.correction.title()} over the {len(rows)} comparisons."
    )
    return Table("Comparison", columns, tuple(rows), COMPARED_NOTES, caption)


def _compared(sheet: Sheet, key: Key, pair: stats.Paired, adjusted: float) -> Iterator[Value]:
    layout, numbers = sheet.layout, sheet.numbers
    for number in (pair.difference, pair.low, pair.high):
        yield value(layout.scale * number, layout.digits, signed=True)
    for p in (pair.t_p, pair.fisher_p, adjusted):
        yield Value(p, "<0.0001") if p < 0.00005 else value(p, 4)
    yield value(pair.d_z, 2)
    yield Value(None, f"{pair.wins}/{pair.ties}/{pair.losses}")
    first, most = (numbers.get((key[0], n, key[2]), math.nan) for n in ("first-stage", "oracle"))
    yield value(100 * (numbers[key] - first) / (most - first) if most > first else None, 1)


# --- captions and notes -----------------------------------------------------------------------


def _unit(layout: Layout) -> str:
    return MEASURE if layout.scale == 1 else f"{MEASURE} x {layout.scale}"


def _caption(sheet: Sheet, tests: int, ranked: bool) -> str:
    layout, used = sheet.layout, sheet.grid.values()
    depths = sorted({int(block.rpartition(" ")[2]) for block, _ in sheet.frame.lines})
    sizes = dict.fromkeys((cell.record.get("queries"), tables.short(cell)) for cell in used)
    text = (
        f"{_unit(layout)} after reranking the top {', '.join(map(str, depths))} of each first"
        f" stage. Queries: {', '.join(f'{n} ({name})' for n, name in sizes if n) or 'none'}."
        " Best in bold, second best underlined, by block and column."
    )
    dagger = (
        f" {tables.SIGNIFICANT}: differs from {layout.baseline} (two-sided paired randomisation"
        f" test over queries, alpha {ALPHA}, {layout.correction.title()} over the {tests}"
        " comparisons of this table)."
    )
    letters = (
        " Letters: better than the rows so named (randomised Tukey HSD over the pairs of a block"
        f" and column, alpha {ALPHA})."
    )
    rank = f" rank: places that cannot be told apart (randomised Tukey HSD, alpha {ALPHA})."
    return text + (letters if layout.marks == "letters" else dagger * bool(tests)) + rank * ranked


def _sign(cell: CellResult) -> str:
    partial = not is_complete(cell) or cell.record.get("limit") is not None
    in_domain = bool(cell.record["dataset"].get("in_domain"))
    signs = tables.PARTIAL * partial + tables.IN_DOMAIN * in_domain
    return signs + tables.FAKE * tables.is_fake(cell)


def _signs(rows: Iterable[Row]) -> list[str]:
    used = {sign for row in rows for v in row.cells for sign in v.note + v.text}
    return [f"{sign} {text}" for sign, text in tables.SIGNS.items() if sign in used]


def _warnings(cells: Sequence[CellResult]) -> Iterator[tuple[str, str]]:
    """What a reader has to know of cells that are shown: the text, and the model it is about."""
    for cell in cells:
        where = f"{tables.short(cell)} ({block_of(cell)})"
        if cell.record["state"] == "failed":
            error = cell.record.get("error", "no reason recorded")
            yield f"Failed on {where}, {error}", cell.model
        for name, count in sorted(tables.part(cell, "inputs").items()):
            yield f"{name.replace('_', ' ').capitalize()}: {count} on {where}", cell.model
        if tables.is_floating(cell):
            yield "Revision not pinned (main)", cell.model


def _mixed(cells: Sequence[CellResult]) -> list[str]:
    """Rows that must not be compared although their names agree."""
    kinds: dict[str, set[Any]] = defaultdict(set)
    for cell in filter(is_complete, cells):
        candidates = cell.record["first_stage"].get("sha256"), cell.record.get("queries")
        kinds[f"{tables.short(cell)} ({block_of(cell)})"].add(candidates)
    mixed = [where for where, found in kinds.items() if len(found) > 1]
    return [f"Not comparable: {where} has cells over different candidates." for where in mixed]


def _power(sheet: Sheet, tests: Tests) -> Iterator[str]:
    """What the tests could have seen: the median of a column's minimal differences."""
    import numpy as np

    least: dict[str, list[float]] = defaultdict(list)
    for (_, _, column), pairs in tests.items():
        a, b = pairs[0]
        if len(pairs) == 1 and len(a) > 1:
            spread = sheet.layout.scale * float(np.std(np.subtract(a, b), ddof=1))
            least[column].append(stats.minimal_detectable(spread, len(a)))
    known = [
        (c.head, statistics.median(least[c.key])) for c in sheet.frame.columns if c.key in least
    ]
    text = ", ".join(f"{tables.rounded(n, sheet.layout.digits)} ({head})" for head, n in known)
    if text:
        yield f"Least difference that one test finds with power 0.8: {text}."
