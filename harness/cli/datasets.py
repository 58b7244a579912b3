"""`prepare` and `audit-data`, `import` and `export`: data in and out."""

from __future__ import annotations

import io
import json
import sys
from contextlib import nullcontext, redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from harness import store
from harness.cli import base
from harness.types import DataError, HarnessError, MissingResourceError, RegistryError, UsageError

# --- data ---------------------------------------------------------------------------------------

Stage = Annotated[str | None, typer.Option("--first-stage", help="Its name, or a TREC run file.")]
Depth = Annotated[int | None, typer.Option("--depth", min=1, help="Candidates a query (--hits).")]
Name = Annotated[str | None, typer.Option("--name", help="Name of a dataset given by path.")]
Qrels = Annotated[str | None, typer.Option("--qrels", help="Judgements, if not the dataset's.")]


@base.app.command()
def prepare(
    dataset: base.Datasets = None,
    first_stage: Stage = None,
    depth: Depth = None,
    data: base.DataDir = None,
    force: Annotated[bool, typer.Option("--force", help="Make again what is there.")] = False,
    registry: base.RegistryDir = None,
    quiet: base.Quiet = False,
) -> None:
    """Retrieve candidates once (bm25, bm25s, either with +QUERY for a rewritten query of the
    dataset, or a run file): a run on them needs neither index nor network nor Java."""
    from harness.data import prepare as preparing
    from harness.data.prepared import data_folder

    lost = 0
    for spec in find_datasets(base.open_registry(registry), dataset):
        base.say(quiet, f"{spec.name}: {first_stage or spec.first_stage}")
        asked = spec, first_stage, depth or spec.depth, data or data_folder()
        try:
            with redirect_stderr(io.StringIO()) if quiet else nullcontext():
                ready = None if force else preparing.ready(*asked)
                path = ready or preparing.prepare(*asked)
        except HarnessError as error:
            base.complain(f"{spec.name}: {error}")
            lost = lost or error.exit_code
            continue
        base.say(quiet or not ready, f"{spec.name}: is there and intact; --force makes it again")
        print(path)
    if lost:
        raise typer.Exit(lost)


@base.app.command("audit-data")
def audit_data(
    dataset: base.Datasets = None,
    qrels: Qrels = None,
    name: Name = None,
    first_stage: Stage = None,
    depth: Depth = None,
    data: base.DataDir = None,
    registry: base.RegistryDir = None,
    format: base.TableFormat = "text",
) -> None:
    """Check queries, candidates and judgements before any engine time is spent on them."""
    from harness.data import audit, load

    base.use_data(data)
    found = []
    for spec in find_datasets(base.open_registry(registry), dataset, qrels, name):
        at = depth or spec.depth
        found.append(audit.audit(spec, load(spec, first_stage, at), at))
        if format != "json":
            base.print_rows(audit.rows(found[-1]), format)
    if format == "json":
        print(json.dumps(found, ensure_ascii=False, indent=1))
    if errors := [f"{row['dataset']}: {text}" for row in found for text in row["errors"]]:
        raise DataError("; ".join(errors))


def find_datasets(
    registry: Any, texts: list[str] | None, qrels: str | None = None, name: str | None = None
) -> list[Any]:
    from harness import plan

    asked = plan.Selection(qrels=qrels, name=name)
    found = [s for text in base.split(texts) for s in plan.find_datasets(registry, text, asked)]
    if not found:
        raise UsageError("name at least one dataset (-d)")
    return found


# --- the runs of others, and runs for others ----------------------------------------------------


@base.app.command("import")
def import_(
    run: Annotated[Path, typer.Argument(help="A TREC run that another program made.")],
    model: Annotated[str, typer.Option("--model", "-m", help="Whose run: any name.")],
    dataset: Annotated[
        str | None, typer.Option("--dataset", "-d", help="A name, also new, or a path.")
    ] = None,
    qrels: Qrels = None,
    first_stage: Stage = None,
    depth: Depth = None,
    data: base.DataDir = None,
    results: base.Results = base.RESULTS,
    registry: base.RegistryDir = None,
    format: base.Format = "text",
) -> None:
    """Measure a foreign run and make its cell: quality known, efficiency unknown."""
    from harness import exchange
    from harness.data import libraries
    from harness.types import ModelSpec

    base.use_data(data)
    names, text = base.open_registry(registry), dataset or libraries.layout(run).dataset
    if not text:
        raise UsageError(f"{run}: its name says no dataset: name one (-d)")
    spec = names.models.get(model) or ModelSpec(name=model, method=exchange.METHOD)
    known = _one_dataset(names, text, qrels)
    known = replace(known, qrels=qrels or known.qrels, judged_by="")
    cell = exchange.take_in(exchange.Foreign(run, spec, known, first_stage, depth), results)
    if format == "json":
        print(json.dumps(dict(cell.record), ensure_ascii=False))
        return
    ties, by_rank = cell.record["imported"], cell.record["imported"]["measures_in_rank_order"]
    print(f"{cell.folder}: {cell.record['queries']} queries, measured in trec_eval's order")
    print(f"{ties['ties']} tied scores in {ties['queries_with_ties']} queries")
    for name, count in cell.record["inputs"].items():
        print(f"{count} {name.replace('_', ' ')}")
    for name, value in cell.measures.items():
        print(f"{name} {value:.4f}, in rank order {by_rank[name]:.4f}")


@base.app.command()
def export(
    cell: Annotated[Path, typer.Argument(help="A cell's folder.")],
    format: Annotated[
        str, base.choice("format", "run", "requests", "results", "ir-metadata")
    ] = "run",
    out: Annotated[Path | None, typer.Option("--out", help="A file; stdout by default.")] = None,
    dataset: Annotated[str | None, typer.Option("--dataset", "-d", help="Where texts are.")] = None,
    qrels: Qrels = None,
    registry: base.RegistryDir = None,
) -> None:
    """Write a cell as others read it: a TREC run, rank_llm requests or results, ir_metadata."""
    from harness import exchange

    found, data = store.read(cell), None
    if found is None or not (cell / "run.trec").is_file():
        raise MissingResourceError(f"{cell}: holds no finished cell")
    if format in ("requests", "results"):
        data = data_of(found, base.open_registry(registry), dataset, qrels)
        base.say(
            data is not None, "the dataset is not at hand: no texts are written; name it with -d"
        )
    text = "".join(exchange.give_out(found, format, data))
    (out.write_text if out else sys.stdout.write)(text)


def _one_dataset(registry: Any, text: str, qrels: str | None) -> Any:
    """The one dataset that a name or path means; a new name is one, when it has judgements."""
    from harness.types import DatasetSpec

    try:
        [found] = find_datasets(registry, [text], qrels)
    except ValueError as error:
        raise UsageError(f"{text} is more than one dataset: name one") from error
    except RegistryError:
        if qrels is None or any(c in text for c in "*?["):
            raise
        return DatasetSpec(name=text, source="requests", qrels=qrels)
    return found


def data_of(cell: Any, registry: Any, text: str | None = None, qrels: str | None = None) -> Any:
    """The data behind a cell, or None when it is not at hand; asked for by name, it must be."""
    from harness.data import load

    stage = None if text else cell.record["first_stage"]["name"].partition("+depth=")[0]
    try:
        spec = _one_dataset(registry, text or cell.record["dataset"]["name"], qrels)
        return load(spec, stage, cell.record["depth"], cell.record["limit"])
    except HarnessError:
        if text:
            raise
        return None
