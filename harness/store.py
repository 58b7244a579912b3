"""results/: one folder per cell, written whole or not at all, judged by its key.

Owns the layout and the public format of result.json. It must not know engines or methods.

    <results>/<dataset>/<first stage>/<model>/
        result.json  run.trec  run.trec.ir_metadata.yml  per_query.csv  trace.jsonl.gz
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from harness.types import Cell, CellResult, DataError, MissingResourceError

SCHEMA_VERSION = 1
State = Literal["planned", "complete", "partial", "failed", "stale"]


@dataclass(frozen=True)
class Files:
    """The content of a cell folder, ready to be written; trace lines are JSON objects."""

    record: Mapping[str, Any]
    run: str
    per_query: Sequence[Mapping[str, Any]]
    trace: Iterable[Mapping[str, Any]]


def write(results: Path, cell: Cell, files: Files) -> Path:
    """Write into a temporary folder beside the place, then rename; returns the cell's folder."""
    folder = results / cell.folder
    texts = {
        "run.trec": files.run,
        "run.trec.ir_metadata.yml": ir_metadata(files.record),
        "per_query.csv": table(files.per_query),
    }
    try:
        with _placing(folder) as work:
            for name, text in texts.items():
                (work / name).write_text(text, encoding="utf-8", newline="\n")
            _write_trace(work / "trace.jsonl.gz", files.trace)
            _write_record(work, files.record)
    except OSError as error:
        raise DataError(f"cannot write the cell: {error}", path=folder) from error
    return folder


def write_failure(results: Path, cell: Cell, record: Mapping[str, Any]) -> None:
    """Note a failed cell, unless a finished one is in its place."""
    folder = results / cell.folder
    with contextlib.suppress(OSError), _placing(folder) as work:
        if (folder / "run.trec").exists():
            raise FileExistsError(folder)
        _write_record(work, record)


