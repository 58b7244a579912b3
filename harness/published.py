"""registry/published.csv -> Published: figures from papers and repositories, under our names.

Owns how published spellings map to registry names; it must not know what a cell measured.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from harness.specs import Registry, data_root, read_toml
from harness.types import DataError, RegistryError

COLUMNS = ("model", "first_stage", "dataset", "measure", "value", "source", "confidence")
CONFIDENCE = ("high", "low")


@dataclass(frozen=True, slots=True)
class Published:
    """One published figure.

    model        registry name; "" for a model, or a setting of one, that is not in the registry
    first_stage  our spelling, the depth in it when it is not 100; "" where the source does not tell
    dataset      registry name, a suite for the mean over it, or the published spelling if external
    value        0-100 for measures of ranking quality; seconds, tokens or calls otherwise
    """

    model: str
    name_as_published: str
    first_stage: str
    dataset: str
    measure: str
    value: float
    source: str
    confidence: str


def load(registry: Registry, folder: Path | None = None) -> tuple[Published, ...]:
    """Read published.csv and published_names.toml of `folder` (the shipped registry's own).

    Raises DataError with file and line for a row that cannot be placed or believed.
    """
    folder = folder or data_root() / "registry"
    names = Names(registry, read_toml(folder / "published_names.toml"))
    path = folder / "published.csv"
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.reader(file)
        try:
            if tuple(next(reader, ())) != COLUMNS:
                raise ValueError(f"expected the columns {', '.join(COLUMNS)}")
            return tuple(names.read(cells) for cells in reader)
        except (ValueError, RegistryError) as error:
            raise DataError(str(error), path=path, line=reader.line_num) from error


class Names:
    """The tables of published_names.toml against one registry. Wrong rows raise ValueError."""

    def __init__(self, registry: Registry, tables: Mapping[str, Any]) -> None:
        self.registry = registry
        self.tables = tables
        self.dataset = cache(self._dataset)  # a search over all aliases, for a few dozen spellings

    def read(self, cells: Sequence[str]) -> Published:
        if len(cells) != len(COLUMNS):
            raise ValueError(f"expected {len(COLUMNS)} columns, got {len(cells)}")
        row = dict(zip(COLUMNS, cells, strict=True))
        model, first_stage = self.placed(row["model"], row["first_stage"])
        dataset = self.dataset(row["dataset"])
        if row["confidence"] not in CONFIDENCE:
            raise ValueError(f"confidence {row['confidence']!r} is not {' or '.join(CONFIDENCE)}")
        value = float(row["value"])
        if not 0 <= value <= (100 if row["measure"].startswith("nDCG") else math.inf):
            raise ValueError(f"{row['measure']} = {row['value']} is out of range")
        tail = (row["measure"], value, row["source"], row["confidence"])
        return Published(model, row["model"], first_stage, dataset, *tail)

    def placed(self, name: str, given: str) -> tuple[str, str]:
        """(registry model or "", first stage) of a published model and its candidates."""
        retrieved = given in self.tables["queries"]
        if retrieved and name in self.tables["retrievers"]:
            return "first-stage", self.tables["retrievers"][name] + self.tables["queries"][given]
        if name in self.tables["external"]["models"]:
            model = ""
        elif (model := self.tables["models"].get(name, name)) not in self.registry.models:
            also = f" ({model!r} here)" if model != name else ""
            raise ValueError(f"model {name!r}{also} is neither in the registry nor external")
        if not retrieved and given not in self.tables["first_stages"]:
            raise ValueError(f"unknown first stage {given!r}")
        return model, "" if retrieved else self.tables["first_stages"][given]

    def _dataset(self, name: str) -> str:
        if name in self.tables["external"]["datasets"]:
            return name
        ours = self.tables["datasets"].get(name, name)
        if ours in self.registry.suites:
            return str(ours)
        return self.registry.find_datasets(ours)[0].name
