"""`paper`: a suite's table with what stands behind every number, and beside figures in print."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import typer

from harness.cli.base import RESULTS, Quiet, RegistryDir, Results, app, complain, open_registry
from harness.types import Cell, CellResult, HarnessError, RegistryError


@app.command()
def paper(
    suite: Annotated[Path, typer.Argument(help="A suite file; [paper] holds title and sources.")],
    results: Results = RESULTS,
    out: Annotated[Path, typer.Option("--out", help="The kit goes to OUT/SUITE.")] = Path("paper"),
    against: Annotated[str, typer.Option(help="published: compare with figures in print.")] = "",
    registry: RegistryDir = None,
    quiet: Quiet = False,
) -> None:
    """Write a suite's table as LaTeX, macros and CSV, with a manifest of the cells behind it.

    The exit code is 7 when cells are missing: the kit is written, with the commands to run.
    """
    from harness import plan
    from harness.published import load as load_published
    from harness.report import paper as kits
    from harness.report import writers
    from harness.report.quality import columns_of
    from harness.specs import build, read_toml

    if against not in ("", "published"):
        raise RegistryError(f"--against {against!r}", known=("published",), given=against)
    names, selection = open_registry(registry), plan.from_suite(suite, plan.Selection())
    stated = {"title": suite.stem} | read_toml(suite).get("paper", {})
    terms = build(kits.Terms, stated, f"{suite}: [paper]")
    cells = plan.cells_of(names, selection)
    slots = [
        kits.Slot(cell, plan.command(cell, selection), *_standing(names, cell, results))
        for cell in cells
    ]
    heads = {cell.dataset.name: (cell.dataset_name, cell.dataset.short) for cell in cells}
    suites: dict[str, dict[str, str]] = defaultdict(dict)
    for text in selection.datasets:
        for spec in plan.find_datasets(names, text, selection):
            label, short = heads[spec.name]
            group = text if text in names.suites else spec.suite or spec.family
            suites[group][label] = short or spec.name
    averages = {name: tuple(some) for name, some in suites.items() if len(some) > 1}
    figures = load_published(names) if against else ()
    folder = out / suite.stem
    shown = kits.write(suite.stem, slots, columns_of(suites, averages), terms, folder, figures)
    if not quiet:
        print("\n\n".join(map(writers.to_text, shown)))
    print(f"written to {folder}")
    if absent := [slot for slot in slots if slot.missing]:
        complain(
            f"{len(absent)} of {len(slots)} cells are no numbers yet: harness run {suite}"
            f" --results {results}; one by one in {folder / 'README.md'}"
        )
        raise typer.Exit(7)


def _standing(names: Any, cell: Cell, results: Path) -> tuple[CellResult | None, str]:
    """A cell's result, or why what is in its place is not a number."""
    from harness import store
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
