"""Figures of finished cells: SVG, PDF and PNG with their data as CSV beside them, byte-stable.

It decides how numbers look, never what they are: those come from tables and stats. It must not
know how a cell was run, and it loads matplotlib only when something is drawn.
"""

from __future__ import annotations

import io
import math
import os
import re
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any, Literal, NamedTuple

from harness.report.tables import (
    MEASURE,
    block_of,
    companions,
    cost,
    csv_text,
    gain,
    is_latency,
    is_sanity,
    plain,
    rounded,
    short,
    shown,
)
from harness.stats import align, bootstrap_interval, paired
from harness.types import CellResult

Cost = Literal["generated_tokens", "seconds", "calls"]
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


def write_file(path: Path, content: str | bytes) -> Path:
    """Write beside the place, then rename: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    with os.fdopen(handle, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
    os.chmod(name, 0o644)
    os.replace(name, path)
    return path


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
    look: int


@dataclass(frozen=True, slots=True)
class _Panel:
    title: str
    points: tuple[_Point, ...]
    references: tuple[tuple[str, float], ...]

    @property
    def front(self) -> list[_Point]:
        """The points that no other beats in cost and quality, cheapest first."""
        front: list[_Point] = []
        for point in sorted(self.points, key=lambda p: (p.x, -p.y)):
            if not front or point.y > front[-1].y:
                front.append(point)
        return front


def quality_against(
    cells: Sequence[CellResult], x: Cost, out: Path, *, _fakes: bool = False
) -> list[Path]:
    """nDCG@10 against a cost, one panel for dataset and first stage, into the folder `out`.

    The line is the Pareto front, bars are 95 % bootstrap intervals of the mean over queries. A
    panel in which every model costs 0 is left out.
    """
    panels = _panels(cells, x, _fakes)
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
        for name, y in panel.references:
            yield (panel.title, name, None, y, None, None, None)


def _panels(cells: Sequence[CellResult], x: str, fakes: bool) -> list[_Panel]:
    used = [
        cell
        for cell in shown(cells, fakes)
        if cell.record["state"] == "complete" and MEASURE in cell.measures and not is_latency(cell)
    ]
    looks = {m: i for i, m in enumerate(dict.fromkeys(c.model for c in used if not is_sanity(c)))}
    groups: dict[str, list[CellResult]] = {}
    for cell in used:
        groups.setdefault(f"{short(cell)}: {block_of(cell)}", []).append(cell)
    panels = [
        _Panel(
            title,
            tuple(_points(group, x, looks)),
            tuple((c.model, 100 * c.measures[MEASURE]) for c in group if is_sanity(c)),
        )
        for title, group in groups.items()
    ]
    return [panel for panel in panels if any(p.x for p in panel.points)]


def _points(cells: Sequence[CellResult], x: str, looks: dict[str, int]) -> Iterator[_Point]:
    for cell in cells:
        place = cost(cell, x)
        if is_sanity(cell) or place is None:
            continue
        interval = bootstrap_interval(
            [100 * v for row in cell.per_query if (v := row.get(MEASURE)) is not None]
        )
        mean = 100 * cell.measures[MEASURE]
        yield _Point(cell.model, place, mean, interval.low, interval.high, looks[cell.model])


def _draw(axes: Any, panel: _Panel, name: str) -> None:
    axes.set(title=fill(plain(panel.title), 45), xlabel=name)
    _scale(axes, panel)
    front = panel.front
    right, top = axes.get_xlim()[1], front[-1].y
    steps = ([*(p.x for p in front), right], [*(p.y for p in front), top])
    axes.step(*steps, where="post", color="#BBBBBB", lw=1.2, zorder=1)
    for p in panel.points:
        colour, marker = COLOURS[p.look % len(COLOURS)], MARKERS[p.look % len(MARKERS)]
        axes.vlines(p.x, p.low, p.high, color=colour, lw=0.9, alpha=0.7, zorder=2)
        edge = {"mec": "white", "mew": 0.5}
        axes.plot([p.x], [p.y], marker, color=colour, ms=5.5, zorder=3, **edge)


def _scale(axes: Any, panel: _Panel) -> None:
    """Limits from the points and the first stage; a logarithmic x from one decade on."""
    xs = [p.x for p in panel.points]
    ys = [v for p in panel.points for v in (p.low, p.y, p.high) if v == v]  # nan: one query
    ys += [y for name, y in panel.references if name == "first-stage"]
    pad = 0.12 * (max(ys) - min(ys)) or 1
    axes.set_ylim(min(ys) - pad, max(ys) + pad)
    if min(xs) > 0 and max(xs) >= 10 * min(xs):
        axes.set_xscale("log")
        decades = max(xs) / min(xs)
        axes.set_xlim(min(xs) / decades**0.08, max(xs) * decades**0.22)
        axes.xaxis.set_major_formatter(lambda v, _: f"{v:,.10g}")
        axes.xaxis.set_minor_formatter(lambda v, _: "")
    else:
        pad = 0.12 * (max(xs) - min(xs)) or max(0.1 * max(xs), 0.5)
        axes.set_xlim(min(xs) - pad, max(xs) + 3 * pad)  # the baselines are named at the right
        axes.xaxis.set_major_formatter(lambda v, _: f"{v:,.6g}" if v >= 0 else "")


class _Box(NamedTuple):
    """A rectangle in pixels."""

    left: float
    low: float
    right: float
    high: float

    def shared(self, other: _Box) -> float:
        """Area in both boxes."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.high, other.high) - max(self.low, other.low)
        return width * height if width > 0 and height > 0 else 0.0

    def nearest(self, x: float, y: float) -> tuple[float, float]:
        """The box's point that is nearest to (x, y)."""
        return min(max(x, self.left), self.right), min(max(y, self.low), self.high)


