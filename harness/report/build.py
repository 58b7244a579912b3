"""reports/: every table, figure and page of a set of cells, written in one go.

Owns the names of the files and the index. It must not know how a cell was run; what stands in a
table is decided in quality and tables, what a figure looks like in plots.

    README.md  quality.*  comparison.*  efficiency.*  results_long.csv  plots/*  leaderboard/
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness.published import Published
from harness.report import plots, quality, tables, writers
from harness.report.against import against
from harness.report.quality import USUAL, Layout
from harness.report.tables import MEASURE, Table
from harness.report.writers import write_file
from harness.types import CellResult, DataError, RegistryError

FORMATS = ("md", "csv", "tex", "html", "json", "all")
DRAWN = {"md", "tex", "html"}  # formats whose reader wants the figures too


def write(
    cells: Sequence[CellResult],
    out: Path,
    formats: Sequence[str] = ("all",),
    *,
    texts: Mapping[str, Any] | None = None,
    with_text: bool = False,
    published: Sequence[Published] = (),
    layout: Layout = USUAL,
    price: float | None = None,
) -> list[Path]:
    """Write the reports of these cells below `out`; the same cells give the same bytes.

    texts and with_text are handed to the page: see page.render. published figures have a table
    beside ours, and rows on the page. Files of an earlier report that this one would not write are
    left alone. price is that of a GPU-hour.
    """
    wanted, placed = _known(formats), arranged(cells)
    made = {
        "quality": quality.quality(placed, layout=layout),
        "comparison": quality.comparison(placed, layout=layout),
        "efficiency": tables.efficiency(placed, price=price),
    }
    if (beside := against(quality.sheet_of(placed, layout), published)).rows:
        made["published"] = beside
    whole = made | {"efficiency": tables.efficiency(placed, price=price, details=True)}
    printed = {
        f"{name}.{kind}": _printed(table, kind, name)
        for kind in sorted(wanted - {"html"})
        for name, table in (whole if kind in ("csv", "json") else made).items()
    }
    if "csv" in wanted:
        printed["results_long.csv"] = writers.to_long_csv(placed)
    paths = [write_file(out / name, text) for name, text in printed.items()]
    drawn = _plots(placed, out / "plots") if wanted & DRAWN else []
    paths += drawn
    if "md" in wanted:
        paths.append(write_file(out / "README.md", _index(made, drawn, paths, out)))
    if "html" in wanted:
        from harness.report import page

        paths += page.render(
            placed, out / "leaderboard", texts=texts, with_text=with_text, published=published
        )
    return paths


def _known(formats: Sequence[str]) -> set[str]:
    for name in formats:
        if name not in FORMATS:
            raise RegistryError(f"unknown format {name!r}", known=FORMATS, given=name)
    return set(FORMATS[:-1] if "all" in formats else formats)


def arranged(cells: Sequence[CellResult]) -> list[CellResult]:
    """By dataset as they come, then as in every table."""
    datasets = list(dict.fromkeys(cell.dataset for cell in cells))
    return sorted(tables.ordered(cells), key=lambda cell: datasets.index(cell.dataset))


def _printed(table: Table, kind: str, name: str) -> str:
    if kind == "tex":
        return writers.to_latex(table, f"tab:{name}")
    return writers.WRITERS[kind](table)


def _plots(cells: Sequence[CellResult], out: Path) -> list[Path]:
    paths = [path for x in plots.AXES for path in plots.quality_against(cells, x, out)]
    paths += [*plots.gain_heatmap(cells, out), *plots.budget_curves(cells, out)]
    firsts = tables.companions(cells, "first-stage")
    for best, first in _pairs(cells):
        with contextlib.suppress(DataError):  # other queries: the table's notes say so
            paths += plots.per_query_bars(best, first, out)
    for cell in cells:
        base = firsts.get((cell.dataset, tables.block_of(cell)))
        with contextlib.suppress(DataError):
            paths += plots.reasoning_length(cell, base, out) if base else []
    return paths


def _pairs(cells: Sequence[CellResult]) -> list[tuple[CellResult, CellResult]]:
    """The best model of every dataset and first stage, beside that first stage."""
    used = [c for c in tables.ranked(cells) if tables.is_complete(c) and MEASURE in c.measures]
    firsts = tables.companions(used, "first-stage")
    models = (cell for cell in used if not tables.is_sanity(cell))
    by_value = sorted(models, key=lambda cell: cell.measures[MEASURE])
    best = {(cell.dataset, tables.block_of(cell)): cell for cell in by_value}
    return [(best[place], firsts[place]) for place in firsts if place in best]


def _index(
    made: Mapping[str, Table], drawn: Sequence[Path], paths: Sequence[Path], out: Path
) -> str:
    """The tables and figures one below the other, for a reader on the web."""
    parts = ["# Results", "Generated from finished cells; edits are lost with the next report."]
    for table in made.values():
        parts += [f"## {table.title}", writers.to_markdown(replace(table, title="")).strip()]
    figures = [path for path in drawn if path.suffix == ".png"]
    parts += ["## Figures"] * bool(figures)
    parts += [f"![{path.stem.replace('_', ' ')}](plots/{path.name})" for path in figures]
    others = sorted(path.relative_to(out).as_posix() for path in paths if path.suffix != ".png")
    parts += ["## Files", "\n".join(f"- [{name}]({name})" for name in others)]
    return "\n\n".join(parts) + "\n"
