"""What the command line (or a suite file) asks for -> cells, and cells -> jobs ready to run.

Owns how models and datasets are named on the command line. It runs nothing and prints nothing.
"""

from __future__ import annotations

import re
import shlex
import typing
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

from harness import cell as cells
from harness.data import Collection, audit, load
from harness.specs import Registry, build, folder_dataset, noted, override, read_toml, with_method
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

KINDS = typing.get_args(typing.get_type_hints(Protocol)["kind"])
LEAST = {"depth": 1, "limit": 1, "replicate": 0, "concurrency": 1}


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


def _stated(selection: Selection) -> dict[str, Any]:
    """What differs from the defaults."""
    given = ((f, getattr(selection, f.name)) for f in fields(Selection))
    return {field.name: value for field, value in given if value != field.default}


def from_suite(path: Path, given: Selection) -> Selection:
    """A suite file's selection; what the command line gives as well wins."""
    table = read_toml(path)
    for remark in ("description", "paper"):  # what a run has no use for
        table.pop(remark, None)
    return replace(build(Selection, table, str(path)), **_stated(given))


def cells_of(registry: Registry, selection: Selection) -> list[Cell]:
    """The matrix in the order asked for, a cell that two patterns name once. Raises for none, and
    for two that would share a folder."""
    if not selection.models or not selection.datasets:
        raise UsageError("name at least one model (-m) and one dataset (-d)")
    for name, least in LEAST.items():
        given = getattr(selection, name)
        if given is not None and given < least:
            raise UsageError(f"--{name} {given}: expected at least {least}")
    if (kind := selection.protocol) not in KINDS:
        raise RegistryError(f"unknown protocol {kind!r}", known=KINDS, given=kind)
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
    places: dict[Path, Cell] = {}
    for dataset, model in product(datasets, models):
        stage = selection.first_stage or dataset.first_stage
        depth = selection.depth or dataset.depth
        cell = Cell(model, dataset, stage, depth, selection.limit, protocol)
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
    for name, value in _stated(selection).items():
        if name in PLAIN_FIELDS:
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
            found = [noted(s, "prompt", selection.prompt, prompt=selection.prompt) for s in found]
    if selection.adapter:
        found = [_with_adapter(spec, selection.adapter) for spec in found]
    return [_on_engine(override(spec, selection.set), selection.engine) for spec in found]


def _folder_model(text: str, selection: Selection) -> ModelSpec:
    if not selection.method or not selection.prompt:
        raise UsageError(f"{text} is a model folder: say how to ask it with --method and --prompt")
    path = Path(text).expanduser().resolve()
    return ModelSpec(path.name, selection.method, selection.prompt, str(path))


def _with_adapter(spec: ModelSpec, adapter: str) -> ModelSpec:
    """Another adapter is another cell; of a local one only the folder's name shows."""
    local = Path(adapter).expanduser()
    shown = local.name if local.is_dir() else adapter
    return noted(spec, "adapter", shown, adapter=adapter)


def _on_engine(spec: ModelSpec, engine: str | None) -> ModelSpec:
    """Another engine than the registry's is another cell; the first is not worth naming."""
    if engine is None or engine == spec.engine:
        return spec
    changed = replace(spec, engine=engine)
    return noted(changed, "engine", engine) if spec.engine else changed


def find_datasets(registry: Registry, text: str, selection: Selection) -> list[DatasetSpec]:
    """Registry names in any spelling, suites, globs; a folder; a request file with --qrels."""
    path = Path(text).expanduser()
    requests = re.fullmatch(r"(.+)\.jsonl?(\.gz)?", path.name)
    if path.is_dir():
        found = [folder_dataset(path)]
    elif requests and path.is_file():
        found = [DatasetSpec(requests[1], "requests", str(path), first_stage="requests")]
    elif requests or text.startswith((".", "/", "~")):
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
    own = {key: getattr(spec, key) for key in ("source", "location", "qrels", "first_stage")}
    return replace(known, **own)


class Loader:
    """Loads each collection once and turns cells into jobs."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self._loaded: dict[tuple[Any, ...], Collection] = {}

    def job(self, cell: Cell, asked_first_stage: str | None) -> cells.Job:
        """A cell with its data and prompt; the first stage's real name replaces the asked one."""
        data, limits = cell.dataset, (cell.depth, cell.limit)
        place = (data.name, data.location, data.qrels, asked_first_stage, *limits)
        if place not in self._loaded:
            found = load(data, asked_first_stage, *limits)
            figures = audit.checked(data, found, *limits)
            self._loaded[place] = replace(found, audit=figures)
        collection = self._loaded[place]
        named = replace(cell, first_stage=collection.first_stage)
        prompt = self.registry.prompt(cell.model.prompt) if cell.model.prompt else None
        return cells.resolve(named, prompt, collection)


def jobs(registry: Registry, selection: Selection) -> Iterator[cells.Job]:
    """The cells of a matrix, one by one ready to run."""
    loader = Loader(registry)
    return (loader.job(cell, selection.first_stage) for cell in cells_of(registry, selection))
