"""registry/**/*.toml and prompts/*.toml -> ModelSpec, DatasetSpec, Prompt and suites.

Owns names: how they are spelled, overridden and looked up, and what the nearest match of a wrong
one is. It must not know what a method does (it binds options against a signature it is handed),
and it reads no data.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import inspect
import tomllib
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, TypeVar

from harness.prompts import Limits, Prompt, Turn
from harness.types import DatasetSpec, MissingResourceError, ModelSpec, RegistryError

T = TypeVar("T")

OPTION_ALIASES = {
    "step_size": "stride",
    "window": "size",
    "window_size": "size",
    "num_permutation": "permutations",
    "top": "k",
    "hits": "depth",
}


def data_root() -> Path:
    """The folder that holds registry/ and prompts/: the checkout, or what the wheel ships."""
    here = Path(__file__).resolve().parent
    return here.parent if (here.parent / "registry").is_dir() else here / "_data"


@dataclass(frozen=True)
class Registry:
    """Everything that is named. `extra` is a user's own folder, laid over the shipped one."""

    extra: Path | None = None

    def _folders(self, kind: str) -> list[Path]:
        shipped = data_root() / ("prompts" if kind == "prompts" else f"registry/{kind}")
        if self.extra is None:
            return [shipped]
        if not self.extra.is_dir():
            raise RegistryError("no such registry folder", where=str(self.extra))
        return [shipped, self.extra / kind]

    def _files(self, kind: str) -> list[Path]:
        return [f for folder in self._folders(kind) for f in sorted(folder.glob("*.toml"))]

    def _tables(self, kind: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """Every table of a kind: its name, where it stands, and its keys over the file's own."""
        for path in self._files(kind):
            tables = read_toml(path)
            shared = _table(tables.pop("defaults", {}), f"{path}: [defaults]")
            for name, value in tables.items():
                where = f"{path}: [{name}]"
                yield name, where, {"name": name} | merge(shared, _table(value, where))

    @cached_property
    def models(self) -> dict[str, ModelSpec]:
        """Every model, each variant under `name@variant`, in registry order."""
        out: dict[str, ModelSpec] = {}
        for name, where, table in self._tables("models"):
            within = where.removesuffix("]") + ".variants"
            variants = _table(table.pop("variants", {}), f"{within}]")
            out[name] = build(ModelSpec, table, where)
            for variant, changes in variants.items():
                full, place = f"{name}@{variant}", f"{within}.{variant}]"
                whole = merge(table, {"name": full} | _table(changes, place))
                out[full] = build(ModelSpec, whole, place)
        return out

    @cached_property
    def prompts(self) -> dict[str, Prompt]:
        return {
            f.stem: build(Prompt, {"name": f.stem} | read_toml(f), str(f))
            for f in self._files("prompts")
        }

    @cached_property
    def datasets(self) -> dict[str, DatasetSpec]:
        """Tables of registry/datasets/*.toml, and every folder there with a dataset.toml."""
        named = self._tables("datasets")
        out = {name: build(DatasetSpec, table, where) for name, where, table in named}
        for folder in self._folders("datasets"):
            found = (folder_dataset(path.parent) for path in sorted(folder.glob("*/dataset.toml")))
            out |= {spec.name: spec for spec in found}
        return out

    @cached_property
    def suites(self) -> dict[str, dict[str, Any]]:
        return {f.stem: read_toml(f) for f in self._files("suites")}

    def find_models(self, pattern: str) -> list[ModelSpec]:
        """A name, or a glob over the names (variants only when the glob has an `@`)."""
        if any(c in pattern for c in "*?["):
            names = [n for n in self.models if ("@" in n) <= ("@" in pattern)]
            found = fnmatch.filter(names, pattern)
            if not found:
                raise RegistryError(f"no model matches {pattern!r}")
            return [self.models[n] for n in found]
        return [self._named(self.models, pattern, "model")]

    def find_datasets(self, pattern: str, _within: tuple[str, ...] = ()) -> list[DatasetSpec]:
        """A name in any spelling, a suite of datasets, or a glob over names (else aliases)."""
        if pattern in self.suites and "datasets" in self.suites[pattern]:
            path = (*_within, pattern)
            if pattern in _within:
                raise RegistryError(f"suite {pattern!r} holds itself: {' > '.join(path)}")
            names: list[str] = self.suites[pattern]["datasets"]
            return [spec for name in names for spec in self.find_datasets(name, path)]
        specs = list(self.datasets.values())
        if any(c in pattern for c in "*?["):
            found = _matching(pattern, specs, lambda s: (s.name, s.index, s.topics))
            found = found or _matching(pattern, specs, lambda s: (s.irds, *s.aliases))
        else:
            wanted = canonical(pattern)
            found = [s for s in specs if wanted in {canonical(n) for n in (s.name, *s.aliases)}]
        if found:
            return found
        known = [n for s in specs for n in (s.name, *s.aliases)] + [*self.suites]
        raise RegistryError(f"unknown dataset {pattern!r}", known=known, given=pattern)

    def prompt(self, name: str) -> Prompt:
        return self._named(self.prompts, name, "prompt")

    def _named(self, table: Mapping[str, T], name: str, what: str) -> T:
        if name not in table:
            raise RegistryError(f"unknown {what} {name!r}", known=table, given=name)
        return table[name]


def canonical(name: str) -> str:
    """One spelling for all: lower case, hyphens and underscores alike, no BEIR version prefix."""
    text = name.lower().replace("_", "-").removeprefix("beir-v1.0.0-").removesuffix(".flat")
    return text.removesuffix("-flat").removesuffix("-test").replace("bright-", "bright/", 1)


def _matching(
    pattern: str, specs: Iterable[DatasetSpec], names: Callable[[DatasetSpec], Iterable[str]]
) -> list[DatasetSpec]:
    """Those with a name that the glob matches; hyphens and underscores, upper and lower alike."""
    plain = pattern.lower().replace("_", "-")
    return [
        s
        for s in specs
        if any(fnmatch.fnmatchcase(n.lower().replace("_", "-"), plain) for n in names(s))
    ]


def read_toml(path: Path) -> dict[str, Any]:
    """Parse one file; a syntax error names file and line."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MissingResourceError(f"{path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RegistryError(str(error), where=str(path)) from error


def _table(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RegistryError(f"expected a table, got {value!r}", where=where)
    return value


def merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """`top` over `base`; tables merge one level deep, so that one option can be changed."""
    out = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = {**out[key], **value} if both else value
    return out


def build(cls: type[T], table: Mapping[str, Any], where: str) -> T:
    """A dataclass from a TOML table: unknown keys and wrong types are errors with the key."""
    from pydantic import ValidationError

    check_keys(table, [f.name for f in dataclasses.fields(cls)], where)  # type: ignore[arg-type]
    turns = table.get("messages")
    nested = [("messages", Turn, turn) for turn in turns] if isinstance(turns, list) else []
    for key, kind, inner in [*nested, ("limits", Limits, table.get("limits"))]:
        if isinstance(inner, dict):  # any other type is the validator's to refuse
            check_keys(inner, [f.name for f in dataclasses.fields(kind)], f"{where}.{key}")
    try:
        return _validator(cls).validate_python(table)  # type: ignore[arg-type, no-any-return]
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise RegistryError(f"key {key!r}: {first['msg']}", where=where) from error


@lru_cache(maxsize=64)
def _validator(kind: Any) -> Any:
    """Making one costs more than a hundred validations."""
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def check_keys(table: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    """Raise RegistryError for the first key that is not known."""
    known = list(known)
    for key in table:
        if key not in known:
            raise RegistryError(f"unknown key {key!r}", known=known, given=key, where=where)


def folder_dataset(folder: Path) -> DatasetSpec:
    """A local folder as a dataset; its dataset.toml (optional) gives name, depth, measures."""
    path = folder / "dataset.toml"
    table = read_toml(path) if path.exists() else {}
    facts = {"name": folder.resolve().name, "source": "folder", "location": str(folder)}
    return build(DatasetSpec, facts | table, str(path))


# --- what the command line may change ---------------------------------------------------------


def option_name(name: str) -> str:
    """Hyphens, and the spellings of other tools, as this project's option names."""
    plain = name.strip().replace("-", "_")
    return OPTION_ALIASES.get(plain, plain)


def override(spec: ModelSpec, assignments: Iterable[str]) -> ModelSpec:
    """Apply `--set key=value`: method options, `limits.x`, `sampling.x`, or a plain spec field.

    Values are TOML where they parse as TOML, text otherwise. What changed is kept in `overrides`.
    """
    for text in assignments:
        key, equals, raw = map(str.strip, text.partition("="))
        if not equals or not key:
            raise RegistryError(f"--set expects option=value, got {text!r}")
        group, _, name = key.rpartition(".")
        value = toml_value(raw)
        changes: dict[str, Any]
        if key in ("adapter_mode", "dtype", "prompt", "raw_special_tokens"):
            hint = typing.get_type_hints(ModelSpec)[key]
            changes = {key: _typed(hint, key, value, f"model {spec.name}")}
        elif group in ("limits", "sampling"):
            changes = {group: {**getattr(spec, group), option_name(name): value}}
            key = f"{group}.{option_name(name)}"
        else:
            key = option_name(key.removeprefix("options."))
            changes = {"options": {**spec.options, key: value}}
        spec = noted(spec, key, raw, **changes)
    return spec


def with_method(spec: ModelSpec, method: str) -> ModelSpec:
    """Another method for the same model; its old options do not carry over."""
    return noted(spec, "method", method, method=method, options={})


def noted(spec: ModelSpec, key: str, shown: str, **changes: Any) -> ModelSpec:
    """The spec with changes, and what its cells' names show of them."""
    return replace(spec, **changes, overrides=tuple({**dict(spec.overrides), key: shown}.items()))


def toml_value(raw: str) -> Any:
    try:
        return tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        return raw.strip()


def bind(function: Callable[..., Any], options: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Check options against a method's keyword-only parameters; defaults filled in.

    The parameters' annotations are the schema, bounds included (`Annotated[int, Ge(1)]`).
    """
    hints = typing.get_type_hints(function, include_extras=True)
    parameters = inspect.signature(function).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.kind == p.KEYWORD_ONLY}
    check_keys(options, defaults, where)
    return defaults | {name: _typed(hints[name], name, v, where) for name, v in options.items()}


def _typed(hint: Any, name: str, value: Any, where: str) -> Any:
    """The value, if it is of the annotated type and within its bounds."""
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(hint).validate_python(value, strict=True)
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise RegistryError(f"option {name}={value!r}: {reason}", where=where) from error


def limits_for(spec: ModelSpec, prompt: Prompt) -> Limits:
    """The prompt's limits with the model's own laid over; unknown keys are errors."""
    own = dataclasses.asdict(prompt.limits) | dict(spec.limits)
    return build(Limits, own, f"model {spec.name}: limits")


def in_domain(trained_on: Iterable[str], dataset: str, family: str) -> bool:
    """Did a model train on this collection's own queries? TREC DL stands on MS MARCO."""
    trained = {name.split(":")[0] for name in trained_on}
    return dataset in trained or (family == "dl" and "msmarco-passage" in trained)
