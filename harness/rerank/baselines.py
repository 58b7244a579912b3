"""Rankings that ask no model: the first stage itself, chance, its mirror and the ceiling."""

from __future__ import annotations

from random import Random

from harness.prompts import Prompt
from harness.types import DEFAULT_SEED, Flow, Query


def first_stage(query: Query, prompt: Prompt | None) -> Flow:
    """The candidates as they came."""
    return query.ranking(range(len(query.candidates)))
    yield


def reverse(query: Query, prompt: Prompt | None) -> Flow:
    """The candidates from last to first."""
    return query.ranking(range(len(query.candidates) - 1, -1, -1))
    yield


def shuffled(query: Query, prompt: Prompt | None, *, seed: int = DEFAULT_SEED) -> Flow:
    """A random order, seeded by (seed, dataset, query), so that a subset of queries agrees."""
    order = list(range(len(query.candidates)))
    Random(f"{seed}:{query.dataset}:{query.qid}:0").shuffle(order)
    return query.ranking(order)
    yield


def oracle(query: Query, prompt: Prompt | None) -> Flow:
    """The candidates by their judged grade: the best that any reranker of them can reach."""
    grades = [query.judgements.get(c.docid, 0) for c in query.candidates]
    return query.ranking(sorted(range(len(grades)), key=lambda i: (-grades[i], i)))
    yield