Obstacles = list[tuple[float, _Box]]  # what a pixel of it costs a name that stands there


def _label(axes: Any, panel: _Panel) -> None:
    """Name every point and line where no other name, point or line stands."""
    frame = _Box(*axes.get_window_extent().extents)
    taken: Obstacles = []
    for p in panel.points:
        x, y = _pixels(axes, p.x, p.y)
        low, high = (_pixels(axes, p.x, v)[1] if v == v else y for v in (p.low, p.high))
        taken += [(10, _Box(x - 5, y - 5, x + 5, y + 5)), (3, _Box(x - 1.5, low, x + 1.5, high))]
    for name, value in panel.references:
        y = _pixels(axes, panel.points[0].x, value)[1]
        taken.append((2, _Box(frame.left, y - 1.5, frame.right, y + 1.5)))
        taken.append((10, _reference(axes, name, value)))
    taken += _steps(axes, panel.front, frame)
    for p in sorted(panel.points, key=lambda p: -p.y):
        taken.append((10, _name(axes, p, taken, frame)))


def _pixels(axes: Any, x: float, y: float) -> tuple[float, float]:
    right, up = axes.transData.transform((x, y))
    return float(right), float(up)


def _steps(axes: Any, front: Sequence[_Point], frame: _Box) -> Obstacles:
    """The level and the upright parts of the front's line."""
    corners = [_pixels(axes, p.x, p.y) for p in front]
    follow = [*corners[1:], (frame.right, corners[-1][1])]
    pairs = list(zip(corners, follow, strict=True))
    level = [(1.0, _Box(x, y - 1.5, end, y + 1.5)) for (x, y), (end, _) in pairs]
    return level + [(1.0, _Box(x - 1.5, low, x + 1.5, y)) for (_, low), (x, y) in pairs]


def _reference(axes: Any, name: str, y: float) -> _Box:
    """A dashed line, or an arrow at the edge when the baseline lies outside the panel."""
    low, high = axes.get_ylim()
    text, height, side = f"{plain(name)} {rounded(y, 1)}", y, "bottom"
    if low <= y <= high:
        axes.axhline(y, color=GREY, lw=0.8, ls=(0, (4, 3)), zorder=0)
    else:
        text += " ↑" if y > high else " ↓"
        height, side = (high, "top") if y > high else (low, "bottom")
    where = {"transform": axes.get_yaxis_transform(), "ha": "right", "va": side}
    drawn = axes.text(0.995, height, text, color="#555555", size=7, **where)
    return _Box(*drawn.get_window_extent().extents)


def _name(axes: Any, p: _Point, taken: Obstacles, frame: _Box) -> _Box:
    """Put the model's name at the best place near its point; far away with a thin line to it."""
    from matplotlib.colors import to_rgb

    x, y = _pixels(axes, p.x, p.y)
    dark = [0.65 * part for part in to_rgb(COLOURS[p.look % len(COLOURS)])]
    text = axes.text(0, 0, plain(p.model), size=7, color=dark, zorder=4)
    size = text.get_window_extent()

    def price(box: _Box) -> float:
        outside = float(size.width * size.height) - box.shared(frame)
        covered = sum(weight * box.shared(other) for weight, other in taken)
        return covered + 100 * outside + math.dist(box.nearest(x, y), (x, y))

    places = ((x + dx, y + dy) for dx, dy in _places(size.width, size.height))
    box = min((_Box(u, v, u + size.width, v + size.height) for u, v in places), key=price)
    back, near = axes.transData.inverted(), box.nearest(x, y)
    text.set_position(back.transform(box[:2]))
    if math.dist(near, (x, y)) > 14:
        axes.plot(*back.transform([(x, y), near]).T, color="#999999", lw=0.5, zorder=1)
    return box


