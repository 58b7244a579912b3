"""What the commands share: the application, common flags, and how rows and errors are printed."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from harness.types import RegistryError

app = typer.Typer(
    name="harness",
    help="Benchmark LLM rerankers: models x datasets, cached, measured, reported.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

FLAG_ALIASES = {
    "--hits": "--depth", "--step-size": "--stride", "--window": "--size",
    "--window-size": "--size", "--top": "--k", "--num-permutation": "--permutations",
}  # fmt: skip

Models = Annotated[
    list[str] | None, typer.Option("--model", "-m", help="Names, globs or a folder; commas too.")
]
Datasets = Annotated[
    list[str] | None, typer.Option("--dataset", "-d", help="Names, suites, globs or a path.")
]
Results = Annotated[Path, typer.Option("--results", help="Folder of the cells.")]
CacheFile = Annotated[
    Path | None, typer.Option("--cache", help="The call cache [default: RESULTS/.cache.sqlite].")
]
RegistryDir = Annotated[
    Path | None, typer.Option("--registry", help="Your own models, datasets, prompts on top.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only the result and errors.")]
Format = Annotated[str, typer.Option("--format", help="text, or json for machines.")]
DataDir = Annotated[
    Path | None, typer.Option("--data", help="Prepared candidates [$RERANK_HARNESS_DATA].")
]
RESULTS = Path("results")


def complain(message: str) -> None:
    print(f"harness: {message}", file=sys.stderr)


def open_registry(extra: Path | None) -> Any:
    from harness.specs import Registry

    return Registry(extra)


def use_data(folder: Path | None) -> None:
    """The folder for this process; sources look where the environment points."""
    if folder is not None:
        os.environ["RERANK_HARNESS_DATA"] = str(folder)


def split(values: list[str] | None) -> tuple[str, ...]:
    """Repeated and comma-separated values alike; a path may not hold a comma."""
    return tuple(
        part.strip() for value in values or () for part in value.split(",") if part.strip()
    )


def check_format(given: str, known: tuple[str, ...]) -> None:
    if given not in known:
        raise RegistryError(f"unknown format {given!r}", known=known, given=given)


def say(quiet: bool, text: str) -> None:
    if not quiet:
        print(text, file=sys.stderr)


def print_rows(rows: Sequence[Mapping[str, Any]], format: str) -> None:
    """Equal-keyed rows as aligned columns, a markdown table or JSON."""
    from harness import listing

    if format == "json":
        print(json.dumps(rows, ensure_ascii=False, indent=1))
        return
    if not rows:
        print("nothing there")
        return
    if format == "md":
        print(listing.markdown([dict(row) for row in rows]))
        return
    texts = [list(rows[0]), *([listing.plain(v) for v in row.values()] for row in rows)]
    widths = [max(len(line[i]) for line in texts) for i in range(len(texts[0]))]
    for line in texts:
        print("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip())
