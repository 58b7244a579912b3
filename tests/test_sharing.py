"""Several processes at once on one cache file and one results folder, and what is left of them."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from harness import store
from harness.specs import folder_dataset
from harness.types import Cell, DataError, ModelSpec, Protocol

ROOT = Path(__file__).resolve().parent.parent
RUN = "-m harness run -m setwise-sft-7b,rankzephyr-7b,oracle -d pocket --limit 6 --engine fake -q"


def together(commands: Sequence[Sequence[str]], place: Path) -> list[tuple[int, str]]:
    """Start all, then wait for all: the exit code of each and what it said."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    runs = [subprocess.Popen([sys.executable, *c], cwd=place, env=env, **pipes) for c in commands]
    said = [run.communicate(timeout=300)[0] for run in runs]
    return [(run.returncode, text) for run, text in zip(runs, said)]


def cells(results: Path) -> dict[str, tuple[str, bytes, bytes]]:
    """What every cell says, apart from when and how fast it was run."""
    return {
        str(cell.folder.relative_to(results)): (
            json.dumps([cell.record["key"], cell.record["state"], cell.record["measures"]]),
            (cell.folder / "run.trec").read_bytes(),
            (cell.folder / "per_query.csv").read_bytes(),
        )
        for cell in store.iterate(results)
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of one process."""
    place = tmp_path_factory.mktemp("alone")
    [(code, said)] = together([[*RUN.split(), "--results", "r"]], place)
    assert code == 0, said
    return place / "r"


@pytest.mark.parametrize("count", [2, 4])
def test_processes_that_run_one_matrix_at_once_store_every_call_once(
    count: int, alone: Path, tmp_path: Path
) -> None:
    said = together([[*RUN.split(), "--results", "shared"]] * count, tmp_path)
    assert [code for code, _ in said] == [0] * count, said
    assert cells(tmp_path / "shared") == cells(alone)
    stored = []
    for results in (alone, tmp_path / "shared"):
        with sqlite3.connect(results / ".cache.sqlite") as db:
            assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            stored.append(sorted(db.execute("SELECT key, value, crc FROM calls NOT INDEXED")))
    assert stored[0] == stored[1]
    assert len({key for key, *_ in stored[1]}) == len(stored[1]) > 0
    left = {p.name for p in (tmp_path / "shared").rglob(".*")}
    assert {name.removeprefix(".cache.sqlite") for name in left} <= {"", "-wal", "-shm"}


# Opens a cache that is not there yet at the same moment as the others, again and again.
OPENS = """
import sys, time
from pathlib import Path
from harness.cache import Cache
from harness.types import Completion
for n in range(25):
    while time.time() < float(sys.argv[1]) + 0.04 * n:
        pass
    cache = Cache(Path(f"{n}.sqlite"))
    cache.put_many([(b"k", Completion(text="x"))])
    assert cache.count() == 1
    cache.close()
"""


def test_processes_may_make_one_cache_at_the_same_moment(tmp_path: Path) -> None:
    import time

    said = together([["-c", OPENS, str(time.time() + 1.5)]] * 4, tmp_path)
    assert [code for code, _ in said] == [0] * 4, said


# Writes a cell again and again, or reads it as often; a cell's parts must belong together.
REWRITES = """
import json, sys
from pathlib import Path
from harness import store
from harness.specs import folder_dataset
from harness.types import Cell, ModelSpec, Protocol

who, base = sys.argv[1], Path("results")
cell = Cell(ModelSpec("m", "random"), folder_dataset(base), "run", 100, None, Protocol())
met = set()
for n in range(150):
    name = f"{who}{n}"
    if who != "reader":
        record = {"schema_version": 1, "key": name, "state": "complete", "depth": 100,
                  "model": {"label": "m", "method": "random"}, "dataset": {"label": "d"},
                  "first_stage": {"name": "run"}}
        rows = [{"qid": "q", "faults": name}]
        store.write(base, cell, store.Files(record, name, rows, [{"qid": name}]))
        store.write_failure(base, cell, {**record, "state": "failed"})
    elif found := store.read(base / cell.folder):
        assert found.record["key"] == found.per_query[0]["faults"], found
        assert found.record["state"] == "complete"
        met.add(found.record["key"])
print(len(met))
"""


def test_a_cell_that_others_rewrite_is_always_whole(tmp_path: Path) -> None:
    words = ["-c", REWRITES]
    said = together(
        [[*words, "a"], [*words, "b"], [*words, "reader"], [*words, "reader"]], tmp_path
    )
    assert [code for code, _ in said] == [0] * 4, said
    assert [p.name for p in (tmp_path / "results").rglob("*") if p.name.startswith(".")] == []
    assert len(list(store.iterate(tmp_path / "results"))) == 1


# --- what a process may leave behind ------------------------------------------------------------


def files(name: str) -> store.Files:
    record = {
        "schema_version": 1, "key": name, "state": "complete", "depth": 100, "measures": {},
        "model": {"label": "m", "method": "random"}, "dataset": {"label": "d"},
        "first_stage": {"name": "run"},
    }  # fmt: skip
    return store.Files(record, f"{name}\n", [{"qid": "q", "nDCG@10": 0.5, "faults": ""}], [])


def place(results: Path) -> Cell:
    return Cell(ModelSpec("m", "random"), folder_dataset(results), "run", 100, None, Protocol())


@pytest.fixture
def cell(tmp_path: Path) -> Path:
    return store.write(tmp_path, place(tmp_path), files("first"))


def hidden(results: Path) -> list[str]:
    return [p.name for p in results.rglob("*") if p.name.startswith(".")]


def test_a_cell_that_was_moved_away_is_found_again(cell: Path, tmp_path: Path) -> None:
    """Killed between the two renames: the old cell is aside, the new one not yet in place."""
    shutil.copytree(cell, cell.with_name(".writing-abc"))
    cell.rename(cell.with_name(f".old-{cell.name}"))
    assert store.state(tmp_path, place(tmp_path), "first") == "complete"
    assert hidden(tmp_path) == []


def test_what_lies_aside_of_a_finished_cell_is_removed(cell: Path, tmp_path: Path) -> None:
    """Killed after the second rename, or while half of the old one was deleted."""
    shutil.copytree(cell, cell.with_name(f".old-{cell.name}"))
    (cell.with_name(f".old-{cell.name}") / "run.trec").unlink()
    cell.with_name(".writing-xyz").mkdir()
    store.write(tmp_path, place(tmp_path), files("second"))
    assert store.state(tmp_path, place(tmp_path), "second") == "complete"
    assert hidden(tmp_path) == []


def test_a_rename_that_fails_gives_the_old_cell_back(
    cell: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.rename

    def fails(self: Path, target: Path) -> Path:
        if self.name.startswith(".writing"):
            raise OSError(28, "No space left on device")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(DataError, match=f"{cell}: cannot write the cell: .*No space left"):
        store.write(tmp_path, place(tmp_path), files("second"))
    assert store.state(tmp_path, place(tmp_path), "first") == "complete"
    assert hidden(tmp_path) == []


def test_a_failure_leaves_nothing_but_its_note(tmp_path: Path) -> None:
    made = place(tmp_path)
    for _ in range(2):
        store.write_failure(tmp_path, made, files("x").record | {"state": "failed"})
        assert store.state(tmp_path, made, "x") == "failed"
    assert [p.name for p in (tmp_path / made.folder).iterdir()] == ["result.json"]
    store.write(tmp_path, made, files("x"))
    store.write_failure(tmp_path, made, files("x").record | {"state": "failed"})
    assert store.state(tmp_path, made, "x") == "complete"


def test_a_file_system_without_locks_is_written_all_the_same(
    cell: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    def none(handle: int, how: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", none)
    cell.with_name(".writing-of-another-process").mkdir()
    store.write(tmp_path, place(tmp_path), files("second"))
    assert store.state(tmp_path, place(tmp_path), "second") == "complete"
    assert hidden(tmp_path) == [".writing-of-another-process"]


@pytest.mark.parametrize("results", ["/proc", "/dev/null", "/dev/null/results"])
def test_a_folder_that_takes_no_cell_is_one_clear_error(results: str) -> None:
    if not Path("/proc/self").exists():
        pytest.skip("there is no /proc, which takes no folder even from root")
    with pytest.raises(DataError, match=f"{results}/.*: cannot write the cell: "):
        store.write(Path(results), place(Path("x")), files("x"))
    store.write_failure(Path(results), place(Path("x")), {})
    assert store.read(Path(results) / place(Path("x")).folder) is None


def test_a_folder_that_may_not_be_read_is_one_clear_error(
    cell: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(path: Path, flags: int) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", denied)  # permissions do not bind root
    with pytest.raises(DataError, match=f"{cell}: cannot be read: .*Permission denied"):
        store.read(cell)


@pytest.mark.parametrize(
    "damage",
    [
        lambda cell: (cell / "result.json").write_text("[]"),
        lambda cell: (cell / "result.json").write_text('{"schema_version": "one"}'),
        lambda cell: (cell / "result.json").write_bytes(b"\xff\xfe"),
        lambda cell: (cell / "result.json").write_text("[" * 100_000),
        lambda cell: (cell / "result.json").write_text((cell / "result.json").read_text()[:99]),
        lambda cell: (cell / "per_query.csv").write_text("qid,nDCG@10\nq,high\n"),
        lambda cell: (cell / "per_query.csv").write_text("qid,nDCG@10\nq,1,2,3\n"),
        lambda cell: (cell / "per_query.csv").write_bytes(b"qid\n\xff\n"),
    ],
)
def test_a_damaged_cell_is_one_clear_error_and_is_run_again(
    damage: Any, cell: Path, tmp_path: Path
) -> None:
    damage(cell)
    with pytest.raises(DataError, match=r"result\.json: is no cell record"):
        list(store.iterate(tmp_path))
    assert store.state(tmp_path, place(tmp_path), "first") == "stale"
