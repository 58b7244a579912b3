"""`run` and `plan`: a matrix from flags, its cells one by one, and their progress."""

from __future__ import annotations

import inspect
import json
import signal
import sys
import time
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial, wraps
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any

import typer

from harness.cli.base import (
    RESULTS,
    CacheFile,
    DataDir,
    Datasets,
    Format,
    Models,
    Quiet,
    RegistryDir,
    Results,
    app,
    check_format,
    complain,
    open_registry,
    print_rows,
    say,
    split,
    use_data,
)
from harness.types import DEFAULT_SEED, DataError, HarnessError, Interrupted, MissingResourceError

# --- the matrix: run and plan -------------------------------------------------------------------


@dataclass
class Matrix:
    """The flags that state a matrix; `run` and `plan` share them."""

    suite: Annotated[Path | None, typer.Argument(help="A suite file with the same keys.")] = None
    model: Models = None
    dataset: Datasets = None
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
    results: Results = RESULTS
    cache: CacheFile = None
    registry: RegistryDir = None
    data: DataDir = None

    def selection(self) -> Any:
        """What the flags, and a suite file under them, ask for."""
        from harness import plan

        use_data(self.data)
        options = ("num_child", "k", "size", "stride", "passes", "permutations")
        given = [(name, getattr(self, name)) for name in options]
        selection = plan.Selection(
            models=split(self.model),
            datasets=split(self.dataset),
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


@app.command()
@with_matrix
def run(
    matrix: Matrix,
    *,
    force: Annotated[bool, typer.Option("--force", help="Run finished cells again.")] = False,
    format: Format = "text",
    quiet: Quiet = False,
) -> None:
    """Run every model on every dataset; finished cells are skipped by their key."""
    check_format(format, ("text", "json"))
    done = run_matrix(matrix, force, quiet)
    if format == "json":
        print(json.dumps([dict(cell.record) for cell in done.results], ensure_ascii=False))
    elif done.results:
        from harness.report import tables, writers

        print(writers.to_text(tables.summary(done.results)))
        say(quiet, _summary(done))
    if done.failures:
        raise typer.Exit(done.failures[0][1].exit_code)


@app.command()
@with_matrix
def plan(matrix: Matrix, *, format: Format = "text") -> None:
    """Say what would run: cells, calls, tokens, GPU-hours, and what the cache already answers."""
    from harness import forecast

    check_format(format, ("text", "json"))
    cache = matrix.open_cache(make=False)
    try:
        rows = _forecast(matrix, cache)
    finally:
        cache.close()
    total = forecast.total(rows)
    if format == "json":
        print(json.dumps({"cells": rows, "total": total}, ensure_ascii=False, indent=1))
    else:
        print_rows([*rows, total], format)
    if matrix.max_gpu_hours is not None:
        forecast.check(rows, matrix.max_gpu_hours)


def _forecast(matrix: Matrix, cache: Any) -> list[dict[str, Any]]:
    """A row for every cell of the matrix."""
    from harness import plan
    from harness.forecast import GPUS, Forecaster

    selection, registry = matrix.selection(), open_registry(matrix.registry)
    gpus = tuple(name.lower() for name in split(matrix.gpu)) or GPUS
    forecaster = Forecaster(cache, matrix.results, selection.serving, gpus)
    loader, cells = plan.Loader(registry), plan.cells_of(registry, selection)
    return [forecaster.row(loader.job(cell, selection.first_stage)) for cell in cells]


def run_matrix(matrix: Matrix, force: bool, quiet: bool) -> Any:
    """Run the cells; one that fails is reported and does not stop the others."""
    from harness import forecast, plan, store
    from harness import matrix as matrices

    selection, registry = matrix.selection(), open_registry(matrix.registry)
    loader, cells = plan.Loader(registry), plan.cells_of(registry, selection)
    lost: list[tuple[Any, HarnessError]] = []
    cache = matrix.open_cache()
    try:
        if matrix.max_gpu_hours is not None:
            forecast.check(_forecast(matrix, cache), matrix.max_gpu_hours)
        with _progress(len(cells), quiet, _Notes(matrix.results)) as show:
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
            done = matrices.run(entries, cache, matrix.results, selection.serving, force=force)
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


class _Notes:
    """The cells of this run and how far they are, where `harness serve` looks for them."""

    def __init__(self, results: Path) -> None:
        self.results, self.written = results, 0.0
        self.cells: dict[str, dict[str, Any]] = {}

    def note(self, cell: str, state: str, done: int = 0, total: int = 0, calls: int = 0) -> None:
        """Every change of a state is written at once, the rest once a second."""
        from harness import store

        known, now = self.cells.get(cell, {}).get("state"), time.monotonic()
        told = {"cell": cell, "state": state, "done": done, "total": total, "calls": calls}
        self.cells[cell] = told
        if state != known or now > self.written + 1:
            store.write_progress(self.results, list(self.cells.values()))
            self.written = now


@dataclass
class _Shown:
    """The progress of one cell as plain lines, for logs and CI."""

    head: str
    note: Callable[..., None]
    quiet: bool = False

    def line(self, text: str) -> None:
        if not self.quiet:
            print(f"{self.head}: {text}", file=sys.stderr, flush=True)

    def started(self) -> None:
        self.note("running")
        self.line("started")

    def skipped(self) -> None:
        self.note("complete")
        self.line("finished before")

    def failed(self, error: HarnessError) -> None:
        self.note("failed")
        complain(f"{self.head.partition(' ')[2]}: {error}")

    def progress(self, done: int, total: int, calls: int) -> None:
        """Lines would flood a log; only a bar shows every query."""
        self.note("running", done, total, calls)

    def finished(self, result: Any) -> None:
        self.note("complete")
        name, value = next(iter(result.measures.items()))
        self.line(f"{name} {value:.4f}")


@dataclass
class _Bar(_Shown):
    """The progress of one cell as a bar, on a terminal."""

    bars: Any = None
    task: Any = None

    def line(self, text: str) -> None:
        self.bars.console.print(f"{self.head}: {text}", markup=False, highlight=False)

    def started(self) -> None:
        self.note("running")
        self.task = self.bars.add_task(self.head, total=None, calls=0)

    def progress(self, done: int, total: int, calls: int) -> None:
        super().progress(done, total, calls)
        self.bars.update(self.task, completed=done, total=total, calls=calls)

    def finished(self, result: Any) -> None:
        self.bars.remove_task(self.task)
        super().finished(result)


@dataclass
class _Progress:
    total: int
    quiet: bool
    notes: _Notes
    bars: Any = None

    def of(self, number: int, cell: Any) -> _Shown:
        head, note = f"[{number}/{self.total}] {cell}", partial(self.notes.note, str(cell))
        note("planned")
        return _Bar(head, note, bars=self.bars) if self.bars else _Shown(head, note, self.quiet)


@contextmanager
def _progress(total: int, quiet: bool, notes: _Notes) -> Iterator[_Progress]:
    if quiet or not sys.stderr.isatty():
        yield _Progress(total, quiet, notes)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
        TextColumn("queries, {task.fields[calls]} calls"), TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        yield _Progress(total, quiet, notes, bars)
