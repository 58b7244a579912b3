"""Published figures beside what was measured here: within the noise or not, and what differed.

It must not know how a figure came into the registry, nor how a cell was run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence

from harness.published import Published
from harness.report import tables
from harness.report.quality import AVERAGE, Line, Sheet
from harness.report.tables import MEASURE, Column, Row, Table, Value, part, value
from harness.stats import macro_interval
from harness.types import CellResult

HEADS = ("ours", "95% low", "high", "published", "diff.", "within noise")


def against(
    sheet: Sheet,
    published: Sequence[Published],
    *,
    sources: Sequence[str] = (),
    missing: bool = False,
) -> Table:
    """Published figures of the sheet's rows and columns, each beside our number.

    sources  what the names of the sources to take begin with; without any, all of them
    missing  also show the figures that there is no number of ours for
    """
    cited = [p for p in published if p.measure == MEASURE and _from(p, sources)]
    found = [
        (line, column, figure)
        for column in sheet.frame.columns
        for line in sheet.frame.lines
        if missing or sheet.complete(line, column)
        for figure in _figures(line, column, cited)
    ]
    named = dict.fromkeys(figure.source for *_, figure in found)
    signs = {source: f"[{n}]" for n, source in enumerate(named, 1)}
    rows = [_beside(sheet, *place, signs[place[2].source]) for place in found]
    causes = tables.told(pair for place in found for pair in _causes(sheet, *place, cited))
    told = (*(f"{signs[source]} {source}." for source in named), *causes)
    caption = (
        f"{MEASURE} x {sheet.layout.scale} here and in print. Within noise: our 95 % interval over"
        " queries, widened by the figure's rounding, holds the figure."
    )
    columns = tuple(Column(head, head) for head in HEADS)
    return Table("Against published figures", columns, tuple(rows), told, caption)


def _figures(line: Line, column: Column, cited: Sequence[Published]) -> list[Published]:
    """Those over the same candidates; of a reranker over others, where there are none."""
    block, model = line[0], line[1].partition("@")[0]  # a variant stands for its model
    key, stage = column.key.removeprefix(AVERAGE), block.rpartition(", ")[0]
    found = [p for p in cited if (p.model, p.dataset) == (model, key)]
    if model == "first-stage":
        return [p for p in found if p.first_stage.partition("+depth=")[0] == stage]
    return [p for p in found if block_of_figure(p) == block] or found


def _from(figure: Published, sources: Sequence[str]) -> bool:
    """Table 1 is not Table 10."""
    known = "|".join(map(re.escape, sources))
    return bool(re.match(rf"({known})(?!\d)", figure.source)) or not sources


def _beside(sheet: Sheet, line: Line, column: Column, figure: Published, sign: str) -> Row:
    layout, cells = sheet.layout, sheet.complete(line, column)
    theirs, half = (layout.scale / 100 * n for n in (figure.value, rounding(figure)))
    ours = sheet.numbers[*line, column.key] if cells else math.nan
    interval = macro_interval(cells, MEASURE)
    low, high = layout.scale * interval.low, layout.scale * interval.high
    within = "yes" if low - half <= theirs <= high + half else "no"
    values = (
        *(value(number, layout.digits) for number in (ours, low, high)),
        value(theirs, layout.digits, note=sign),
        value(ours - theirs, layout.digits, signed=True),
        Value(None, within if cells else "no number"),
    )
    return Row(line[1], f"{column.key}, {line[0]}", values)


def rounding(figure: Published) -> float:
    """Half a unit of the last digit that was printed."""
    return 0.5 * 10.0 ** -len(f"{figure.value:g}".partition(".")[2])


def block_of_figure(figure: Published) -> str:
    """The block of a table that a figure would stand in."""
    name, _, depth = figure.first_stage.partition("+depth=")
    return f"{name or 'unnamed candidates'}, top {depth or 100}"


def _causes(
    sheet: Sheet, line: Line, column: Column, figure: Published, cited: Sequence[Published]
) -> Iterator[tuple[str, str]]:
    """What is known to differ from how a figure was made, and the row it is about."""
    if figure.model != "first-stage" and (block := block_of_figure(figure)) != line[0]:
        yield f"In print over other candidates ({block})", f"{line[1]} on {column.head}"
    if figure.confidence == "low":
        yield "In print at second hand only, or from memory", line[1]
    place, ours = ("first-stage", figure.source, figure.dataset, figure.first_stage), sheet.numbers
    for p in cited:
        first = ours.get((line[0], "first-stage", column.key), math.nan) / sheet.layout.scale * 100
        same = (p.model, p.source, p.dataset, p.first_stage) == place
        if same and abs(first - p.value) > max(0.1, 2 * rounding(p)):
            there = f"{tables.rounded(first, 2)} here, {p.value:g} there"
            yield f"The first stage itself is another ({there})", column.head
    for cell in sheet.complete(line, column):
        yield from ((text, line[1]) for text in _own_causes(cell))


def _own_causes(cell: CellResult) -> Iterator[str]:
    """What a cell's record says of it that a paper's run need not have had."""
    engine, model = part(cell, "environment", "engine").get("engine"), cell.record["model"]
    if engine and engine != "vllm":
        yield f"Engine {engine}, not vLLM"
    if tables.is_floating(cell):
        yield "Weights not pinned (main)"
    if model.get("overrides"):
        yield f"Changed ({', '.join(f'{k}={v}' for k, v in model['overrides'].items())})"
    if model.get("note"):
        yield f"Of the model: {model['note']}"
    if (share := tables.numbers_of(cell)["fault_share"] or 0) > 1:
        yield f"Faults in {tables.rounded(share, 1)} % of the answers"
