"""`report` and `paper`: what is made of finished cells, and what stands behind its numbers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import typer

from harness import store
from harness.cli import base
from harness.cli.datasets import data_of
from harness.published import load as load_published
from harness.specs import build, read_toml
from harness.types import (
    Cell,
    CellResult,
    HarnessError,
    MissingResourceError,
    Query,
    RegistryError,
    UsageError,
)


@base.app.command()
def report(
    results: base.Results = base.RESULTS,
    out: Annotated[Path, typer.Option("--out", help="Folder to write into.")] = Path("reports"),
    format: Annotated[
        str, base.choice("format", "md", "csv", "tex", "html", "json", "all", several=True)
    ] = "all",
    allow_partial: Annotated[bool, typer.Option("--allow-partial")] = False,
    with_text: base.WithText = False,
    published: base.PublishedToo = False,
    baseline: Annotated[
        str, typer.Option(help="The row that the others are tested against.")
    ] = "first-stage",
    marks: Annotated[
        str, typer.Option(help="dagger: against the baseline; letters: all pairs of a column.")
    ] = "dagger",
    correction: Annotated[str, typer.Option(help="holm or bonferroni.")] = "holm",
    scale: Annotated[int, typer.Option(help="100 as in papers, or 1.")] = 100,
    round_: Annotated[int, typer.Option("--round", help="Digits behind the point.")] = 1,
    gpu_hour_price: Annotated[
        float | None, typer.Option(min=0, help="Shows what 1,000 queries cost on the GPU used.")
    ] = None,
    registry: base.RegistryDir = None,
    quiet: base.Quiet = False,
) -> None:
    """Write tables, plots and the page from finished cells."""
    from harness.report import build as building
    from harness.report import quality, writers

    chosen = base.split([format])
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out}: is not a folder")
    names = base.open_registry(registry)
    states = ("complete", "partial") if allow_partial else ("complete",)
    cells = _finished(results, names, states)
    known = {"first-stage": None, **dict.fromkeys(cell.model for cell in cells)}
    if baseline not in known:
        raise RegistryError(f"no row {baseline!r} in {results}", known=known, given=baseline)
    stated = {"baseline": baseline, "marks": marks, "correction": correction, "scale": scale}
    layout = build(quality.Layout, stated | {"digits": round_}, "report")
    extra: dict[str, Any] = {"published": load_published(names) if published else ()}
    if not {"html", "all"}.isdisjoint(chosen):
        extra |= {"texts": page_texts(cells, names, with_text), "with_text": with_text}
    paths = building.write(cells, out, chosen, layout=layout, price=gpu_hour_price, **extra)
    if not quiet:
        print(writers.to_text(quality.quality(cells, layout=layout), base.width(100)))
    first = [path for name in ("index.html", "quality.md") for path in paths if path.name == name]
    print(f"{len(paths)} files in {out}: {first[0] if first else ''}")


def _finished(results: Path, registry: Any, states: Sequence[str]) -> list[CellResult]:
    """The cells in these states, datasets in the registry's order."""
    cells = [c for c in store.iterate(results) if c.record.get("state") in states]
    if not cells:
        raise MissingResourceError(f"{results}: holds no finished cell")
    order = {name: place for place, name in enumerate(registry.datasets)}
    return sorted(cells, key=lambda cell: order.get(cell.record["dataset"]["name"], len(order)))


def page_texts(cells: Sequence[CellResult], registry: Any, with_text: bool) -> dict[str, Any]:
    """Queries with passages and grades for the page: of collections whose licence allows it, or
    on request of all that are at hand, as they were measured."""
    out: dict[str, dict[str, Query]] = {}
    seen = set()
    for cell in cells:
        measured = cell.record["dataset"]
        place = (cell.dataset, cell.first_stage, measured["sha256"])
        if place in seen or not (with_text or measured.get("show_text")):
            continue
        seen.add(place)
        data, known = data_of(cell, registry), out.setdefault(cell.dataset, {})
        if data is None or ("imported" not in cell.record and data.sha256 != measured["sha256"]):
            told = "what was measured is not at hand: the page shows no texts of it"
            base.complain(f"{cell.dataset}, {cell.first_stage}: {told}")
            continue
        for query in data.queries:
            before = known.get(query.qid, query).candidates
            both = {c.docid: c for c in (*before, *query.candidates)}
            grades = dict(data.qrels[query.qid])
            known[query.qid] = replace(query, candidates=tuple(both.values()), judgements=grades)
    return {label: queries for label, queries in out.items() if queries}


