"""`report`: what is made of finished cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from harness.cli.base import (
    RESULTS,
    Quiet,
    RegistryDir,
    Results,
    app,
    check_format,
    complain,
    open_registry,
    split,
)
from harness.cli.datasets import data_of
from harness.types import CellResult, MissingResourceError, Query, RegistryError, UsageError


@app.command()
def report(
    results: Results = RESULTS,
    out: Annotated[Path, typer.Option("--out", help="Folder to write into.")] = Path("reports"),
    format: Annotated[str, typer.Option(help="md, csv, tex, html, json or all.")] = "all",
    allow_partial: Annotated[bool, typer.Option("--allow-partial")] = False,
    with_text: Annotated[
        bool, typer.Option("--with-text", help="Put passages in the page.")
    ] = False,
    published: Annotated[
        bool, typer.Option("--published", help="Also hold figures in print against ours.")
    ] = False,
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
    registry: RegistryDir = None,
    quiet: Quiet = False,
) -> None:
    """Write tables, plots and the page from finished cells."""
    from harness import store
    from harness.published import load as load_published
    from harness.report import build, quality, writers
    from harness.specs import build as build_from

    chosen = split([format])
    for one in chosen:
        check_format(one, ("md", "csv", "tex", "html", "json", "all"))
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out}: is not a folder")
    states = ("complete", "partial") if allow_partial else ("complete",)
    cells = [c for c in store.iterate(results) if c.record.get("state") in states]
    if not cells:
        raise MissingResourceError(f"{results}: holds no finished cell")
    names = open_registry(registry)
    order = {name: place for place, name in enumerate(names.datasets)}
    cells.sort(key=lambda cell: order.get(cell.record["dataset"]["name"], len(order)))
    known = {"first-stage": None, **dict.fromkeys(cell.model for cell in cells)}
    if baseline not in known:
        raise RegistryError(f"no row {baseline!r} in {results}", known=known, given=baseline)
    stated = {"baseline": baseline, "marks": marks, "correction": correction, "scale": scale}
    layout = build_from(quality.Layout, stated | {"digits": round_}, "report")
    pages = not {"html", "all"}.isdisjoint(chosen)
    texts = page_texts(cells, names, with_text) if pages else {}
    figures = load_published(names) if published else ()
    paths = build.write(
        cells,
        out,
        chosen,
        texts=texts,
        with_text=with_text,
        published=figures,
        layout=layout,
        price=gpu_hour_price,
    )
    if not quiet:
        print(writers.to_text(quality.quality(cells, layout=layout)))
    print(f"{len(paths)} files in {out}: {_first(paths, 'index.html', 'quality.md')}")


def _first(paths: Sequence[Path], *names: str) -> str:
    found = [str(path) for name in names for path in paths if path.name == name]
    return found[0] if found else ""


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
            complain(f"{cell.dataset}, {cell.first_stage}: what was measured is not at hand:"
                     " the page shows no texts of it")  # fmt: skip
            continue
        for query in data.queries:
            before = known.get(query.qid, query).candidates
            both = {c.docid: c for c in (*before, *query.candidates)}
            grades = dict(data.qrels[query.qid])
            known[query.qid] = replace(query, candidates=tuple(both.values()), judgements=grades)
    return {label: queries for label, queries in out.items() if queries}
