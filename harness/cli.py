"""The command line: the only module that prints.

It turns flags into a Selection, errors into one line and an exit code, and progress into a bar on
a terminal or plain lines elsewhere. What a command does lies in the module it calls.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import wraps
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any

import typer

from harness.types import (
    DEFAULT_SEED,
    DataError,
    HarnessError,
    Interrupted,
    MissingResourceError,
    RegistryError,
    UsageError,
)

app = typer.Typer(
    name="harness",
    help="Benchmark LLM rerankers: models x datasets, cached, measured, reported.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
cache_app = typer.Typer(help="Look after the call cache.", no_args_is_help=True)
app.add_typer(cache_app, name="cache")

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


def main(args: list[str] | None = None) -> None:
    """Run the command line and exit with the code that DESIGN gives the outcome."""
    try:
        app(args=[_flag(a) for a in (sys.argv[1:] if args is None else args)])
    except HarnessError as error:
        _error(str(error))
        sys.exit(error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def _flag(word: str) -> str:
    """Underscores in a flag's name are hyphens, and some flags have a second name."""
    if not word.startswith("--") or word == "--":
        return word
    name, equals, value = word.partition("=")
    plain = name.replace("_", "-")
    return FLAG_ALIASES.get(plain, plain) + equals + value


def _error(message: str) -> None:
    print(f"harness: {message}", file=sys.stderr)


def _registry(extra: Path | None) -> Any:
    from harness.specs import Registry

    return Registry(extra)


def _use_data(folder: Path | None) -> None:
    """The folder for this process; sources look where the environment points."""
    if folder is not None:
        os.environ["RERANK_HARNESS_DATA"] = str(folder)


def _split(values: list[str] | None) -> tuple[str, ...]:
    """Repeated and comma-separated values alike; a path may not hold a comma."""
    return tuple(
        part.strip() for value in values or () for part in value.split(",") if part.strip()
    )


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
    results: Results = RESULTS
    cache: CacheFile = None
    registry: RegistryDir = None
    data: DataDir = None

    def selection(self) -> Any:
        """What the flags, and a suite file under them, ask for."""
        from harness import plan

        _use_data(self.data)
        options = ("num_child", "k", "size", "stride", "passes", "permutations")
        given = [(name, getattr(self, name)) for name in options]
        selection = plan.Selection(
            models=_split(self.model),
            datasets=_split(self.dataset),
            set=(*(self.set or ()), *(f"{n}={v}" for n, v in given if v is not None)),
            **{name: getattr(self, name) for name in plan.PLAIN_FIELDS},
        )
        return plan.from_suite(self.suite, selection) if self.suite else selection

    def open_cache(self) -> Any:
        from harness.cache import Cache

        return Cache(self.cache or self.results / ".cache.sqlite")


