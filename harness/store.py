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
    work = _workspace(folder)
    try:
        (work / "run.trec").write_text(files.run, encoding="utf-8", newline="\n")
        (work / "run.trec.ir_metadata.yml").write_text(ir_metadata(files.record), encoding="utf-8")
        (work / "per_query.csv").write_text(table(files.per_query), encoding="utf-8", newline="\n")
        _write_trace(work / "trace.jsonl.gz", files.trace)
        _write_record(work, files.record)
        _swap(work, folder)
    except OSError as error:
        raise DataError(f"cannot write the cell: {error}", path=folder) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def write_failure(results: Path, cell: Cell, record: Mapping[str, Any]) -> None:
    """Note a failed cell, unless a finished one is in its place."""
    folder = results / cell.folder
    with contextlib.suppress(OSError, DataError):
        if (folder / "run.trec").exists():
            return
        work = _workspace(folder)
        _write_record(work, record)
        _swap(work, folder)


def _workspace(folder: Path) -> Path:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".writing-{os.getpid()}-", dir=folder.parent))
    except OSError as error:
        raise DataError(f"cannot write there: {error}", path=folder) from error
    work.chmod(0o755)
    return work


def _write_record(work: Path, record: Mapping[str, Any]) -> None:
    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    (work / "result.json").write_text(text, encoding="utf-8", newline="\n")


def _write_trace(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with path.open("wb") as raw, gzip.GzipFile("", "wb", 6, raw, mtime=0) as packed:
        for row in rows:
            line = json.dumps(row, ensure_ascii=False) + "\n"
            packed.write(line.encode("utf-8", "surrogatepass"))


def _swap(work: Path, folder: Path) -> None:
    """Put the finished folder in its place. Killed in between, the cell is absent, never half."""
    old = folder.with_name(f".old-{os.getpid()}-{folder.name}")
    with contextlib.suppress(FileNotFoundError):
        folder.rename(old)
    with contextlib.suppress(OSError):  # another process put its equal folder there first
        work.rename(folder)
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
    path = folder / "result.json"
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        version = record["schema_version"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise DataError(f"is no cell record: {error}", path=path) from error
    if version > SCHEMA_VERSION:
        raise DataError(f"schema_version {version} is newer than {SCHEMA_VERSION}", path=path)
    per_query: list[dict[str, Any]] = []
    rows = folder / "per_query.csv"
    if rows.is_file():
        with rows.open(encoding="utf-8", newline="") as file:
            per_query = [_typed(row) for row in csv.DictReader(file)]
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
