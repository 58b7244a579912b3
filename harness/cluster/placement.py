"""Which queries of a matrix run where: shards, the workers that hold them, and when to give up.

It knows neither Ray nor engines: driver.py drives it over real workers, and the simulation
beside docs/scale.md over a virtual clock.
"""

from __future__ import annotations

import math
from bisect import insort
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

A_WORKER = 16  # shards, about: few enough to be long, many enough to end together
TRIES = 3


@dataclass(frozen=True)
class Work:
    """One cell: the weights it needs, its data, its queries, and predicted seconds of a query."""

    group: str
    data: str
    gpus: int
    qids: Sequence[str]
    seconds: float


@dataclass(eq=False)
class Shard:
    """Queries of one dataset for cells that share an engine's weights.

    parts   what is not answered yet: qids by the number of their Work
    costs   predicted seconds of a query, by the same number
    """

    group: str
    gpus: int
    parts: dict[int, set[str]]
    costs: Mapping[int, float]
    failures: int = 0

    @property
    def queries(self) -> int:
        return sum(map(len, self.parts.values()))

    @property
    def seconds(self) -> float:
        """What is left of it."""
        return math.fsum(self.costs[number] * len(qids) for number, qids in self.parts.items())


@dataclass(eq=False)
class Hand:
    """A worker as the board sees it: its GPUs, the weights it has loaded, what it is at.

    room  queries it likes to have at a time
    """

    gpus: int
    room: int = 64
    group: str = ""
    shards: list[Shard] = field(default_factory=list)


def cut(works: Sequence[Work], workers: int) -> list[Shard]:
    """Shards of about equal predicted length, A_WORKER of them for each worker.

    Cells of one group over the same data stay together: they may share calls.
    """
    together: dict[tuple[str, str, int], list[int]] = defaultdict(list)
    for number, work in enumerate(works):
        together[work.group, work.data, work.gpus].append(number)
    target = sum(w.seconds * len(w.qids) for w in works) / (workers * A_WORKER)
    shards = []
    for (group, _, gpus), numbers in together.items():
        wanted = {n: set(works[n].qids) for n in numbers}
        costs = {n: works[n].seconds for n in numbers}
        qids = list(dict.fromkeys(qid for n in numbers for qid in works[n].qids))
        each = sum(costs.values())
        size = max(1, min(len(qids), math.floor(target / each))) if each else len(qids)
        for start in range(0, len(qids), size):
            block = set(qids[start : start + size])
            parts = {n: kept for n in numbers if (kept := block & wanted[n])}
            shards.append(Shard(group, gpus, parts, costs))
    return shards


class Board:
    """What waits and who holds what. A worker keeps to its weights while they have work."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.hands: dict[int, list[Hand]] = defaultdict(list)  # by GPUs
        self.again: list[Shard] = []  # failed before
        self.waiting: dict[tuple[int, str], list[Shard]] = defaultdict(list)  # the longest last
        self.left: dict[int, float] = defaultdict(float)  # seconds not answered, by GPUs
        for shard in shards:
            self._put(shard)

    def _put(self, shard: Shard) -> None:
        self.left[shard.gpus] += shard.seconds
        if shard.failures:
            self.again.append(shard)
        else:
            insort(self.waiting[shard.gpus, shard.group], shard, key=lambda s: s.seconds)

    def join(self, hand: Hand) -> None:
        self.hands[hand.gpus].append(hand)

    def leave(self, hand: Hand) -> None:
        """What it held has been given back."""
        if hand in self.hands[hand.gpus]:
            self.hands[hand.gpus].remove(hand)

    @property
    def waits(self) -> Counter[int]:
        """How many shards nobody holds, by the GPUs that they need."""
        counts = Counter(shard.gpus for shard in self.again)
        for (gpus, _), shards in self.waiting.items():
            counts[gpus] += len(shards)
        return +counts

    @property
    def open(self) -> list[Shard]:
        """Every shard that is not finished."""
        queued = [shard for shards in self.waiting.values() for shard in shards]
        held = [shard for hands in self.hands.values() for hand in hands for shard in hand.shards]
        return [*queued, *self.again, *held]

    def next(self, hand: Hand) -> Shard | None:
        """Take the next shard for a worker, the longest first; None if it had better wait.

        A busy worker gets more of its own weights, up to its room and its fair share of what is
        left, or half of that. One that failed before runs alone: the next failure is its own.
        """
        if not hand.shards:
            shard = self._repeated(hand) or self._longest(hand)
        elif hand.shards[0].failures:
            return None
        else:
            shard = self._more(hand)
        if shard is not None:
            hand.group = shard.group
            hand.shards.append(shard)
        return shard

    def _repeated(self, hand: Hand) -> Shard | None:
        fitting = [shard for shard in self.again if shard.gpus == hand.gpus]
        shard = max(fitting, key=lambda s: s.group == hand.group, default=None)
        if shard:
            self.again.remove(shard)
        return shard

    def _longest(self, hand: Hand) -> Shard | None:
        """Of its own weights, else of those with the most work for each worker that has them."""
        if own := self.waiting[hand.gpus, hand.group]:
            return own.pop()
        holders = Counter(other.group for other in self.hands[hand.gpus])
        needs = {
            group: math.fsum(shard.seconds for shard in shards) / (holders[group] + 1)
            for (gpus, group), shards in self.waiting.items()
            if shards and gpus == hand.gpus
        }
        return self.waiting[hand.gpus, max(needs, key=needs.__getitem__)].pop() if needs else None

    def _more(self, hand: Hand) -> Shard | None:
        own, queries = self.waiting[hand.gpus, hand.group], sum(s.queries for s in hand.shards)
        if not own or queries >= hand.room:
            return None
        share = self.left[hand.gpus] / len(self.hands[hand.gpus])
        if queries >= hand.room / 8:  # far from idle; what it holds nobody can help it with
            share /= 2
        mine = math.fsum(shard.seconds for shard in hand.shards)
        return own.pop() if mine + own[-1].seconds <= share else None

    def answered(self, hand: Hand, shard: Shard, number: int, qid: str) -> bool:
        """A query is done; True if it was the last of its shard."""
        shard.parts[number].remove(qid)
        self.left[shard.gpus] -= shard.costs[number]
        if any(shard.parts.values()):
            return False
        hand.shards.remove(shard)
        return True

    def give_back(self, hand: Hand, shard: Shard, *, failed: bool) -> bool:
        """A shard comes back unfinished; False when it has failed TRIES times and is dropped.

        The cells of one that failed are told apart: each of its parts is a shard of its own.
        """
        hand.shards.remove(shard)
        self.left[shard.gpus] -= shard.seconds
        shard.failures += failed
        if shard.failures >= TRIES:
            return False
        whole = {number: qids for number, qids in shard.parts.items() if qids}
        for parts in [{n: qids} for n, qids in whole.items()] if failed else [whole]:
            self._put(Shard(shard.group, shard.gpus, parts, shard.costs, shard.failures))
        return True

    def drop(self, number: int) -> None:
        """A cell has failed: nothing more of it is to run."""
        for shard in self.open:
            unanswered = shard.parts.pop(number, ())
            self.left[shard.gpus] -= len(unanswered) * shard.costs[number] if unanswered else 0.0
        held = (hand.shards for hands in self.hands.values() for hand in hands)
        for shards in (self.again, *self.waiting.values(), *held):
            shards[:] = [shard for shard in shards if shard.queries]
