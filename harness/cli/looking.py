"""`list`, `show`, `prompt` and `status`: what the registry and the results hold."""

from __future__ import annotations

from typing import Annotated

import typer

from harness.cli import base
from harness.types import RegistryError, UsageError

# --- looking things up --------------------------------------------------------------------------


@base.app.command("list")
def list_(
    what: Annotated[
        str, typer.Argument(help="models, datasets, suites, prompts, methods")
    ] = "models",
    registry: base.RegistryDir = None,
    format: base.TableFormat = "text",
) -> None:
    """List what the registry holds."""
    from harness import listing

    if what not in listing.LISTS:
        raise RegistryError(f"unknown list {what!r}", known=listing.LISTS, given=what)
    brief = what == "models" and format == "text"
    rows = listing.models_in_brief if brief else listing.LISTS[what]
    base.print_rows(rows(base.open_registry(registry)), format)


@base.app.command()
def show(
    name: Annotated[str, typer.Argument(help="A model, dataset, suite, prompt or cell folder.")],
    registry: base.RegistryDir = None,
) -> None:
    """Show everything about one name: source, limits, options, variants and how they differ."""
    from harness import listing

    print(listing.describe(base.open_registry(registry), name))


@base.app.command()
def prompt(
    model: Annotated[str, typer.Argument(help="A model of the registry.")],
    dataset: Annotated[str, typer.Option("--dataset", "-d")],
    query: Annotated[str | None, typer.Option(help="A query id; the first by default.")] = None,
    qrels: str | None = None,
    first_stage: str | None = None,
    tokenizer: Annotated[str | None, typer.Option(help="A folder or hub id: exact text.")] = None,
    visible: Annotated[bool, typer.Option("--visible", help="Make white space visible.")] = False,
    registry: base.RegistryDir = None,
) -> None:
    """Print what a model is asked about a query, to the byte; first-stage order, unshuffled."""
    from harness import listing, plan

    selection = plan.Selection((model,), (dataset,), qrels=qrels, first_stage=first_stage)
    names = base.open_registry(registry)
    [cell, *more] = plan.cells_of(names, selection)
    if more:
        raise UsageError(f"{model} on {dataset} is {1 + len(more)} cells: name one of each")
    job = plan.Loader(names).job(cell, first_stage)
    if tokenizer is None and job.limits.unit == "tokens":
        base.say(False, "without --tokenizer, limits in tokens are not applied")
    text = listing.rendered(job, query, tokenizer)
    print(listing.visible(text) if visible else text)


@base.app.command()
def status(results: base.Results = base.RESULTS, format: base.Format = "text") -> None:
    """List the cells of a results folder and their states, and the runs that fill it now."""
    from harness import listing

    cells, runs = listing.cells(results), listing.going(results)
    base.print_rows([*cells, *runs] if format == "json" else cells, format)
    for run in runs if format == "text" else ():
        print(listing.progress(run))
