"""Figures of finished cells: SVG, PDF and PNG with their data as CSV beside them, byte-stable.

It decides how numbers look, never what they are: those come from tables and stats. It must not
know how a cell was run, and it loads matplotlib only when something is drawn.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from textwrap import fill
from typing import Any

from harness.report import tables
from harness.report.tables import MEASURE, block_of, is_sanity, rounded, short
from harness.report.writers import csv_text, plain, write_file
from harness.stats import Paired, align, bootstrap_interval, paired
from harness.types import CellResult

AXES = {
    "generated_tokens": "generated tokens per query",
    "seconds": "engine seconds per query",
    "calls": "calls per query",
}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")  # Okabe-Ito
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
GREY = "#777777"
STYLE = {
    "font.family": "DejaVu Sans", "font.size": 8, "axes.titlesize": 9, "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6,
    "xtick.major.width": 0.6, "ytick.major.width": 0.6, "text.parse_math": False,
    "svg.hashsalt": "harness", "svg.fonttype": "none", "pdf.fonttype": 42,
}  # fmt: skip
FILES: dict[str, dict[str, None]] = {  # the metadata that would change with the clock
    "svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {"Software": None},
}  # fmt: skip


@contextmanager
def _figure(width: float, height: float) -> Iterator[Any]:
    """A figure in inches that no global state of matplotlib can reach."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a name in another script is still right in SVG
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure


def _save(figure: Any, stem: Path, rows: Iterable[Sequence[Any]]) -> list[Path]:
    """Must be called inside `_figure`: the SVG's ids and fonts come from its style."""
    paths = []
    for kind, metadata in FILES.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, metadata=metadata, dpi=200)
        paths.append(write_file(stem.with_name(f"{stem.name}.{kind}"), buffer.getvalue()))
    return [*paths, write_file(stem.with_name(f"{stem.name}.csv"), csv_text(rows))]


# --- quality against cost ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Point:
    """One cell: x in the cost's unit, y with its 95 % interval [low, high], times 100."""

    model: str
    x: float
    y: float
    low: float
    high: float
    colour: str
    marker: str


@dataclass(frozen=True, slots=True)
class _Panel:
    title: str
    points: tuple[_Point, ...]
    references: dict[str, float]

    @property
    def front(self) -> list[_Point]:
        """The points that no other beats in cost and quality, cheapest first."""
        front: list[_Point] = []
        for point in sorted(self.points, key=lambda p: (p.x, -p.y)):
            if not front or point.y > front[-1].y:
                front.append(point)
        return front


