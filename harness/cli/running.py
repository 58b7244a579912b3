"""`run` and `plan`: a matrix from flags, its cells one by one, and their progress."""

from __future__ import annotations

import inspect
import json
import signal
import typing
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any

import typer

from harness.cli import base
from harness.types import (
    DEFAULT_SEED,
    DataError,
    HarnessError,
    Interrupted,
    MissingResourceError,
    UsageError,
)

# --- the matrix: run and plan -------------------------------------------------------------------


@dataclass
class Matrix:
    """The flags that state a matrix; `run` and `plan` share them."""

    suite: Annotated[Path | None, typer.Argument(help="A suite file with the same keys.")] = None
    model: base.Models = None
    dataset: base.Datasets = None
    qrels: Annotated[str | None, typer.Option(help="Judgements of a request file.")] = None
    name: Annotated[str | None, typer.Option(help="Name of a dataset given by path.")] = None
    first_stage: Annotated[str | None, typer.Option(help="Its name, or a TREC run file.")] = None
    depth: Annotated[int | None, typer.Option(help="Candidates a query (--hits).")] = None
    limit: Annotated[int | None, typer.Option(help="Only the first N queries.")] = None
    method: Annotated[str | None, typer.Option(help="Another method than the registry's.")] = None
    prompt: Annotated[str | None, typer.Option(help="Another prompt.")] = None
    adapter: Annotated[str | None, typer.Option(help="A LoRA adapter: hub id or folder.")] = None
    set: Annotated[list[str] | None, typer.Option(help="option=value, limits.x=, sampling.x=")] = (
        None
    )
    num_child: Annotated[int | None, typer.Option(help="Setwise: children of a node.")] = None
    k: Annotated[int | None, typer.Option(help="Ranks that must be exact (--top).")] = None
    size: Annotated[int | None, typer.Option(help="Listwise: window (--window-size).")] = None
    stride: Annotated[int | None, typer.Option(help="Listwise: stride (--step-size).")] = None
    passes: Annotated[int | None, typer.Option(help="Listwise: passes.")] = None
    permutations: Annotated[int | None, typer.Option(help="Setwise: votes on a set.")] = None
    engine: Annotated[str | None, typer.Option(help="Where to run; the registry's by default.")] = (
        None
    )
    protocol: Annotated[str, typer.Option(help="quality or latency.")] = "quality"
    concurrency: Annotated[int | None, typer.Option(help="Queries in flight.")] = None
    seed: Annotated[int, typer.Option(help="Seed of shuffles and random orders.")] = DEFAULT_SEED
    replicate: Annotated[int, typer.Option(help="Number of a repeated run; asks anew.")] = 0
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="Answers that no batch can change; slower.")
    ] = False
    strict_cache: Annotated[
        bool, typer.Option("--strict-cache", help="Versions and hardware decide about reuse too.")
    ] = False
    base_url: Annotated[str, typer.Option(help="http: an OpenAI-compatible endpoint.")] = ""
    served_model: Annotated[str, typer.Option(help="http: the model's name there.")] = ""
    tokenizer: Annotated[str, typer.Option(help="http: folder or hub id to count tokens with.")] = (
        ""
    )
    gpu: Annotated[
        list[str] | None, typer.Option(help="GPUs to plan for [default: h200,h100,a100].")
    ] = None
    max_gpu_hours: Annotated[
        float | None, typer.Option(min=0, help="Refuse what is estimated to need more.")
    ] = None
    results: base.Results = base.RESULTS
    cache: base.CacheFile = None
    registry: base.RegistryDir = None
    data: base.DataDir = None

    def selection(self) -> Any:
        """What the flags, and a suite file under them, ask for."""
        from harness import plan

        base.use_data(self.data)
        options = ("num_child", "k", "size", "stride", "passes", "permutations")
        given = [(name, getattr(self, name)) for name in options]
        selection = plan.Selection(
            models=base.split(self.model),
            datasets=base.split(self.dataset),
            set=(*(self.set or ()), *(f"{n}={v}" for n, v in given if v is not None)),
            **{name: getattr(self, name) for name in plan.PLAIN_FIELDS},
        )
        return plan.from_suite(self.suite, selection) if self.suite else selection

    def open_cache(self, *, make: bool = True) -> Any:
        from harness.cache import Cache

        path = self.cache or self.results / ".cache.sqlite"
        return Cache(path if make or path.exists() else None)


