"""Figures of finished cells: SVG, PDF and PNG with their data as CSV beside them, byte-stable.

It decides how numbers look, never what they are: those come from tables and stats. It must not
know how a cell was run, and it loads matplotlib only when something is drawn.
"""

from __future__ import annotations

import io
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from textwrap import fill
from typing import Any

from harness import store
from harness.report import tables
from harness.report.tables import MEASURE, block_of, is_sanity, rounded, short
from harness.report.writers import csv_text, plain, write_file
from harness.stats import Paired, align, bootstrap_interval, by_query, paired
from harness.types import CellResult

AXES = {
    "generated_tokens": "generated tokens per query",
    "seconds": "engine seconds per query",
    "calls": "calls per query",
    "flops": "floating-point operations per query",
}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")  # Okabe-Ito
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
GREY = "#777777"
POINT: dict[str, Any] = {"ms": 5.5, "mec": "white", "mew": 0.5}
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


def _file(name: str) -> str:
    """A name as a part of a file's name."""
    return re.sub(r"[^\w.+=@-]+", "_", name)


def _place(cell: CellResult) -> str:
    return _file(f"{cell.dataset}_{cell.first_stage}")


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
    looks = {p.model: (p.colour, p.marker) for panel in panels for p in panel.points}
    wide = min(3, len(panels))
    tall, width = -(-len(panels) // wide), 0.4 + (4.6 if wide == 1 else 3.6) * wide
    columns = int(width / (0.4 + 0.075 * max(map(len, looks)))) or 1
    with _figure(width, 2.9 * tall + 0.18 * -(-len(looks) // columns)) as figure:
        grid = figure.subplots(tall, wide, squeeze=False).flat
        for place, axes in enumerate(grid):
            if place < len(panels):
                _draw(axes, panels[place], AXES[x])
                axes.set_ylabel("" if place % wide else f"{MEASURE} x 100")
            axes.set_visible(place < len(panels))
        _legend(figure, looks, columns)
        return _save(figure, out / f"quality_against_{x}", _points_csv(panels, x))


def _legend(figure: Any, looks: Mapping[str, tuple[str, str]], columns: int) -> None:
    """One for all panels, in which a model looks the same."""
    from matplotlib.lines import Line2D

    marks = [Line2D([], [], color=c, marker=m, **POINT, ls="") for c, m in looks.values()]
    where = {"loc": "outside lower center", "ncols": columns, "frameon": False}
    figure.legend(marks, list(map(plain, looks)), handletextpad=0.1, **where)


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
        axes.plot(p.x, p.y, p.marker, color=p.colour, zorder=3, **POINT)
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
    axes.xaxis.set_major_formatter(lambda v, _: f"{v:,.6g}" if 0 <= v < 1e7 else f"{v / 1e9:,.6g}G")


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
        name = f"{_place(a)}_{_file(a.model)}_minus_{_file(b.model)}"
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


# --- reasoning --------------------------------------------------------------------------------


def reasoning_length(cell: CellResult, first: CellResult, out: Path) -> list[Path]:
    """Histogram of the reasoning tokens of a call, and the gain over the first stage by length.

    Nothing for a cell without reasoning. Queries are grouped by the mean length of their calls, at
    least eight to a group and at most ten groups; bars are 95 % bootstrap intervals of the mean.
    """
    if not tables.shown([cell]) or not tables.part(cell, "efficiency").get("reasoning_tokens"):
        return []
    lengths: dict[str, list[float]] = defaultdict(list)
    ends: dict[bool, list[float]] = {False: [], True: []}
    for call in store.read_trace(cell.folder):
        lengths[call["qid"]].append(call["reasoning_tokens"])
        ends[call["finish"] == "length"].append(max(1, call["reasoning_tokens"]))
    groups = _by_length(cell, first, lengths)
    with _figure(7.2, 2.6) as figure:
        left, right = figure.subplots(1, 2)
        table: list[tuple[Any, ...]] = [
            ("part", "from", "to", "calls", "cut_off", "gain", "low", "high")
        ]
        table += [("calls", *line, None, None, None) for line in _histogram(left, ends)]
        table += [("queries", low, high, None, None, *gain) for low, high, *gain in groups]
        _gains(right, groups)
        figure.suptitle(fill(plain(f"{cell.model}, {short(cell)} ({block_of(cell)})"), 95), size=9)
        return _save(figure, out / f"reasoning_{_place(cell)}_{_file(cell.model)}", table)


def _by_length(
    cell: CellResult, first: CellResult, lengths: Mapping[str, Sequence[float]]
) -> list[tuple[float, ...]]:
    """Of every group of queries: shortest, longest, mean gain x 100 and its interval."""
    import numpy as np

    ours, theirs = align(cell, first, MEASURE)
    pairs = zip(by_query(cell, MEASURE), ours, theirs, strict=True)
    known = sorted((fmean(lengths[q]), 100 * (a - b)) for q, a, b in pairs if q in lengths)
    groups = []
    for some in np.array_split(known, min(10, max(1, len(known) // 8))) if known else ():
        interval = bootstrap_interval(list(some[:, 1]))
        groups.append((*some[[0, -1], 0], some[:, 1].mean(), interval.low, interval.high))
    return groups


def _histogram(axes: Any, ends: Mapping[bool, Sequence[float]]) -> list[tuple[float, ...]]:
    """Bars of calls by length, those that the token limit cut off on top; returns their values."""
    import numpy as np

    both = [*ends[False], *ends[True]]
    edges = np.geomspace(min(both), max(max(both), min(both) + 1), 25)
    looks = {"color": COLOURS[:2], "label": ("ended by itself", "cut off"), "lw": 0.4}
    counts, *_ = axes.hist([ends[False], ends[True]], edges, stacked=True, ec="white", **looks)
    axes.set(xscale="log", xlabel="reasoning tokens of a call", ylabel="calls")
    axes.xaxis.set_major_formatter("{x:,.6g}")
    axes.legend(frameon=False)
    own, every = np.asarray(counts)
    return list(zip(edges, edges[1:], every, every - own))


def _gains(axes: Any, groups: Sequence[Sequence[float]]) -> None:
    for low, high, gain, *interval in groups:
        axes.hlines(gain, low, high, color=COLOURS[0], lw=1.6)
        axes.vlines((low + high) / 2, *interval, color=COLOURS[0], lw=0.9, alpha=0.7)
        axes.plot((low + high) / 2, gain, "o", color=COLOURS[0], **POINT)
    axes.axhline(0, color=GREY, lw=0.8, ls=(0, (4, 3)), zorder=0)
    axes.set_xlabel("mean reasoning tokens of a query's calls")
    axes.set_ylabel(f"gain over the first stage,\n{MEASURE} x 100")
