"""reports/: every table, figure and page of a set of cells, written in one go.

Owns the names of the files and the index. It must not know how a cell was run; what stands in a
table is decided in tables, what a figure looks like in plots.

    README.md  quality.*  efficiency.*  results_long.csv  plots/*  index.html  data/*
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from harness.report import plots, tables
from harness.report.plots import write_file
from harness.report.tables import Table
from harness.types import CellResult, DataError, RegistryError

FORMATS = ("md", "csv", "tex", "html", "json", "all")
DRAWN = {"md", "tex", "html"}  # formats whose reader wants the figures too
CAPTIONS = {
    "quality_against_generated_tokens": "Quality against generated tokens",
    "quality_against_seconds": "Quality against engine time",
    "quality_against_calls": "Quality against calls",
    "gain_over_first_stage": "Gain over the first stage",
}


def write(
    cells: Sequence[CellResult],
    out: Path,
    formats: Sequence[str] = ("all",),
    *,
    texts: Mapping[str, Any] | None = None,
    with_text: bool = False,
    _fakes: bool = False,
) -> list[Path]:
    """Write the reports of these cells below `out`; the same cells give the same bytes.

    texts and with_text are handed to the page: see page.render. Files of an earlier report that
    this one would not write are left alone.
    """
    wanted = _known(formats)
    placed = arranged(cells)
    made = {
        "quality": tables.quality(placed, baseline="first-stage", _fakes=_fakes),
        "efficiency": tables.efficiency(placed, _fakes=_fakes),
    }
    paths = [
        write_file(out / f"{name}.{kind}", _printed(table, kind, name))
        for kind in sorted(wanted - {"html"})
        for name, table in made.items()
    ]
    if "csv" in wanted:
        long = tables.to_long_csv(placed, _fakes=_fakes)
        paths.append(write_file(out / "results_long.csv", long))
    drawn = _plots(placed, out / "plots", _fakes) if wanted & DRAWN else []
    paths += drawn
    if "md" in wanted:
        paths.append(write_file(out / "README.md", _index(made, drawn, paths, out)))
    if "html" in wanted:
        from harness.report import page

        paths += page.render(placed, out, texts=texts, with_text=with_text, allow_fake=_fakes)
    return paths


def _known(formats: Sequence[str]) -> set[str]:
    for name in formats:
        if name not in FORMATS:
            raise RegistryError(f"unknown format {name!r}", known=FORMATS, given=name)
    return set(FORMATS[:-1] if "all" in formats else formats)


def arranged(cells: Sequence[CellResult]) -> list[CellResult]:
    """By dataset and first stage as they come, the baselines around the models."""
    datasets = list(dict.fromkeys(cell.dataset for cell in cells))
    blocks = list(dict.fromkeys(tables.block_of(cell) for cell in cells))

    def place(cell: CellResult) -> tuple[int, int]:
        return datasets.index(cell.dataset), blocks.index(tables.block_of(cell))

    return sorted(tables.ordered(cells), key=place)


def _printed(table: Table, kind: str, name: str) -> str:
    return tables.to_latex(table, f"tab:{name}") if kind == "tex" else tables.WRITERS[kind](table)


def _plots(cells: Sequence[CellResult], out: Path, fakes: bool) -> list[Path]:
    paths = [
        path
        for x in get_args(plots.Cost)
        for path in plots.quality_against(cells, x, out, _fakes=fakes)
    ]
    paths += plots.gain_heatmap(cells, out, _fakes=fakes)
    for best, first in _pairs(cells, fakes):
        with contextlib.suppress(DataError):  # other queries: the table's notes say so
            paths += plots.per_query_bars(best, first, out, _fakes=fakes)
    return paths


def _pairs(cells: Sequence[CellResult], fakes: bool) -> list[tuple[CellResult, CellResult]]:
    """The best model of every dataset and first stage, beside that first stage."""
    used = [cell for cell in tables.shown(cells, fakes) if cell.record["state"] == "complete"]
    firsts = tables.companions(used, "first-stage")
    best: dict[tuple[str, str], CellResult] = {}
    for cell in used:
        place = (cell.dataset, tables.block_of(cell))
        value = tables.score(cell)
        if tables.is_sanity(cell) or tables.is_latency(cell) or value is None:
            continue
        if place in firsts and (place not in best or value > (tables.score(best[place]) or 0)):
            best[place] = cell
    return [(cell, firsts[place]) for place, cell in best.items()]


def _index(
    made: Mapping[str, Table], drawn: Sequence[Path], paths: Sequence[Path], out: Path
) -> str:
    """The tables and figures one below the other, for a reader on the web."""
    parts = ["# Results", "Generated from finished cells; edits are lost with the next report."]
    for table in made.values():
        parts += [f"## {table.title}", tables.to_markdown(replace(table, title="")).strip()]
    figures = [path for path in drawn if path.suffix == ".png"]
    parts += ["## Figures"] * bool(figures)
    parts += [f"![{_caption(path.stem)}](plots/{path.name})" for path in figures]
    others = sorted(path.relative_to(out).as_posix() for path in paths if path.suffix != ".png")
    parts += ["## Files", "\n".join(f"- [{name}]({name})" for name in others)]
    return "\n\n".join(parts) + "\n"


def _caption(stem: str) -> str:
    return CAPTIONS.get(stem, "Per query: " + stem.removeprefix("per_query_").replace("_", " "))
