"""A cell from end to end over the fake engine: identity, files, failures and resumption."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from harness import budget, costs, store
from harness import cell as cells
from harness.cache import Cache
from harness.data import load
from harness.engines.fake import FakeEngine
from harness.prompts import Prompt
from harness.specs import Registry, folder_dataset
from harness.types import Cell, DataError, EngineError, ModelSpec, Protocol, RegistryError

PASSAGES = {
    "red": "red apples grow on trees",
    "green": "green apples are sour",
    "pie": "an apple pie needs apples",
    "sky": "the sky holds no apples",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    base = tmp_path / "apples"
    base.mkdir()
    (base / "queries.tsv").write_text("q2\twhich apples are sour\nq1\thow do I bake apples\n")
    rows = [json.dumps({"_id": k, "text": v}) for k, v in PASSAGES.items()]
    (base / "corpus.jsonl").write_text("\n".join(rows) + "\n")
    (base / "qrels.txt").write_text("q1 0 pie 3\nq1 0 sky 0\nq2 0 green 2\nq2 0 red 1\n")
    return base


def make_job(folder: Path, spec: ModelSpec | str = "rank-r1-7b", **changes: Any) -> cells.Job:
    registry = Registry()
    model = registry.models[spec] if isinstance(spec, str) else spec
    dataset = folder_dataset(folder)
    data = load(dataset, None, changes.get("depth", 100))
    made = Cell(model, dataset, data.first_stage, 100, None, Protocol())
    prompt: Prompt | None = registry.prompts.get(model.prompt)
    return cells.resolve(replace(made, **changes), prompt, data)


def run(
    job: cells.Job, results: Path, engine: FakeEngine | None = None, cache: Cache | None = None
):
    engine = engine or FakeEngine(job.cell.model)
    return cells.run(job, engine, cache or Cache(None), results, command="harness run ...")


def files(results: Path) -> dict[str, bytes]:
    """What must be equal between two runs of one cell."""
    out = {}
    for path in results.rglob("*"):
        if path.name in ("run.trec", "per_query.csv"):
            out[path.name] = path.read_bytes()
        if path.name == "result.json":
            record = json.loads(path.read_text())
            out["measures"] = json.dumps(record["measures"]).encode()
    return out


def test_a_cell_folder_holds_what_the_design_promises(folder: Path, tmp_path: Path) -> None:
    result = run(make_job(folder), tmp_path / "r")
    place = tmp_path / "r" / "apples" / "bm25s" / "rank-r1-7b"
    assert result.folder == place
    names = {
        "result.json",
        "run.trec",
        "run.trec.ir_metadata.yml",
        "per_query.csv",
        "trace.jsonl.gz",
    }
    assert {p.name for p in place.iterdir()} == names
    record = json.loads((place / "result.json").read_text())
    assert record["schema_version"] == 1
    assert record["state"] == "complete"
    assert record["queries"] == 2
    assert record["first_stage"]["name"] == "bm25s"
    assert record["efficiency"]["latency"] is None
    calls = list(store.read_trace(place))
    assert record["efficiency"]["calls"] == record["faults"]["calls"] == len(calls) > 0
    assert sum(c["generated_tokens"] for c in calls) == record["efficiency"]["generated_tokens"]
    lines = (place / "run.trec").read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["q2"] * 4 + ["q1"] * 4
    rows = list(csv.DictReader((place / "per_query.csv").read_text().splitlines()))
    assert [row["qid"] for row in rows] == ["q2", "q1"]
    mean = sum(float(row["nDCG@10"]) for row in rows) / 2
    assert record["measures"]["nDCG@10"] == pytest.approx(mean)


def test_a_cell_killed_at_any_call_and_resumed_is_the_same_cell(
    folder: Path, tmp_path: Path
) -> None:
    job = make_job(folder)
    whole = FakeEngine(job.cell.model)
    run(job, tmp_path / "whole", whole)
    expected = files(tmp_path / "whole")
    for survive in range(len(whole.asked)):
        cache, results = Cache(None), tmp_path / f"r{survive}"
        dying = FakeEngine(job.cell.model, mode="dying", survive=survive)
        dying.fingerprint = whole.fingerprint
        with pytest.raises(EngineError):
            run(job, results, dying, cache)
        assert store.state(results, job.cell, cells.key(job, whole)) == "failed"
        again = FakeEngine(job.cell.model)
        run(job, results, again, cache)
        assert len(again.asked) == len(whole.asked) - survive
        assert files(results) == expected


def test_a_failure_does_not_replace_a_finished_cell(folder: Path, tmp_path: Path) -> None:
    job = make_job(folder)
    run(job, tmp_path / "r")
    before = files(tmp_path / "r")
    with pytest.raises(EngineError):
        run(job, tmp_path / "r", FakeEngine(job.cell.model, mode="dying"))
    assert files(tmp_path / "r") == before


def changed_keys(folder: Path) -> dict[str, str]:
    """The key of a cell after each change that must make another cell of it."""
    job = make_job(folder)
    engine = FakeEngine(job.cell.model)
    out = {"plain": cells.key(job, engine)}
    assert job.prompt is not None
    out["prompt"] = cells.key(replace(job, prompt=replace(job.prompt, separator="\n\n")), engine)
    out["option"] = cells.key(replace(job, options={**job.options, "k": 3}), engine)
    out["engine"] = cells.key(job, FakeEngine(job.cell.model, mode="noisy"))
    out["protocol"] = cells.key(
        replace(job, cell=replace(job.cell, protocol=Protocol("latency"))), engine
    )
    out["depth"] = cells.key(replace(job, cell=replace(job.cell, depth=3)), engine)
    (folder / "qrels.txt").write_text("q1 0 pie 3\nq1 0 sky 0\nq2 0 green 2\nq2 0 red 2\n")
    out["grade"] = cells.key(make_job(folder), engine)
    corpus = (folder / "corpus.jsonl").read_text()
    (folder / "corpus.jsonl").write_text(corpus.replace("holds no apples", "holds some apples"))
    out["text"] = cells.key(make_job(folder), engine)
    return out


def test_everything_a_result_depends_on_changes_the_key(folder: Path) -> None:
    keys = changed_keys(folder)
    assert len(set(keys.values())) == len(keys)


def test_the_key_does_not_depend_on_where_the_files_lie(folder: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere" / "apples"
    elsewhere.parent.mkdir()
    before = make_job(folder)
    folder.rename(elsewhere)
    after = make_job(elsewhere)
    engine = FakeEngine(before.cell.model)
    assert cells.key(before, engine) == cells.key(after, engine)


def test_states_follow_the_key(folder: Path, tmp_path: Path) -> None:
    job, results = make_job(folder), tmp_path / "r"
    key = cells.key(job, FakeEngine(job.cell.model))
    assert store.state(results, job.cell, key) == "planned"
    run(job, results)
    assert store.state(results, job.cell, key) == "complete"
    assert store.state(results, job.cell, "another") == "stale"
    (results / job.cell.folder / "result.json").write_text("{ half")
    assert store.state(results, job.cell, key) == "stale"
    with pytest.raises(DataError, match=r"result\.json: is no cell record"):
        list(store.iterate(results))


def test_a_record_names_no_place_of_this_machine(folder: Path, tmp_path: Path) -> None:
    job = make_job(folder)
    run(job, tmp_path / "r")
    text = (tmp_path / "r" / job.cell.folder / "result.json").read_text()
    assert str(tmp_path) not in text


def test_nothing_half_written_is_ever_seen(folder: Path, tmp_path: Path, monkeypatch) -> None:
    job, results = make_job(folder), tmp_path / "r"

    def breaks(path: Path, rows: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "_write_trace", breaks)
    with pytest.raises(DataError, match="No space left"):
        run(job, results)
    assert list(store.iterate(results)) == []
    assert [p for p in results.rglob("*") if p.is_file()] == []


def test_a_prompt_that_a_method_cannot_read_is_refused_before_anything_runs(folder: Path) -> None:
    spec = replace(Registry().models["rank-r1-7b"], method="listwise.window", options={})
    with pytest.raises(RegistryError, match=r"asks for a label, the method reads permutation"):
        make_job(folder, spec)


def test_more_passages_than_labels_are_refused_before_anything_runs(folder: Path) -> None:
    spec = replace(Registry().models["rank-r1-7b"], options={"num_child": 20})
    with pytest.raises(RegistryError, match="labels for 20 passages, 21 would be shown"):
        make_job(folder, spec)


def test_names_that_the_command_line_changed_live_side_by_side() -> None:
    spec = ModelSpec("m", "random", overrides=(("num_child", "9"),))
    dataset = folder_dataset(Path("beir"))
    made = Cell(spec, replace(dataset, name="beir/x"), "bm25", 30, 5, Protocol("latency", seed=1))
    assert made.folder == Path("beir_x+limit=5/bm25+depth=30/m+num_child=9+protocol=latency+seed=1")


@pytest.mark.parametrize("name", ["../../etc", "..", "a/../b", "/abs", ".hidden", "nul\x00"])
def test_no_name_leaves_the_results_folder(name: str) -> None:
    made = Cell(ModelSpec(name, "random"), folder_dataset(Path("x")), name, 100, None, Protocol())
    assert len(made.folder.parts) == 3
    assert not any(part.startswith(".") or "\x00" in part for part in made.folder.parts)


def test_a_latency_run_measures_every_query_alone_and_a_cached_one_claims_nothing(
    folder: Path, tmp_path: Path
) -> None:
    extra = "".join(f"q{n}\tapples and {n}\n" for n in range(3, 9))
    (folder / "queries.tsv").write_text((folder / "queries.tsv").read_text() + extra)
    more = "".join(f"q{n} 0 red 1\n" for n in range(3, 9))
    (folder / "qrels.txt").write_text((folder / "qrels.txt").read_text() + more)
    job = make_job(folder, protocol=Protocol("latency"))
    cache = Cache(None)
    for _ in range(2):  # the cache is never read
        latency = run(job, tmp_path / "r", cache=cache).record["efficiency"]["latency"]
        assert latency["queries"] == 8
        assert 0 < latency["median"] <= latency["p90"] <= latency["p99"]
    quality = make_job(folder)
    run(quality, tmp_path / "r", cache=cache)
    again = run(quality, tmp_path / "r", cache=cache).record["efficiency"]
    assert again["latency"] is None
    assert again["queries_per_second"] is None
    assert again["calls_from_cache"] == again["calls"]


def test_a_latency_run_warms_up_first_and_answers_its_sample_once(
    folder: Path, tmp_path: Path
) -> None:
    quality, engine = make_job(folder), FakeEngine(Registry().models["rank-r1-7b"])
    expected = run(quality, tmp_path / "r").record["efficiency"]["calls"]
    record = run(make_job(folder, protocol=Protocol("latency")), tmp_path / "r", engine).record
    assert record["efficiency"]["calls"] == expected
    assert len(engine.asked) == 2 * expected, "two queries to warm up with, and two that count"
    assert record["efficiency"]["latency"]["rounds"] == record["efficiency"]["rounds"] / 2
    stated = record["efficiency"]["latency"]
    assert (stated["sample"], stated["warm_up"]) == (costs.SAMPLE, costs.WARM_UP)


def test_a_latency_run_is_over_the_sample_alone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(costs, "SAMPLE", 1)
    whole, sampled = make_job(folder), make_job(folder, protocol=Protocol("latency"))
    assert len(whole.queries) == 2
    record = run(sampled, tmp_path / "r").record
    assert record["queries"] == record["efficiency"]["latency"]["queries"] == 1


def test_what_a_run_spent_its_seconds_on_is_in_its_record(folder: Path, tmp_path: Path) -> None:
    cache = Cache(None)
    first = run(make_job(folder), tmp_path / "r", cache=cache).record["efficiency"]
    parts = dict(first["breakdown"])
    assert parts.pop("load") is None, "the fake engine loads nothing"
    assert parts["prefill"] == pytest.approx(0.001 * first["calls"])
    assert all(parts[name] > 0 for name in ("render", "tokenise", "wait", "parse", "cache"))
    clocked = sum(parts[name] for name in ("render", "tokenise", "wait", "parse", "cache"))
    assert clocked < first["wall_seconds"] + 0.001
    again = run(make_job(folder), tmp_path / "r", cache=cache).record["efficiency"]
    assert again["breakdown"]["decode"] == again["breakdown"]["wait"] == 0, "nothing was asked"
    assert again["breakdown"]["cache"] > 0


def test_the_budget_curve_ends_at_the_cells_own_measure_and_comes_from_its_trace(
    folder: Path, tmp_path: Path
) -> None:
    job = make_job(folder)
    result = run(job, tmp_path / "r")
    points = result.record["budget"]
    assert points[0]["calls"] == points[0]["tokens"] == 0
    assert points[-1]["nDCG@10"] == pytest.approx(result.measures["nDCG@10"])
    assert points[-1]["calls"] == result.record["efficiency"]["calls"] / 2
    asks = partial(job.method.flow, **job.options)
    stored = list(store.read_trace(result.folder))
    known = job.queries, stored, job.collection.qrels, "nDCG@10"
    assert list(budget.curve(asks, "label", *known)) == points
    assert run(make_job(folder, "random"), tmp_path / "r").record["budget"] == []


def test_operations_are_counted_for_a_known_shape_or_one_that_the_engine_tells(
    folder: Path, tmp_path: Path
) -> None:
    spec = Registry().models["rank-r1-7b"]
    known = run(make_job(folder, spec), tmp_path / "r").record["efficiency"]
    assert known["flops"] > known["flops_published"] > 0
    unknown = replace(spec, base="someone/unheard-of")
    assert run(make_job(folder, unknown), tmp_path / "r").record["efficiency"]["flops"] is None
    config = {
        "num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 12,
        "num_attention_heads": 4, "vocab_size": 50,
    }  # fmt: skip
    told = FakeEngine(unknown, facts={"config": config})
    assert run(make_job(folder, unknown), tmp_path / "r", told).record["efficiency"]["flops"] > 0
