"""Setwise reranking: one call names the best of a set; a sort is built from such calls.

The sorts are those of llm-rankers `setwise.py` (PROTOCOLS 1.1-1.3): the same sets are asked and
the same rankings reached. Two things differ on purpose: the nodes of one heap level are asked
together, and the shuffle inside a prompt is seeded by what is asked, not by history.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from itertools import islice
from random import Random
from typing import Annotated, Any, Literal, TypeVar

from annotated_types import Ge

from harness.prompts import Prompt
from harness.types import DEFAULT_SEED, Completion, Fault, Flow, Parsed, Query, Request

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

    def best(self, group: list[int]) -> Asking[int]:
        """The position, in a set of candidate numbers, of the one that wins."""
        winner = self._majority((yield from self._votes(group, self.permutations)), group)
        if winner is None and self.on_unparsable == "retry":
            [winner] = yield from self._votes(group, 1, Fault.RETRIED)
        return self._fallback(group) if winner is None else winner

    def _votes(self, group: list[int], count: int, *remarks: Fault) -> Asking[list[int | None]]:
        candidates, shown = self.query.candidates, [self._order(group) for _ in range(count)]
        answers = yield [self.prompt.render(self.query, [candidates[i] for i in s]) for s in shown]
        votes: list[int | None] = []
        for order, answer in zip(shown, answers, strict=True):
            read = self.prompt.parse(answer, len(order))
            vote = group.index(order[read.order[0]]) if read.order else None
            if remarks or read.changed != bool(vote):
                read = Parsed(read.order, read.faults + remarks, read.score, bool(vote))
            self.log.append(read)
            votes.append(vote)
        return votes

    def _order(self, group: list[int]) -> list[int]:
        """The set in the order shown: shuffled by (seed, dataset, qid, documents, occurrence)."""
        if not self.shuffle:
            return group
        members = tuple(sorted(group))
        occurrence = self.asked[members]
        self.asked[members] += 1
        docids = ",".join(sorted([self.query.candidates[i].docid for i in members]))
        rng = Random(f"{self.seed}:{self.query.dataset}:{self.query.qid}:{docids}:{occurrence}")
        return rng.sample(list(members), len(members))

    def _majority(self, votes: list[int | None], group: list[int]) -> int | None:
        """The position with most votes; a tie goes to the better first-stage document."""
        cast = [vote for vote in votes if vote is not None]
        return max(cast, key=lambda vote: (cast.count(vote), -group[vote]), default=None)

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
    order = yield from heap_order(len(query.candidates), num_child, k, judge.best)
    return query.ranking(order, judge.log)


def heap_order(
    count: int, children: int, k: int, best: Callable[[list[int]], Asking[int]]
) -> Asking[list[int]]:
    """The first k of a heap whose parents are compared with their children by `best`."""
    heap = list(range(count))
    for level in levels(count, children):
        yield from together([_sift(heap, count, node, children, best) for node in level])
    for ranked, last in enumerate(range(count - 1, 0, -1), 1):
        heap[0], heap[last] = heap[last], heap[0]
        if ranked == k:
            break
        yield from _sift(heap, last, 0, children, best)
    return top_then_rest(heap[::-1], k)


def _sift(
    heap: list[int], size: int, node: int, children: int, best: Callable[[list[int]], Asking[int]]
) -> Asking[None]:
    """Let node's document sink until it beats its children; a leaf asks nothing."""
    while (first := children * node + 1) < size:
        places = [node, *range(first, min(first + children, size))]
        winner = places[(yield from best([heap[p] for p in places]))]
        if winner == node:
            return
        heap[node], heap[winner] = heap[winner], heap[node]
        node = winner


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
    answered: list[tuple[Asking[None], Any]] = [(asking, None) for asking in askings]
    while answered:
        waiting = []
        for asking, own in answered:
            with contextlib.suppress(StopIteration):
                waiting.append((asking, asking.send(own)))
        rest = iter((yield [r for _, requests in waiting for r in requests]) if waiting else ())
        answered = [(asking, list(islice(rest, len(requests)))) for asking, requests in waiting]


def top_then_rest(order: list[int], k: int) -> list[int]:
    """The first k of the sort, then everything else in first-stage order."""
    top = order[:k]
    return top + sorted(order[k:])


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
            winner = (yield from judge.best(window)) if len(window) > 1 else 0
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
