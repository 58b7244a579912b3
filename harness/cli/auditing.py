"""`audit`: do a model's answers depend on what else is asked?"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from harness.cli.base import Format, app, check_format, open_registry, print_rows
from harness.cli.running import Matrix, with_matrix
from harness.types import MissingResourceError, UsageError


@app.command()
@with_matrix
def audit(
    matrix: Matrix,
    *,
    sample: Annotated[int, typer.Option(min=1, help="Stored calls to ask again.")] = 200,
    format: Format = "text",
) -> None:
    """Ask a model's stored calls again, alone and in batches: which answers flip?"""
    from harness import flips, plan
    from harness.matrix import open_for

    check_format(format, ("text", "md", "json"))
    if matrix.suite and not matrix.suite.is_file():
        matrix = replace(matrix, suite=None, model=[*(matrix.model or ()), str(matrix.suite)])
    selection, registry = matrix.selection(), open_registry(matrix.registry)
    loader, rows = plan.Loader(registry), []
    if not (matrix.cache or matrix.results / ".cache.sqlite").is_file():
        raise MissingResourceError(f"{matrix.results}: no stored calls; run the cell first")
    cache = matrix.open_cache()
    try:
        for cell in plan.cells_of(registry, selection):
            job = loader.job(cell, selection.first_stage)
            if (engine := open_for(job, selection.serving)) is not None:
                try:
                    found = flips.Audit(job, engine, cache).rows(sample, selection.seed)
                finally:
                    engine.close()
                rows += [{"cell": str(job.cell)} | row for row in found]
    finally:
        cache.close()
    if not rows:
        raise UsageError("no engine answers for these models")
    print_rows(rows, format)
