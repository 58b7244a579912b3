"""`cache`: looking after the store of calls."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from harness import store
from harness.cache import Cache
from harness.cli import base
from harness.cli.gating import matrix_of
from harness.cli.running import Matrix, with_matrix
from harness.types import DataError, MissingResourceError

cache_app = typer.Typer(help="Look after the call cache.", no_args_is_help=True)
base.app.add_typer(cache_app, name="cache")

CacheArgument = Annotated[Path, typer.Argument(help="A cache file.")]


@cache_app.command("stats")
def cache_stats(path: CacheArgument = base.RESULTS / ".cache.sqlite") -> None:
    """Count the stored answers."""
    with _existing(path) as cache:
        print(f"{path}: {cache.count()} answers, {path.stat().st_size / 1e6:.1f} MB")


@cache_app.command("verify")
def cache_verify(path: CacheArgument = base.RESULTS / ".cache.sqlite") -> None:
    """Check the file and every row's checksum; damaged rows are asked again when needed."""
    with _existing(path) as cache:
        bad = sum(completion is None for _, completion in cache.rows())
        print(f"{path}: {cache.count()} answers, {bad} damaged")
        fault = f"{bad} damaged rows" if bad else cache.fault()
    if fault:
        raise DataError(f"{fault}; `cache merge NEW {path}` saves what is sound", path=path)


@cache_app.command("merge")
def cache_merge(
    path: CacheArgument,
    others: Annotated[list[Path], typer.Argument(help="Caches to take answers from.")],
) -> None:
    """Add the sound answers of other caches to one, which is made if it is not there."""
    with closing(Cache(path)) as cache:
        for other_path in others:
            with _existing(other_path) as other:
                print(f"{other_path}: {cache.merge(other)} new answers")


@cache_app.command("export")
def cache_export(path: CacheArgument = base.RESULTS / ".cache.sqlite") -> None:
    """Print every sound answer as one JSON object a line."""
    from dataclasses import asdict

    with _existing(path) as cache:
        for key, completion in cache.rows():
            if completion is not None:
                print(json.dumps({"key": key.hex(), **asdict(completion)}))


@cache_app.command("why")
@with_matrix
def cache_why(matrix: Matrix) -> None:
    """Say which field of their identity keeps a cell's calls from being answered by the cache.

    The cell is named by its folder, or by the flags that run takes.
    """
    from harness import cell, plan, schedule
    from harness.matrix import open_for

    if matrix.suite and matrix.suite.is_dir():
        matrix = _made(matrix.suite, matrix)
    selection = matrix.selection()
    with _existing(matrix.cache or matrix.results / ".cache.sqlite") as cache:
        for job in plan.jobs(base.open_registry(matrix.registry), selection):
            if (engine := open_for(job, selection.serving)) is None:
                print(f"{job.cell}: asks no engine")
                continue
            identity, why = cell.identity(job.cell, engine), Counter[str]()
            for query in job.queries:
                flow = cell.flow(job, query, engine, Counter())
                if missed := schedule.replay(flow, cache, identity.key)[1]:
                    why[cache.nearest(identity, missed)] += 1
            print(f"{job.cell}: {why.total()} of {len(job.queries)} queries ask something new")
            for reason, count in why.most_common():
                print(f"  {count} x {reason}")


def _made(folder: Path, matrix: Matrix) -> Matrix:
    """The flags that made a finished cell, as its record has them, in its own place."""
    found = store.read(folder)
    if found is None or not found.record.get("command"):
        raise MissingResourceError(f"{folder}: holds no cell of `harness run`")
    given = {name: getattr(matrix, name) for name in ("cache", "registry", "data")}
    made = matrix_of(found.record["command"])
    return replace(made, results=folder.resolve().parents[2], **given)


def _existing(path: Path) -> Any:
    if not path.is_file():
        raise MissingResourceError(f"{path}: no such cache file")
    return closing(Cache(path))
