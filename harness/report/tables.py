"""Tables of finished cells: the model of a table, and what stands in each of them.

A number is rounded once, when its Value is made, so no two formats can disagree. It must not know
how a cell was run, nor any format: it reads records and per-query rows alone.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from harness.types import CellResult

MEASURE = "nDCG@10"
SANITY = ("first-stage", "random", "reverse", "oracle")  # ask no model, compete for no mark
ABSENT, SIGNIFICANT, PARTIAL, IN_DOMAIN, FAKE = "—", "†", "‡", "§", "¶"
SIGNS = {
    IN_DOMAIN: "in-domain: the model was trained on queries of this collection.",
    PARTIAL: "not the whole query set: comparable within its column only.",
    FAKE: "answered by the fake engine: not a result.",
    ABSENT: "no finished cell; no average is printed where a dataset of the row is missing.",
}
Mark = Literal["", "best", "second"]
MARKS: tuple[Mark, ...] = ("", "best", "second")


@dataclass(frozen=True, slots=True)
class Column:
    """key: machine name; head: what is printed; group: the heading above several columns."""

    key: str
    head: str
    group: str = ""


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
    """A printable number; None and nan become an em-dash, never 0."""
    if number is None or math.isnan(number):
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


def is_floating(cell: CellResult) -> bool:
    """Were its weights taken at whatever `main` was on that day?"""
    weights = (part(cell, "environment", "engine", name) for name in ("base", "adapter"))
    return any(table.get("revision") == "main" for table in weights)


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


def ranked(cells: Iterable[CellResult]) -> list[CellResult]:
    """What may be compared by quality: no latency runs."""
    return [cell for cell in shown(cells) if not is_latency(cell)]


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


def left_out(cells: Sequence[CellResult], used: Sequence[CellResult]) -> Iterator[tuple[str, str]]:
    """Why finished cells are not in a table: the reason, and the model."""
    kept = set(map(id, used))
    for cell in cells:
        if id(cell) not in kept and cell.record["state"] != "failed":
            why = "answered by the fake engine" if is_fake(cell) else "a latency run"
            yield f"Left out, {why}", cell.model


def told(warnings: Iterable[tuple[str, str]]) -> list[str]:
    """One note for all models that a warning is about."""
    models: dict[str, dict[str, None]] = defaultdict(dict)
    for text, model in warnings:
        models[text][model] = None
    return [f"{text}: {', '.join(found)}." for text, found in models.items()]


# --- efficiency and summary -------------------------------------------------------------------

COLUMNS = {  # head, digits; a key that is not here is a measure
    "gain": ("gain", 4), "calls": ("calls/q", 1), "rounds": ("rounds/q", 1),
    "prompt_tokens": ("tokens in/q", 0), "generated_tokens": ("tokens out/q", 0),
    "seconds": ("s/q", 2), "queries_per_second": ("queries/s", 3), "gain_share": ("% of gain", 1),
    "unparsable": ("unparsed %", 1), "cut_off": ("cut off %", 1), "no_op": ("no-op %", 1),
    "kendall_tau": ("tau", 2), "latency_median": ("median s", 2), "latency_p90": ("p90 s", 2),
    "latency_p99": ("p99 s", 2), "tflop": ("TFLOP/q", 2), "rpp": ("RPP", 2), "qpp": ("QPP", 2),
    "energy_joules": ("J/q", 1), "gpu_memory_gib": ("GPU GiB", 1), "money": ("price/1k q", 3),
    "faults": ("faults", 0),
}  # fmt: skip
COSTS = ("calls", "rounds", "prompt_tokens", "generated_tokens", "seconds")
FAULTS = ("unparsable", "cut_off")
BY_PROTOCOL = ("seconds", "queries_per_second", "energy_joules", "money")
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
WHERE_KNOWN = {  # columns that stand only where some cell has a number, and what they are
    "tflop": "TFLOP/q: decoder formula over whole prompts. RPP, QPP: nDCG@10, queries a PFLOP.",
    "rpp": "", "qpp": "",
    "latency_median": "median, p90, p99 s: wall clock of queries that run alone, a fixed sample.",
    "latency_p90": "", "latency_p99": "",
    "energy_joules": "J/q: of whole boards while the cell ran. GPU GiB: the most seen in use.",
    "gpu_memory_gib": "",
    "money": "price/1k q: s/q of 1,000 queries at the given price of a GPU-hour.",
}  # fmt: skip


def efficiency(
    cells: Sequence[CellResult], *, price: float | None = None, details: bool = False
) -> Table:
    """What every model cost and did, one block for dataset and first stage, both protocols.

    price     of a GPU-hour, for cells that ran on one
    details   for machines: every number of the record's efficiency, too
    """
    used = [cell for cell in shown(cells) if cell.record["state"] != "failed"]
    baselines = {cell.model for cell in used if is_sanity(cell)}
    numbers = [numbers_of(c, price) for c in used if c.model not in baselines]
    known = {key: None for found in numbers for key, n in found.items() if n is not None}
    more = [key for key in known if "." in key] if details else []
    keys = (*EFFICIENCY, *(key for key in WHERE_KNOWN if key in known), *more)
    models = [row for row in _per_cell(used, keys, price) if row.label not in baselines]
    explained = [text for key, text in WHERE_KNOWN.items() if text and key in keys]
    notes = (*EXPLAINED, *explained, *told(left_out(cells, used)))
    return Table("Efficiency", _heads(keys), tuple(models), notes)


def summary(cells: Sequence[CellResult]) -> Table:
    """What a run came to: quality, cost and faults of every cell, fake ones with a sign."""
    used = ordered(cells)
    names = [name for cell in used for name in cell.measures]
    timed = ("latency_median", "latency_p90") * any(map(is_latency, used))
    keys = (MEASURE if MEASURE in names or not names else names[0], *SUMMARY, *timed)
    notes = (f"{FAKE} {SIGNS[FAKE]}",) * any(map(is_fake, used))
    return Table("Summary", _heads(keys), tuple(_per_cell(used, keys)), notes)


def _heads(keys: Iterable[str]) -> tuple[Column, ...]:
    return tuple(Column(key, COLUMNS.get(key, (key,))[0]) for key in keys)


def _per_cell(
    cells: Sequence[CellResult], keys: Sequence[str], price: float | None = None
) -> list[Row]:
    """One row a cell, of one block for dataset, first stage and depth."""
    measure = keys[0] if keys[0] not in COLUMNS else MEASURE
    first, best = companions(cells, "first-stage"), companions(cells, "oracle")
    rows, apart = [], len(set(map(is_latency, cells))) > 1
    for cell in cells:
        place = cell.dataset, block_of(cell)
        ours, most = gain(cell, first, measure), gain(best.get(place, cell), first, measure)
        numbers = {**cell.measures, **numbers_of(cell, price), "gain": ours}
        if apart and is_latency(cell):  # two protocols never share a column
            numbers |= dict.fromkeys(BY_PROTOCOL)
        if place in best and ours is not None and most and most > 0:
            numbers["gain_share"] = 100 * ours / most
        line = [
            value(numbers.get(key), COLUMNS.get(key, (key, 4))[1], signed=key == "gain")
            for key in keys
        ]
        line[0] = replace(line[0], note=FAKE * is_fake(cell))
        rows.append(Row(cell.model, ", ".join(place), tuple(line)))
    groups = list(dict.fromkeys(row.group for row in rows))
    return sorted(rows, key=lambda row: groups.index(row.group))


def numbers_of(cell: CellResult, price: float | None = None) -> dict[str, float | None]:
    """A cell's own numbers by column: costs per query, faults in percent of the calls.

    A key with dots is a path in the record.
    """
    faults, times = dict(part(cell, "faults")), part(cell, "efficiency", "latency")
    calls, no_op = faults.pop("calls", None), faults.pop("no_op_rate", None)
    pflop = None if (flops := cost(cell, "flops")) is None else flops / 1e15
    spent, hours = part(cell, "efficiency"), _gpu_hours(cell)
    return {
        **{key: cost(cell, key) for key in (*COSTS, "energy_joules")},
        "queries_per_second": spent.get("queries_per_second"),
        "money": 1000 * hours * price if price is not None and hours is not None else None,
        "tflop": None if pflop is None else 1000 * pflop,
        "rpp": cell.measures[MEASURE] / pflop if pflop and MEASURE in cell.measures else None,
        "qpp": 1 / pflop if pflop else None,
        "gpu_memory_gib": spent.get("gpu_memory_gib"),
        "latency_p99": times.get("p99"),
        **dict(_paths(spent, "efficiency.")),
        **{key: 100 * faults.get(key, 0) / calls if calls else None for key in FAULTS},
        "no_op": None if no_op is None else 100 * no_op,
        "kendall_tau": cell.record.get("kendall_tau"),
        "latency_median": times.get("median"),
        "latency_p90": times.get("p90"),
        "faults": sum(faults.values()) if faults else None,
        "fault_share": 100 * sum(faults.values()) / calls if calls else None,
    }


def _gpu_hours(cell: CellResult) -> float | None:
    """Of a query, over all GPUs its calls kept busy; None where they ran on none, or elsewhere."""
    engine, seconds = part(cell, "environment", "engine").get("engine"), cost(cell, "seconds")
    here = part(cell, "environment", "hardware").get("gpu") and engine in ("hf", "vllm")
    boards = cell.record["model"].get("tensor_parallel") or 1
    return boards * seconds / 3600 if here and seconds is not None else None


def _paths(found: Mapping[str, Any], above: str) -> Iterator[tuple[str, float]]:
    """Every number below nested tables, by its path."""
    for name, value in found.items():
        if isinstance(value, Mapping):
            yield from _paths(value, f"{above}{name}.")
        elif value is not None:
            yield f"{above}{name}", value
