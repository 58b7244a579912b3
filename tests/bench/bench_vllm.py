"""vLLM on a processor: one query at a time against all in flight, on one loaded engine.

`nox -s vllm` runs this. PERFORMANCE's E1, with a model of two small layers and answers of 8 and 64 tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from conftest import gate

from harness import schedule
from harness.cache import Cache, Identity
from harness.engines import open_engine
from harness.types import Engine, Flow, ModelSpec, Parsed, Query, Request

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed")
QUERIES, CALLS = 16, 3


def chain(query: Query, tokens: int) -> Flow:
    """Calls that wait for each other, as those of a sort do."""
    for number in range(CALLS):
        text = f"Which passage is most relevant to query {query.qid}? Comparison {number}. " * 4
        yield [Request(text=text, exact_length_of="0" * tokens)]
    return query.ranking([], [Parsed()] * CALLS)


def run(engine: Engine, concurrency: int, length: int) -> None:
    flows: Iterator[tuple[str, Flow]] = (
        (str(n), chain(Query(str(n), ""), length)) for n in range(QUERIES)
    )
    key = Identity(engine.fingerprint).key
    done = list(
        schedule.run(flows, engine, Cache(None), key=key, concurrency=concurrency, read_cache=False)
    )
    tokens = {call.completion.output_tokens for outcome in done for call in outcome.calls}
    assert (len(done), tokens) == (QUERIES, {length})


@pytest.mark.parametrize(("length", "least"), [(8, 1.8), (64, 4)])
def test_all_queries_in_flight_against_one_at_a_time(
    tiny_model: Path, paired: Callable[..., Any], length: int, least: float
) -> None:
    engine = open_engine(
        "vllm", ModelSpec("tiny", "first-stage", base=str(tiny_model), dtype="float32")
    )
    run(engine, engine.capacity, length)  # loads, and fills the prefix cache for both
    alone, together = paired(
        lambda: run(engine, 1, length), lambda: run(engine, engine.capacity, length), rounds=5
    )
    engine.close()
    gate(
        f"E1 {QUERIES} queries, {length}-token answers, vllm: alone / together",
        alone / together,
        least=least,
        note=f"{alone:.2f} s against {together:.2f} s",
    )
