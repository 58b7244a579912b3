"""On a GPU: one query at a time against all in flight, at the shape of a 7B setwise reranker.

`nox -s gpu` runs this and keeps the record as results/gpu/throughput.json. The weights are random:
answers are forced to a length and mean nothing, times are real. STUDY_SHAPE=tiny tries the study
itself on a processor, and keeps nothing.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from bench_hf import forced
from conftest import gate

from harness import env, schedule
from harness.cache import Cache, Identity
from harness.engines import open_engine
from harness.rerank import setwise
from harness.specs import Registry
from harness.types import Candidate, Engine, Flow, ModelSpec, Query, Serving

TINY = os.environ.get("STUDY_SHAPE") == "tiny"
ROOT = Path(__file__).resolve().parent.parent.parent
SHAPE = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}
STUDIES = [(8, 8), (8, 250), (43, 8), (43, 250)] if not TINY else [(2, 3), (4, 3)]
ALONE = 8 if not TINY else 2  # queries asked one at a time; more would only take longer

torch = pytest.importorskip("torch", reason="torch is not installed")
pytestmark = pytest.mark.skipif(
    not (TINY or torch.cuda.is_available()), reason="there is no CUDA GPU here"
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen2.5-7B's configuration with random weights, and a byte-level tokenizer."""
    import transformers

    sys.path.insert(0, str(ROOT / "tests"))
    from importlib.machinery import SourceFileLoader

    tokenizer = (
        SourceFileLoader("parts", str(ROOT / "tests" / "conftest.py"))
        .load_module()
        .trained_tokenizer()
    )
    shape = (
        SHAPE
        if not TINY
        else {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
        }
    )
    config = transformers.Qwen2Config(
        vocab_size=152064 if not TINY else 512,
        max_position_embeddings=32768,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
        **shape,
    )
    folder = tmp_path_factory.mktemp("shape")
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    del model
    torch.cuda.empty_cache()
    return folder


def flows(queries: list[Query], length: int) -> Iterator[tuple[str, Flow]]:
    prompt = Registry().prompts["rank-r1"]
    for query in queries:
        yield query.qid, forced(setwise.heapsort(query, prompt, num_child=19, k=10), length)


def took(engine: Engine, queries: list[Query], length: int, concurrency: int) -> tuple[float, int]:
    started = time.perf_counter()
    key = Identity(engine.fingerprint).key
    done = list(
        schedule.run(
            flows(queries, length),
            engine,
            Cache(None),
            key=key,
            concurrency=concurrency,
            read_cache=False,
        )
    )
    return time.perf_counter() - started, sum(len(o.calls) for o in done)


def collection(engine: Any, count: int) -> list[Query]:
    """Queries with 100 passages of about 95 tokens, so that twenty make a 2,000-token prompt."""
    rng, out = Random(0), []
    for n in range(count):
        texts = (
            engine.clip(" ".join(str(rng.randrange(10**6)) for _ in range(80)), 95)
            for _ in range(100)
        )
        out.append(
            Query(
                f"q{n}",
                f"query {n}",
                tuple(Candidate(f"d{n}-{i}", t) for i, t in enumerate(texts)),
                "study",
            )
        )
    return out


def test_all_queries_in_flight_against_one_at_a_time(weights: Path) -> None:
    family = "vllm" if importlib.util.find_spec("vllm") else "hf"
    spec = ModelSpec("study", "setwise.heapsort", base=str(weights), dtype="bfloat16", context=4096)
    engine = open_engine(family, spec, Serving(prefix_caching=False))
    queries, rows = collection(engine, max(n for n, _ in STUDIES)), []
    took(engine, queries[:1], 4, 1)  # loading, and the first calls' compilation
    for count, length in STUDIES:
        alone, calls_alone = took(engine, queries[: min(count, ALONE)], length, 1)
        together, calls = took(engine, queries[:count], length, 10**6)
        ratio = (alone / calls_alone) / (together / calls)
        rows.append(
            {
                "queries": count,
                "answer_tokens": length,
                "calls": calls,
                "alone_seconds_per_call": alone / calls_alone,
                "alone_queries": min(count, ALONE),
                "together_seconds_per_call": together / calls,
                "gain": ratio,
            }
        )
        gate(
            f"G1 {count} queries, {length}-token answers, {family}: alone / together",
            ratio,
            least=None if TINY or (count, length) != (8, 250) else 4,
        )
    record = {
        "what": "setwise heapsort, 20 passages a prompt, random weights of Qwen2.5-7B's shape",
        "engine": family,
        "facts": dict(engine.facts),
        "environment": env.environment(),
        "command": "nox -s gpu",
        "measured": rows,
    }
    engine.close()
    if not TINY:
        place = ROOT / "results" / "gpu" / "throughput.json"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(record, indent=1) + "\n")
