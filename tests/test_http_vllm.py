"""The http engine against vLLM's own server with SmolLM2, which `nox -s vllm` starts and stops.

The engine contract is that of test_engines; the answers are compared with transformers'.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from test_engines import (  # noqa: F401
    EMBEDDED,
    MIXED,
    VLLM,
    ask,
    chat,
    prose,
    raw,
    test_an_engine_likes_to_have_calls_in_flight,
    test_answers_do_not_depend_on_the_order_of_submission,
    test_answers_do_not_depend_on_the_rest_of_the_batch,
    test_calls_may_be_submitted_between_polls,
    test_clip_keeps_the_beginning_of_a_long_text,
    test_clip_leaves_a_short_text_byte_equal,
    test_close_may_be_called_twice,
    test_equal_requests_get_equal_answers,
    test_every_label_gets_a_score,
    test_every_number_is_answered_exactly_once,
    test_poll_without_a_submitted_call_is_an_error,
    test_the_fingerprint_is_json,
)

from harness.engines import open_engine, weights
from harness.types import Engine, EngineError, MissingPackageError, ModelSpec, Serving

pytestmark = VLLM
ROOT = Path(__file__).resolve().parent.parent
START = 300  # seconds that loading may take before the test gives up


@pytest.fixture(scope="module")
def folder() -> str:
    """SmolLM2-135M-Instruct as a folder of safetensors."""
    pytest.importorskip("openai", reason="openai is not installed")
    try:
        base = weights.locate(EMBEDDED, "main")
    except MissingPackageError as error:
        pytest.skip(str(error))
    weights.load_tokenizer(base)  # converts the weights on first use
    return base.path


@pytest.fixture(scope="module")
def server(folder: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The base URL of vLLM's server; its whole process group ends with the module."""
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    flags = {
        "model": folder, "served-model-name": "smollm2", "host": "127.0.0.1", "port": port,
        "dtype": "float32", "max-model-len": 1024, "max-num-seqs": 16,
    }  # fmt: skip
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"]
    command += [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    env = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with log.open("w") as out:
        process = subprocess.Popen(
            command, env=env, stdout=out, stderr=out, cwd=log.parent, start_new_session=True
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/v1/models", process, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(START):
        with suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        if process.poll() is not None:
            break
        time.sleep(1)
    pytest.fail(f"vLLM's server did not start:\n{log.read_text()[-2000:]}")


@pytest.fixture
def engine(server: str, folder: str) -> Iterator[Engine]:
    spec = ModelSpec("smollm2", "first-stage", base=folder)
    engine = open_engine("http", spec, Serving(base_url=server, served_model="smollm2"))
    yield engine
    engine.close()


@pytest.fixture
def model_engine(engine: Engine) -> Engine:
    return engine


@pytest.fixture(scope="module")
def hf(folder: str) -> Engine:
    spec = ModelSpec("smollm2", "first-stage", base=folder, dtype="float32")
    return open_engine("hf", spec)


def test_answers_are_those_of_transformers(engine: Engine, hf: Engine) -> None:
    chats = [
        chat("What is the capital of France?", max_tokens=16),
        chat("Which is better?", prefill="The first is", max_tokens=6),
        chat("Which is better?", prefill=" Passage", labels=(" A", " B")),
        chat("Count to ten in words.", max_tokens=40, stop=("five", "zzz")),
        raw(
            "The capital of France is", max_tokens=8, stop=("Paris",), labels=(" Paris", " London")
        ),
    ]
    for asked, here, there in zip(
        (*MIXED, *chats), ask(hf, *MIXED, *chats), ask(engine, *MIXED, *chats)
    ):
        assert there.text == here.text, asked
        assert there.scores == pytest.approx(here.scores, abs=1e-2), asked
        for fact in ("finish", "prompt_tokens", "output_tokens"):
            assert getattr(there, fact) == getattr(here, fact), asked


def test_a_prompt_that_does_not_fit_is_too_long(engine: Engine) -> None:
    asked = (
        chat(prose(1500), max_tokens=4),
        raw(prose(1500), labels=(" A", " B")),
        raw("x", continuation=" " + prose(1500)),
    )
    answers = ask(engine, *asked)
    assert [answer.finish for answer in answers] == ["too_long"] * 3
    assert all(answer.prompt_tokens > 1024 for answer in answers)


def test_the_server_says_what_it_is(engine: Engine) -> None:
    ask(engine, raw("x", max_tokens=1))
    assert (engine.facts["owned_by"], engine.facts["max_model_len"]) == ("vllm", 1024)
    assert "not_sent" not in engine.facts  # it knows every argument


def test_a_model_that_is_not_served_is_named_with_the_nearest(server: str, folder: str) -> None:
    spec = ModelSpec("smollm2", "first-stage", base=folder)
    engine = open_engine("http", spec, Serving(base_url=server, served_model="smollm"))
    with pytest.raises(EngineError, match="serves no 'smollm', but smollm2"):
        ask(engine, raw("x", max_tokens=1))
    engine.close()


def test_the_command_reranks_as_with_transformers(server: str, folder: str, tmp_path: Path) -> None:
    plan = ("-m", "smollm2-135m-qlm,smollm2-135m-setwise", "-d", "pocket", "--limit", "2")
    there = ("--base-url", server, "--served-model", "smollm2")
    runs: dict[str, Any] = {}
    for name, flags in {"hf": ("--set", "dtype=float32"), "http": there}.items():
        words = ["run", *plan, "--depth", "5", "--engine", name, *flags, "--results", name]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-m", "harness", *words],
            cwd=tmp_path, env=env, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        files = sorted((tmp_path / name).rglob("run.trec"))
        runs[name] = [[line.split()[:4] for line in f.read_text().splitlines()] for f in files]
    assert runs["http"] == runs["hf"]
    assert len(runs["hf"]) == 2
