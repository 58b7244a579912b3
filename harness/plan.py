"""What the command line (or a suite file) asks for -> cells, and cells -> jobs ready to run.

Owns how models and datasets are named on the command line. It runs nothing and prints nothing.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from harness import cell as cells
from harness.data import Collection, audit, load
from harness.specs import Registry, build, folder_dataset, override, read_toml, with_method
from harness.types import (
    DEFAULT_SEED,
    Cell,
    DatasetSpec,
    MissingResourceError,
    ModelSpec,
    Protocol,
    RegistryError,
    Serving,
    UsageError,
)

REQUEST_FILES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")


@dataclass(frozen=True)
class Selection:
    """A matrix as a user states it; the keys of a suite file are these names."""

    models: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    qrels: str | None = None
    name: str | None = None
    first_stage: str | None = None
    depth: int | None = None
    limit: int | None = None
    method: str | None = None
    prompt: str | None = None
    adapter: str | None = None
    set: tuple[str, ...] = ()
    engine: str | None = None
    protocol: str = "quality"
    concurrency: int | None = None
    seed: int = DEFAULT_SEED
    deterministic: bool = False
    replicate: int = 0
    strict_cache: bool = False
    base_url: str = ""
    served_model: str = ""
    tokenizer: str = ""

    @property
    def serving(self) -> Serving:
        """What the engines of this matrix are told beside their models' rows."""
        return Serving(
            prefix_caching=self.protocol == "quality",
            deterministic=self.deterministic,
            base_url=self.base_url,
            served_model=self.served_model,
            tokenizer=self.tokenizer,
            connections=self.concurrency or 0,
        )


PLAIN_FIELDS = tuple(
    f.name for f in fields(Selection) if f.name not in ("models", "datasets", "set")
)


def from_suite(path: Path, given: Selection) -> Selection:
    """A suite file's selection; what the command line gives as well wins."""
    table = read_toml(path)
    for remark in ("description", "paper"):  # what a run has no use for
        table.pop(remark, None)
    base = build(Selection, table, str(path))
    plain = Selection()
    changed: dict[str, Any] = {
        f.name: getattr(given, f.name)
        for f in fields(Selection)
        if getattr(given, f.name) != getattr(plain, f.name)
    }
    return replace(base, **changed)


def cells_of(registry: Registry, selection: Selection) -> list[Cell]:
    """The matrix in the order asked for. Raises for an empty one."""
    if not selection.models or not selection.datasets:
        raise UsageError("name at least one model (-m) and one dataset (-d)")
    if selection.depth is not None and selection.depth < 1:
        raise UsageError(f"--depth {selection.depth}: expected at least 1")
    if selection.limit is not None and selection.limit < 1:
        raise UsageError(f"--limit {selection.limit}: expected at least 1")
    if selection.replicate < 0:
        raise UsageError(f"--replicate {selection.replicate}: expected 0 or more")
    if selection.concurrency is not None and selection.concurrency < 1:
        raise UsageError(f"--concurrency {selection.concurrency}: expected at least 1")
    if selection.protocol not in ("quality", "latency"):
        raise RegistryError(
            f"unknown protocol {selection.protocol!r}",
            known=("quality", "latency"),
            given=selection.protocol,
        )
    datasets = [d for text in selection.datasets for d in find_datasets(registry, text, selection)]
    models = [m for text in selection.models for m in find_models(registry, text, selection)]
    protocol = Protocol(
        kind=selection.protocol,  # type: ignore[arg-type]
        concurrency=selection.concurrency,
        prefix_caching=selection.serving.prefix_caching,
        seed=selection.seed,
        deterministic=selection.deterministic,
        replicate=selection.replicate,
        strict_cache=selection.strict_cache,
    )
    made = [
        Cell(
            model=model,
            dataset=dataset,
            first_stage=selection.first_stage or dataset.first_stage,
            depth=selection.depth or dataset.depth,
            limit=selection.limit,
            protocol=protocol,
        )
        for dataset in datasets
        for model in models
    ]
    return _distinct(made)


def _distinct(made: Sequence[Cell]) -> list[Cell]:
    """A cell that two patterns name is one cell; two cells may not share a folder."""
    places: dict[Path, Cell] = {}
    for cell in made:
        if places.setdefault(cell.folder, cell) != cell:
            raise UsageError(f"{cell}: two datasets or models with one name; give one --name")
    return list(places.values())


