"""Every row of the model registry can be run, and says where it comes from."""

from __future__ import annotations

import re

import pytest

from harness.rerank import METHODS
from harness.specs import Registry, bind, limits_for
from harness.types import ModelSpec

REGISTRY = Registry()
MODELS = list(REGISTRY.models.values())
ASKING = [m for m in MODELS if METHODS[m.method].answers]
VARIANTS = [m for m in MODELS if "@" in m.name]


def name_of(spec: ModelSpec) -> str:
    return spec.name


def shown_at_once(spec: ModelSpec) -> int:
    """The most passages one call of this row puts into a prompt."""
    options = bind(METHODS[spec.method].flow, spec.options, spec.name)
    family = spec.method.partition(".")[0]
    if family == "setwise":
        return int(options["num_child"]) + 1
    return int(options["size"]) if family == "listwise" else {"pairwise": 2}.get(family, 1)


def test_the_field_is_in_the_registry() -> None:
    names = {
        *(f"rank-r1-{size}" for size in ("3b", "7b", "14b", "32b-v0.2")),
        *(f"rank-r1-zs-{size}" for size in ("3b", "7b", "14b")),
        *(f"setwise-sft-{size}" for size in ("3b", "7b", "14b")),
        *(f"setwise-zs-{size}" for size in ("3b", "7b", "14b")),
        *(f"rankzephyr-7b{variant}" for variant in ("", "@paper", "@rank_llm", "@llm-rankers")),
        *("reasonrank-7b", "reasonrank-8b", "reasonrank-32b", "rearank-7b", "rearank-zs-7b"),
        *("rank-r1-7b@runner", "rank-r1-7b@published", "rearank-7b@published-windows"),
        *("rank1-7b", "rankgpt", "first-stage", "random", "reverse", "oracle"),
    }
    assert names <= set(REGISTRY.models)


@pytest.mark.parametrize("spec", MODELS, ids=name_of)
def test_a_row_has_a_method_and_a_source(spec: ModelSpec) -> None:
    assert spec.method in METHODS
    assert spec.source


@pytest.mark.parametrize("spec", MODELS, ids=name_of)
def test_its_options_are_its_methods(spec: ModelSpec) -> None:
    bind(METHODS[spec.method].flow, spec.options, spec.name)


@pytest.mark.parametrize("spec", ASKING, ids=name_of)
def test_its_prompt_is_one_that_its_method_can_read(spec: ModelSpec) -> None:
    assert REGISTRY.prompt(spec.prompt).answer in METHODS[spec.method].answers


@pytest.mark.parametrize("spec", ASKING, ids=name_of)
def test_its_limits_are_complete(spec: ModelSpec) -> None:
    prompt = REGISTRY.prompt(spec.prompt)
    limits = limits_for(spec, prompt)
    generates = prompt.answer in ("permutation", "reasoning") or bool(prompt.pattern)
    assert bool(limits.max_tokens) is generates
    for family in ("dl", "beir", "bright", "other"):
        for what in ("query", "passage"):
            limit = limits.of(what, family)  # type: ignore[arg-type]
            assert limit is None or limit > 0


@pytest.mark.parametrize("spec", ASKING, ids=name_of)
def test_its_prompt_has_a_label_for_every_passage_shown(spec: ModelSpec) -> None:
    most = REGISTRY.prompt(spec.prompt).most
    assert most is None or most >= shown_at_once(spec)


@pytest.mark.parametrize("spec", ASKING, ids=name_of)
def test_it_names_an_engine_and_what_the_engine_loads(spec: ModelSpec) -> None:
    assert spec.engine in ("vllm", "hf", "http")
    assert bool(spec.base) is (spec.engine != "http")
    if spec.base:
        assert spec.parameters
        assert spec.license


@pytest.mark.parametrize("spec", MODELS, ids=name_of)
def test_a_baseline_asks_no_model(spec: ModelSpec) -> None:
    if not METHODS[spec.method].answers:
        assert (spec.base, spec.prompt, spec.engine) == ("", "", "")


@pytest.mark.parametrize("spec", VARIANTS, ids=name_of)
def test_a_variant_says_how_it_differs_and_from_where(spec: ModelSpec) -> None:
    plain = REGISTRY.models[spec.name.partition("@")[0]]
    assert spec.differs
    assert "\n" not in spec.differs
    assert spec.source
    assert (spec.base, spec.adapter) == (plain.base, plain.adapter)
    assert not plain.differs


@pytest.mark.parametrize("name", sorted(REGISTRY.prompts))
def test_a_prompt_has_a_source_and_is_used(name: str) -> None:
    assert REGISTRY.prompts[name].source
    assert name in {m.prompt for m in MODELS}


def test_only_the_published_variants_let_the_root_win() -> None:
    policy = {m.name: m.options["on_unparsable"] for m in MODELS if "on_unparsable" in m.options}
    assert set(policy.values()) == {"root"}
    assert all(name.endswith("@published") for name in policy)


def test_rank_r1_shows_twenty_documents_in_a_new_order_each_time() -> None:
    for size in ("3b", "7b", "14b"):
        spec = REGISTRY.models[f"rank-r1-{size}"]
        assert dict(spec.options) == {"num_child": 19, "k": 10, "shuffle": True}
        assert spec.trained_on == ("msmarco-passage",)
        assert spec.base == f"Qwen/Qwen2.5-{size.upper()}-Instruct"
        assert spec.adapter == f"ielabgroup/Rank-R1-{size.upper()}-v0.1"
    assert shown_at_once(REGISTRY.models["rank-r1-32b-v0.2"]) == 10


def test_an_untrained_row_has_no_adapter_and_no_training_set() -> None:
    for spec in MODELS:
        if "-zs-" in spec.name:
            assert not spec.adapter
            assert not spec.trained_on


def test_every_row_but_one_is_greedy() -> None:
    sampled = [m.name for m in ASKING if m.sampling.get("temperature", 0.0) > 0]
    assert sampled == ["reasonrank-8b"]


def test_a_paper_is_named_by_its_arxiv_number() -> None:
    for spec in MODELS:
        assert not spec.paper or re.fullmatch(r"arXiv[ :]\d{4}\.\d{5}", spec.paper), spec.name
