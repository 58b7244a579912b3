"""What flips when stored calls are asked again: over scripted engines, and for real."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from harness import cell as cells
from harness.cache import Cache
from harness.data import load
from harness.engines.fake import FakeEngine
from harness.flips import Audit
from harness.specs import Registry, folder_dataset
from harness.types import Cell, Completion, MissingResourceError, Protocol

ROOT = Path(__file__).resolve().parent.parent
DOCS = {f"d{n}": f"apples of kind {n}" for n in range(6)}
QUERIES = {f"q{n}": f"which apples number {n}" for n in range(5)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    base = tmp_path / "apples"
    base.mkdir()
    (base / "queries.tsv").write_text("".join(f"{q}\t{t}\n" for q, t in QUERIES.items()))
    rows = [json.dumps({"_id": d, "text": t}) for d, t in DOCS.items()]
    (base / "corpus.jsonl").write_text("\n".join(rows) + "\n")
    judged = [f"{q} 0 d{n} {n % 4}" for q in QUERIES for n in range(6)]
    (base / "qrels.txt").write_text("\n".join(judged) + "\n")
    return base


@dataclass(eq=False)
class Crowded(FakeEngine):
    """Judges the other way round while more than one call is in flight."""

    most: int = 0
    contrary: bool = True

    def poll(self) -> list[tuple[int, Completion]]:
        self.most = max(self.most, len(self._pending))
        self.mode = "reversed" if self.contrary and len(self._pending) > 1 else "oracle"
        return super().poll()


@pytest.fixture
def ran(folder: Path, tmp_path: Path) -> Callable[..., tuple[cells.Job, Cache]]:
    """A cell whose calls were asked one at a time, and the cache that holds them."""

    def ran(model: str = "rank-r1-7b") -> tuple[cells.Job, Cache]:
        registry, dataset = Registry(), folder_dataset(folder)
        spec, data, cache = registry.models[model], load(dataset, None, 100), Cache(None)
        cell = Cell(spec, dataset, data.first_stage, 100, None, Protocol(concurrency=1))
        job = cells.resolve(cell, registry.prompts[spec.prompt], data)
        engine = Crowded(spec, contrary=False)
        cells.run(job, engine, cache, tmp_path / "results", command="harness run ...")
        return job, cache

    return ran


def audited(job: cells.Job, cache: Cache, most: int = 999, **settings: Any) -> Any:
    engine = Crowded(job.cell.model, **settings)
    return Audit(job, engine, cache).rows(most, seed=1)


def test_an_engine_that_answers_alike_flips_nothing(ran: Callable[..., Any]) -> None:
    job, cache = ran()
    stored = cache.count()
    alone, together, between = audited(job, cache, contrary=False)
    for row in (alone, together, between):
        assert (row["calls"], row["flips"], row["rate"]) == (stored, 0, 0)
        assert row["95%"][0] == 0 < row["95%"][1] < 1
    for row in (alone, together):
        assert (row["queries"], row["rankings changed"], row["change"]) == (5, 0, 0)
    assert between["change"] is None


def test_answers_that_other_calls_change_are_found_and_weighed(ran: Callable[..., Any]) -> None:
    job, cache = ran()
    stored = cache.count()
    alone, together, between = audited(job, cache)
    assert (alone["flips"], alone["rankings changed"]) == (0, 0)
    assert together["flips"] == between["flips"] > stored / 2
    assert together["rankings changed"] > 0
    assert together["change"] == together["nDCG@10"] - together["stored nDCG@10"] != 0
    assert cache.count() == stored  # what was asked again is not kept


def test_alone_means_one_call_in_flight(ran: Callable[..., Any]) -> None:
    job, cache = ran()
    engine = Crowded(job.cell.model)
    audit = Audit(job, engine, cache)
    seen = []
    real = engine.poll

    def poll() -> list[tuple[int, Completion]]:
        seen.append(len(engine._pending))
        return real()

    engine.poll = poll  # type: ignore[method-assign]
    audit.rows(7, seed=1)
    assert seen[:7] == [1] * 7
    assert seen[7] == 7


def test_the_effect_is_that_of_a_rerun(ran: Callable[..., Any], tmp_path: Path) -> None:
    """Every answer replaced, so nDCG@10 is that of a run with these answers."""
    job, cache = ran()
    [_, together, _] = audited(job, cache)
    contrary = FakeEngine(job.cell.model, mode="reversed")
    again = cells.run(job, contrary, Cache(None), tmp_path / "again", command="")
    # The last calls of a query are asked alone and so judged the right way round.
    assert together["nDCG@10"] < together["stored nDCG@10"]
    assert again.measures["nDCG@10"] < together["stored nDCG@10"]


def test_a_sample_is_whole_queries_as_far_as_it_goes(ran: Callable[..., Any]) -> None:
    job, cache = ran()
    per_query = cache.count() / len(QUERIES)
    small, larger = (audited(job, cache, most)[0] for most in (2, int(per_query) + 1))
    assert (small["calls"], small["queries"]) == (2, 1)
    assert (larger["calls"], larger["queries"]) == (int(per_query) + 1, 2)
    other = Audit(job, Crowded(job.cell.model), cache).rows(2, seed=2)
    assert other[0]["calls"] == 2


def test_a_score_flips_only_when_a_passage_changes_places(
    ran: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    job, cache = ran("smollm2-135m-qlm")

    def shifted(by: float) -> Any:
        engine = FakeEngine(job.cell.model, mode="oracle")
        real = engine.answer

        def answer(request: Any) -> Completion:
            found = real(request)
            hit = request.shown == ("d0",)
            return Completion(finish="scored", scores=tuple(s + by * hit for s in found.scores))

        engine.answer = answer  # type: ignore[method-assign]
        return Audit(job, engine, cache).rows(999, seed=1)[0]

    assert shifted(1e-9)["flips"] == 0
    moved = shifted(50.0)
    assert moved["calls"] == len(DOCS) * len(QUERIES)
    assert 0 < moved["flips"] <= len(QUERIES)
    assert moved["rankings changed"] == moved["flips"]


def test_nothing_stored_is_nothing_to_audit(ran: Callable[..., Any]) -> None:
    job, _ = ran()
    with pytest.raises(MissingResourceError, match="run it first"):
        audited(job, Cache(None))


# --- the command ------------------------------------------------------------------------------


def harness(place: Path, *words: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "300", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "harness", *words]
    return subprocess.run(command, cwd=place, env=env, capture_output=True, text=True)


def test_the_command_audits_a_real_model(folder: Path, tmp_path: Path, tiny_model: Path) -> None:
    asked = ["--method", "pointwise.yesno", "--prompt", "yesno", "-d", str(folder)]
    refused = harness(tmp_path, "audit", str(tiny_model), *asked)
    assert (refused.returncode, "no stored calls" in refused.stderr) == (4, True)
    assert not (tmp_path / "results").exists()
    done = harness(tmp_path, "run", "-m", str(tiny_model), *asked, "--limit", "3")
    assert done.returncode == 0, done.stderr
    words = ["audit", str(tiny_model), *asked, "--limit", "3", "--sample", "10"]
    said = harness(tmp_path, *words, "--format", "json")
    assert said.returncode == 0, said.stderr
    rows = json.loads(said.stdout)
    assert [(row["asked"], row["against"]) for row in rows] == [
        ("alone", "stored"), ("in batches", "stored"), ("in batches", "alone"),
    ]  # fmt: skip
    assert all(row["calls"] == 10 for row in rows)
    assert rows[0]["queries"] == 2
    baseline = harness(tmp_path, "audit", "random", "-d", str(folder))
    assert (baseline.returncode, "no engine" in baseline.stderr) == (2, True)
