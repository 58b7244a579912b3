"""`cache`: looking after the store of calls."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from harness.cli.base import RESULTS, app
from harness.types import DataError, MissingResourceError

cache_app = typer.Typer(help="Look after the call cache.", no_args_is_help=True)
app.add_typer(cache_app, name="cache")

CacheArgument = Annotated[Path, typer.Argument(help="A cache file.")]


@cache_app.command("stats")
def cache_stats(path: CacheArgument = RESULTS / ".cache.sqlite") -> None:
    """Count the stored answers."""
    with _existing_cache(path) as cache:
        print(f"{path}: {cache.count()} answers, {path.stat().st_size / 1e6:.1f} MB")


@cache_app.command("verify")
def cache_verify(path: CacheArgument = RESULTS / ".cache.sqlite") -> None:
    """Check every row's checksum; damaged rows are asked again when they are needed."""
    with _existing_cache(path) as cache:
        bad = sum(completion is None for _, completion in cache.rows())
        print(f"{path}: {cache.count()} answers, {bad} damaged")
    if bad:
        raise DataError(f"{bad} damaged rows", path=path)


@cache_app.command("merge")
def cache_merge(
    path: CacheArgument,
    others: Annotated[list[Path], typer.Argument(help="Caches to take answers from.")],
) -> None:
    """Add the answers of other caches to one."""
    from harness.cache import Cache

    cache = Cache(path)
    for other_path in others:
        with _existing_cache(other_path) as other:
            print(f"{other_path}: {cache.merge(other)} new answers")
    cache.close()


@cache_app.command("export")
def cache_export(path: CacheArgument = RESULTS / ".cache.sqlite") -> None:
    """Print every sound answer as one JSON object a line."""
    from dataclasses import asdict

    with _existing_cache(path) as cache:
        for key, completion in cache.rows():
            if completion is not None:
                print(json.dumps({"key": key.hex(), **asdict(completion)}, ensure_ascii=False))


@contextmanager
def _existing_cache(path: Path) -> Iterator[Any]:
    from harness.cache import Cache

    if not path.is_file():
        raise MissingResourceError(f"{path}: no such cache file")
    cache = Cache(path)
    try:
        yield cache
    finally:
        cache.close()
