"""Pairwise reranking (PRP, Qin et al. 2023; llm-rankers `pairwise.py`).

Each pair is asked in both orders; a verdict counts as a win only if both agree.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from annotated_types import Ge

from harness.prompts import Prompt
from harness.rerank.setwise import Asking, heap_order, top_then_rest
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
        orders = [p.order for p in parsed]
        agreed: dict[Any, float] = {((0,), (1,)): 1.0, ((1,), (0,)): 0.0}
        return [agreed.get(both, 0.5) for both in zip(orders[::2], orders[1::2], strict=True)]

    def best(self, group: list[int]) -> Asking[int]:
        """The position of who leads at the end; winning both orders takes the lead."""
        best = 0
        for i in range(1, len(group)):
            [won] = yield from self.wins([(group[i], group[best])])
            best = i if won == 1.0 else best
        return best


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
    order = yield from heap_order(len(query.candidates), 2, k, duel.best)
    return query.ranking(order, duel.log)
