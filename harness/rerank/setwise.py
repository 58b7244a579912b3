"""Setwise reranking: one call names the best of a set; a sort is built from such calls.

The sorts are those of llm-rankers `setwise.py` (PROTOCOLS 1.1-1.3): the same sets are asked and
the same rankings reached. Two things differ on purpose: the nodes of one heap level are asked
together, and the shuffle inside a prompt is seeded by what is asked, not by history.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Generator
from dataclasses import dataclass, field, replace
from random import Random
from typing import Annotated, Literal, TypeVar

from annotated_types import Ge

from harness.prompts import Prompt
from harness.types import DEFAULT_SEED, Candidate, Completion, Fault, Flow, Parsed, Query, Request

T = TypeVar("T")
Asking = Generator[list[Request], list[Completion], T]
Policy = Literal["first-stage", "root", "retry"]


@dataclass
class Judge:
    """Asks for the best of each set and remembers every answer, in the order of asking."""

    query: Query
    prompt: Prompt
    seed: int
    shuffle: bool
    permutations: int
    on_unparsable: Policy
    log: list[Parsed] = field(default_factory=list)
    asked: Counter[tuple[int, ...]] = field(default_factory=Counter)

    def best(self, sets: list[list[int]]) -> Asking[list[int]]:
        """For each set of candidate numbers, the position in the set of the one that wins."""
        times = self.permutations
        winners = yield from self._vote([group for group in sets for _ in range(times)])
        if times > 1:
            cast = [winners[i : i + times] for i in range(0, len(winners), times)]
            winners = [self._majority(votes, group) for votes, group in zip(cast, sets)]
        again = [i for i, w in enumerate(winners) if w is None] if self._retries else []
        if again:
            retried = yield from self._vote([sets[i] for i in again], retry=True)
            for i, vote in zip(again, retried, strict=True):
                winners[i] = vote
        return [self._fallback(s) if w is None else w for s, w in zip(sets, winners, strict=True)]

    @property
    def _retries(self) -> bool:
        return self.on_unparsable == "retry"

    def _vote(self, sets: list[list[int]], retry: bool = False) -> Asking[list[int | None]]:
        shown = [self._order(group) for group in sets]
        answers = yield [self.prompt.render(self.query, self._candidates(s)) for s in shown]
        out: list[int | None] = []
        for group, order, answer in zip(sets, shown, answers, strict=True):
            parsed = self.prompt.parse(answer, len(order))
            winner = group.index(order[parsed.order[0]]) if parsed.order else None
            if retry:
                parsed = replace(parsed, faults=(*parsed.faults, Fault.RETRIED))
            self.log.append(Parsed(parsed.order, parsed.faults, parsed.score, bool(winner)))
            out.append(winner)
        return out

    def _order(self, group: list[int]) -> list[int]:
        """The set in the order shown: shuffled by (seed, dataset, qid, documents, occurrence)."""
        if not self.shuffle:
            return list(group)
        members = tuple(sorted(group))
        occurrence = self.asked[members]
        self.asked[members] += 1
        docids = ",".join(sorted([self.query.candidates[i].docid for i in members]))
        rng = Random(f"{self.seed}:{self.query.dataset}:{self.query.qid}:{docids}:{occurrence}")
        return rng.sample(list(members), len(members))

    def _candidates(self, order: list[int]) -> list[Candidate]:
        return [self.query.candidates[i] for i in order]

    def _majority(self, votes: list[int | None], group: list[int]) -> int | None:
        """The position with most votes; a tie goes to the better first-stage document."""
        counts = Counter(v for v in votes if v is not None)
        return max(counts, key=lambda v: (counts[v], -group[v]), default=None)

    def _fallback(self, group: list[int]) -> int:
        """root: the published rule. Otherwise the best first-stage document of the set: during
        extraction the root has just come from the tail, and would win by default."""
        return 0 if self.on_unparsable == "root" else group.index(min(group))


def heapsort(
    query: Query,
    prompt: Prompt,
    *,
    num_child: Annotated[int, Ge(1)] = 19,
    k: Annotated[int, Ge(1)] = 10,
    shuffle: bool = False,
    permutations: Annotated[int, Ge(1)] = 1,
    on_unparsable: Policy = "first-stage",
    seed: int = DEFAULT_SEED,
) -> Flow:
    """Heap sort with num_child + 1 documents a call; the first k ranks are exact."""
    judge = Judge(query, prompt, seed, shuffle, permutations, on_unparsable)
    heap = list(range(len(query.candidates)))
    for level in levels(len(heap), num_child):
        yield from together([sift(judge, heap, len(heap), i, num_child) for i in level])
    for ranked, last in enumerate(range(len(heap) - 1, 0, -1), 1):
        heap[0], heap[last] = heap[last], heap[0]
        if ranked == k:
            break
        yield from sift(judge, heap, last, 0, num_child)
    return query.ranking(top_then_rest(heap[::-1], k), judge.log)


def sift(judge: Judge, heap: list[int], size: int, node: int, children: int) -> Asking[None]:
    """Let node's document sink until it beats its children; a leaf asks nothing."""
    while children * node + 1 < size:
        places = [node, *range(children * node + 1, min(children * (node + 1) + 1, size))]
        [winner] = yield from judge.best([[heap[p] for p in places]])
        if winner == 0:
            return
        best = places[winner]
        heap[node], heap[best] = heap[best], heap[node]
        node = best


