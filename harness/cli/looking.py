"""`list`, `show`, `prompt` and `status`: what the registry and the results hold."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from harness.cli.base import (
    RESULTS,
    Format,
    RegistryDir,
    Results,
    app,
    check_format,
    open_registry,
    print_rows,
    say,
)
from harness.types import RegistryError, UsageError

# --- looking things up --------------------------------------------------------------------------


@app.command("list")
def list_(
    what: Annotated[
        str, typer.Argument(help="models, datasets, suites, prompts, methods")
    ] = "models",
    registry: RegistryDir = None,
    format: Annotated[str, typer.Option(help="text, md or json.")] = "text",
) -> None:
    """List what the registry holds."""
    from harness import listing

    check_format(format, ("text", "md", "json"))
    if what not in listing.LISTS:
        raise RegistryError(f"unknown list {what!r}", known=listing.LISTS, given=what)
    if format == "md" and what in listing.PAGES:
        print(listing.PAGES[what](open_registry(registry)))
        return
    brief = what == "models" and format == "text"
    rows = listing.models_in_brief if brief else listing.LISTS[what]
    print_rows(rows(open_registry(registry)), format)


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="A model, dataset, suite, prompt or cell folder.")],
    registry: RegistryDir = None,
) -> None:
    """Show everything about one name: source, limits, options, variants and how they differ."""
    from harness import listing

    print(listing.describe(open_registry(registry), name))


@app.command()
def prompt(
    model: Annotated[str, typer.Argument(help="A model of the registry.")],
    dataset: Annotated[str, typer.Option("--dataset", "-d")],
    query: Annotated[str | None, typer.Option(help="A query id; the first by default.")] = None,
    passages: Annotated[int | None, typer.Option(help="How many passages to show.")] = None,
    qrels: str | None = None,
    first_stage: str | None = None,
    tokenizer: Annotated[Path | None, typer.Option(help="A folder: print the exact text.")] = None,
    visible: Annotated[bool, typer.Option("--visible", help="Make white space visible.")] = False,
    registry: RegistryDir = None,
) -> None:
    """Print what a model is asked about a query, to the byte; first-stage order, unshuffled."""
    from harness import listing, plan

    selection = plan.Selection((model,), (dataset,), qrels=qrels, first_stage=first_stage)
    names = open_registry(registry)
    [cell, *more] = plan.cells_of(names, selection)
    if more:
        raise UsageError(f"{model} on {dataset} is {1 + len(more)} cells: name one of each")
    job = plan.Loader(names).job(cell, first_stage)
    if tokenizer is None and job.limits.unit == "tokens":
        say(False, "without --tokenizer, limits in tokens are not applied")
    text = listing.rendered(job, query, passages, tokenizer)
    print(listing.visible(text) if visible else text)


@app.command()
def status(results: Results = RESULTS, format: Format = "text") -> None:
    """List the cells of a results folder and their states."""
    from harness import listing

    check_format(format, ("text", "json"))
    print_rows(listing.cells(results), format)