def quality_against(cells: Sequence[CellResult], x: str, out: Path) -> list[Path]:
    """nDCG@10 against a cost, one panel for dataset and first stage, into the folder `out`.

    The line is the Pareto front, bars are 95 % bootstrap intervals of the mean over queries. A
    panel in which every model costs 0 is left out.
    """
    panels = _panels(cells, x)
    if not panels:
        return []
    wide = min(3, len(panels))
    tall = -(-len(panels) // wide)
    with _figure(0.4 + (4.6 if wide == 1 else 3.6) * wide, 3.1 * tall) as figure:
        grid = figure.subplots(tall, wide, squeeze=False).flat
        for place, axes in enumerate(grid):
            if place < len(panels):
                _draw(axes, panels[place], AXES[x])
                axes.set_ylabel("" if place % wide else f"{MEASURE} x 100")
            axes.set_visible(place < len(panels))
        figure.canvas.draw()  # fixes the layout, which the labels need
        figure.set_layout_engine("none")
        for axes, panel in zip(figure.axes, panels):
            _label(axes, panel)
        return _save(figure, out / f"quality_against_{x}", _points_csv(panels, x))


def _points_csv(panels: Sequence[_Panel], x: str) -> Iterator[Sequence[Any]]:
    yield ("panel", "model", f"{x}_per_query", f"{MEASURE} x 100", "low", "high", "on_front")
    for panel in panels:
        for p in panel.points:
            yield (panel.title, p.model, p.x, p.y, p.low, p.high, int(p in panel.front))
        for name, y in panel.references.items():
            yield (panel.title, name, None, y, None, None, None)


def _panels(cells: Sequence[CellResult], x: str) -> list[_Panel]:
    """One for dataset and first stage; a model looks the same in all of them."""
    used = [cell for cell in tables.shown(cells) if tables.is_complete(cell)]
    used = [cell for cell in used if MEASURE in cell.measures and not tables.is_latency(cell)]
    models = list(dict.fromkeys(cell.model for cell in used if not is_sanity(cell)))
    groups: dict[str, list[CellResult]] = defaultdict(list)
    for cell in used:
        groups[f"{short(cell)}: {block_of(cell)}"].append(cell)
    panels = []
    for title, group in groups.items():
        points = tuple(_points(group, x, models))
        references = {c.model: 100 * c.measures[MEASURE] for c in group if is_sanity(c)}
        panels += [_Panel(title, points, references)] * any(p.x for p in points)
    return panels


def _points(cells: Sequence[CellResult], x: str, models: Sequence[str]) -> Iterator[_Point]:
    for cell in cells:
        place = tables.cost(cell, x)
        if not is_sanity(cell) and place is not None:
            values = [row[MEASURE] for row in cell.per_query if row.get(MEASURE) is not None]
            interval, look = bootstrap_interval(values), models.index(cell.model)
            y, low, high = (100 * n for n in (cell.measures[MEASURE], interval.low, interval.high))
            colour, marker = COLOURS[look % len(COLOURS)], MARKERS[look % len(MARKERS)]
            yield _Point(cell.model, place, y, low, high, colour, marker)


def _draw(axes: Any, panel: _Panel, name: str) -> None:
    axes.set(title=fill(plain(panel.title), 45), xlabel=name)
    _scale(axes, panel)
    front = panel.front
    xs, ys = [p.x for p in front], [p.y for p in front]
    end = axes.get_xlim()[1]
    axes.step([*xs, end], [*ys, ys[-1]], where="post", color="#BBBBBB", lw=1.2, zorder=1)
    for p in panel.points:
        axes.vlines(p.x, p.low, p.high, color=p.colour, lw=0.9, alpha=0.7, zorder=2)
        look = {"color": p.colour, "ms": 5.5, "mec": "white", "mew": 0.5}
        axes.plot(p.x, p.y, p.marker, zorder=3, **look)
    for model, y in panel.references.items():
        _reference(axes, model, y)


def _scale(axes: Any, panel: _Panel) -> None:
    """Limits from the points and the first stage; a logarithmic x from one decade on."""
    xs = [p.x for p in panel.points]
    ys = [v for p in panel.points for v in (p.low, p.y, p.high) if v == v]  # nan: one query
    ys += [y for name, y in panel.references.items() if name == "first-stage"]
    pad = 0.12 * (max(ys) - min(ys)) or 1
    axes.set_ylim(min(ys) - pad, max(ys) + pad)
    if min(xs) > 0 and max(xs) >= 10 * min(xs):
        axes.set_xscale("log")
        decades = max(xs) / min(xs)
        axes.set_xlim(min(xs) / decades**0.08, max(xs) * decades**0.22)
        axes.xaxis.set_minor_formatter("")
    else:
        pad = 0.12 * (max(xs) - min(xs)) or max(0.1 * max(xs), 0.5)
        axes.set_xlim(min(xs) - pad, max(xs) + 3 * pad)  # the baselines are named at the right
    axes.xaxis.set_major_formatter(lambda v, _: f"{v:,.6g}" if v >= 0 else "")


def _reference(axes: Any, name: str, y: float) -> None:
    """A dashed line, or an arrow at the edge when the baseline lies outside the panel."""
    low, high = axes.get_ylim()
    text, height, side = f"{plain(name)} {rounded(y, 1)}", y, "bottom"
    if low <= y <= high:
        axes.axhline(y, color=GREY, lw=0.8, ls=(0, (4, 3)), zorder=0)
    else:
        text += " ↑" if y > high else " ↓"
        height, side = (high, "top") if y > high else (low, "bottom")
    where = {"transform": axes.get_yaxis_transform(), "ha": "right", "va": side}
    axes.text(0.995, height, text, color="#555555", size=7, **where)


def _label(axes: Any, panel: _Panel) -> None:
    """Name every point near it, where no other name or point stands and few lines pass."""
    from matplotlib.colors import to_rgb

    frame, (solid, thin) = axes.get_window_extent(), _obstacles(axes, panel)

    def price(place: tuple[int, Any]) -> float:
        number, box = place
        outside = not (frame.contains(*box.p0) and frame.contains(*box.p1))
        crossed = 4 * box.count_overlaps(solid) + box.count_overlaps(thin)
        return float(crossed + 20 * outside + number / 40)

    for p in sorted(panel.points, key=lambda p: -p.y):
        dark = [0.65 * part for part in to_rgb(p.colour)]
        text = axes.text(0, 0, plain(p.model), size=7, color=dark, zorder=4)
        size, (x, y) = text.get_window_extent(), axes.transData.transform((p.x, p.y))
        boxes = [size.translated(x + u - size.x0, y + v - size.y0) for u, v in _offsets(size)]
        _, box = min(enumerate(boxes), key=price)
        solid.append(box)
        near = min(max(x, box.x0), box.x1), min(max(y, box.y0), box.y1)
        corner, *line = axes.transData.inverted().transform([box.p0, (x, y), near])
        text.set_position(corner)
        if math.dist(near, (x, y)) > 14:
            axes.plot(*zip(*line), color="#999999", lw=0.5, zorder=1)


def _obstacles(axes: Any, panel: _Panel) -> tuple[list[Any], list[Any]]:
    """In pixels: points and names that stand already; bars, levels and the front's steps."""
    from matplotlib.transforms import Bbox

    left, right = axes.get_xlim()
    lines = [((left, y), (right, y)) for y in panel.references.values()]
    lines += [((p.x, p.low), (p.x, p.high)) for p in panel.points if p.low == p.low]
    lines += [((p.x, p.y), (follow.x, p.y)) for p, follow in pairwise(panel.front)]
    thin = [Bbox(axes.transData.transform(line)).padded(1) for line in lines]
    points = [axes.transData.transform((p.x, p.y)) for p in panel.points]
    solid = [Bbox([point, point]).padded(5) for point in points]
    return solid + [text.get_window_extent() for text in axes.texts], thin


def _offsets(size: Any) -> Iterator[tuple[float, float]]:
    """In pixels, of a name's lower left corner from its point, nearest first."""
    width, height = size.width, size.height
    for far in range(7, 90, 6):
        for up in (-height / 2, 2, -height - 2, far, -far - height):
            yield from ((far, up), (-far - width, up))
        yield from ((-width / 2, far), (-width / 2, -far - height))


# --- gains ------------------------------------------------------------------------------------


def gain_heatmap(cells: Sequence[CellResult], out: Path) -> list[Path]:
    """Gain over the first stage in nDCG@10 x 100, models x datasets, into the folder `out`."""
    used = [cell for cell in tables.shown(cells) if not tables.is_latency(cell)]
    first = tables.companions(used, "first-stage")
    gains = {
        (block_of(cell), cell.model, cell.dataset): 100 * found
        for cell in used
        if not is_sanity(cell) and (found := tables.gain(cell, first)) is not None
    }
    if not gains:
        return []
    heads = {cell.dataset: plain(short(cell)) for cell in used}
    columns = [name for name in heads if any(name == dataset for _, _, dataset in gains)]
    rows = list(dict.fromkeys(key[:2] for key in gains))
    values = [[gains.get((*row, column)) for column in columns] for row in rows]
    names = [plain(f"{model} ({block})") for block, model in rows]
    width = 0.068 * max(map(len, names)) + max(2.6, 0.62 * len(columns)) + 0.8
    height = 0.045 * max(len(heads[column]) for column in columns) + 0.27 * len(rows)
    with _figure(width, 0.9 + height) as figure:
        _heat(figure, values, names, [heads[column] for column in columns])
        lines: list[Sequence[Any]] = [("first_stage", "model", *columns)]
        lines += [(*row, *line) for row, line in zip(rows, values)]
        return _save(figure, out / "gain_over_first_stage", lines)


def _heat(figure: Any, values: Any, names: Sequence[str], heads: Sequence[str]) -> None:
    """Coloured cells with their numbers printed, white where there is no gain."""
    import numpy as np

    data = np.array(values, dtype=float)
    limit = max(1.0, float(np.nanmax(np.abs(data))))
    axes = figure.subplots()
    image = axes.imshow(data, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
    axes.set_yticks(range(len(names)), names)
    axes.set_xticks(range(len(heads)), heads, rotation=35, ha="left", rotation_mode="anchor")
    axes.tick_params(top=True, bottom=False, labeltop=True, labelbottom=False, length=0)
    axes.spines[:].set_visible(False)
    for (i, j), number in np.ndenumerate(data):
        known = number == number
        colour = "white" if known and abs(number) > 0.6 * limit else "#222222"
        text = rounded(float(number), 1, signed=True).replace("-", "−") if known else "—"
        axes.text(j, i, text, ha="center", va="center", color=colour, size=7)
    axes.set_xlabel(f"gain over the first stage,\n{MEASURE} x 100")
    figure.colorbar(image, ax=axes, pad=0.02)


def per_query_bars(a: CellResult, b: CellResult, out: Path) -> list[Path]:
    """Sorted per-query differences a - b in nDCG@10, into the folder `out`."""
    if len(tables.shown((a, b))) < 2:
        return []
    left, right = align(a, b, MEASURE)
    qids = [str(row["qid"]) for row in a.per_query if row.get(MEASURE) is not None]
    bars = sorted(((x - y, qid, x, y) for qid, x, y in zip(qids, left, right)), reverse=True)
    with _figure(5.2, 2.8) as figure:
        axes = figure.subplots()
        _bars(axes, [difference for difference, *_ in bars], paired(left, right))
        title = f"{a.model} minus {b.model}, {short(a)} ({block_of(a)})"
        axes.set_title(fill(plain(title), 75))
        name = re.sub(r"[^\w.+=@-]+", "_", f"{a.dataset}_{a.model}_minus_{b.model}")
        table = [("qid", a.model, b.model, "difference"), *((q, x, y, d) for d, q, x, y in bars)]
        return _save(figure, out / f"per_query_{name}", table)


def _bars(axes: Any, differences: Sequence[float], result: Paired) -> None:
    """The bars, their mean and its interval, and the counts in words."""
    colours = [COLOURS[0] if d > 0 else COLOURS[1] for d in differences]
    axes.bar(range(len(differences)), differences, width=0.85, color=colours)
    axes.axhline(0, color="#222222", lw=0.6)
    axes.axhline(result.difference, color=GREY, lw=0.9, ls=(0, (4, 3)))
    axes.axhspan(result.low, result.high, color=GREY, alpha=0.2, lw=0, zorder=0)
    axes.set(xlabel="queries, sorted", ylabel=f"difference in {MEASURE}", xticks=[])
    axes.set_xlim(-1, len(differences))
    mean, low, high = (
        rounded(n, 3, signed=True) for n in (result.difference, result.low, result.high)
    )
    counts = f"{result.wins} better, {result.ties} equal, {result.losses} worse"
    where = {"transform": axes.transAxes, "ha": "right", "va": "top"}
    axes.text(0.99, 0.97, f"{counts}\nmean {mean} [{low}, {high}]", **where)
