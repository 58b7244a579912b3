"""The http engine against servers that misbehave; test_engines holds it to the engine contract."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from openai_server import MODELS, Body, Reply, Served, TinyVllm, failed, said, serving

from harness.engines import open_engine
from harness.plan import Selection
from harness.types import (
    Completion,
    EngineError,
    Message,
    MissingResourceError,
    ModelSpec,
    RegistryError,
    Request,
    Serving,
    UsageError,
    digest,
)

pytest.importorskip("openai", reason="openai is not installed")

ROOT = Path(__file__).resolve().parent.parent
KEY = "sk-0123456789abcdef"
ASKED = Request(messages=(Message("user", "Rank [1] and [2]."),), max_tokens=9)
TEXT = Request(text="Is it?\n<think>", max_tokens=9, stop=("</think> true", "</think> false"))


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def model(**fields: Any) -> ModelSpec:
    return ModelSpec(**({"name": "tiny", "method": "listwise.window"} | fields))


@pytest.fixture
def opened() -> Iterator[Callable[..., Any]]:
    """Opens engines on a server (or an address) and closes them after the test."""
    engines = []

    def opened(server: Served | str, *, spec: ModelSpec | None = None, **settings: Any) -> Any:
        names = ("served_model", "tokenizer", "prefix_caching", "deterministic", "connections")
        flags = {name: settings.pop(name) for name in names if name in settings}
        url = server if isinstance(server, str) else server.url
        flags = {"base_url": url, "served_model": "tiny"} | flags
        engine = open_engine("http", spec or model(), Serving(**flags))
        for name, value in ({"pause": 0.0} | settings).items():
            setattr(engine, name, value)
        engines.append(engine)
        return engine

    yield opened
    for engine in engines:
        engine.close()


def answers(engine: Any, *requests: Request) -> list[Completion]:
    for number, request in enumerate(requests):
        engine.submit(number, request)
    found: dict[int, Completion] = {}
    while len(found) < len(requests):
        found |= dict(engine.poll())
    return [found[n] for n in range(len(requests))]


def script(*replies: Reply | Body) -> Callable[[str, Body], Reply | Body]:
    """One reply after the other; the last one for ever."""
    left = list(replies)
    return lambda path, body: left.pop(0) if len(left) > 1 else left[0]


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses between tries, none of which is waited for."""
    import asyncio

    seen: list[float] = []
    real = asyncio.sleep

    async def sleep(seconds: float) -> None:
        seen.append(seconds)
        await real(0)

    monkeypatch.setattr("harness.engines.http_server.asyncio.sleep", sleep)
    return seen


# --- what is asked ----------------------------------------------------------------------------


def test_the_sampling_is_stated_and_not_left_to_the_server(opened: Callable[..., Any]) -> None:
    with serving(script(said())) as server:
        [answer] = answers(opened(server), ASKED)
        hot = model(
            sampling={"temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.1, "seed": 7}
        )
        answers(opened(server, spec=hot), ASKED)
    greedy, sampled = server.bodies
    stated = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}
    assert greedy.items() >= (stated | {"seed": 929, "max_tokens": 9, "model": "tiny"}).items()
    assert greedy["messages"] == [{"role": "user", "content": "Rank [1] and [2]."}]
    assert sampled.items() >= {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.1}.items()
    assert sampled["seed"] == 7
    assert (answer.text, answer.finish) == ("[2] > [1]", "stop")
    assert (answer.prompt_tokens, answer.output_tokens) == (11, 7)


def test_raw_text_goes_to_completions_with_its_stop_strings(opened: Callable[..., Any]) -> None:
    choice = {"text": " so</think> true", "finish_reason": "stop"}
    with serving(script({"choices": [choice], "usage": {"prompt_tokens": 3}})) as server:
        [answer] = answers(opened(server), TEXT)
    path, body = server.asked[-1]
    assert path == "/v1/completions"
    assert (body["prompt"], body["stop"]) == (TEXT.text, list(TEXT.stop))
    assert body["include_stop_str_in_output"] is True
    assert answer.text == " so</think> true"


