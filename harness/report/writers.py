"""Every format of a table: text, Markdown, LaTeX, CSV and JSON, from the same printed values.

Owns escaping, so that no name can steer a terminal, Markdown or TeX, and how files are written. It
must not round: what is printed was decided when the table was made.
"""

from __future__ import annotations

import csv
import html
import io
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from textwrap import wrap
from typing import Any

from harness.report import tables
from harness.report.tables import Row, Table, Value
from harness.types import CellResult


def write_file(path: Path, content: str | bytes) -> Path:
    """Write beside the place, then rename: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    with os.fdopen(handle, "wb") as file:
        file.write(content.encode("utf-8", "replace") if isinstance(content, str) else content)
    os.chmod(name, 0o644)
    os.replace(name, path)
    return path


def plain(text: str) -> str:
    """No control characters: a name from a file must not steer the terminal."""
    return "".join(c if c.isprintable() else " " for c in text)


def _blocks(table: Table) -> list[tuple[str, list[Row]]]:
    return [(group, list(rows)) for group, rows in groupby(table.rows, lambda row: row.group)]


def _spans(table: Table) -> list[tuple[str, int]]:
    """Headings above neighbouring columns and how many each covers; empty without headings."""
    spans = [(group, len(list(some))) for group, some in groupby(table.columns, lambda c: c.group)]
    return spans if any(group for group, _ in spans) else []


# --- for people -------------------------------------------------------------------------------


def to_text(table: Table, width: int = 100) -> str:
    """Plain columns for a terminal; footnote signs hang to the right of the aligned numbers.

    Columns that do not fit the width follow below, beside the labels once more.
    """
    labels = ["model", *(f"  {plain(row.label)}" for row in table.rows)]
    left = [label.ljust(max(map(len, labels))) for label in labels]
    columns = [_text_column(table, i) for i in range(len(table.columns))]
    out: list[str] = []
    for some in _folded(columns, width - len(left[0])):
        head, *lines = ["  ".join(line).rstrip() for line in zip(left, *some)]
        number = iter(lines)
        out += [""] * bool(out) + [head]
        for group, rows in _blocks(table):
            out += [plain(group), *(next(number) for _ in rows)]
    below = [table.caption] * bool(table.caption) + [f"- {note}" for note in table.notes]
    return "\n".join([*out, *(line for text in below for line in wrap(plain(text), width))])


def _folded(columns: Sequence[list[str]], width: int) -> list[list[list[str]]]:
    """Columns in parts of at most this width; a part holds one column at least."""
    parts: list[list[list[str]]] = [[]]
    for column in columns:
        used = sum(2 + len(other[0]) for other in parts[-1])
        if parts[-1] and used + 2 + len(column[0]) > width:
            parts.append([])
        parts[-1].append(column)
    return parts


def _text_column(table: Table, i: int) -> list[str]:
    """Head and values of a column, all of one width, the decimal points below one another."""
    values = [row.cells[i] for row in table.rows]
    hang = max((len(v.note) for v in values), default=0)
    texts = [plain(table.columns[i].head), *(v.text + v.note.ljust(hang) for v in values)]
    return [text.rjust(max(map(len, texts))) for text in texts]


def to_markdown(table: Table) -> str:
    """A GitHub table; block heads are rows in italics."""
    lines = [["Model", *(_markdown(column.head) for column in table.columns)]]
    lines += [["---", *("---:" for _ in table.columns)]]
    for group, rows in _blocks(table):
        lines += [[f"*{_markdown(group)}*", *("" for _ in table.columns)]]
        lines += [[_markdown(row.label), *map(_markdown_value, row.cells)] for row in rows]
    title = f"**{_markdown(table.title)}.** " if table.title else ""
    notes = [f"- {_markdown(note)}" for note in table.notes]
    body = [f"| {' | '.join(line)} |" for line in lines]
    head = (title + _markdown(table.caption)).strip()
    return "\n".join([head, "", *body, "", *notes]).strip() + "\n"


def _markdown(text: str) -> str:
    safe = html.escape(plain(text), quote=False)
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", safe)


def _markdown_value(v: Value) -> str:
    marked = {"": "{}", "best": "**{}**", "second": "<u>{}</u>"}[v.mark].format(v.text)
    return marked + (f"<sup>{v.note}</sup>" if v.note else "")


_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': "''",
    "—": "---", "†": r"$^\dagger$", "‡": r"$^\ddagger$", "§": r"$^\S$", "¶": r"$^\P$",
}  # fmt: skip


TIGHT = r"\footnotesize\setlength{\tabcolsep}{2.5pt}"  # a table across both columns of a page


def _latex(text: str) -> str:
    return "".join(_LATEX.get(c, c) for c in plain(text))


def to_latex(table: Table, label: str = "tab:results") -> str:
    """A booktabs table: blocks with a head row in italics, best bold, second underlined."""
    width = len(table.columns)
    body = [*_latex_spans(table), _latex_line("Model", *(_latex(c.head) for c in table.columns))]
    for group, rows in _blocks(table):
        head = rf"\multicolumn{{{width + 1}}}{{l}}{{\textit{{{_latex(group)}}}}}"
        body += [r"\midrule", _latex_line(head)]
        body += [_latex_line(_latex(row.label), *map(_latex_value, row.cells)) for row in rows]
    small = [r"\par\smallskip\raggedright\footnotesize"] * bool(table.notes)
    kind, tight = ("table*", [TIGHT]) if width > 6 else ("table", [])
    return "\n".join([
        r"% needs \usepackage{booktabs}", rf"\begin{{{kind}}}", r"\centering", *tight,
        rf"\caption{{{_latex(table.caption or table.title)}}}", rf"\label{{{label}}}",
        rf"\begin{{tabular}}{{l{'r' * width}}}", r"\toprule", *body, r"\bottomrule",
        r"\end{tabular}", *small, *(_latex(note) + r"\par" for note in table.notes),
        rf"\end{{{kind}}}", "",
    ])  # fmt: skip


def _latex_line(*cells: str) -> str:
    return " & ".join(cells) + r" \\"


def _latex_spans(table: Table) -> list[str]:
    """The headings above the columns, and the rules below them."""
    heads, rules, start = [""], "", 2
    for group, span in _spans(table):
        heads.append(rf"\multicolumn{{{span}}}{{c}}{{{_latex(group)}}}")
        rules += rf"\cmidrule(lr){{{start}-{start + span - 1}}}" if group else ""
        start += span
    return [_latex_line(*heads), rules] if rules else []


def _latex_value(v: Value) -> str:
    minus, text = "$-$" * v.text.startswith("-"), _latex(v.text.removeprefix("-"))
    mark = {"": "{}", "best": r"\textbf{{{}}}", "second": r"\underline{{{}}}"}[v.mark]
    note = "".join(_LATEX.get(c, rf"\textsuperscript{{{c}}}") for c in v.note)
    return mark.format(minus + text) + (rf"\rlap{{{note}}}" if len(v.note) == 1 else note)


# --- for programs -----------------------------------------------------------------------------


def csv_text(rows: Iterable[Sequence[Any]]) -> str:
    """CSV with line feeds; None is an empty field."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue()


