"""What the commands share: the application, common flags, and how rows and errors are printed."""

from __future__ import annotations

import json
import os
import shutil
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
DataDir = Annotated[
    Path | None, typer.Option("--data", help="Prepared candidates [$RERANK_HARNESS_DATA].")
]
WithText = Annotated[bool, typer.Option("--with-text", help="Put all passages in the page.")]
PublishedToo = Annotated[bool, typer.Option("--published", help="Also show figures in print.")]
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


def choice(what: str, *known: str, several: bool = False) -> Any:
    """An option that takes one of these, or several with commas."""

    def checked(given: str) -> str:
        for one in split([given]) if several else [given]:
            if one not in known:
                raise RegistryError(f"unknown {what} {one!r}", known=known, given=one)
        return given

    told = f"{', '.join(known[:-1])} or {known[-1]}."
    return typer.Option(f"--{what}", help=told, callback=checked)


Format = Annotated[str, choice("format", "text", "json")]
TableFormat = Annotated[str, choice("format", "text", "md", "json")]


def say(quiet: bool, text: str) -> None:
    if not quiet:
        print(text, file=sys.stderr)


def width(otherwise: int) -> int:
    """Columns of the terminal, or those of a file."""
    return shutil.get_terminal_size((otherwise, 0)).columns


def print_rows(rows: Sequence[Mapping[str, Any]], format: str) -> None:
    """Equal-keyed rows as aligned columns, a markdown table or JSON."""
    from harness import listing

    if format == "json":
        print(json.dumps(rows, ensure_ascii=False, indent=1))
    elif not rows:
        print("nothing there")
    elif format == "md":
        print(listing.markdown(rows))
    else:
        print(listing.columns(rows, width(sys.maxsize)))