def test_a_stop_string_that_the_server_cut_off_is_put_back(opened: Callable[..., Any]) -> None:
    choice = {"text": " so", "finish_reason": "stop", "stop_reason": "</think> true"}
    with serving(script({"choices": [choice]})) as server:
        [answer] = answers(opened(server), TEXT)
    assert answer.text == " so</think> true"


def test_template_arguments_and_bos_reach_the_servers_template(opened: Callable[..., Any]) -> None:
    asked = Request(messages=ASKED.messages, max_tokens=1, bos=True)
    with serving(script(said())) as server:
        answers(opened(server, spec=model(template={"enable_thinking": False})), asked)
    assert server.bodies[0]["chat_template_kwargs"] == {"enable_thinking": False}
    assert server.bodies[0]["add_special_tokens"] is True


def test_a_prefill_is_continued_by_a_server_that_proves_it(opened: Callable[..., Any]) -> None:
    asked = Request(messages=ASKED.messages, prefill=" Passage:", max_tokens=1)
    with serving(script(said(" Passage: B"))) as server:
        [answer] = answers(opened(server), asked)
    body = server.bodies[0]
    assert body["messages"][-1] == {"role": "assistant", "content": " Passage:"}
    assert (body["continue_final_message"], body["add_generation_prompt"]) == (True, False)
    assert answer.text == " Passage: B"


@pytest.mark.parametrize(
    "reply", [said("B"), failed(400, "Unrecognized request argument: continue_final_message")]
)
def test_a_prefill_that_a_server_does_not_continue_is_an_error(
    opened: Callable[..., Any], reply: Any
) -> None:
    asked = Request(messages=ASKED.messages, prefill=" Passage:", max_tokens=1)
    with serving(script(reply)) as server, pytest.raises(EngineError, match="continue_final_mess"):
        answers(opened(server), asked)


def test_a_latency_run_keeps_the_servers_prefix_cache_out(opened: Callable[..., Any]) -> None:
    with serving(script(said())) as server:
        answers(opened(server, prefix_caching=False), ASKED, ASKED)
    salts = [body["cache_salt"] for body in server.bodies]
    assert len(set(salts)) == 2
    assert all(salts)


def test_what_a_server_does_not_know_is_left_out_and_noted(opened: Callable[..., Any]) -> None:
    """As a hosted service refuses: one argument at a time."""

    def strict(path: str, body: Body) -> Reply | Body:
        for name in ("top_k", "repetition_penalty", "seed"):
            if name in body:
                return failed(400, f"Unrecognized request argument supplied: {name}")
        if "max_tokens" in body:
            return failed(400, "'max_tokens' is not supported. Use 'max_completion_tokens'.")
        return said()

    with serving(strict) as server:
        engine = opened(server, tries=1)
        answers(engine, ASKED, ASKED, ASKED)
        before = len(server.bodies)
        answers(engine, ASKED)
    assert len(server.bodies) == before + 1  # learnt once
    assert server.bodies[-1]["max_completion_tokens"] == 9
    assert server.bodies[-1]["temperature"] == 0.0
    assert engine.facts["not_sent"] == ["max_tokens", "repetition_penalty", "seed", "top_k"]


@pytest.mark.parametrize(
    ("name", "sampling"),
    [
        ("repetition_penalty", {"repetition_penalty": 1.2}),
        ("seed", {"temperature": 0.7}),
        ("temperature", {}),
    ],
)
def test_a_setting_that_decides_tokens_is_never_left_out(
    opened: Callable[..., Any], name: str, sampling: dict[str, float]
) -> None:
    refuses = failed(400, f"Unrecognized request argument supplied: {name}")
    with serving(script(refuses)) as server, pytest.raises(EngineError, match=name):
        answers(opened(server, spec=model(sampling=sampling)), ASKED)