def levels(count: int, children: int) -> list[list[int]]:
    """The parents of a heap, deepest level first; nodes of one level have disjoint subtrees."""
    out: list[list[int]] = []
    first, width = 0, 1
    while children * first + 1 < count:
        out.append([i for i in range(first, first + width) if children * i + 1 < count][::-1])
        first, width = first + width, width * children
    return out[::-1]


def together(askings: list[Asking[None]]) -> Asking[None]:
    """Run independent askings side by side: each round's requests go out in one yield."""
    waiting: list[tuple[Asking[None], list[Request]]] = []
    for asking in askings:
        with contextlib.suppress(StopIteration):
            waiting.append((asking, next(asking)))
    while waiting:
        answers = yield [request for _, requests in waiting for request in requests]
        start, still = 0, []
        for asking, requests in waiting:
            end = start + len(requests)
            with contextlib.suppress(StopIteration):
                still.append((asking, asking.send(answers[start:end])))
            start = end
        waiting = still


def top_then_rest(order: list[int], k: int) -> list[int]:
    """The first k of the sort, then everything else in first-stage order."""
    top = order[:k]
    return top + [i for i in range(len(order)) if i not in set(top)]


def bubblesort(
    query: Query,
    prompt: Prompt,
    *,
    num_child: Annotated[int, Ge(1)] = 2,
    k: Annotated[int, Ge(1)] = 10,
    shuffle: bool = False,
    permutations: Annotated[int, Ge(1)] = 1,
    on_unparsable: Policy = "first-stage",
    seed: int = DEFAULT_SEED,
) -> Flow:
    """The published bubble sort with its shortcut; not exact for a num_child near k or above.

    A window of one document or none asks nothing (published code sends it to the model).
    """
    judge = Judge(query, prompt, seed, shuffle, permutations, on_unparsable)
    order = list(range(len(query.candidates)))
    last = len(order) - (num_child + 1)
    for rank in range(min(k, len(order))):
        start, end, changed = last, last + num_child + 1, False
        while True:
            start = max(start, rank)
            window = order[start:end]
            [winner] = (yield from judge.best([window])) if len(window) > 1 else [0]
            if winner != 0:
                order[start], order[start + winner] = order[start + winner], order[start]
                if not changed:
                    changed = True
                    if last != len(order) - (num_child + 1) and winner == len(window) - 1:
                        last += len(window) - 1
            if start == rank:
                break
            if not changed:
                last -= num_child
            start, end = start - num_child, end - num_child
    return query.ranking(top_then_rest(order, k), judge.log)
