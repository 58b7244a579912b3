"""What a cell cost: totals and spreads by hand, and nothing claimed that was not measured."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from harness import costs, env, flops
from harness.types import Call, Completion, Outcome, Parsed, Query, Ranking, Request

TINY = flops.Shape(layers=2, hidden=8, inner=12, heads=4, groups=2, width=3, vocabulary=50)


def call(*, cached: bool = False, request: Request | None = None, **done: Any) -> Call:
    done = {"prompt_tokens": 100, "output_tokens": 10, "prefill": 0.1, "decode": 0.4, **done}
    return Call(1, "", request or Request(text=""), Completion(**done), Parsed((0,)), cached)


def outcome(qid: str, *calls: Call, seconds: float = 1.0, rounds: int = 1) -> Outcome:
    return Outcome(qid, Ranking(()), calls, rounds, seconds)


def measured(*outcomes: Outcome, kind: str = "quality", **more: Any) -> dict[str, Any]:
    return costs.efficiency(outcomes, more.pop("wall", 4.0), kind, **more)


def test_totals_are_sums_over_the_calls() -> None:
    found = measured(outcome("a", call(), call(cached_tokens=60)), outcome("b", call(), rounds=2))
    assert (found["calls"], found["rounds"]) == (3, 3)
    assert (found["prompt_tokens"], found["cached_prompt_tokens"]) == (300, 60)
    assert found["generated_tokens"] == 30
    assert found["seconds"] == pytest.approx(1.5)
    assert found["queries_per_second"] == 0.5
    assert found["replayed_queries_per_second"] == pytest.approx(2 / 1.5, abs=1e-4)


def test_tokens_are_split_by_what_they_were_and_spread_over_calls() -> None:
    calls = [
        call(prompt_tokens=n, cached_tokens=n // 2, output_tokens=n, reasoning_tokens=n - 1)
        for n in range(2, 102)
    ]
    tokens = measured(outcome("a", *calls))["tokens"]
    assert tokens["prompt"] == {"mean": 51.5, "median": 51.5, "p95": 96, "max": 101}
    assert tokens["cached_prompt"]["max"] == 50
    assert tokens["reasoning"]["max"] == 100
    assert tokens["answer"] == {"mean": 1.0, "median": 1.0, "p95": 1, "max": 1}


def test_the_share_cut_off_leaves_out_answers_whose_length_was_asked_for() -> None:
    forced = call(request=Request(text="", exact_length_of="[1] > [2]"), finish="length")
    found = measured(outcome("a", forced, call(finish="length"), call(), call()))
    assert found["tokens"]["cut_off"] == 0.25


def test_prompts_that_the_engine_never_ran_cost_nothing() -> None:
    found = measured(outcome("a", call(), call(finish="too_long")), shape=TINY)
    assert found["calls"] == 1
    assert found["flops"] == flops.of_call(TINY, 100, 10)


def test_one_answer_from_a_cache_leaves_nothing_that_hangs_on_this_runs_clock() -> None:
    hit = outcome("a", call(), call(cached=True))
    for kind in ("quality", "latency"):
        found = measured(hit, kind=kind)
        names = ("wall_seconds", "queries_per_second", "latency")
        assert [found[name] for name in names] == [None] * 3
        assert found["seconds"] == 1.0
        assert found["replayed_queries_per_second"] == 1.0


def test_cells_that_ran_together_have_no_clock_of_their_own() -> None:
    assert measured(outcome("a", call()), wall=None)["queries_per_second"] is None


def test_a_cell_that_asked_nothing_says_nothing_about_speed() -> None:
    found = measured(outcome("a"), outcome("b"))
    names = ("tokens", "queries_per_second", "replayed_queries_per_second", "latency", "flops")
    assert [found[name] for name in names] == [None] * 5
    assert found["calls"] == found["seconds"] == 0


# --- latency ----------------------------------------------------------------------------------


def test_latency_is_the_wall_clock_of_queries_with_their_rounds_beside_it() -> None:
    outcomes = [outcome(str(n), call(), seconds=n / 10, rounds=n % 2 + 1) for n in range(1, 101)]
    found = measured(*outcomes, kind="latency")["latency"]
    assert found["median"] == pytest.approx(5.05)
    assert (found["p90"], found["p99"]) == (9.0, 9.9)
    assert (found["rounds"], found["queries"], found["warm_up"]) == (1.5, 100, costs.WARM_UP)


def test_only_a_latency_run_has_latency() -> None:
    assert measured(outcome("a", call()))["latency"] is None


def queries(names: Sequence[str], dataset: str = "d") -> list[Query]:
    return [Query(name, "text", (), dataset) for name in names]


def test_the_sample_is_fixed_by_seed_dataset_and_qid_and_keeps_its_order() -> None:
    every = queries([str(n) for n in range(300)])
    chosen = costs.sample(every, 929)
    assert len(chosen) == costs.SAMPLE
    assert [q for q in every if q in chosen] == list(chosen)
    assert costs.sample(every[::-1], 929) == chosen[::-1]
    assert costs.sample(every, 930) != chosen
    others = {q.qid for q in costs.sample(queries([str(n) for n in range(300)], "e"), 929)}
    assert others != {q.qid for q in chosen}


def test_a_small_set_of_queries_is_its_own_sample() -> None:
    every = queries(["b", "a"])
    assert list(costs.sample(every, 929)) == every


# --- operations -------------------------------------------------------------------------------


def test_operations_are_of_whole_prompts_and_what_a_prefix_cache_spared_stands_beside() -> None:
    found = measured(outcome("a", call(), call(cached_tokens=64)), shape=TINY)
    assert found["flops"] == 2 * flops.of_call(TINY, 100, 10)
    assert found["flops_spared"] == found["flops"] / 2 - flops.of_call(TINY, 100, 10, cached=64)
    assert found["flops_published"] == 2 * flops.published(TINY, 100, 10)


def test_every_scored_token_of_a_continuation_pays_the_head() -> None:
    scored = {"output_tokens": 0, "finish": "scored", "scores": (-1.0, -2.0, -3.0)}
    likelihood = call(request=Request(text="", continuation="x"), **scored)
    labels = call(request=Request(text="", labels=("a", "b", "c")), **scored)
    found = measured(outcome("a", likelihood), shape=TINY)["flops"]
    assert found == flops.of_call(TINY, 100, 0, scored=3)
    assert measured(outcome("a", labels), shape=TINY)["flops"] == flops.of_call(TINY, 100, 0)


def test_without_a_shape_there_are_no_operations() -> None:
    found = measured(outcome("a", call()))
    assert found["flops"] is found["flops_spared"] is found["flops_published"] is None


# --- where the seconds go ---------------------------------------------------------------------


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that moves when it is told to."""
    clock = SimpleNamespace(time=0.0)
    monkeypatch.setattr(costs.time, "perf_counter", lambda: clock.time)
    return clock