def meeting(count: int) -> Callable[[str, Body], Body]:
    """Answers only when so many calls are in flight at the same time."""
    barrier = threading.Barrier(count, timeout=60)

    def answer(path: str, body: Body) -> Body:
        barrier.wait()
        return said()

    return answer


def test_concurrency_bounds_the_connections_too(opened: Callable[..., Any]) -> None:
    with serving(meeting(2)) as server:
        answers(opened(server, connections=2), *[ASKED] * 6)
    assert server.most == 2
    assert Selection(concurrency=5).serving.connections == 5


def test_calls_in_flight_are_bounded_and_their_time_is_shared(opened: Callable[..., Any]) -> None:
    with serving(meeting(3)) as server:
        engine = opened(server, connections=3)
        started = time.perf_counter()
        found = answers(engine, *[ASKED] * 9)
        spent = time.perf_counter() - started
    assert server.most == 3
    assert 0 < sum(answer.decode for answer in found) <= spent
    assert max(answer.queued for answer in found) > min(answer.queued for answer in found)


# --- patience ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reply",
    [
        *(failed(status) for status in (408, 409, 429, 500, 503)),
        *({"error": {"message": "overloaded"}}, {"choices": []}, [1]),
        *(Reply("<html>busy</html>"), Reply(status=0)),
    ],
)
def test_what_may_pass_is_tried_again(
    opened: Callable[..., Any], pauses: list[float], reply: Any
) -> None:
    with serving(script(reply, reply, said())) as server:
        [answer] = answers(opened(server, pause=1.0), ASKED)
    assert answer.text == "[2] > [1]"
    assert len(server.bodies) == 3
    assert 0.5 <= pauses[0] <= 1.5
    assert 1.0 <= pauses[1] <= 3.0


def test_a_servers_retry_after_is_obeyed(opened: Callable[..., Any], pauses: list[float]) -> None:
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)
    replies = [failed(429, Retry_After="77"), failed(503, Retry_After=later), said()]
    with serving(script(*replies)) as server:
        answers(opened(server), ASKED)
    assert pauses[0] == 77
    assert 80 <= pauses[1] <= 90


def test_a_server_that_asks_for_too_long_a_pause_is_given_up(
    opened: Callable[..., Any], pauses: list[float]
) -> None:
    with (
        serving(script(failed(429, "come back tomorrow", Retry_After="86400"))) as server,
        pytest.raises(EngineError, match=r"429.*come back tomorrow"),
    ):
        answers(opened(server), ASKED)
    assert pauses == []


def test_after_the_last_try_status_and_message_are_told(
    opened: Callable[..., Any], pauses: list[float]
) -> None:
    with (
        serving(script(failed(503, "no room\nat the inn"))) as server,
        pytest.raises(EngineError, match=r"HTTP 503: no room at the inn \(try 4\)"),
    ):
        answers(opened(server, tries=4), ASKED)
    assert len(server.bodies) == 4


@pytest.mark.parametrize("status", [401, 403, 404, 400])
def test_what_will_not_pass_is_final_at_once(opened: Callable[..., Any], status: int) -> None:
    with (
        serving(script(failed(status, "go away"))) as server,
        pytest.raises(EngineError, match=f"HTTP {status}: go away"),
    ):
        answers(opened(server), ASKED)
    assert len(server.bodies) == 1


def test_an_error_object_with_status_200_counts_by_its_own_code(opened: Callable[..., Any]) -> None:
    with (
        serving(script({"error": {"message": "no credit [1] > [2]", "code": 402}})) as server,
        pytest.raises(EngineError, match="HTTP 402: no credit"),
    ):
        answers(opened(server), ASKED)
    assert len(server.bodies) == 1


def test_a_call_that_hangs_is_given_up(opened: Callable[..., Any]) -> None:
    with (
        serving(script(Reply(said(), after=60))) as server,
        pytest.raises(EngineError, match=r"no answer within 0.1 s"),
    ):
        answers(opened(server, limit=0.1), ASKED)


