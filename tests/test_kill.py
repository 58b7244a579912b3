"""Processes that are killed or interrupted half way lose nothing and change nothing."""

from __future__ import annotations

import csv
import json
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
QUERIES, DEPTH = 8, 14

# A process that has everything imported and loaded forks one child after the other ("lives"): each
# runs the whole cell, and all but the last are killed with SIGKILL at a random moment. Children
# note every call asked and every answer stored in a file that only grows.
LIVES = """
import json, os, signal, sys, time
from pathlib import Path
from random import Random
from harness import cell, store
from harness.cache import Cache, Identity
from harness.data import load
from harness.engines import open_engine
from harness.specs import Registry, folder_dataset, override
from harness.types import Cell, Protocol

data, results, model, asking, kills, pause, seed = json.loads(sys.argv[1])
results = Path(results)
registry, dataset = Registry(), folder_dataset(Path(data))
spec = override(registry.models["setwise-sft-7b"], ["num_child=2", "limits.max_tokens=12"])
if model:
    from dataclasses import replace
    import torch
    torch.set_num_threads(1)  # threads do not survive a fork
    spec = replace(spec, base=model, adapter="", engine="hf")
limit = 2 if model else None
place = Cell(spec, dataset, "run", 100, limit, Protocol())
job = cell.resolve(place, registry.prompt(spec.prompt), load(dataset, limit=limit))
log = os.open(results / "log", os.O_CREAT | os.O_APPEND | os.O_WRONLY)

def note(what, key):
    os.write(log, f"{what} {key.hex()}\\n".encode())

class Watched:
    def __init__(self, engine):
        self._engine, self._identity = engine, Identity(engine.fingerprint)
    def __getattr__(self, name):
        return getattr(self._engine, name)
    def submit(self, number, request):
        note("asked", self._identity.key(request))
        self._engine.submit(number, request)
    def poll(self):
        time.sleep(pause)
        return self._engine.poll()

class Noted(Cache):
    def put_many(self, items, *rest):
        items = list(items)
        super().put_many(items, *rest)
        for key, _ in items:
            note("stored", key)

def live(folder):
    engine = open_engine("hf" if model else "fake", spec)
    cache = Noted(folder / "calls.sqlite")
    cell.run(job, Watched(engine), cache, folder, command="test")
    cache.close()

live(results / "whole")  # undisturbed; what it imports and loads stays for the children
os.truncate(results / "log", 0)
rng, size = Random(seed), lambda: (results / "log").stat().st_size

def life(lines=None, seconds=float("inf")):
    # One child, killed a little after it noted so many lines or lived so long. Was it?
    os.write(log, b"life\\n")
    before, child, start = size(), os.fork(), time.monotonic()
    if not child:
        live(results / "killed")
        os._exit(0)
    ended = 0
    while not ended and time.monotonic() - start < seconds:
        if lines is not None and size() >= before + lines * 72:
            time.sleep(rng.uniform(0, 2 * pause))
            break
        time.sleep(0.0005)
        ended, status = os.waitpid(child, os.WNOHANG)
    if not ended:
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
    return status == signal.SIGKILL

killed = [life(lines=rng.randint(0, 24)) for _ in range(asking)]
life()
start = time.monotonic()
life()  # everything is in the cache: reading, measuring and writing
whole = time.monotonic() - start
while sum(killed) < kills:
    killed.append(life(seconds=rng.uniform(0, whole)))
life()
print(sum(killed[:asking]))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return a_collection(tmp_path / "data")


def a_collection(base: Path) -> Path:
    """A folder of QUERIES queries with DEPTH candidates each."""
    base.mkdir()
    docs = [f"d{i}" for i in range(DEPTH)]
    corpus = [json.dumps({"_id": d, "text": f"passage {d} " * 4}) for d in docs]
    (base / "corpus.jsonl").write_text("\n".join(corpus) + "\n")
    (base / "queries.tsv").write_text("".join(f"q{n}\tquery {n}\n" for n in range(QUERIES)))
    run = [f"q{n} Q0 {d} {i + 1} {50 - i} t\n" for n in range(QUERIES) for i, d in enumerate(docs)]
    (base / "run.trec").write_text("".join(run))
    qrels = [f"q{n} 0 {d} {i % 4}\n" for n in range(QUERIES) for i, d in enumerate(docs)]
    (base / "qrels.txt").write_text("".join(qrels))
    return base


def lives(folder: Path, results: Path, model: str, asking: int, kills: int, pause: float) -> Any:
    """Run the script; how many of the children that were to ask something were killed."""
    results.mkdir()
    words = json.dumps([str(folder), str(results), model, asking, kills, pause, 929])
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", LIVES, words], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def lasting(results: Path, *, seconds: bool) -> dict[str, Any]:
    """The bytes that must not depend on how often a run was killed; measured times may."""
    [record] = results.rglob("result.json")
    rows = list(csv.reader((record.parent / "per_query.csv").read_text().splitlines()))
    clock = rows[0].index("seconds")
    return {
        "measures": json.dumps(json.loads(record.read_text())["measures"]),
        "run.trec": (record.parent / "run.trec").read_bytes(),
        "per_query.csv": [row if seconds else row[:clock] + row[clock + 1 :] for row in rows],
    }


@pytest.mark.parametrize(
    ("engine", "asking", "kills", "pause"), [("fake", 35, 50, 0.004), ("hf", 12, 16, 0)]
)
def test_a_run_killed_again_and_again_gives_the_same_bytes_and_pays_once(
    engine: str,
    asking: int,
    kills: int,
    pause: float,
    folder: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    model = str(request.getfixturevalue("tiny_model")) if engine == "hf" else ""
    assert lives(folder, tmp_path / "r", model, asking, kills, pause) >= asking // 2
    results, fake = tmp_path / "r" / "killed", engine == "fake"
    assert lasting(results, seconds=fake) == lasting(tmp_path / "r" / "whole", seconds=fake)
    stored: set[str] = set()
    asked: Counter[str] = Counter()
    lost = 0
    for text in (tmp_path / "r" / "log").read_text().split("life\n"):
        noted = [line.split() for line in text.splitlines()]
        now, kept = ([key for what, key in noted if what == w] for w in ("asked", "stored"))
        assert not stored & {*now}, "a stored call was asked again"
        assert len(now) == len({*now}), "a call in flight was asked again"
        stored |= {*kept}
        asked.update(now)
        lost += len({*now} - stored)
    with sqlite3.connect(results / "calls.sqlite") as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        kept = [key.hex() for (key,) in db.execute("SELECT key FROM calls")]
    assert {*kept} == asked.keys() >= stored  # some died between storing and noting it
    assert 0 < asked.total() - len(kept) <= lost
    assert list(results.rglob(".*")) == []


# Writes a cell over an old one (or over none), once for every call into the operating system on
# the way, killed there: before the call, and right after it.
STEPS = """
import json, os, shutil, signal, sys
from itertools import count
from pathlib import Path
from harness import store
from harness.specs import folder_dataset
from harness.types import Cell, ModelSpec, Protocol