def test_a_part_inside_another_counts_for_itself_alone(now: SimpleNamespace) -> None:
    clock = costs.Clock()

    def passing(seconds: float) -> None:
        now.time += seconds

    inner = clock.timed("tokenise", passing)

    def preparing() -> str:
        now.time += 1
        inner(2)
        inner(3)
        now.time += 4
        return "prepared"

    assert clock.timed("render", preparing)() == "prepared"
    inner(10)
    assert clock.parts == {"render": 5, "tokenise": 15}


def test_a_part_that_fails_is_counted_and_fails(now: SimpleNamespace) -> None:
    clock = costs.Clock()

    def failing() -> None:
        now.time += 7
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        clock.timed("wait", failing)()
    assert clock.parts == {"wait": 7}


def test_a_watched_object_is_itself_but_for_the_time_it_takes(now: SimpleNamespace) -> None:
    class Engine:
        capacity = 16

        def poll(self) -> str:
            now.time += 2
            return "answers"

        def close(self) -> str:
            return "closed"

    clock = costs.Clock()
    watched = clock.watch(Engine(), poll="wait")
    assert (watched.poll(), watched.close(), watched.capacity) == ("answers", "closed", 16)
    assert clock.parts == {"wait": 2}


def test_the_breakdown_has_the_runs_own_parts_and_what_the_engine_recorded() -> None:
    clock = costs.Clock()
    clock.parts |= {"render": 1.0, "wait": 9.0}
    asked = call(queued=0.5, prefill=1.5, decode=2.5)
    kept = call(queued=100.0, cached=True)
    found = clock.breakdown([outcome("a", asked, kept)], load=4.0)
    assert found == {
        "load": 4.0, "render": 1.0, "tokenise": 0.0, "wait": 5.0, "parse": 0.0, "cache": 0.0,
        "evaluate": 0.0, "queued": 0.5, "prefill": 1.5, "decode": 2.5,
    }  # fmt: skip


def test_a_load_that_nobody_timed_is_absent() -> None:
    assert costs.Clock().breakdown([], load=None)["load"] is None


# --- the GPU ----------------------------------------------------------------------------------


class Nvml:
    """Stands in for pynvml: two boards, their counters in millijoules and bytes."""

    class NVMLError(Exception):
        pass

    def __init__(self, broken: str = "") -> None:
        self.broken, self.millijoules, self.used = broken, [1000, 2000], [1 << 30, 2 << 30]

    def _unless(self, name: str) -> None:
        if self.broken == name:
            raise self.NVMLError(name)

    def nvmlInit(self) -> None:
        self._unless("init")

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetHandleByUUID(self, name: str) -> int:
        return {"GPU-b": 1}[name]

    def nvmlDeviceGetTotalEnergyConsumption(self, board: int) -> int:
        self._unless("energy")
        return self.millijoules[board]

    def nvmlDeviceGetMemoryInfo(self, board: int) -> SimpleNamespace:
        return SimpleNamespace(used=self.used[board])


def plugged(monkeypatch: pytest.MonkeyPatch, nvml: Any, visible: str | None = None) -> Any:
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    return nvml


def test_energy_and_peak_memory_are_those_since_the_meter_was_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nvml = plugged(monkeypatch, Nvml())
    meter = env.GpuMeter()
    nvml.millijoules, nvml.used = [1500, 2750], [5 << 30, 2 << 30]
    meter.look()
    nvml.used = [1 << 30, 1 << 30]
    assert meter.read() == {"energy_joules": 1.25, "gpu_memory_gib": 7.0}


@pytest.mark.parametrize("visible", ["1", "GPU-b"])
def test_only_the_boards_that_cuda_shows_are_counted(
    monkeypatch: pytest.MonkeyPatch, visible: str
) -> None:
    nvml = plugged(monkeypatch, Nvml(), visible)
    meter = env.GpuMeter()
    nvml.millijoules = [9000, 2500]
    assert meter.read() == {"energy_joules": 0.5, "gpu_memory_gib": 2.0}


@pytest.mark.parametrize(
    ("nvml", "visible"),
    [(None, None), (Nvml("init"), None), (Nvml("energy"), None), (Nvml(), "")],
    ids=["no package", "no driver", "no counter", "no board shown"],
)
def test_without_a_gpu_that_counts_both_are_absent_and_not_0(
    monkeypatch: pytest.MonkeyPatch, nvml: Any, visible: str | None
) -> None:
    plugged(monkeypatch, nvml, visible)
    meter = env.GpuMeter()
    meter.look()
    assert meter.read() == {"energy_joules": None, "gpu_memory_gib": None}