def test_answers_that_came_before_a_failure_are_handed_out_first(
    opened: Callable[..., Any],
) -> None:
    def answer(path: str, body: Body) -> Reply | Body:
        late = replace(failed(404, "gone"), after=1.0)  # the others are there before
        return late if body["prompt"] == "bad" else {"choices": [{"text": "good"}]}

    texts = ["good", "good", "bad", "good"]
    with serving(answer) as server:
        engine = opened(server)
        for number, text in enumerate(texts):
            engine.submit(number, Request(text=text, max_tokens=1))
        came = {number for number, _ in engine.poll()}
        with pytest.raises(EngineError, match="gone"):
            came |= {number for _ in range(3) for number, _ in engine.poll()}
    assert came <= {0, 1, 3}


def test_closing_does_not_wait_for_calls_that_hang(opened: Callable[..., Any]) -> None:
    with serving(script(Reply(said(), after=600))) as server:
        engine = opened(server, connections=2)
        for number in range(5):
            engine.submit(number, ASKED)
        engine.close()
        with pytest.raises(EngineError, match="poll without"):
            engine.poll()


def test_an_engine_can_be_used_again_after_closing(opened: Callable[..., Any]) -> None:
    with serving(script(said())) as server:
        engine = opened(server)
        answers(engine, ASKED)
        engine.close()
        assert answers(engine, ASKED)[0].text == "[2] > [1]"


# --- the server at the start ------------------------------------------------------------------


def test_a_server_that_is_not_there_is_an_engine_error(opened: Callable[..., Any]) -> None:
    with serving(script(said())) as server:
        pass
    engine = opened(server)
    for _ in range(2):  # the second call does not believe that the first had found it
        with pytest.raises(EngineError, match=r"127.0.0.1.*/models: no connection"):
            answers(engine, ASKED, ASKED)
        engine.close()


@pytest.mark.parametrize(
    ("models", "expected"),
    [
        (failed(401, "bad key"), "HTTP 401: bad key"),
        (Reply("<html>hello</html>"), "hello"),
        ({"hello": "world"}, "lists no models"),
        ({"data": []}, "serves no 'tiny', but nothing at all"),
        ({"data": [{"id": "tinny"}, {"id": "huge"}]}, "serves no 'tiny', but tinny"),
    ],
)
def test_a_server_without_the_model_is_refused_before_anything_is_asked(
    opened: Callable[..., Any], models: Any, expected: str
) -> None:
    with serving(script(said()), models) as server:
        with pytest.raises(EngineError, match=expected):
            answers(opened(server), ASKED)
        assert server.bodies == []