def _with_matrix(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command Matrix's flags; the function receives them as one value."""

    @wraps(function)
    def command(**flags: Any) -> None:
        own = {field.name: flags.pop(field.name) for field in fields(Matrix)}
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
@_with_matrix
def run(
    matrix: Matrix,
    *,
    force: Annotated[bool, typer.Option("--force", help="Run finished cells again.")] = False,
    format: Format = "text",
    quiet: Quiet = False,
) -> None:
    """Run every model on every dataset; finished cells are skipped by their key."""
    _check_format(format, ("text", "json"))
    done = _run_matrix(matrix, force, quiet)
    if format == "json":
        print(json.dumps([dict(cell.record) for cell in done.cells], ensure_ascii=False))
    elif done.cells:
        from harness.report import tables, writers

        print(writers.to_text(tables.summary(done.cells)))
        _say(quiet, done.summary)
    if done.failures:
        raise typer.Exit(done.failures[0].exit_code)


@app.command()
@_with_matrix
def plan(matrix: Matrix, *, format: Format = "text") -> None:
    """Say what would run: cells, calls, rounds, tokens, and what the cache already answers."""
    from harness import plan as planning

    _check_format(format, ("text", "json"))
    selection, registry = matrix.selection(), _registry(matrix.registry)
    loader, cache = planning.Loader(registry), matrix.open_cache()
    try:
        jobs = [
            loader.job(c, selection.first_stage) for c in planning.cells_of(registry, selection)
        ]
        rows = [planning.estimate(job, cache, matrix.results) for job in jobs]
    finally:
        cache.close()
    _print_rows(rows, format)


def _check_format(given: str, known: tuple[str, ...]) -> None:
    if given not in known:
        raise RegistryError(f"unknown format {given!r}", known=known, given=given)


class _Done:
    """What a run of the matrix has come to so far."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.cells: list[Any] = []
        self.failures: list[HarnessError] = []
        self.skipped = self.asked = self.cached = 0

    def fail(self, cell: Any, error: HarnessError) -> None:
        """Report a failure and keep it for the exit code; alone, it is the outcome."""
        if self.total == 1:
            raise error
        self.failures.append(error)
        _error(f"{cell}: {error}")

    def count(self, result: Any) -> None:
        efficiency = result.record["efficiency"]
        self.cached += efficiency["calls_from_cache"]
        self.asked += efficiency["calls"] - efficiency["calls_from_cache"]

    @property
    def summary(self) -> str:
        asked = "the engine was asked nothing" if not self.asked else f"{self.asked} calls asked"
        return (
            f"{len(self.cells)} cells, {self.skipped} of them finished before;"
            f" {asked}, {self.cached} answers came from the cache"
        )


def _run_matrix(matrix: Matrix, force: bool, quiet: bool) -> _Done:
    """Run the cells; one that fails is reported and does not stop the others."""
    from harness import plan

    selection, registry = matrix.selection(), _registry(matrix.registry)
    loader, cells = plan.Loader(registry), plan.cells_of(registry, selection)
    done, jobs = _Done(len(cells)), []
    for cell in cells:
        try:
            jobs.append(loader.job(cell, selection.first_stage))
        except (DataError, MissingResourceError) as error:  # flags and names are wrong for all
            done.fail(cell, error)
    cache = matrix.open_cache()
    try:
        with _progress(len(jobs), quiet) as show:
            for number, job in enumerate(jobs, 1):
                try:
                    _run_job(
                        job,
                        plan.command(job.cell, selection),
                        matrix,
                        cache,
                        force,
                        done,
                        show.of(number, job.cell),
                    )
                except HarnessError as error:
                    done.fail(job.cell, error)
    finally:
        cache.close()
    return done


def _run_job(
    job: Any, command: str, matrix: Matrix, cache: Any, force: bool, done: _Done, show: Any
) -> None:
    """One cell: skipped when its key is already there, else run with an engine of its own."""
    from harness import cell, store
    from harness.engines import open_engine

    spec = job.cell.model
    engine = open_engine(spec.engine or "hf", spec) if job.needs_engine else None
    try:
        known = store.state(matrix.results, job.cell, cell.key(job, engine))
        if known == "complete" and not force:
            result = store.read(matrix.results / job.cell.folder)
            done.skipped += 1
            show.line("finished before")
        else:
            show.started()
            result = cell.run(
                job, engine, cache, matrix.results, command=command, progress=show.progress
            )
            done.count(result)
            show.finished(result)
        done.cells.append(result)
    finally:
        if engine is not None:
            engine.close()


@dataclass
class _Shown:
    """The progress of one cell as plain lines, for logs and CI."""

    head: str
    quiet: bool = False

    def line(self, text: str) -> None:
        if not self.quiet:
            print(f"{self.head}: {text}", file=sys.stderr, flush=True)

    def started(self) -> None:
        self.line("started")

    def progress(self, done: int, total: int, calls: int) -> None:
        """Lines would flood a log; only a bar shows every query."""

    def finished(self, result: Any) -> None:
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
        self.task = self.bars.add_task(self.head, total=None, calls=0)

    def progress(self, done: int, total: int, calls: int) -> None:
        self.bars.update(self.task, completed=done, total=total, calls=calls)

    def finished(self, result: Any) -> None:
        self.bars.remove_task(self.task)
        super().finished(result)


@dataclass
class _Progress:
    total: int
    quiet: bool
    bars: Any = None

    def of(self, number: int, cell: Any) -> _Shown:
        head = f"[{number}/{self.total}] {cell}"
        return _Bar(head, bars=self.bars) if self.bars else _Shown(head, self.quiet)


@contextmanager
def _progress(total: int, quiet: bool) -> Iterator[_Progress]:
    if quiet or not sys.stderr.isatty():
        yield _Progress(total, quiet)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
        TextColumn("queries, {task.fields[calls]} calls"), TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        yield _Progress(total, quiet, bars)


def _say(quiet: bool, text: str) -> None:
    if not quiet:
        print(text, file=sys.stderr)


def _print_rows(rows: Sequence[Mapping[str, Any]], format: str) -> None:
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


# --- looking things up --------------------------------------------------------------------------


@app.command("list")
def list_(
    what: Annotated[
        str, typer.Argument(help="models, datasets, suites, prompts, methods")
    ] = "models",
    registry: RegistryDir = None,
    format: Annotated[str, typer.Option(help="text, md or json.")] = "text",
) -> None:
    """List what the registry holds."""
    from harness import listing

    _check_format(format, ("text", "md", "json"))
    if what not in listing.LISTS:
        raise RegistryError(f"unknown list {what!r}", known=listing.LISTS, given=what)
    if what == "models" and format == "md":
        print(listing.models_page(_registry(registry)))
        return
    _print_rows(listing.LISTS[what](_registry(registry)), format)


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="A model, dataset, suite, prompt or cell folder.")],
    registry: RegistryDir = None,
) -> None:
    """Show everything about one name: source, limits, options, variants and how they differ."""
    from harness import listing

    print(listing.describe(_registry(registry), name))


@app.command()
def prompt(
    model: Annotated[str, typer.Argument(help="A model of the registry.")],
    dataset: Annotated[str, typer.Option("--dataset", "-d")],
    query: Annotated[str | None, typer.Option(help="A query id; the first by default.")] = None,
    passages: Annotated[int | None, typer.Option(help="How many passages to show.")] = None,
    qrels: str | None = None,
    first_stage: str | None = None,
    tokenizer: Annotated[Path | None, typer.Option(help="A folder: print the exact text.")] = None,
    visible: Annotated[bool, typer.Option("--visible", help="Make white space visible.")] = False,
    registry: RegistryDir = None,
) -> None:
    """Print what a model is asked about a query, to the byte; first-stage order, unshuffled."""
    from harness import listing, plan

    selection = plan.Selection((model,), (dataset,), qrels=qrels, first_stage=first_stage)
    names = _registry(registry)
    [cell, *more] = plan.cells_of(names, selection)
    if more:
        raise UsageError(f"{model} on {dataset} is {1 + len(more)} cells: name one of each")
    job = plan.Loader(names).job(cell, first_stage)
    if tokenizer is None and job.limits.unit == "tokens":
        _say(False, "without --tokenizer, limits in tokens are not applied")
    text = listing.rendered(job, query, passages, tokenizer)
    print(listing.visible(text) if visible else text)


@app.command()
def status(results: Results = RESULTS, format: Format = "text") -> None:
    """List the cells of a results folder and their states."""
    from harness import listing

    _check_format(format, ("text", "json"))
    _print_rows(listing.cells(results), format)


# --- data ---------------------------------------------------------------------------------------

Stage = Annotated[str | None, typer.Option("--first-stage", help="Its name, or a TREC run file.")]
Depth = Annotated[int | None, typer.Option("--depth", min=1, help="Candidates a query (--hits).")]
Qrels = Annotated[str | None, typer.Option("--qrels", help="Judgements, if not the dataset's.")]


@app.command()
def prepare(
    dataset: Datasets = None,
    first_stage: Stage = None,
    depth: Depth = None,
    data: DataDir = None,
    registry: RegistryDir = None,
    quiet: Quiet = False,
) -> None:
    """Retrieve candidates once (bm25, bm25s, either with +QUERY for a rewritten query of the
    dataset, or a run file): a run on them needs neither index nor network nor Java."""
    from harness.data import prepare as preparing
    from harness.data.prepared import data_folder

    for spec in _datasets(_registry(registry), dataset):
        _say(quiet, f"{spec.name}: {first_stage or spec.first_stage}")
        folder = data or data_folder()
        print(preparing.prepare(spec, first_stage, depth or spec.depth, folder))


@app.command("audit-data")
def audit_data(
    dataset: Datasets = None,
    qrels: Qrels = None,
    first_stage: Stage = None,
    depth: Depth = None,
    data: DataDir = None,
    registry: RegistryDir = None,
    format: Format = "text",
) -> None:
    """Check queries, candidates and judgements before any engine time is spent on them."""
    from harness.data import audit, load

    _check_format(format, ("text", "json"))
    _use_data(data)
    found = []
    for spec in _datasets(_registry(registry), dataset, qrels):
        at = depth or spec.depth
        found.append(audit.audit(spec, load(spec, first_stage, at), at))
        if format == "text":
            _print_figures(found[-1])
    if format == "json":
        print(json.dumps(found, ensure_ascii=False, indent=1))
    if errors := [f"{row['dataset']}: {text}" for row in found for text in row["errors"]]:
        raise DataError("; ".join(errors))


def _datasets(registry: Any, texts: list[str] | None, qrels: str | None = None) -> list[Any]:
    from harness import plan

    asked = plan.Selection(qrels=qrels)
    found = [s for text in _split(texts) for s in plan.find_datasets(registry, text, asked)]
    if not found:
        raise UsageError("name at least one dataset (-d)")
    return found


def _print_figures(figures: Mapping[str, Any]) -> None:
    """One figure a line; those of a table under its name."""
    rows = []
    for name, value in figures.items():
        inner = value.items() if isinstance(value, dict) else [("", value)]
        rows += [{"figure": f"{name}: {key}" if key else name, "value": v} for key, v in inner]
    _print_rows([row for row in rows if row["value"] != []], "text")


# --- the runs of others, and runs for others ----------------------------------------------------


@app.command("import")
def import_(
    run: Annotated[Path, typer.Argument(help="A TREC run that another program made.")],
    model: Annotated[str, typer.Option("--model", "-m", help="Whose run: any name.")],
    dataset: Annotated[str, typer.Option("--dataset", "-d", help="A name, also new, or a path.")],
    qrels: Qrels = None,
    first_stage: Stage = None,
    depth: Depth = None,
    data: DataDir = None,
    results: Results = RESULTS,
    registry: RegistryDir = None,
    format: Format = "text",
) -> None:
    """Measure a foreign run and make its cell: quality known, efficiency unknown."""
    from harness import exchange
    from harness.types import ModelSpec

    _check_format(format, ("text", "json"))
    _use_data(data)
    names, judged = _registry(registry), Path(qrels) if qrels else None
    spec = names.models.get(model) or ModelSpec(name=model, method=exchange.METHOD)
    known = _one_dataset(names, dataset, qrels)
    foreign = exchange.Foreign(run, spec, known, judged, first_stage, depth)
    cell = exchange.take_in(foreign, results)
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


@app.command()
def export(
    cell: Annotated[Path, typer.Argument(help="A cell's folder.")],
    format: Annotated[str, typer.Option(help="run, requests, results or ir-metadata.")] = "run",
    out: Annotated[Path | None, typer.Option("--out", help="A file; stdout by default.")] = None,
    dataset: Annotated[str | None, typer.Option("--dataset", "-d", help="Where texts are.")] = None,
    qrels: Qrels = None,
    registry: RegistryDir = None,
) -> None:
    """Write a cell as others read it: a TREC run, rank_llm requests or results, ir_metadata."""
    from harness import exchange, store

    _check_format(format, exchange.FORMATS)
    found, data = store.read(cell), None
    if found is None or not (cell / "run.trec").is_file():
        raise MissingResourceError(f"{cell}: holds no finished cell")
    if format in ("requests", "results"):
        data = _data_of(found, _registry(registry), dataset, qrels)
        _say(data is not None, "the dataset is not at hand: no texts are written; name it with -d")
    text = "".join(exchange.give_out(found, format, data))
    (out.write_text if out else sys.stdout.write)(text)


def _one_dataset(registry: Any, text: str, qrels: str | None) -> Any:
    """The one dataset that a name or path means; a new name is one, when it has judgements."""
    from harness.types import DatasetSpec

    try:
        [found] = _datasets(registry, [text], qrels)
    except ValueError as error:
        raise UsageError(f"{text} is more than one dataset: name one") from error
    except RegistryError:
        if qrels is None or any(c in text for c in "*?["):
            raise
        return DatasetSpec(name=text, source="requests", qrels=qrels)
    return found


def _data_of(cell: Any, registry: Any, text: str | None, qrels: str | None) -> Any:
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
    registry: RegistryDir = None,
    quiet: Quiet = False,
) -> None:
    """Write tables, plots and the page from finished cells."""
    from harness import store
    from harness.report import build, tables, writers

    chosen = _split([format])
    for one in chosen:
        _check_format(one, ("md", "csv", "tex", "html", "json", "all"))
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out}: is not a folder")
    states = ("complete", "partial") if allow_partial else ("complete",)
    cells = [c for c in store.iterate(results) if c.record.get("state") in states]
    if not cells:
        raise MissingResourceError(f"{results}: holds no finished cell")
    texts = _texts(cells, _registry(registry), with_text)
    paths = build.write(cells, out, chosen, texts=texts, with_text=with_text)
    if not quiet:
        print(writers.to_text(tables.quality(cells, baseline="first-stage")))
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