base = Path(sys.argv[1])
cell = Cell(ModelSpec("m", "random"), folder_dataset(base), "run", 100, None, Protocol())

def write(name):
    record = {"schema_version": 1, "key": name, "state": "complete", "depth": 100,
              "model": {"label": "m", "method": "random"}, "dataset": {"label": "d"},
              "first_stage": {"name": "run"}}
    rows = [{"qid": "q", "faults": name}]
    store.write(base, cell, store.Files(record, name, rows, [{"qid": name}]))

def dies_at(number):
    calls = count()
    def at(frame, event, function):
        if event.startswith("c_") and function.__module__ in ("posix", "fcntl", "io"):
            if next(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.setprofile(at)

def found():
    at = store.read(base / cell.folder)
    if at is None:
        return None
    parts = {at.record["key"], at.per_query[0]["faults"], (at.folder / "run.trec").read_text(),
             *(row["qid"] for row in store.read_trace(at.folder))}
    assert len(parts) == 1, parts
    return parts.pop()

seen = []
for old in (None, "old"):
    for number in count():
        shutil.rmtree(base, ignore_errors=True)
        if old:
            write(old)
        if not (child := os.fork()):
            dies_at(number)
            write("new")
            sys.setprofile(None)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        assert status in (0, signal.SIGKILL), status
        now = found()
        assert now in (old, "new"), (number, now)
        assert [p for p in base.rglob("*") if p.name.startswith(".")] == [] or now is None
        write("new")
        assert found() == "new"
        assert [p for p in base.rglob("*") if p.name.startswith(".")] == []
        if not status:
            break
        seen.append([old, now])
print(json.dumps(seen))
"""


def test_a_cell_killed_at_any_step_of_its_writing_is_the_old_one_or_the_new_one(
    tmp_path: Path,
) -> None:
    words = [sys.executable, "-c", STEPS, str(tmp_path / "r")]
    done = subprocess.run(
        words, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    seen = [tuple(pair) for pair in json.loads(done.stdout)]
    assert {(None, None), (None, "new"), ("old", "old"), ("old", "new")} == set(seen)
    assert len(seen) > 60


# --- the command line ---------------------------------------------------------------------------


def harness(folder: Path, results: Path, words: str, **how: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "harness", "run", *words.split(), "-d", str(folder)]
    env = {"RERANK_HARNESS_CACHE": str(results.parent / "models"), "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(
        [*command, "--results", str(results)], **pipes, env=os.environ | env, **how
    )


def real(model: Path) -> str:
    settings = "--set limits.max_tokens=24 --set num_child=3 --limit 1"
    return f"-m {model} --method setwise.heapsort --prompt setwise-sft {settings}"


def answers(cache: Path) -> int:
    if not cache.exists():
        return 0
    with sqlite3.connect(cache, timeout=30) as db:
        try:
            return int(db.execute("SELECT COUNT(*) FROM calls").fetchone()[0])
        except sqlite3.OperationalError:  # the table is not made yet
            return 0


def stopped(run: subprocess.Popen[str]) -> None:
    _, said = run.communicate(timeout=60)
    assert run.returncode == 7, said
    assert "the same command goes on from there" in said
    assert "Traceback" not in said


def test_an_interrupt_inside_a_batch_keeps_what_is_paid_for_and_the_run_goes_on(
    folder: Path, tiny_model: Path, tmp_path: Path
) -> None:
    results, words = tmp_path / "r", real(tiny_model)
    run = harness(folder, results, words)
    while not answers(results / ".cache.sqlite") and run.poll() is None:
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    stopped(run)
    paid = answers(results / ".cache.sqlite")
    assert paid > 0
    again = harness(folder, results, words)
    _, said = again.communicate(timeout=300)
    assert again.returncode == 0, said
    assert f"{paid} answers came from the cache" in said


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_run_is_stopped_while_its_engine_loads(
    how: signal.Signals, folder: Path, tiny_model: Path, tmp_path: Path
) -> None:
    run = harness(folder, tmp_path / "r", real(tiny_model))
    assert run.stderr is not None
    assert "started" in run.stderr.readline()
    run.send_signal(how)
    stopped(run)


def test_a_full_disk_ends_a_run_with_one_line_and_it_goes_on_when_there_is_room(
    folder: Path, tmp_path: Path
) -> None:
    def full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))

    results, words = tmp_path / "r", "-m setwise-sft-7b --engine fake --set num_child=2"
    run = harness(folder, results, words, preexec_fn=full)
    out, said = run.communicate(timeout=120)
    assert (run.returncode, out) == (5, ""), said
    assert "cannot store answers: " in said
    assert "Traceback" not in said
    paid = answers(results / ".cache.sqlite")
    assert paid > 0
    for place in (results, tmp_path / "whole"):
        run = harness(folder, place, words)
        _, said = run.communicate(timeout=120)
        assert run.returncode == 0, said
        assert (f"{paid} answers came from the cache" in said) == (place == results)
    assert lasting(results, seconds=True) == lasting(tmp_path / "whole", seconds=True)
