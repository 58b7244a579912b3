"""Budget curves: what a ranking is worth as calls and tokens are spent on it.

It draws what records hold under "budget"; what stopping a method means is harness.budget's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import cycle
from pathlib import Path
from textwrap import fill
from typing import Any

from harness.report import plots, tables
from harness.report.tables import MEASURE
from harness.report.writers import plain
from harness.types import CellResult

SPENT = {"calls": "calls per query", "tokens": "prompt and generated tokens per query"}


def budget_curves(cells: Iterable[CellResult], out: Path) -> list[Path]:
    """nDCG@10 x 100 against what was spent, a figure for dataset and first stage, a line a model.

    The left end of every line is the first stage, the right end the cell's own ranking.
    """
    places: dict[str, list[CellResult]] = defaultdict(list)
    for cell in tables.shown(cells):
        known = any(MEASURE in point for point in cell.record.get("budget") or ())
        if known and not tables.is_latency(cell):
            places[plots._place(cell)].append(cell)
    return [path for place, some in places.items() for path in _figure(some, out, place)]


def _figure(cells: Sequence[CellResult], out: Path, place: str) -> list[Path]:
    with plots._figure(7.2, 3.0) as figure:
        for axes, (key, name) in zip(figure.subplots(1, 2, sharey=True), SPENT.items()):
            _draw(axes, cells, key)
            axes.set_xlabel(name)
        figure.axes[0].set_ylabel(f"{MEASURE} x 100")
        title = f"{tables.short(cells[0])}: {tables.block_of(cells[0])}"
        figure.suptitle(fill(plain(title), 95), size=9)
        where = {"loc": "outside lower center", "ncols": 3, "frameon": False}
        figure.legend(handles=figure.axes[0].lines, **where)
        points = ((cell.model, point) for cell in cells for point in cell.record["budget"])
        columns = ("budget", *SPENT)
        rows = [(m, *(p[key] for key in columns), 100 * p[MEASURE]) for m, p in points]
        head = ("model", *columns, f"{MEASURE} x 100")
        return plots._save(figure, out / f"budget_{place}", [head, *rows])


def _draw(axes: Any, cells: Sequence[CellResult], key: str) -> None:
    ends = [cell.record["budget"][-1][key] for cell in cells]
    if max(ends) >= 10 * min(ends):
        axes.set_xscale("symlog", linthresh=min(ends), linscale=0.5)
    axes.xaxis.set_major_formatter("{x:,.6g}")
    for cell, colour, marker in zip(cells, cycle(plots.COLOURS), cycle(plots.MARKERS)):
        xs, ys = zip(*((p[key], 100 * p[MEASURE]) for p in cell.record["budget"]))
        look = {"color": colour, "marker": marker, "markevery": [-1], "lw": 1.3, **plots.POINT}
        axes.plot(xs, ys, drawstyle="steps-post", label=plain(cell.model), **look)
