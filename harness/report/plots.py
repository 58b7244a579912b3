"""Figures of finished cells: SVG, PDF and PNG with their data as CSV beside them, byte-stable.

It decides how numbers look, never what they are: those come from tables and stats. It must not
know how a cell was run, and it loads matplotlib only when something is drawn.
"""

from __future__ import annotations

import io
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import fill
from typing import Any

from harness import store
from harness.report import tables
from harness.report.tables import MEASURE, block_of, is_sanity, rounded, short
from harness.report.writers import plain, write_file
from harness.stats import Paired, align, bootstrap_interval, by_query, macro_interval, paired
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
    from matplotlib.figure import Figure

    with rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a name in another script is still right in SVG
        yield Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, stem: Path, data: Any) -> list[Path]:
    """Must be called inside `_figure`: the SVG's ids and fonts come from its style."""
    paths = []
    for kind, metadata in FILES.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, metadata=metadata, dpi=200)
        paths.append(write_file(stem.with_name(f"{stem.name}.{kind}"), buffer.getvalue()))
    text = data.to_csv(index=False, lineterminator="\n")
    return [*paths, write_file(stem.with_name(f"{stem.name}.csv"), text)]


def _file(name: str) -> str:
    """A name as a part of a file's name."""
    return re.sub(r"[^\w.+=@-]+", "_", name)


def _place(cell: CellResult) -> str:
    return _file(f"{cell.dataset}_{cell.first_stage}")


# --- quality against cost ---------------------------------------------------------------------


