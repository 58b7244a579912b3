"""vLLM on a processor: the research loop against all queries in flight, on one loaded engine.

`nox -s vllm` runs this. PERFORMANCE's E1, with a model of two small layers and answers of 8 and 64
tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from bench_hf import sides
from bench_loop import queries
from conftest import gate

from harness.engines import open_engine
from harness.types import ModelSpec

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed")


@pytest.mark.parametrize(("length", "least"), [(8, 1.8), (64, 4)])
def test_all_queries_in_flight_against_the_research_loop(
    tiny_model: Path, paired: Callable[..., Any], length: int, least: float
) -> None:
    spec = ModelSpec("tiny", "first-stage", base=str(tiny_model), dtype="float32")
    engine = open_engine("vllm", spec)
    theirs, ours = sides(engine, queries(16, 8), length)
    ours()  # loads, cuts every passage once, and fills the prefix cache for both
    alone, together = paired(theirs, ours, rounds=5)
    engine.close()
    gate(
        f"E1 research loop / ours, {length}-token answers, vllm, 48 listwise calls",
        alone / together,
        least=least,
        note=f"{alone:.2f} s against {together:.2f} s",
    )