def to_csv(table: Table) -> str:
    """Wide CSV of the printed numbers; what is absent is empty."""
    head = ("group", "model", *(column.key for column in table.columns))
    texts = [[v.text.replace(tables.ABSENT, "") for v in row.cells] for row in table.rows]
    return csv_text([head, *([r.group, r.label, *t] for r, t in zip(table.rows, texts))])


COSTS = ("calls", "prompt_tokens", "generated_tokens", "seconds")
LONG = (
    "model", "dataset", "first_stage", "depth", "protocol", "measure", "value", "queries", "key",
)  # fmt: skip


def to_long_csv(cells: Sequence[CellResult]) -> str:
    """One row per finished cell and measure, unrounded; costs are totals of the cell."""
    rows: list[Sequence[Any]] = [(*LONG, *COSTS)]
    for cell in tables.shown(cells):
        record, costs = cell.record, tables.part(cell, "efficiency")
        kind = tables.part(cell, "protocol").get("kind")
        start = (cell.model, cell.dataset, tables.first_stage_of(cell), record["depth"], kind)
        end = (record.get("queries"), record["key"], *(costs.get(key) for key in COSTS))
        rows += [(*start, name, repr(number), *end) for name, number in cell.measures.items()]
    return csv_text(rows)


def to_json(table: Table) -> str:
    """The table as it stands, unrounded numbers beside the printed ones."""
    return json.dumps(asdict(table), indent=1, ensure_ascii=False) + "\n"


WRITERS: dict[str, Callable[[Table], str]] = {
    "md": to_markdown, "csv": to_csv, "tex": to_latex, "json": to_json,
}  # fmt: skip
