"""The decoder formula against published profiler counts, and its parts against sums by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness import flops
from harness.specs import Registry, read_toml

SHAPES = read_toml(Path(__file__).resolve().parent.parent / "registry" / "shapes.toml")
TINY = flops.Shape(layers=2, hidden=8, inner=12, heads=4, groups=2, width=3, vocabulary=50)


def qwen(size: str) -> flops.Shape:
    return flops.known()[f"Qwen/Qwen2.5-{size}-Instruct"]


# TFLOP of a call over 394 prompt tokens with one token of answer: what the authors of arXiv
# 2507.06223 measured with a profiler, and what their own estimator says.
@pytest.mark.parametrize(
    ("size", "profiled", "estimated"),
    [("3B", 2.192, 1.556), ("7B", 5.138, 3.662), ("14B", 10.407, 7.784)],
)
def test_the_exact_count_agrees_with_a_profiler_and_the_published_one_with_its_source(
    size: str, profiled: float, estimated: float
) -> None:
    assert flops.of_call(qwen(size), 394, 1) / 1e12 == pytest.approx(profiled, rel=0.02)
    assert flops.published(qwen(size), 394, 1) / 1e12 == pytest.approx(estimated, rel=0.001)


@pytest.mark.parametrize(
    ("prompt", "counted"), [(215, 2807078070272), (246, 3211662397440), (149, 1945704986624)]
)
def test_single_calls_agree_with_a_profiler_that_leaves_attention_out(
    prompt: int, counted: int
) -> None:
    assert flops.of_call(qwen("7B"), prompt, 1) == pytest.approx(counted, rel=0.005)


def test_a_call_is_its_matrices_its_attention_and_its_head() -> None:
    matrices = 2 * (8 * 12 + 12 * 8 + 2 * 8 * 6 + 3 * 8 * 12)  # q, o, k and v, MLP; two layers
    assert TINY.weights == matrices
    pairs = 1 + 2 + 3 + 4 + 5 + 6  # five prompt tokens and the first of two generated
    attention = 2 * 2 * 2 * (4 * 3) * pairs  # scores and values, layers, heads x width
    assert flops.of_call(TINY, 5, 2) == 2 * matrices * 6 + attention + 2 * (8 * 50) * 2


def test_generated_tokens_cost_what_the_same_tokens_cost_in_a_prompt() -> None:
    head = 2 * TINY.head
    assert flops.of_call(TINY, 5, 4) - 3 * head == flops.of_call(TINY, 8, 1)


def test_cached_tokens_are_not_computed_but_attended_to() -> None:
    whole, rest = flops.of_call(TINY, 10, 3), flops.of_call(TINY, 10, 3, cached=6)
    assert whole - rest == flops.of_call(TINY, 6, 1) - 2 * TINY.head
    assert rest > flops.of_call(TINY, 4, 3), "the four new tokens attend to the six old ones"


def test_a_scored_continuation_pays_the_head_at_every_place() -> None:
    more = flops.of_call(TINY, 10, 0, scored=4) - flops.of_call(TINY, 10, 0)
    assert more == 3 * 2 * TINY.head


@pytest.mark.parametrize("name", SHAPES)
def test_a_known_shape_has_as_many_parameters_as_the_registry_says(name: str) -> None:
    table = SHAPES[name]
    shape = flops.shape(table)
    assert shape
    tables = 1 if table.get("tie_word_embeddings") else 2
    stated = {m.parameters for m in Registry().models.values() if m.base in table["bases"]}
    for billions in stated - {None}:
        assert (shape.weights + tables * shape.head) / 1e9 == pytest.approx(billions, rel=0.01)


def test_every_model_of_the_registry_with_weights_has_a_known_shape() -> None:
    bases = {spec.base for spec in Registry().models.values() if spec.base}
    assert bases <= flops.known().keys()


def test_defaults_of_a_configuration_are_those_of_its_library() -> None:
    config = {
        "num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 12,
        "num_attention_heads": 4, "vocab_size": 50, "hidden_act": "silu",
    }  # fmt: skip
    assert flops.shape(config) == flops.Shape(2, 8, 12, 4, 4, 2, 50)
    grouped = flops.shape({**config, "num_key_value_heads": 2, "head_dim": 3})
    assert grouped == TINY


@pytest.mark.parametrize(
    "config",
    [
        None, {}, {"model_type": "gpt2", "n_layer": 12},
        {**SHAPES["qwen2_5-7b"], "hidden_act": "gelu"},
        {**SHAPES["qwen2_5-7b"], "num_local_experts": 8},
    ],
)  # fmt: skip
def test_what_the_formula_does_not_describe_has_no_shape(config: dict[str, object] | None) -> None:
    assert flops.shape(config) is None