# --- a suite as in a paper --------------------------------------------------------------------


@base.app.command()
def paper(
    suite: Annotated[Path, typer.Argument(help="A suite file; [paper] holds title and sources.")],
    results: base.Results = base.RESULTS,
    out: Annotated[Path, typer.Option("--out", help="The kit goes to OUT/SUITE.")] = Path("paper"),
    against: Annotated[str, typer.Option(help="published: compare with figures in print.")] = "",
    registry: base.RegistryDir = None,
    quiet: base.Quiet = False,
) -> None:
    """Write a suite's table as LaTeX, macros and CSV, with a manifest of the cells behind it.

    The exit code is 7 when cells are missing: the kit is written, with the commands to run.
    """
    from harness import plan
    from harness.report import paper as kits
    from harness.report import writers

    if against not in ("", "published"):
        raise RegistryError(f"--against {against!r}", known=("published",), given=against)
    names, selection = base.open_registry(registry), plan.from_suite(suite, plan.Selection())
    stated = {"title": suite.stem} | read_toml(suite).get("paper", {})
    terms = build(kits.Terms, stated, f"{suite}: [paper]")
    cells = plan.cells_of(names, selection)
    slots = [
        kits.Slot(cell, plan.command(cell, selection), *_standing(names, cell, results))
        for cell in cells
    ]
    columns = _columns(names, selection, cells)
    figures = load_published(names) if against else ()
    folder = out / suite.stem
    shown = kits.write(suite.stem, slots, columns, terms, folder, figures)
    if not quiet:
        print("\n\n".join(writers.to_text(table, base.width(100)) for table in shown))
    print(f"written to {folder}")
    if absent := [slot for slot in slots if slot.missing]:
        base.complain(
            f"{len(absent)} of {len(slots)} cells are no numbers yet: harness run {suite}"
            f" --results {results}; one by one in {folder / 'README.md'}"
        )
        raise typer.Exit(7)


def _columns(names: Any, selection: Any, cells: Sequence[Cell]) -> Any:
    """The table's columns, under the suites or families by which the datasets were named."""
    from harness import plan
    from harness.report.quality import columns_of

    heads = {cell.dataset.name: (cell.dataset_name, cell.dataset.short) for cell in cells}
    suites: dict[str, dict[str, str]] = defaultdict(dict)
    for text in selection.datasets:
        for spec in plan.find_datasets(names, text, selection):
            label, short = heads[spec.name]
            group = text if text in names.suites else spec.suite or spec.family
            suites[group][label] = short or spec.name
    return columns_of(suites, {name: tuple(some) for name, some in suites.items() if len(some) > 1})


def _standing(names: Any, cell: Cell, results: Path) -> tuple[CellResult | None, str]:
    """A cell's result, or why what is in its place is not a number."""
    from harness.report.tables import is_fake

    try:
        found = store.read(results / cell.folder)
        if found is None:
            return None, "not run"
        if (state := found.record["state"]) != "complete":
            return None, str(state)
        if is_fake(found):
            return None, "answered by the fake engine"
        why = "" if "imported" in found.record else _stale(names, cell, found)
    except HarnessError as error:
        why = str(error)
    return (None, why) if why else (found, "")


def _stale(names: Any, cell: Cell, found: CellResult) -> str:
    """Would the registry of today make another cell of it? Told without its data or engine, which
    are taken to be those of the record."""
    from harness import cell as cells
    from harness import gate
    from harness.data import Collection

    record, prompt = found.record, cell.model.prompt
    hashes = record["first_stage"]["sha256"], record["dataset"]["sha256"]
    data = Collection((), {}, cell.first_stage, *hashes, {}, True)
    job = cells.resolve(cell, names.prompt(prompt) if prompt else None, data)
    engine: Any = SimpleNamespace(fingerprint=record["environment"]["engine"])
    same = cells.key(job, engine if job.needs_engine else None) == record["key"]
    changed = gate.differences(record, cells.record_head(job, "", ""))
    settings = [text for text in changed if text.startswith(gate.SETTINGS)]
    if same and not (job.needs_engine and settings):
        return ""
    return f"stale ({'; '.join(settings) or 'another key'})"