def with_matrix(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command Matrix's flags; the function receives them as one value."""

    @wraps(function)
    def command(**flags: Any) -> None:
        own = {field.name: flags.pop(field.name) for field in fields(Matrix)}
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # what batch systems send
        try:
            function(Matrix(**own), **flags)
        except KeyboardInterrupt:
            raise Interrupted(
                "stopped; every answer so far is in the cache: the same command goes on from there"
            ) from None

    hints = typing.get_type_hints(Matrix, include_extras=True)
    shared = [
        Parameter(f.name, Parameter.KEYWORD_ONLY, default=f.default, annotation=hints[f.name])
        for f in fields(Matrix)
    ]
    own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
    command.__signature__ = inspect.Signature([*shared, *own])  # type: ignore[attr-defined]
    return command


@dataclass(frozen=True)
class Hiring:
    """The flags that say who runs the cells."""

    executor: str = "local"
    address: str | None = None
    workers: int = 0

    def executed(self, matrix: Matrix, cache: Any, tell: Callable[[Any], None]) -> Any:
        """The executor, over this process or a Ray cluster."""
        from harness.matrix import Local

        serving = matrix.selection().serving
        if self.executor == "local":
            if self.address or self.workers:
                raise UsageError("--address and --workers are for --executor ray")
            return Local(serving)
        from harness.cluster import RayExecutor
        from harness.forecast import Forecaster

        seconds = Forecaster(cache, matrix.results, serving, ()).seconds
        return RayExecutor(serving, self.address, self.workers, seconds, tell)


@base.app.command()
@with_matrix
def run(
    matrix: Matrix,
    *,
    force: Annotated[bool, typer.Option("--force", help="Run finished cells again.")] = False,
    executor: Annotated[str, base.choice("executor", "local", "ray")] = "local",
    address: Annotated[str | None, typer.Option(help="ray: of a running cluster, or auto.")] = None,
    workers: Annotated[int, typer.Option(min=0, help="ray: most workers; 0 is all there is.")] = 0,
    format: base.Format = "text",
    quiet: base.Quiet = False,
) -> None:
    """Run every model on every dataset; finished cells are skipped by their key."""
    done = run_matrix(matrix, force, quiet, Hiring(executor, address, workers))
    if format == "json":
        print(json.dumps([dict(cell.record) for cell in done.results], ensure_ascii=False))
    elif done.results:
        from harness.report import tables, writers

        print(writers.to_text(tables.summary(done.results), base.width(100)))
        base.say(quiet, _summary(done))
    if done.failures:
        raise typer.Exit(done.failures[0][1].exit_code)


@base.app.command()
@with_matrix
def plan(matrix: Matrix, *, format: base.Format = "text") -> None:
    """Say what would run: cells, calls, tokens, GPU-hours, and what the cache already answers."""
    from harness import forecast

    cache = matrix.open_cache(make=False)
    try:
        rows = _forecast(matrix, cache)
    finally:
        cache.close()
    total = forecast.total(rows)
    if format == "json":
        print(json.dumps({"cells": rows, "total": total}, ensure_ascii=False, indent=1))
    else:
        base.print_rows([*rows, total], format)
    if matrix.max_gpu_hours is not None:
        forecast.check(rows, matrix.max_gpu_hours)


def _forecast(matrix: Matrix, cache: Any) -> list[dict[str, Any]]:
    """A row for every cell of the matrix."""
    from harness import plan
    from harness.forecast import GPUS, Forecaster

    selection = matrix.selection()
    gpus = tuple(name.lower() for name in base.split(matrix.gpu)) or GPUS
    forecaster = Forecaster(cache, matrix.results, selection.serving, gpus)
    return [*map(forecaster.row, plan.jobs(base.open_registry(matrix.registry), selection))]


def run_matrix(matrix: Matrix, force: bool, quiet: bool, hiring: Hiring | None = None) -> Any:
    """Run the cells; one that fails is reported and does not stop the others."""
    from harness import forecast, plan, store
    from harness import matrix as matrices
    from harness.cli.progress import Notes, progress

    selection, registry = matrix.selection(), base.open_registry(matrix.registry)
    loader, cells = plan.Loader(registry), plan.cells_of(registry, selection)
    lost: list[tuple[Any, HarnessError]] = []
    cache = matrix.open_cache()
    try:
        if matrix.max_gpu_hours is not None:
            forecast.check(_forecast(matrix, cache), matrix.max_gpu_hours)
        notes = Notes(matrix.results)
        executor = (hiring or Hiring()).executed(matrix, cache, notes.tell)
        with executor, progress(len(cells), quiet, notes) as show:
            entries = []
            for number, cell in enumerate(cells, 1):
                try:
                    job = loader.job(cell, selection.first_stage)
                except (DataError, MissingResourceError) as error:  # flags are wrong for all
                    lost.append((cell, error))
                    show.of(number, cell).failed(error)
                    continue
                watcher = show.of(number, job.cell)
                entries.append(matrices.Entry(job, plan.command(job.cell, selection), watcher))
            done = matrices.run(entries, cache, matrix.results, executor, force=force)
    finally:
        store.write_progress(matrix.results, [])
        cache.close()
    done.failures[:0] = lost
    return done


def _summary(done: Any) -> str:
    asked = "the engine was asked nothing" if not done.asked else f"{done.asked} calls asked"
    return (
        f"{len(done.results)} cells, {done.skipped} of them finished before;"
        f" {asked}, {done.cached} answers came from the cache"
    )