def quality_against(cells: Sequence[CellResult], x: str, out: Path) -> list[Path]:
    """nDCG@10 against a cost, one panel for dataset and first stage, into the folder `out`.

    The line is the Pareto front, bars are 95 % bootstrap intervals of the mean over queries. A
    panel in which every model costs 0 is left out.
    """
    data = _points(cells, x)
    panels, models = list(data.groupby("panel", sort=False)), data[data.x.notna()].model.unique()
    if not panels:
        return []
    wide = min(3, len(panels))
    tall, width = -(-len(panels) // wide), 0.4 + (4.6 if wide == 1 else 3.6) * wide
    columns = int(width / (0.4 + 0.075 * max(map(len, models)))) or 1
    with _figure(width, 2.9 * tall + 0.18 * -(-len(models) // columns)) as figure:
        grid = figure.subplots(tall, wide, squeeze=False).flat
        for place, axes in enumerate(grid):
            if place < len(panels):
                _draw(axes, *panels[place])
                axes.set_xlabel(AXES[x])
                axes.set_ylabel("" if place % wide else f"{MEASURE} x 100")
            axes.set_visible(place < len(panels))
        _legend(figure, columns)
        named = data.rename(columns={"x": f"{x}_per_query", "y": f"{MEASURE} x 100"})
        return _save(figure, out / f"quality_against_{x}", named.drop(columns="look"))


def _points(cells: Sequence[CellResult], x: str) -> Any:
    """A row for every model, x in the cost's unit, and below them the baselines, without x.

    y is times 100, with its 95 % interval. look numbers the models, alike in all panels.
    """
    from pandas import DataFrame

    used = [c for c in tables.ranked(cells) if tables.is_complete(c) and MEASURE in c.measures]
    looks = list(dict.fromkeys(cell.model for cell in used if not is_sanity(cell)))
    rows: list[tuple[Any, ...]] = []
    for cell in sorted(used, key=is_sanity):
        place, y = (f"{short(cell)}: {block_of(cell)}", cell.model), 100 * cell.measures[MEASURE]
        if is_sanity(cell):
            rows.append((*place, None, y, None, None, None))
        elif (cost := tables.cost(cell, x)) is not None:
            ends = macro_interval([cell], MEASURE)
            look = looks.index(cell.model)
            rows.append((*place, cost, y, 100 * ends.low, 100 * ends.high, look))
    columns = ["panel", "model", "x", "y", "low", "high", "look"]
    data = DataFrame(rows, columns=columns, dtype=object)
    data = data.astype(dict.fromkeys(columns[2:6], float))
    data = data.sort_values("panel", key=lambda names: names.factorize()[0], kind="stable")
    data = data[data.groupby("panel").x.transform("max") > 0]
    return data.assign(on_front=_on_front(data))


def _on_front(data: Any) -> Any:
    """Does no other point of the panel beat it in cost and quality? Of a baseline: nothing."""
    ranked = data.sort_values(["x", "y"], ascending=[True, False])
    before = ranked.groupby("panel").y.transform(lambda y: y.cummax().shift(fill_value=-1.0))
    return (ranked.y > before).astype("Int64").where(ranked.x.notna())


def _look(number: int) -> dict[str, Any]:
    return {
        "color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)], **POINT,
    }  # fmt: skip


def _legend(figure: Any, columns: int) -> None:
    """One for all panels, in which a model looks the same."""
    named = {line.get_label(): line for axes in figure.axes for line in axes.lines}
    shown = {name: line for name, line in named.items() if not name.startswith("_")}
    where = {"loc": "outside lower center", "ncols": columns, "frameon": False}
    figure.legend(shown.values(), shown, handletextpad=0.1, **where)


def _draw(axes: Any, title: Any, panel: Any) -> None:
    points, baselines = panel[panel.x.notna()], panel[panel.x.isna()]
    axes.set_title(fill(plain(title), 45))
    _scale(axes, points, baselines)
    front = points[points.on_front == 1].sort_values("x")
    xs, ys = [*front.x, axes.get_xlim()[1]], [*front.y, front.y.iloc[-1]]
    axes.step(xs, ys, where="post", color="#BBBBBB", lw=1.2, zorder=1)
    for p in points.itertuples():
        look = _look(p.look)
        axes.vlines(p.x, p.low, p.high, color=look["color"], lw=0.9, alpha=0.7, zorder=2)
        axes.plot(p.x, p.y, ls="", zorder=3, label=plain(p.model), **look)
    for p in baselines.itertuples():
        _reference(axes, p.model, p.y)


def _scale(axes: Any, points: Any, baselines: Any) -> None:
    """Limits from the points and the first stage; a logarithmic x from one decade on."""
    first = baselines[baselines.model == "first-stage"].y
    ys = [*points.y, *points.low.dropna(), *points.high.dropna(), *first]
    pad = 0.12 * (max(ys) - min(ys)) or 1
    axes.set_ylim(min(ys) - pad, max(ys) + pad)
    low, high = points.x.min(), points.x.max()
    if low > 0 and high >= 10 * low:
        axes.set_xscale("log")
        axes.set_xlim(low / (high / low) ** 0.08, high * (high / low) ** 0.22)
        axes.xaxis.set_minor_formatter("")
    else:
        pad = 0.12 * (high - low) or max(0.1 * high, 0.5)
        axes.set_xlim(low - pad, high + 3 * pad)  # the baselines are named at the right
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
    from pandas import Series

    used = tables.ranked(cells)
    first = tables.companions(used, "first-stage")
    gains = {
        (block_of(cell), cell.model, cell.dataset): 100 * found
        for cell in used
        if not is_sanity(cell) and (found := tables.gain(cell, first)) is not None
    }
    if not gains:
        return []
    heads = {cell.dataset: plain(short(cell)) for cell in used}
    data = Series(gains).rename_axis(["first_stage", "model", None]).unstack(sort=False)
    data = data[[name for name in heads if name in data]]
    names = [plain(f"{model} ({block})") for block, model in data.index]
    shown = [heads[name] for name in data]
    width = 0.068 * max(map(len, names)) + max(2.6, 0.62 * len(shown)) + 0.8
    height = 0.045 * max(map(len, shown)) + 0.27 * len(names)
    with _figure(width, 0.9 + height) as figure:
        _heat(figure, data.to_numpy(), names, shown)
        return _save(figure, out / "gain_over_first_stage", data.reset_index())


def _heat(figure: Any, data: Any, names: Sequence[str], heads: Sequence[str]) -> None:
    """Coloured cells with their numbers printed, white where there is no gain."""
    import numpy as np

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
    from pandas import DataFrame

    if len(tables.shown((a, b))) < 2:
        return []
    pair = align([a, b], MEASURE)
    rows = sorted(
        ((x - y, qid, x, y) for qid, x, y in zip(by_query(a, MEASURE), *pair)), reverse=True
    )
    data = DataFrame(rows, columns=["difference", "qid", a.model, b.model])
    with _figure(5.2, 2.8) as figure:
        axes = figure.subplots()
        _bars(axes, data.difference, paired([[pair]])[0])
        title = f"{a.model} minus {b.model}, {short(a)} ({block_of(a)})"
        axes.set_title(fill(plain(title), 75))
        name = f"{_place(a)}_{_file(a.model)}_minus_{_file(b.model)}"
        return _save(figure, out / f"per_query_{name}", data.iloc[:, [1, 2, 3, 0]])


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


# --- budgets ----------------------------------------------------------------------------------

SPENT = {"calls": "calls per query", "tokens": "prompt and generated tokens per query"}


def budget_curves(cells: Iterable[CellResult], out: Path) -> list[Path]:
    """nDCG@10 x 100 against what was spent, a figure for dataset and first stage, a line a model.

    It draws what records hold under "budget"; what stopping a method means is harness.budget's.
    The left end of every line is the first stage, the right end the cell's own ranking.
    """
    places: dict[str, list[CellResult]] = defaultdict(list)
    for cell in tables.ranked(cells):
        if any(MEASURE in point for point in cell.record.get("budget") or ()):
            places[_place(cell)].append(cell)
    return [path for place, some in places.items() for path in _curves(some, out, place)]


def _curves(cells: Sequence[CellResult], out: Path, place: str) -> list[Path]:
    from pandas import DataFrame

    rows = [{"model": cell.model, **point} for cell in cells for point in cell.record["budget"]]
    data = DataFrame(rows)[["model", "budget", *SPENT, MEASURE]]
    data[MEASURE] *= 100
    with _figure(7.2, 3.0) as figure:
        for axes, key in zip(figure.subplots(1, 2, sharey=True), SPENT):
            _draw_curves(axes, data, key)
        figure.axes[0].set_ylabel(f"{MEASURE} x 100")
        figure.suptitle(fill(plain(f"{short(cells[0])}: {block_of(cells[0])}"), 95), size=9)
        where = {"loc": "outside lower center", "ncols": 3, "frameon": False}
        figure.legend(handles=figure.axes[0].lines, **where)
        return _save(
            figure, out / f"budget_{place}", data.rename(columns={MEASURE: f"{MEASURE} x 100"})
        )


def _draw_curves(axes: Any, data: Any, key: str) -> None:
    lines = data.groupby("model", sort=False)
    ends = lines[key].last()
    if ends.max() >= 10 * ends.min():
        axes.set_xscale("symlog", linthresh=ends.min(), linscale=0.5)
    axes.xaxis.set_major_formatter("{x:,.6g}")
    axes.set_xlabel(SPENT[key])
    for look, (model, line) in enumerate(lines):
        own = {"drawstyle": "steps-post", "label": plain(model), "markevery": [-1], "lw": 1.3}
        axes.plot(line[key], line[MEASURE], **own, **_look(look))


# --- reasoning --------------------------------------------------------------------------------


def reasoning_length(cell: CellResult, first: CellResult, out: Path) -> list[Path]:
    """Histogram of the reasoning tokens of a call, and the gain over the first stage by length.

    Nothing for a cell without reasoning. Queries are grouped by the mean length of their calls, at
    least eight to a group and at most ten groups; bars are 95 % bootstrap intervals of the mean.
    """
    from pandas import DataFrame

    if not tables.shown([cell]) or not tables.part(cell, "efficiency").get("reasoning_tokens"):
        return []
    calls = DataFrame(store.read_trace(cell.folder))
    groups = _by_length(cell, first, calls.groupby("qid")["reasoning_tokens"].mean())
    with _figure(7.2, 2.6) as figure:
        left, right = figure.subplots(1, 2)
        rows = [("calls", *line, None, None, None) for line in _histogram(left, calls)]
        rows += [("queries", low, high, None, None, *gain) for low, high, *gain in groups]
        columns = ["part", "from", "to", "calls", "cut_off", "gain", "low", "high"]
        _gains(right, groups)
        figure.suptitle(fill(plain(f"{cell.model}, {short(cell)} ({block_of(cell)})"), 95), size=9)
        name = f"reasoning_{_place(cell)}_{_file(cell.model)}"
        return _save(figure, out / name, DataFrame(rows, columns=columns))


def _by_length(cell: CellResult, first: CellResult, lengths: Any) -> list[tuple[float, ...]]:
    """Of every group of queries: shortest, longest, mean gain x 100 and its interval."""
    import numpy as np

    pairs = zip(by_query(cell, MEASURE), *align([cell, first], MEASURE), strict=True)
    known = sorted((lengths[qid], 100 * (a - b)) for qid, a, b in pairs if qid in lengths)
    groups = []
    for some in np.array_split(known, min(10, max(1, len(known) // 8))) if known else ():
        interval = bootstrap_interval(list(some[:, 1]))
        groups.append((*some[[0, -1], 0], some[:, 1].mean(), interval.low, interval.high))
    return groups


def _histogram(axes: Any, calls: Any) -> list[tuple[float, ...]]:
    """Bars of calls by length, those that the token limit cut off on top; returns their values."""
    import numpy as np

    tokens, cut = calls["reasoning_tokens"].clip(lower=1), calls["finish"] == "length"
    edges = np.geomspace(tokens.min(), max(tokens.max(), tokens.min() + 1), 25)
    looks = {"color": COLOURS[:2], "label": ("ended by itself", "cut off"), "lw": 0.4}
    counts, *_ = axes.hist([tokens[~cut], tokens[cut]], edges, stacked=True, ec="white", **looks)
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