def command(cell: Cell, selection: Selection) -> str:
    """The command that makes this one cell again, wherever its results are to lie."""
    dataset = cell.dataset.location if cell.dataset.source == "requests" else cell.dataset.name
    if cell.dataset.source == "folder" and dataset not in Registry().datasets:
        dataset = cell.dataset.location
    base = cell.model.base  # a baseline has none, and Path("") is the working folder
    model = base if base and Path(base).is_dir() else cell.model.name
    words = ["harness", "run", "-m", model, "-d", dataset]
    plain = Selection()
    for name in PLAIN_FIELDS:
        value = getattr(selection, name)
        if value != getattr(plain, name):
            words += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    words += [word for text in selection.set for word in ("--set", text)]
    return shlex.join(words)


def find_models(registry: Registry, text: str, selection: Selection) -> list[ModelSpec]:
    """Registry names, globs, or a model folder with --method and --prompt."""
    if text not in registry.models and Path(text).expanduser().is_dir():
        found = [_folder_model(text, selection)]
    else:
        found = registry.find_models(text)
        if selection.method:
            found = [with_method(spec, selection.method) for spec in found]
        if selection.prompt:
            found = [override(spec, [f"prompt={selection.prompt}"]) for spec in found]
    if selection.adapter:
        found = [_with_adapter(spec, selection.adapter) for spec in found]
    return [_on_engine(override(spec, selection.set), selection.engine) for spec in found]


def _folder_model(text: str, selection: Selection) -> ModelSpec:
    if not selection.method or not selection.prompt:
        raise UsageError(f"{text} is a model folder: say how to ask it with --method and --prompt")
    path = Path(text).expanduser().resolve()
    return ModelSpec(
        name=path.name, method=selection.method, prompt=selection.prompt, base=str(path)
    )


def _with_adapter(spec: ModelSpec, adapter: str) -> ModelSpec:
    """Another adapter is another cell; of a local one only the folder's name shows."""
    local = Path(adapter).expanduser()
    shown = local.name if local.is_dir() else adapter
    return replace(spec, adapter=adapter, overrides=(*spec.overrides, ("adapter", shown)))


def _on_engine(spec: ModelSpec, engine: str | None) -> ModelSpec:
    """Another engine than the registry's is another cell; the first is not worth naming."""
    if engine is None or engine == spec.engine:
        return spec
    changed = spec.overrides + ((("engine", engine),) if spec.engine else ())
    return replace(spec, engine=engine, overrides=changed)


def find_datasets(registry: Registry, text: str, selection: Selection) -> list[DatasetSpec]:
    """Registry names in any spelling, suites, globs; a folder; a request file with --qrels."""
    path = Path(text).expanduser()
    if path.is_dir():
        found = [folder_dataset(path)]
    elif path.name.endswith(REQUEST_FILES) and path.is_file():
        stem = path.name[: -len(next(s for s in REQUEST_FILES if path.name.endswith(s)))]
        found = [
            DatasetSpec(
                name=stem,
                source="requests",
                location=str(path),
                qrels=selection.qrels or "",
                first_stage="requests",
            )
        ]
    elif path.name.endswith(REQUEST_FILES) or text.startswith((".", "/", "~")):
        raise MissingResourceError(f"{text}: no such dataset file or folder")
    elif selection.name:
        raise UsageError(f"--name is for a dataset given by its path, {text} is none")
    else:
        judged = Path(selection.qrels).stem if selection.qrels else ""
        found = [replace(spec, judged_by=judged) for spec in registry.find_datasets(text)]
    if selection.qrels:
        found = [replace(spec, qrels=selection.qrels) for spec in found]
    return [_named(registry, spec, selection.name) for spec in found]


def _named(registry: Registry, spec: DatasetSpec, name: str | None) -> DatasetSpec:
    """`--name dl19`: a path that is a registered dataset takes over its family and facts."""
    if name is None:
        return spec
    try:
        [known] = registry.find_datasets(name)
    except (RegistryError, ValueError):
        return replace(spec, name=name)
    return replace(
        known,
        source=spec.source,
        location=spec.location,
        qrels=spec.qrels,
        first_stage=spec.first_stage,
    )


class Loader:
    """Loads each collection once and turns cells into jobs."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self._loaded: dict[tuple[Any, ...], Collection] = {}

    def job(self, cell: Cell, asked_first_stage: str | None) -> cells.Job:
        """A cell with its data and prompt; the first stage's real name replaces the asked one."""
        place = (
            cell.dataset.name,
            cell.dataset.location,
            cell.dataset.qrels,
            asked_first_stage,
            cell.depth,
            cell.limit,
        )
        if place not in self._loaded:
            found = load(cell.dataset, asked_first_stage, cell.depth, cell.limit)
            figures = audit.checked(cell.dataset, found, cell.depth, cell.limit)
            self._loaded[place] = replace(found, audit=figures)
        collection = self._loaded[place]
        named = replace(cell, first_stage=collection.first_stage)
        prompt = self.registry.prompt(cell.model.prompt) if cell.model.prompt else None
        return cells.resolve(named, prompt, collection)