def _places(width: float, height: float) -> Iterator[tuple[float, float]]:
    """Offsets in pixels of a name's lower left corner from its point, nearest first."""
    for far in range(7, 90, 6):
        for up in (-height / 2, 2, -height - 2, far, -far - height):
            yield from ((far, up), (-far - width, up))
        yield from ((-width / 2, far), (-width / 2, -far - height))


# --- gains ------------------------------------------------------------------------------------


def gain_heatmap(cells: Sequence[CellResult], out: Path, *, _fakes: bool = False) -> list[Path]:
    """Gain over the first stage in nDCG@10 x 100, models x datasets, into the folder `out`."""
    used = [cell for cell in shown(cells, _fakes) if not is_latency(cell)]
    first = companions(used, "first-stage")
    gains = {
        (block_of(cell), cell.model, cell.dataset): 100 * found
        for cell in used
        if not is_sanity(cell) and (found := gain(cell, first)) is not None
    }
    if not gains:
        return []
    heads = {cell.dataset: short(cell) for cell in used}
    columns = [name for name in heads if any(key[2] == name for key in gains)]
    rows = sorted(dict.fromkeys(key[:2] for key in gains), key=lambda row: row[0])
    several = len({block for block, _ in rows}) > 1
    names = [plain(f"{model} ({block})" if several else model) for block, model in rows]
    width = 0.068 * max(map(len, names)) + max(2.6, 0.62 * len(columns)) + 0.8
    height = 0.045 * max(len(heads[column]) for column in columns) + 0.27 * len(rows)
    with _figure(width, 0.9 + height) as figure:
        values = [[gains.get((*row, column)) for column in columns] for row in rows]
        _heat(figure, values, names, [plain(heads[column]) for column in columns])
        where = "" if several else f" ({rows[0][0]})"
        figure.axes[0].set_xlabel(
            plain(f"gain over the first stage{where},") + f"\n{MEASURE} x 100"
        )
        head: Sequence[Any] = ("first_stage", "model", *columns)
        table = [head, *((*row, *line) for row, line in zip(rows, values))]
        return _save(figure, out / "gain_over_first_stage", table)


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
    figure.colorbar(image, ax=axes, pad=0.02)


def per_query_bars(a: CellResult, b: CellResult, out: Path, *, _fakes: bool = False) -> list[Path]:
    """Sorted per-query differences a - b in nDCG@10, into the folder `out`."""
    if len(shown((a, b), _fakes)) < 2:
        return []
    left, right = align(a, b, MEASURE)
    qids = [str(row["qid"]) for row in a.per_query if row.get(MEASURE) is not None]
    bars = sorted(
        ((x - y, qid, x, y) for qid, x, y in zip(qids, left, right, strict=True)), reverse=True
    )
    result = paired(left, right)
    with _figure(5.2, 2.8) as figure:
        axes = figure.subplots()
        colours = [COLOURS[0] if d > 0 else COLOURS[1] for d, *_ in bars]
        axes.bar(range(len(bars)), [d for d, *_ in bars], width=0.85, color=colours)
        axes.axhline(0, color="#222222", lw=0.6)
        axes.axhline(result.difference, color=GREY, lw=0.9, ls=(0, (4, 3)))
        axes.axhspan(result.low, result.high, color=GREY, alpha=0.2, lw=0, zorder=0)
        axes.set(
            title=fill(plain(f"{a.model} minus {b.model}, {short(a)} ({block_of(a)})"), 75),
            xlabel="queries, sorted", ylabel=f"difference in {MEASURE}", xlim=(-1, len(bars)),
            xticks=[],
        )  # fmt: skip
        axes.text(
            0.99, 0.97,
            f"{result.wins} better, {result.ties} equal, {result.losses} worse\n"
            f"mean {rounded(result.difference, 3, signed=True)}"
            f" [{rounded(result.low, 3, signed=True)}, {rounded(result.high, 3, signed=True)}]",
            transform=axes.transAxes, ha="right", va="top",
        )  # fmt: skip
        name = re.sub(r"[^\w.+=@-]+", "_", f"{a.dataset}_{a.model}_minus_{b.model}")
        table = [("qid", a.model, b.model, "difference"), *((q, x, y, d) for d, q, x, y in bars)]
        return _save(figure, out / f"per_query_{name}", table)
