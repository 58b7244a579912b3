"""Processes that are killed or interrupted half way lose nothing and change nothing."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest

QUERIES, DEPTH = 6, 14
# A cell over a fake engine that takes its time; every submitted request is noted in a file.
SLOW_CELL = """
import sys, time
from pathlib import Path
from harness import cell
from harness.cache import Cache, Identity
from harness.data import load
from harness.engines.fake import FakeEngine
from harness.specs import Registry, folder_dataset
from harness.types import Cell, Protocol

class Slow(FakeEngine):
    def submit(self, number, request):
        with open(sys.argv[3], "a") as log:
            log.write(Identity(self.fingerprint).key(request).hex() + "\\n")
        super().submit(number, request)
    def poll(self):
        time.sleep(float(sys.argv[4]))
        return super().poll()

registry, dataset = Registry(), folder_dataset(Path(sys.argv[1]))
spec = registry.models["rank-r1-7b"]
place = Cell(spec, dataset, "run", 100, None, Protocol())
job = cell.resolve(place, registry.prompt(spec.prompt), load(dataset))
results = Path(sys.argv[2])
cell.run(job, Slow(spec), Cache(results / "calls.sqlite"), results, command="test")
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    base = tmp_path / "data"
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


def lasting(results: Path) -> dict[str, str]:
    """The bytes that must not depend on how often a run was killed."""
    [record] = results.rglob("result.json")
    measures = json.loads(record.read_text())["measures"]
    files = {name: (record.parent / name).read_text() for name in ("run.trec", "per_query.csv")}
    return files | {"measures": json.dumps(measures)}


def slow_cell(folder: Path, results: Path, pause: float) -> subprocess.Popen[bytes]:
    results.mkdir(exist_ok=True)
    words = [str(folder), str(results), str(results / "asked.log"), str(pause)]
    return subprocess.Popen([sys.executable, "-c", SLOW_CELL, *words])


def test_a_run_killed_again_and_again_gives_the_same_bytes_and_pays_once(
    folder: Path, tmp_path: Path
) -> None:
    assert slow_cell(folder, tmp_path / "whole", 0).wait(timeout=120) == 0
    expected = lasting(tmp_path / "whole")
    distinct = len(set((tmp_path / "whole" / "asked.log").read_text().split()))
    rng, killed, results = Random(5), 0, tmp_path / "killed"
    for _ in range(40):
        run = slow_cell(folder, results, 0.1)
        try:
            code = run.wait(timeout=rng.uniform(1.0, 3.0))
        except subprocess.TimeoutExpired:
            run.kill()
            run.wait()
            killed += 1
            continue
        assert code == 0
        break
    assert killed >= 2, "the run was never killed half way"
    assert lasting(results) == expected
    asked = (results / "asked.log").read_text().split()
    in_flight = killed * 16  # at most one call of each of the queries alive was in flight
    assert len(set(asked)) == distinct
    assert len(asked) <= distinct + in_flight
    assert [p.name for p in results.rglob("*") if p.name.startswith((".writing", ".old"))] == []


def answers(cache: Path) -> int:
    if not cache.exists():
        return 0
    with sqlite3.connect(cache, timeout=30) as db:
        try:
            return int(db.execute("SELECT COUNT(*) FROM calls").fetchone()[0])
        except sqlite3.OperationalError:  # the table is not made yet
            return 0


def real_run(folder: Path, model: Path, results: Path) -> subprocess.Popen[str]:
    words = ["-m", str(model), "--method", "setwise.heapsort", "--prompt", "setwise-sft"]
    words += ["--set", "limits.max_tokens=48", "--set", "num_child=3", "-d", str(folder)]
    command = [sys.executable, "-m", "harness", "run", *words, "--results", str(results)]
    env = os.environ | {"RERANK_HARNESS_CACHE": str(results.parent / "models")}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **pipes, env=env, preexec_fn=hears_interrupts)


def hears_interrupts() -> None:
    """A test run in the background of a shell has interrupts ignored, and would hand that on."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_real_engine_is_stopped_at_once_and_goes_on_where_it_was(
    how: signal.Signals, folder: Path, tiny_model: Path, tmp_path: Path
) -> None:
    results, whole = tmp_path / "r", tmp_path / "whole"
    run = real_run(folder, tiny_model, results)
    deadline = time.monotonic() + 120
    while not answers(results / ".cache.sqlite") and time.monotonic() < deadline:
        time.sleep(0.05)
    run.send_signal(how)
    _, said = run.communicate(timeout=60)
    paid = answers(results / ".cache.sqlite")
    assert paid > 0
    if how == signal.SIGINT:
        assert run.returncode == 7, said
        assert "the same command goes on from there" in said
        assert "Traceback" not in said
    again = real_run(folder, tiny_model, results)
    _, said = again.communicate(timeout=300)
    assert again.returncode == 0, said
    assert f"{paid} answers came from the cache" in said
    complete = real_run(folder, tiny_model, whole)
    assert complete.wait(timeout=300) == 0
    complete.communicate()
    [one], [other] = results.rglob("run.trec"), whole.rglob("run.trec")
    assert one.read_text() == other.read_text()