@contextlib.contextmanager
def _placing(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `folder` when all went well."""
    parent = folder.parent
    parent.mkdir(parents=True, exist_ok=True)
    how: Any = {"prefix": ".writing-", "dir": parent, "ignore_cleanup_errors": True}
    with _alone(parent), tempfile.TemporaryDirectory(**how) as work:
        yield Path(work)
        _swap(Path(work), folder)


@contextlib.contextmanager
def _alone(parent: Path) -> Iterator[None]:
    """Hold a folder of cells for this process; what a killed one left there is put right first."""
    import fcntl

    handle = os.open(parent, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
            _tidy(parent)
        yield
    finally:
        os.close(handle)


def _tidy(parent: Path) -> None:
    """A cell that was moved away comes back unless its place is taken; half-written ones go."""
    for old in parent.glob(".old-*"):
        with contextlib.suppress(OSError):
            old.rename(parent / old.name.removeprefix(".old-"))
    for left in (*parent.glob(".old-*"), *parent.glob(".writing-*")):
        shutil.rmtree(left, ignore_errors=True)


def _write_record(work: Path, record: Mapping[str, Any]) -> None:
    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    # What stands for a byte of a path that is not UTF-8 becomes JSON's own escape of it.
    (work / "result.json").write_bytes(text.encode("utf-8", "backslashreplace"))


def _write_trace(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with path.open("wb") as raw, gzip.GzipFile("", "wb", 6, raw, mtime=0) as packed:
        for row in rows:
            line = json.dumps(row, ensure_ascii=False) + "\n"
            packed.write(line.encode("utf-8", "surrogatepass"))


def _swap(work: Path, folder: Path) -> None:
    """Put the finished folder in its place. Killed in between, the old cell is found again."""
    old = folder.with_name(f".old-{folder.name}")
    work.chmod(0o755)
    with contextlib.suppress(FileNotFoundError):
        folder.rename(old)
    try:
        work.rename(folder)
    except OSError:
        with contextlib.suppress(OSError):
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """CSV text of equal-keyed rows."""
    out = io.StringIO()
    if rows:
        writer = csv.DictWriter(out, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return out.getvalue()


def read(folder: Path) -> CellResult | None:
    """The cell in a folder, None when there is none. Raises DataError for a damaged one."""
    try:
        with _alone(folder.parent):
            return _read(folder)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DataError(f"cannot be read: {error}", path=folder) from error


def _read(folder: Path) -> CellResult | None:
    path = folder / "result.json"
    if not path.is_file():
        return None
    per_query, rows = [], folder / "per_query.csv"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        newer = record["schema_version"] > SCHEMA_VERSION
        if rows.is_file() and not newer:
            with rows.open(encoding="utf-8", newline="") as file:
                per_query = [_typed(row) for row in csv.DictReader(file)]
    except (ValueError, LookupError, TypeError, RecursionError, OSError, csv.Error) as error:
        raise DataError(f"is no cell record: {error}", path=path) from error
    if newer:
        version = record["schema_version"]
        raise DataError(f"schema_version {version} is newer than {SCHEMA_VERSION}", path=path)
    return CellResult(record, tuple(per_query), folder)


def _typed(row: Mapping[str, str | None]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, text in row.items():
        if name in ("qid", "faults"):
            out[name] = text or ""
        else:
            out[name] = float(text) if text else None
    return out


def state(results: Path, cell: Cell, key: str) -> State:
    """What a new run would find in the cell's place; a damaged cell is stale."""
    try:
        found = read(results / cell.folder)
    except DataError:
        return "stale"
    if found is None:
        return "planned"
    if found.record.get("key") != key:
        return "stale"
    known: State = found.record.get("state", "stale")
    return known if known in ("complete", "partial", "failed") else "stale"


def iterate(results: Path) -> Iterator[CellResult]:
    """Every readable cell below a folder, in path order; raises when there is no such folder."""
    if not results.is_dir():
        raise MissingResourceError(f"{results}: no such results folder")
    for path in sorted(results.rglob("result.json")):
        if any(part.startswith(".") for part in path.relative_to(results).parts):
            continue
        found = read(path.parent)
        if found is not None:
            yield found


def read_trace(folder: Path) -> Iterator[dict[str, Any]]:
    """The calls of a cell, one object each."""
    path = folder / "trace.jsonl.gz"
    if path.is_file():
        with gzip.open(path, "rt", encoding="utf-8", errors="surrogatepass") as file:
            for line in file:
                yield json.loads(line)


# --- a run that is going ----------------------------------------------------------------------


def write_progress(
    results: Path, cells: Sequence[Mapping[str, Any]], crew: Mapping[str, Any] | None = None
) -> None:
    """Tell who watches the folder what this process is at; no cells: it has ended.

    cells  of each "cell" (its folder), "state" (planned, running, complete, failed), and of a
           running one "done" and "total" queries and "calls"
    crew   of a run over many workers "shards" (open), "workers" (up), "calls",
           "calls_per_second" and predicted "seconds_left"
    """
    path = results / f".running-{os.getpid()}.json"
    with contextlib.suppress(OSError):  # nobody's result depends on being watched
        if not cells:
            path.unlink(missing_ok=True)
            return
        results.mkdir(parents=True, exist_ok=True)
        work = path.with_suffix(".new")
        told = {"cells": list(cells), "crew": dict(crew or {})}
        work.write_text(json.dumps(told), encoding="utf-8")
        work.replace(path)


def read_progress(results: Path) -> list[dict[str, Any]]:
    """What every run of this machine that is going has told, "cells" and "crew"; what a killed
    one left counts not."""
    runs: list[dict[str, Any]] = []
    for path in sorted(results.glob(".running-*.json")):
        with contextlib.suppress(OSError, ValueError):
            os.kill(int(path.stem.rpartition("-")[2]), 0)
            runs.append(json.loads(path.read_text(encoding="utf-8")))
    return runs


def ir_metadata(record: Mapping[str, Any]) -> str:
    """The run's sidecar in the ir_metadata vocabulary (PRIMAD keys)."""
    import yaml

    environment = record.get("environment", {})
    content = {
        "platform": {
            "hardware": environment.get("hardware", {}),
            "operating system": environment.get("platform"),
            "software": {"libraries": environment.get("packages", {})},
        },
        "implementation": {
            "executable": {"cmd": record.get("command")},
            "source": {"commit": environment.get("commit")},
            "lang": "python",
        },
        "method": {
            "automatic": True,
            "score ties": "none: scores strictly decrease",
            "retrieval": [{"name": record["first_stage"]["name"], "depth": record["depth"]}],
            "reranking": [{"name": record["model"]["label"], "method": record["model"]["method"]}],
        },
        "data": {
            "test collection": {"name": record["dataset"]["label"]},
            "training data": list(record["model"].get("trained_on", ())),
        },
    }
    return str(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
