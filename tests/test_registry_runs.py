"""Every model of the registry, asked through its own template, sort and parser by a perfect judge."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from harness import cell as cells
from harness.cache import Cache
from harness.data import load
from harness.engines.fake import FakeEngine
from harness.specs import Registry, folder_dataset
from harness.types import Cell, Protocol, Request

REGISTRY = Registry()
MODELS = list(REGISTRY.models)
DEPTH = 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three queries with 30 candidates each; the last candidate of the first stage is the best."""
    base = tmp_path_factory.mktemp("data") / "three"
    base.mkdir()
    names = [f"doc{i}" for i in range(DEPTH)]
    corpus = [
        {"_id": d, "title": f"Title {d}", "text": f"[{i}] says {{query}} of {d}"}
        for i, d in enumerate(names)
    ]
    (base / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in corpus))
    (base / "queries.tsv").write_text("".join(f"q{q}\twhat is {q}?\n" for q in range(3)))
    run = [f"q{q} Q0 {d} {i + 1} {100 - i} t\n" for q in range(3) for i, d in enumerate(names)]
    (base / "run.trec").write_text("".join(run))
    qrels = [f"q{q} 0 {d} {i // 10}\n" for q in range(3) for i, d in enumerate(names)]
    (base / "qrels.txt").write_text("".join(qrels))
    return base


def by_number(request: Request, docid: str) -> float:
    """The grade of a document is its number; in [0, 1) so that it can be a probability too."""
    return int(docid.removeprefix("doc")) / 100


@pytest.mark.parametrize("name", MODELS)
def test_a_perfect_judge_brings_the_best_document_to_the_top(
    name: str, folder: Path, tmp_path: Path
) -> None:
    spec, dataset = REGISTRY.models[name], folder_dataset(folder)
    prompt = REGISTRY.prompts.get(spec.prompt)
    place = Cell(spec, dataset, "run", 100, None, Protocol())
    job = cells.resolve(place, prompt, load(dataset))
    engine = FakeEngine(spec, grade=by_number)
    record = cells.run(job, engine, Cache(None), tmp_path, command="test").record
    faults = Counter(
        {k: v for k, v in record["faults"].items() if k not in ("calls", "no_op_rate")}
    )
    assert not +faults, f"{name}: a perfect judge made faults"
    if not job.needs_engine:
        assert record["efficiency"]["calls"] == 0
        return
    efficiency = record["efficiency"]
    assert efficiency["calls"] - efficiency["calls_from_cache"] == len(engine.asked) > 0
    assert all(request.shown for request in engine.asked)
    run = (tmp_path / replace(place, first_stage="run").folder / "run.trec").read_text()
    top = [line.split()[2] for line in run.splitlines() if line.split()[3] == "1"]
    assert top == [f"doc{DEPTH - 1}"] * 3
