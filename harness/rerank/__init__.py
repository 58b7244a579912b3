"""Reranking methods as pure generators, and the one table that names them.

A method yields lists of independent Requests, receives their Completions in the same order and
returns a Ranking. It knows no engine, file, clock, thread or global random state.
"""

from __future__ import annotations

from harness.rerank import baselines, listwise, pairwise, pointwise, setwise
from harness.types import Method

METHODS: dict[str, Method] = {
    "first-stage": Method(baselines.first_stage),
    "random": Method(baselines.shuffled),
    "reverse": Method(baselines.reverse),
    "oracle": Method(baselines.oracle, needs_judgements=True),
    "pointwise.qlm": Method(pointwise.score_each, answers=("likelihood",)),
    "pointwise.yesno": Method(pointwise.score_each, answers=("yesno",)),
    "pointwise.reasoning": Method(pointwise.reason_then_score, answers=("reasoning",)),
    "pairwise.allpairs": Method(pairwise.allpairs, answers=("label",)),
    "pairwise.heapsort": Method(pairwise.heapsort, answers=("label",)),
    "setwise.heapsort": Method(setwise.heapsort, answers=("label",)),
    "setwise.bubblesort": Method(setwise.bubblesort, answers=("label",)),
    "listwise.window": Method(listwise.sliding_window, answers=("permutation",)),
}
