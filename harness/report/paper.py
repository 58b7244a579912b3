"""The paper kit: a suite's table as LaTeX, macros and CSV, and what stands behind each number.

What is not a finished cell of today's registry is never a number: its place shows as such, with
the command that makes it. It must not know how a cell is run, nor how a suite file is read.

    README.md  table.tex  table.csv  macros.tex  manifest.json  against.tex  against.csv
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness.published import Published
from harness.report import quality, writers
from harness.report.against import against
from harness.report.quality import Line, Sheet
from harness.report.tables import MEASURE, Column, Table, part, value
from harness.stats import macro_interval
from harness.types import Cell, CellResult, DataError

UNKNOWN = r"\textbf{??}"  # what LaTeX itself prints for a reference that it does not know
DIGITS = ("Zero", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine")


@dataclass(frozen=True, slots=True)
class Terms(quality.Layout):
    """A suite file's [paper] table. source: what the names of the published sources begin with."""

    title: str = ""
    source: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Slot:
    """A cell of the plan and the command that makes it; its result, or why there is none."""

    cell: Cell
    command: str
    result: CellResult | None = None
    missing: str = ""

    @property
    def line(self) -> Line:
        return f"{self.cell.first_stage}, top {self.cell.depth}", self.cell.model_name


def write(
    name: str,
    slots: Sequence[Slot],
    columns: Mapping[Column, tuple[str, ...]],
    terms: Terms,
    out: Path,
    published: Sequence[Published] = (),
) -> list[Table]:
    """Write the kit of the suite `name` into `out` and return its tables. Byte-stable.

    columns    of the table, with their datasets: quality.columns_of
    published  figures to compare with, where they are of its models and datasets
    """
    frame = quality.Frame(tuple(dict.fromkeys(slot.line for slot in slots)), columns)
    sheet = quality.sheet_of((s.result for s in slots if s.result), terms, frame)
    table = quality.quality(list(sheet.grid.values()), layout=terms, frame=frame)
    table = replace(table, title=terms.title, caption=f"{terms.title}. {table.caption}")
    numbers = list(_numbers(name, sheet, slots))
    absent = [slot for slot in slots if not slot.result]
    files = {
        "table.tex": writers.to_latex(table, f"tab:{name}")
        + "".join(writers.plain(f"% {s.cell}, {s.missing}: {s.command}") + "\n" for s in absent),
        "table.csv": writers.to_csv(table),
        "macros.tex": "".join(
            rf"\newcommand{{\{n['macro']}}}{{{n['printed'] or UNKNOWN}}}" + "\n" for n in numbers
        ),
        "manifest.json": json.dumps(
            {"title": terms.title, "measure": MEASURE, "scale": terms.scale, "numbers": numbers},
            indent=1, ensure_ascii=False,
        ) + "\n",
    }  # fmt: skip
    shown = [table]
    beside = against(sheet, published, sources=terms.source, missing=True)
    if beside.rows:
        shown.append(beside)
        files["against.tex"] = writers.to_latex(beside, f"tab:{name}-against")
        files["against.csv"] = writers.to_csv(beside)
    files["README.md"] = _readme(shown, absent)
    for file, text in files.items():
        writers.write_file(out / file, text)
    return shown


def _numbers(name: str, sheet: Sheet, slots: Sequence[Slot]) -> Iterator[dict[str, Any]]:
    """Every number that the plan has cells for, and those cells, as the manifest tells it.

    value, low, high: in the measure's own unit, null without the cells. Raises DataError for two
    numbers of one macro name.
    """
    planned, seen = {(*slot.line, slot.cell.dataset_name): slot for slot in slots}, set[str]()
    for line in sheet.frame.lines:
        for column, names in sheet.frame.columns.items():
            behind = [planned[k] for name in names if (k := (*line, name)) in planned]
            macro, cells = letters(f"{name} {line[1]} {column.key}"), sheet.at(line, column)
            if len(behind) < len(names):
                continue
            if macro in seen:
                raise DataError(f"two numbers of {name} would share the macro {macro}")
            seen.add(macro)
            number = sheet.numbers.get((*line, column.key))
            interval = macro_interval(cells, MEASURE)
            yield {
                "macro": macro,
                "model": line[1],
                "first_stage": line[0],
                "column": column.key,
                "value": None if number is None else number / sheet.layout.scale,
                "low": None if math.isnan(interval.low) else interval.low,
                "high": None if math.isnan(interval.high) else interval.high,
                "printed": None if number is None else value(number, sheet.layout.digits).text,
                "cells": [_behind(slot) for slot in behind],
            }


def letters(text: str) -> str:
    """A TeX command's name, which holds letters only: `rank-r1` is RankROne."""
    words = re.findall(r"[A-Za-z]+|[0-9]", text)
    return "".join(DIGITS[int(w)] if w.isdigit() else w[0].upper() + w[1:] for w in words)


def _behind(slot: Slot) -> dict[str, Any]:
    """Where a cell is, how it is made, and the hashes of what it was made from."""
    facts = {"folder": slot.cell.folder.as_posix(), "command": slot.command}
    if slot.result is None:
        return facts | {"state": slot.missing}
    record, engine = slot.result.record, part(slot.result, "environment", "engine")
    return (
        facts
        | {name: record.get(name) for name in ("state", "key", "queries")}
        | {name: engine.get(name) for name in ("engine", "base", "adapter")}
        | {f"{name}_sha256": record[name].get("sha256") for name in ("dataset", "first_stage")}
    )


def _readme(shown: Sequence[Table], absent: Sequence[Slot]) -> str:
    parts = []
    for level, table in zip(("#", "##"), shown):
        body = writers.to_markdown(replace(table, title="")).strip()
        parts += [f"{level} {table.title}", body]
    lines = [writers.plain(f"{slot.command}  # {slot.missing}") for slot in absent]
    parts += ["## Not there yet", "\n".join(["```sh", *lines, "```"])] * bool(absent)
    return "\n\n".join(parts) + "\n"