def test_a_model_list_that_does_not_come_is_an_error(
    opened: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.engines.http_server.FIRST_ANSWER", 0.1)
    with (
        serving(script(said()), Reply(MODELS, after=60)) as server,
        pytest.raises(EngineError, match=r"models: no answer within 0.1 s"),
    ):
        answers(opened(server), ASKED)


def test_the_list_of_models_is_asked_for_once_and_not_before_a_call(
    opened: Callable[..., Any],
) -> None:
    with serving(script(said())) as server:
        engine = opened(server)
        assert server.asked == []
        answers(engine, ASKED, ASKED)
        assert [path for path, _ in server.asked].count("/v1/models") == 1
    assert engine.facts["owned_by"] == "test"


# --- answers ----------------------------------------------------------------------------------


def test_a_thought_in_a_field_of_its_own_stands_before_the_answer(
    opened: Callable[..., Any],
) -> None:
    body = said("<answer>[2]</answer>", reasoning_content="hmm [1]?")
    body["usage"]["completion_tokens_details"] = {"reasoning_tokens": 5}
    body["usage"]["prompt_tokens_details"] = {"cached_tokens": 4}
    with serving(script(body)) as server:
        [answer] = answers(opened(server), ASKED)
    assert answer.text == "<think>hmm [1]?</think><answer>[2]</answer>"
    assert (answer.reasoning_tokens, answer.cached_tokens) == (5, 4)


def test_a_thought_that_the_limit_cut_off_stays_open(opened: Callable[..., Any]) -> None:
    with serving(script(said(None, finish="length", reasoning="[1] or"))) as server:
        [answer] = answers(opened(server), ASKED)
    assert (answer.text, answer.finish) == ("<think>[1] or", "length")


@pytest.mark.parametrize(
    ("reply", "finish", "text"),
    [
        (said("[2] >", finish="length"), "length", "[2] >"),
        (said("", finish="content_filter"), "filtered", ""),
        (said(None, refusal="I cannot"), "filtered", ""),
        (said(None), "stop", ""),
    ],
)
def test_how_an_answer_ended_is_kept(
    opened: Callable[..., Any], reply: Body, finish: str, text: str
) -> None:
    with serving(script(reply)) as server:
        [answer] = answers(opened(server), ASKED)
    assert (answer.finish, answer.text) == (finish, text)


def test_without_usage_and_tokenizer_the_missing_counts_are_noted(
    opened: Callable[..., Any],
) -> None:
    with serving(script({"choices": said()["choices"]})) as server:
        engine = opened(server)
        found = answers(engine, ASKED, ASKED)
    assert [answer.text for answer in found] == ["[2] > [1]"] * 2
    assert (found[0].prompt_tokens, found[0].output_tokens) == (0, 0)
    assert engine.facts["answers_without_usage"] == 2


@pytest.mark.parametrize(
    "message",
    [
        "This model's maximum context length is 50 tokens. However, your prompt contains 70 input"
        " tokens.",
        "maximum context length is 50 tokens, however you requested 70 tokens (61 in your prompt)",
        "the request exceeds the available context size; 70 tokens",
    ],
)
def test_a_prompt_without_room_is_too_long_and_no_error(
    opened: Callable[..., Any], message: str
) -> None:
    with serving(script(failed(400, message))) as server:
        [answer] = answers(opened(server), ASKED)
    assert (answer.finish, answer.prompt_tokens, answer.text) == ("too_long", 70, "")


def test_the_models_own_context_holds_on_a_server_with_more_room(
    opened: Callable[..., Any],
) -> None:
    with serving(script(said())) as server:  # 11 tokens of prompt, 9 to generate
        fits, too_long = (
            answers(opened(server, spec=model(context=room)), ASKED)[0] for room in (20, 19)
        )
    assert (fits.finish, too_long.finish) == ("stop", "too_long")


# --- scores -----------------------------------------------------------------------------------

LABELS = Request(messages=ASKED.messages, labels=("Yes", "No"))


def scored(**listed: float) -> Body:
    body = said("Yes")
    top = [{"token": token, "logprob": score} for token, score in listed.items()]
    body["choices"][0]["logprobs"] = {"content": [{"token": "Yes", "top_logprobs": top}]}
    return body


def test_labels_are_found_among_the_likeliest_tokens(opened: Callable[..., Any]) -> None:
    with serving(script(scored(Yes=-0.1, yes=-2.5, No=-3.0))) as server:
        [answer] = answers(opened(server), LABELS)
    body = server.bodies[0]
    assert (body["logprobs"], body["top_logprobs"], body["max_tokens"]) == (True, 20, 1)
    assert (answer.scores, answer.finish, answer.text) == ((-0.1, -3.0), "scored", "")


@pytest.mark.parametrize("reply", [scored(Yes=-0.1, yes=-2.5), said("Yes")])
def test_a_label_without_a_reported_score_is_an_error_and_never_a_guess(
    opened: Callable[..., Any], reply: Body
) -> None:
    with (
        serving(script(reply)) as server,
        pytest.raises(EngineError, match=r"label '(No|Yes)'.*--t"),
    ):
        answers(opened(server), LABELS)


def test_labels_of_a_written_answer_that_are_not_reported_are_no_scores(
    opened: Callable[..., Any],
) -> None:
    asked = Request(text="x", max_tokens=5, labels=(" true", " false"))
    listed = [{"a": -1.0}, {" true": -0.2, " false": -1.7}]
    whole = {"choices": [{"text": "a true", "logprobs": {"top_logprobs": listed}}]}
    cut = {"choices": [{"text": "a", "logprobs": {"top_logprobs": listed[:1]}}]}
    with serving(script(whole, cut)) as server:
        engine = opened(server)
        assert answers(engine, asked)[0].scores == (-0.2, -1.7)
        assert answers(engine, asked)[0].scores == ()


@pytest.mark.parametrize(
    "asked", [Request(text="a", continuation=" b"), Request(text="a", exact_length_of="[1] > [2]")]
)
def test_what_takes_the_models_tokens_names_the_missing_tokenizer(
    opened: Callable[..., Any], asked: Request
) -> None:
    with (
        serving(script(said())) as server,
        pytest.raises(MissingResourceError, match="--tokenizer"),
    ):
        answers(opened(server), asked)


# --- with the model's tokenizer ---------------------------------------------------------------


@pytest.fixture
def tiny(tiny_model: Path) -> Iterator[Served]:
    """A server that answers as vLLM's does, for the tiny model."""
    engine = open_engine("hf", model(base=str(tiny_model), dtype="float32"))
    with serving(TinyVllm(engine)) as server:
        yield server


def test_a_tokenizer_clips_counts_and_names_labels(
    opened: Callable[..., Any], tiny: Served, tiny_model: Path
) -> None:
    engine = opened(tiny, tokenizer=str(tiny_model))
    assert len(engine.tokenizer.tokenize(engine.clip("so it is true " * 9, 7))) == 7
    [answer] = answers(engine, Request(text="Is it?", labels=("true", "false")))
    assert len(answer.scores) == 2


def test_tokens_that_the_server_does_not_count_are_counted(
    opened: Callable[..., Any], tiny_model: Path
) -> None:
    with serving(script({"choices": said("so</think>it")["choices"]})) as server:
        engine = opened(server, tokenizer=str(tiny_model))
        [answer] = answers(engine, ASKED)
    tokens = engine.tokenizer.tokenize
    assert answer.prompt_tokens == len(tokens(engine.rendered(ASKED)))
    assert answer.output_tokens == len(tokens("so</think>it"))
    assert answer.reasoning_tokens == len(tokens("so</think>"))


def test_a_tokenizer_needs_no_chat_template(
    opened: Callable[..., Any], tiny_model: Path, tmp_path: Path
) -> None:
    bare = Path(shutil.copytree(tiny_model, tmp_path / "bare"))
    (bare / "chat_template.jinja").unlink()
    with serving(script({"choices": said()["choices"]}, failed(400, "context length"))) as server:
        engine = opened(server, tokenizer=str(bare))
        assert answers(engine, ASKED)[0].text == "[2] > [1]"
        assert answers(engine, ASKED)[0].finish == "too_long"


def test_a_server_that_does_not_score_a_given_text_is_refused(
    opened: Callable[..., Any], tiny_model: Path
) -> None:
    choice = {"text": "x", "logprobs": {"token_logprobs": [-1.0]}}
    with (
        serving(script({"choices": [choice]})) as server,
        pytest.raises(EngineError, match="does not score a given text"),
    ):
        answers(opened(server, tokenizer=str(tiny_model)), Request(text="a", continuation=" b"))


def test_clipping_without_a_tokenizer_names_the_flag(opened: Callable[..., Any]) -> None:
    with pytest.raises(MissingResourceError, match="--tokenizer"):
        opened("http://127.0.0.1:9/v1").clip("a text", 1)


def test_a_tokenizer_that_no_network_brings_is_asked_for_once(
    opened: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """from_pretrained would ask the hub again for most of a minute."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    def no_network(repo: str, **settings: Any) -> str:
        asked.append(repo)
        raise hub.errors.LocalEntryNotFoundError("no such host")

    monkeypatch.setattr(hub, "snapshot_download", no_network)
    monkeypatch.setattr(
        transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: asked.clear()
    )
    engine = opened("http://127.0.0.1:9/v1", spec=model(base="org/base"))
    with pytest.raises(MissingResourceError, match=r"--tokenizer.*org/base: no such host"):
        engine.clip("a text", 1)
    assert asked == ["org/base"]


# --- identity, flags and secrets --------------------------------------------------------------


def test_the_fingerprint_tells_models_apart_but_not_addresses(
    opened: Callable[..., Any], tiny_model: Path
) -> None:
    here, there = "http://127.0.0.1:1/v1", "https://example.org/v1/"
    assert opened(here).fingerprint == opened(there).fingerprint
    engines = [
        opened(here),
        opened(here, served_model="other"),
        opened(here, tokenizer=str(tiny_model)),
        opened(here, spec=model(base="org/base")),
        opened(here, spec=model(base="org/base", revision="abc")),
        opened(here, spec=model(base="org/base", adapter="org/adapter")),
        opened(here, spec=model(sampling={"temperature": 1.0})),
        opened(here, spec=model(template={"enable_thinking": False})),
        opened(here, spec=model(context=99)),
    ]
    assert len({digest(dict(e.fingerprint)) for e in engines}) == len(engines)
    assert opened(there).facts["base_url"] == "https://example.org/v1"


def test_the_served_model_is_the_adapter_or_the_base_unless_told(
    opened: Callable[..., Any],
) -> None:
    url, base = "http://127.0.0.1:1/v1", {"base": "org/base"}
    adapted = model(**base, adapter="org/adapter")
    assert opened(url, spec=model(**base), served_model="").model == "org/base"
    assert opened(url, spec=adapted, served_model="").model == "org/adapter"
    with pytest.raises(UsageError, match="without its adapter"):
        opened(url, spec=adapted, served_model="org/base")
    with pytest.raises(UsageError, match="--served-model"):
        opened(url, served_model="")


def test_no_path_of_the_servers_disk_is_recorded(
    opened: Callable[..., Any], tiny_model: Path
) -> None:
    engine = opened("http://h/v1", spec=model(base=str(tiny_model)), served_model="")
    assert engine.model == str(tiny_model)
    assert str(tiny_model) not in json.dumps([engine.fingerprint, engine.facts])


@pytest.mark.parametrize(
    "url",
    [
        "http://user:hush@127.0.0.1/v1",
        "https://h/v1?api_key=hush",
        "ftp://hush/v1",
        "hush:80/v1",
        "",
    ],
)
def test_an_address_with_a_secret_is_refused_and_not_repeated(
    opened: Callable[..., Any], url: str
) -> None:
    with pytest.raises(UsageError, match="--base-url") as caught:
        opened(url)
    assert "hush" not in str(caught.value)


def test_flags_that_http_cannot_honour_are_refused(opened: Callable[..., Any]) -> None:
    with pytest.raises(UsageError, match="deterministic"):
        opened("http://127.0.0.1:1/v1", deterministic=True)
    with pytest.raises(RegistryError, match="did you mean temperature"):
        opened("http://127.0.0.1:1/v1", spec=model(sampling={"temprature": 1.0}))


def test_the_key_is_sent_and_shown_nowhere(
    opened: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    replies = [failed(401, f"Incorrect API key provided: {KEY}"), Reply(f"Bearer {KEY}", 400)]
    shown = []
    for reply in (*replies, {"choices": KEY}):
        with serving(script(reply)) as server:
            engine = opened(server, tries=2)
            with pytest.raises(EngineError) as caught:
                answers(engine, ASKED)
            shown += [str(caught.getrepr(chain=True)), str(engine.facts)]
            shown += [json.dumps(dict(engine.fingerprint)), repr(engine)]
            assert all(f"Bearer {KEY}" in h.values() for h in server.headers)
    assert KEY not in "".join(shown) + caplog.text
    assert "***" in "".join(shown)


def test_a_key_that_is_a_word_spoils_no_message(
    opened: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "text")  # as people write for servers without keys
    replies = failed(400, "context length exceeded"), failed(400, "a text (text) in context")
    with serving(script(*replies)) as server:
        engine = opened(server)
        assert answers(engine, ASKED)[0].finish == "too_long"
        with pytest.raises(EngineError, match=r"a \*\*\* \(\*\*\*\) in context"):
            answers(engine, ASKED)


def test_a_key_that_no_header_can_hold_is_refused_unseen(
    opened: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret\nsecond line")
    with pytest.raises(UsageError) as caught:
        opened("http://127.0.0.1:1/v1")
    assert "secret" not in str(caught.value)


# --- the whole command ------------------------------------------------------------------------

SMALL = {
    "queries.tsv": "q1\tfirst question\nq2\tsecond question\nq3\tthird question\n",
    "qrels.txt": "q1 0 d1 2\nq2 0 d2 1\nq3 0 d2 1\n",
    "corpus.jsonl": '{"_id": "d1", "text": "one"}\n{"_id": "d2", "text": "two"}\n',
    "run.trec": "".join(f"q{q} Q0 d{d} {d} {9 - d} bm25\n" for q in (1, 2, 3) for d in (1, 2)),
}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "small").mkdir()
    for name, text in SMALL.items():
        (tmp_path / "small" / name).write_text(text)
    return tmp_path


def started(place: Path, *flags: str) -> subprocess.Popen[str]:
    words = ["run", "-m", "rankgpt", "-d", "small", "--served-model", "tiny", *flags]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-m", "harness", *words], cwd=place, env=env, **pipes)


def ran(place: Path, *flags: str) -> tuple[int, str]:
    """Exit code and everything printed."""
    process = started(place, *flags)
    out, err = process.communicate(timeout=120)
    assert "Traceback" not in err
    return process.returncode, out + err


def record(place: Path) -> str:
    [path] = (place / "results").rglob("result.json")
    return path.read_text()


def test_a_run_that_a_server_ended_keeps_its_answers_and_goes_on(place: Path) -> None:
    def dies(path: str, body: Body) -> Reply | Body:
        return failed(403, f"{KEY} is spent") if "third" in json.dumps(body) else said()

    flags = ("--concurrency", "1", "--base-url")
    with serving(dies) as server:
        code, shown = ran(place, *flags, server.url)
        assert code == 6
        assert "HTTP 403: *** is spent" in shown
        assert "q3" in shown
        assert len(server.bodies) == 3
        broken = record(place)
    with serving(script(said())) as server:
        code, again = ran(place, *flags, server.url)
        assert code == 0
        assert len(server.bodies) == 1  # only what was not answered
    result = json.loads(record(place))
    assert (result["state"], result["efficiency"]["calls_from_cache"]) == ("complete", 2)
    assert result["environment"]["serving"]["base_url"] == server.url
    assert KEY not in broken + shown + again + record(place)


def test_a_server_that_cannot_be_reached_ends_the_command_with_6(place: Path) -> None:
    with serving(script(said())) as server:
        pass
    code, shown = ran(place, "--base-url", server.url)
    assert code == 6
    assert "no connection" in shown


def test_flags_are_checked_before_anything_runs(place: Path) -> None:
    code, shown = ran(place, "--base-url", "http://me:hush@127.0.0.1/v1")
    assert (code, "hush" in shown) == (2, False)
    assert not (place / "results").exists() or not list((place / "results").rglob("result.json"))


def test_an_interrupt_does_not_wait_for_the_server(place: Path) -> None:
    asked = threading.Event()

    def hangs(path: str, body: Body) -> Reply:
        asked.set()
        return Reply(said(), after=600)

    with serving(hangs) as server:
        process = started(place, "--base-url", server.url)
        assert asked.wait(120)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)  # a try may take 600 seconds
    assert process.returncode == 7
    assert "Traceback" not in err
