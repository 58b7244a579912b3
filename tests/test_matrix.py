"""A matrix: what shares weights runs together, and one cell's failure stays its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from harness import cell as cells
from harness import matrix
from harness.cache import Cache
from harness.data import load
from harness.engines.fake import FakeEngine
from harness.prompts import Prompt
from harness.specs import Registry, folder_dataset
from harness.types import (
    Cell,
    CellResult,
    Completion,
    EngineError,
    HarnessError,
    ModelSpec,
    Protocol,
    Request,
    Serving,
)


@dataclass
class Weights:
    """One loaded base: the views on it share a queue, as those of one vLLM process do."""

    waiting: list[tuple[int, Request, View]] = field(default_factory=list)
    batches: list[set[str]] = field(default_factory=list)


class View(FakeEngine):
    """An engine of a group; `dies` lets every poll of the group fail while it has calls there."""

    def __init__(self, spec: ModelSpec, weights: Weights, *, dies: bool = False) -> None:
        super().__init__(spec)
        self.weights, self.dies, self.group, self.open = weights, dies, "one base", True

    def submit(self, number: int, request: Request) -> None:
        self.asked.append(request)
        self.weights.waiting.append((number, request, self))

    def poll(self) -> list[tuple[int, Completion]]:
        batch = list(self.weights.waiting)
        self.weights.waiting.clear()
        if any(view.dies for _, _, view in batch):
            raise EngineError("the process of this base died")
        self.weights.batches.append({view.spec.name for _, _, view in batch})
        return [(number, view.answer(request)) for number, request, view in batch]

    def close(self) -> None:
        self.open = False


class Told:
    """Writes down what a watcher hears."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.error: HarnessError | None = None

    def skipped(self) -> None:
        self.heard.append("skipped")

    def started(self) -> None:
        self.heard.append("started")

    def progress(self, done: int, total: int, calls: int) -> None:
        self.heard.append(f"{done}/{total}")

    def finished(self, result: CellResult) -> None:
        self.heard.append("finished")

    def failed(self, error: HarnessError) -> None:
        self.heard.append("failed")
        self.error = error


@pytest.fixture
def entry(tmp_path: Path) -> Callable[..., matrix.Entry]:
    """Makes an entry for a renamed row of the registry over a small folder."""
    base = tmp_path / "fruit"
    base.mkdir()
    (base / "queries.tsv").write_text("q1\tsour apples\nq2\tsweet apples\n")
    rows = [json.dumps({"_id": f"d{i}", "text": f"apples {i}"}) for i in range(6)]
    (base / "corpus.jsonl").write_text("\n".join(rows) + "\n")
    (base / "qrels.txt").write_text("q1 0 d1 1\nq2 0 d2 1\n")
    registry = Registry()

    def made(name: str, **protocol: Any) -> matrix.Entry:
        spec = replace(registry.models["rank-r1-7b"], name=name)
        dataset = folder_dataset(base)
        data = load(dataset, None, 100)
        prompt: Prompt = registry.prompts[spec.prompt]
        cell = Cell(spec, dataset, data.first_stage, 100, None, Protocol(**protocol))
        return matrix.Entry(cells.resolve(cell, prompt, data), "harness run ...", Told())

    return made


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> dict[str, View]:
    """What open_engine hands out, by model; one base for all, `bad` dies in use."""
    weights, opened = Weights(), dict[str, View]()

    def open_engine(family: str, spec: ModelSpec, serving: Serving) -> View:
        opened[spec.name] = View(spec, weights, dies=spec.name == "bad")
        return opened[spec.name]

    monkeypatch.setattr(matrix, "open_engine", open_engine)
    return opened


def ran(entries: list[matrix.Entry], results: Path, cache: Cache | None = None) -> matrix.Done:
    return matrix.run(entries, cache or Cache(None), results, matrix.Local(Serving()))


def heard(entry: matrix.Entry) -> list[str]:
    assert isinstance(entry.watcher, Told)
    return entry.watcher.heard


def test_cells_on_one_base_are_in_flight_together(entry, engines, tmp_path: Path) -> None:
    done = ran([entry("a"), entry("b"), entry("c")], tmp_path / "r")
    assert engines["a"].weights.batches[0] == {"a", "b", "c"}
    assert sorted(r.model for r in done.results) == ["a", "b", "c"]
    assert not any(engine.open for engine in engines.values())


def test_together_or_alone_a_cell_ranks_the_same(entry, engines, tmp_path: Path) -> None:
    def run_files(folder: Path) -> dict[str, bytes]:
        return {p.parent.name: p.read_bytes() for p in folder.rglob("run.trec")}

    ran([entry("a"), entry("b")], tmp_path / "together")
    for name in ("a", "b"):
        ran([entry(name)], tmp_path / "alone")
    assert run_files(tmp_path / "together") == run_files(tmp_path / "alone")


def test_a_shared_run_claims_no_throughput_for_one_cell(entry, engines, tmp_path: Path) -> None:
    together = ran([entry("a"), entry("b")], tmp_path / "r").results[0].record
    assert together["efficiency"]["queries_per_second"] is None
    assert together["environment"]["cells_together"] == 2
    alone = ran([entry("c")], tmp_path / "r").results[0].record
    assert alone["efficiency"]["queries_per_second"] > 0


def test_a_base_that_dies_takes_one_cell_with_it(entry, engines, tmp_path: Path) -> None:
    entries = [entry("a"), entry("bad"), entry("c")]
    done = ran(entries, tmp_path / "r")
    assert [cell.model.name for cell, _ in done.failures] == ["bad"]
    assert sorted(r.model for r in done.results) == ["a", "c"]
    states = {
        p.parent.name: json.loads(p.read_text())["state"]
        for p in (tmp_path / "r").rglob("result.json")
    }
    assert states == {"a": "complete", "bad": "failed", "c": "complete"}
    assert heard(entries[1])[-1] == "failed"


def test_latency_is_measured_alone_even_on_a_shared_base(entry, engines, tmp_path: Path) -> None:

    ran([entry("a", kind="latency"), entry("b", kind="latency")], tmp_path / "r")
    assert all(len(batch) == 1 for batch in engines["a"].weights.batches)


def test_finished_cells_are_skipped_and_their_engines_closed(entry, engines, tmp_path) -> None:
    ran([entry("a")], tmp_path / "r")
    again = entry("a")
    done = ran([again, entry("b")], tmp_path / "r")
    assert (done.skipped, done.asked > 0) == (1, True)
    assert heard(again) == ["skipped"]
    assert not engines["a"].asked
    assert not engines["a"].open


def test_replicates_ask_anew_and_live_side_by_side(entry, engines, tmp_path: Path) -> None:
    cache = Cache(None)
    first = ran([entry("a")], tmp_path / "r", cache)
    second = ran([entry("a", replicate=1)], tmp_path / "r", cache)
    assert second.asked == first.asked
    assert second.cached == 0
    assert second.results[0].model == "a+replicate=1"
