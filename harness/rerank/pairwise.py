"""Pairwise reranking (PRP, Qin et al. 2023; llm-rankers `pairwise.py`).

Each pair is asked in both orders; a verdict counts as a win only if both agree.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated

from annotated_types import Ge

from harness.prompts import Prompt
from harness.rerank.setwise import Asking, levels, together, top_then_rest
from harness.types import Flow, Parsed, Query


@dataclass
class Duel:
    """Asks pairs in both orders and remembers every answer, in the order of asking."""

    query: Query
    prompt: Prompt
    log: list[Parsed] = field(default_factory=list)

    def wins(self, pairs: list[tuple[int, int]]) -> Asking[list[float]]:
        """For each pair (a, b): 1 when a wins both orders, 0 when b does, 0.5 otherwise."""
        shown = [order for a, b in pairs for order in ((a, b), (b, a))]
        candidates = self.query.candidates
        answers = yield [
            self.prompt.render(self.query, [candidates[x], candidates[y]]) for x, y in shown
        ]
        parsed = [self.prompt.parse(answer, 2) for answer in answers]
        self.log += [replace(p, changed=p.order == (1,)) for p in parsed]
        return [
            1.0 if (ab.order, ba.order) == ((0,), (1,)) else
            0.0 if (ab.order, ba.order) == ((1,), (0,)) else 0.5
            for ab, ba in zip(parsed[::2], parsed[1::2], strict=True)
        ]  # fmt: skip


def allpairs(query: Query, prompt: Prompt, *, k: Annotated[int, Ge(1)] | None = None) -> Flow:
    """Every pair in both orders, n(n-1) calls at once; candidates by wins, half for a draw.

    k is accepted for symmetry with the heap sort: ranks after k keep first-stage order.
    """
    duel, count = Duel(query, prompt), len(query.candidates)
    pairs = [(a, b) for a in range(count) for b in range(a + 1, count)]
    verdicts = (yield from duel.wins(pairs)) if pairs else []
    score = [0.0] * count
    for (a, b), won in zip(pairs, verdicts, strict=True):
        score[a] += won
        score[b] += 1 - won
    order = sorted(range(count), key=lambda i: (-score[i], i))
    return query.ranking(top_then_rest(order, k or count), duel.log)


def heapsort(query: Query, prompt: Prompt, *, k: Annotated[int, Ge(1)] = 10) -> Flow:
    """A binary heap over duels; a child rises only when it wins both orders."""
    duel = Duel(query, prompt)
    heap = list(range(len(query.candidates)))
    for level in levels(len(heap), 2):
        yield from together([_sift(duel, heap, len(heap), i) for i in level])
    for ranked, last in enumerate(range(len(heap) - 1, 0, -1), 1):
        heap[0], heap[last] = heap[last], heap[0]
        if ranked == k:
            break
        yield from _sift(duel, heap, last, 0)
    return query.ranking(top_then_rest(heap[::-1], k), duel.log)


def _sift(duel: Duel, heap: list[int], size: int, node: int) -> Asking[None]:
    while 2 * node + 1 < size:
        best = node
        for child in range(2 * node + 1, min(2 * node + 3, size)):
            [won] = yield from duel.wins([(heap[child], heap[best])])
            best = child if won == 1.0 else best
        if best == node:
            return
        heap[node], heap[best] = heap[best], heap[node]
        node = best
