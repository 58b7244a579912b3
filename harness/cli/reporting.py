"""`report` and `cache`: what is made of finished cells, and the store of calls."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from harness.cli.base import (
    RESULTS,
    Quiet,
    RegistryDir,
    Results,
    app,
    cache_app,
    check_format,
    open_registry,
    split,
)
from harness.types import DataError, MissingResourceError, UsageError

# --- reports and the cache ----------------------------------------------------------------------


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
        bool, typer.Option("--published", help="Show published figures beside ours, marked so.")
    ] = False,
    registry: RegistryDir = None,
    quiet: Quiet = False,
) -> None:
    """Write tables, plots and the page from finished cells."""
    from harness import store
    from harness.published import load as load_published
    from harness.report import build, tables, writers

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
    texts = _texts(cells, names, with_text)
    figures = load_published(names) if published else ()
    paths = build.write(cells, out, chosen, texts=texts, with_text=with_text, published=figures)
    if not quiet:
        print(writers.to_text(tables.quality(cells, figures, baseline="first-stage")))
    print(f"{len(paths)} files in {out}: {_first(paths, 'index.html', 'quality.md')}")


def _first(paths: Sequence[Path], *names: str) -> str:
    found = [str(path) for name in names for path in paths if path.name == name]
    return found[0] if found else ""


def _texts(cells: Sequence[Any], registry: Any, with_text: bool) -> dict[str, Any]:
    """Passages for the page: of collections whose licence allows it, or of all on request."""
    from harness.data import load

    out: dict[str, Any] = {}
    for cell in cells:
        name = cell.record["dataset"]["name"]
        if cell.dataset in out or name not in registry.datasets:
            continue
        spec = registry.datasets[name]
        if spec.source == "folder" and (spec.show_text or with_text):
            data = load(spec, None, cell.record["depth"], cell.record["limit"])
            out[cell.dataset] = {
                "queries": {q.qid: q.text for q in data.queries},
                "documents": {c.docid: c.text for q in data.queries for c in q.candidates},
                "qrels": {qid: dict(rels) for qid, rels in data.qrels.items()},
            }
    return out


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
