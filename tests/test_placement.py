"""Shards and workers: nothing lost, nothing twice, nobody idle beside work, whatever dies."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.cluster.placement import A_WORKER, TRIES, Board, Hand, Shard, Work, cut


def work(
    group: str = "g", data: str = "d", queries: int = 10, seconds: float = 1.0, gpus: int = 1
) -> Work:
    return Work(group, data, gpus, [f"q{n}" for n in range(queries)], seconds)


def shard(queries: int = 4, group: str = "g", *, gpus: int = 1, cells: int = 1) -> Shard:
    parts = {number: {f"q{n}" for n in range(queries)} for number in range(cells)}
    return Shard(group, gpus, parts, dict.fromkeys(range(cells), 1.0))


def joined(board: Board, *hands: Hand) -> Board:
    for hand in hands:
        board.join(hand)
    return board


def finish(board: Board, hand: Hand, held: Shard) -> None:
    asked = [(number, qid) for number, qids in held.parts.items() for qid in qids]
    assert [board.answered(hand, held, *one) for one in asked] == [False] * (len(asked) - 1) + [
        True
    ]


def left(board: Board) -> float:
    return sum(board.left.values())


# --- cutting ----------------------------------------------------------------------------------

works = st.lists(
    st.builds(
        work,
        group=st.sampled_from("ab"),
        data=st.sampled_from("xy"),
        queries=st.integers(1, 40),
        seconds=st.sampled_from([0.0, 0.1, 1.0, 30.0]),
        gpus=st.sampled_from([1, 2]),
    ),
    min_size=1,
    max_size=8,
)


@given(works=works, workers=st.integers(1, 50))
def test_every_query_of_every_cell_is_in_one_shard(works: list[Work], workers: int) -> None:
    shards = cut(works, workers)
    held = Counter((n, qid) for s in shards for n, qids in s.parts.items() for qid in qids)
    assert held == Counter((n, qid) for n, w in enumerate(works) for qid in w.qids)
    assert all(qids for s in shards for qids in s.parts.values())
    for one in shards:
        kinds = {(works[n].group, works[n].data, works[n].gpus) for n in one.parts}
        assert len(kinds) == 1
        assert one.seconds == pytest.approx(
            sum(works[n].seconds * len(q) for n, q in one.parts.items())
        )


def test_cells_on_the_same_weights_and_data_are_cut_together() -> None:
    shards = cut([work(), work(queries=6), work(data="other"), work(group="h"), work(gpus=2)], 1)
    assert {tuple(s.parts) for s in shards} == {(0, 1), (0,), (2,), (3,), (4,)}
    assert all(s.parts[1] <= s.parts[0] for s in shards if 1 in s.parts)


@pytest.mark.parametrize("workers", [1, 8, 64])
def test_a_worker_gets_about_so_many_shards_of_equal_length(workers: int) -> None:
    works = [work(f"g{n}", queries=4000, seconds=2**n / 8) for n in range(5)]
    shards = cut(works, workers)
    assert workers * A_WORKER <= len(shards) <= workers * A_WORKER * 1.2 + len(works)
    target = sum(w.seconds * 4000 for w in works) / (workers * A_WORKER)
    assert max(s.seconds for s in shards) <= target * 1.001


def test_a_query_longer_than_a_shard_is_one_and_cells_that_take_no_time_are_not_cut() -> None:
    shards = cut([work(queries=3, seconds=1000.0), work("free", queries=500, seconds=0.0)], 64)
    assert sorted(s.queries for s in shards) == [1, 1, 1, 500]
    assert [s.queries for s in cut([work(queries=9, seconds=0.0)], 4)] == [9]


# --- who gets what ----------------------------------------------------------------------------


def test_the_longest_shard_goes_first() -> None:
    board, lengths = Board([shard(n) for n in (3, 9, 1, 5)]), []
    joined(board, hand := Hand(1))
    while one := board.next(hand):
        lengths.append(one.queries)
        finish(board, hand, one)
    assert lengths == [9, 5, 3, 1]


def test_a_worker_keeps_its_weights_while_they_have_work() -> None:
    board = Board([shard(2), shard(2), shard(50, "other")])
    joined(board, hand := Hand(1, group="g"))
    groups = []
    while one := board.next(hand):
        groups.append(one.group)
        finish(board, hand, one)
    assert groups == ["g", "g", "other"]


def test_fresh_workers_spread_over_the_weights_by_what_these_need() -> None:
    board = Board([*(shard(1, "big") for _ in range(90)), *(shard(1, "small") for _ in range(30))])
    hands = [Hand(1) for _ in range(8)]
    joined(board, *hands)
    for hand in hands:
        board.next(hand)
    assert Counter(hand.group for hand in hands) == {"big": 6, "small": 2}


def test_a_busy_worker_takes_more_up_to_its_room() -> None:
    board = joined(Board([shard(4) for _ in range(20)]), hand := Hand(1, room=10))
    while board.next(hand):
        pass
    assert sum(one.queries for one in hand.shards) == 12  # two of four leave room for a third


def test_a_busy_worker_leaves_others_their_share_of_what_is_left() -> None:
    board = Board([shard(1) for _ in range(12)])
    hands = [Hand(1) for _ in range(4)]
    joined(board, *hands)
    for hand in hands:
        while board.next(hand):
            pass
    assert [len(hand.shards) for hand in hands] == [3, 3, 3, 3]
    assert not board.waits


def test_one_that_has_enough_at_hand_leaves_half_of_its_share() -> None:
    board = joined(Board([shard(10) for _ in range(16)]), hand := Hand(1, room=100), Hand(1))
    while board.next(hand):
        pass
    assert sum(one.seconds for one in hand.shards) == 40  # of 80 that are its share


def test_a_busy_worker_takes_no_other_weights() -> None:
    board = joined(Board([shard(9), shard(1, "other")]), hand := Hand(1))
    board.next(hand)
    assert board.next(hand) is None


def test_workers_of_other_sizes_take_nothing_from_each_other() -> None:
    board = Board([shard(gpus=2), shard(gpus=1)])
    joined(board, one := Hand(1), two := Hand(2))
    assert board.waits == {1: 1, 2: 1}
    assert [held.gpus for held in (board.next(one), board.next(two)) if held] == [1, 2]
    finish(board, one, one.shards[0])
    assert board.next(one) is None
    assert not board.waits


# --- faults -----------------------------------------------------------------------------------


def test_what_failed_runs_alone_and_with_its_cells_told_apart() -> None:
    board = joined(Board([shard(2, cells=2), shard(1), shard(1)]), hand := Hand(1))
    failing = board.next(hand)
    assert failing is not None
    assert board.give_back(hand, failing, failed=True)
    seen = []
    while one := board.next(hand):
        seen.append((tuple(one.parts), one.failures))
        if one.failures:
            assert board.next(hand) is None
        finish(board, hand, one)
    assert seen == [((0,), 1), ((1,), 1), ((0,), 0), ((0,), 0)]


def test_only_what_is_not_answered_comes_back() -> None:
    board = joined(Board([shard(2, cells=2)]), hand := Hand(1))
    held = board.next(hand)
    assert held is not None
    for qid in ("q0", "q1"):
        board.answered(hand, held, 0, qid)
    board.answered(hand, held, 1, "q0")
    assert board.give_back(hand, held, failed=True)
    assert [one.parts for one in board.open] == [{1: {"q1"}}]
    assert left(board) == pytest.approx(1)


def test_a_shard_that_failed_three_times_is_dropped() -> None:
    board = joined(Board([shard(2), shard(1)]), hand := Hand(1))
    kept = []
    for _ in range(TRIES):
        held = board.next(hand)
        assert held is not None
        kept.append(board.give_back(hand, held, failed=True))
    assert kept == [True, True, False]
    assert [one.queries for one in board.open] == [1]
    assert left(board) == pytest.approx(1)


def test_a_shard_of_a_node_that_left_has_not_failed() -> None:
    board = joined(Board([shard(3, cells=2)]), hand := Hand(1))
    for _ in range(2 * TRIES):
        held = board.next(hand)
        assert held is not None
        assert board.give_back(hand, held, failed=False)
    [one] = board.open
    assert (one.failures, sorted(one.parts)) == (0, [0, 1])


def test_a_dropped_cell_leaves_the_others_of_its_shards() -> None:
    board = joined(Board([shard(3, cells=2), shard(2), shard(4, "other")]), hand := Hand(1))
    board.next(hand)
    board.drop(0)
    assert {number for one in board.open for number in one.parts} == {1}
    assert left(board) == pytest.approx(sum(one.seconds for one in board.open)) == pytest.approx(3)


# --- all of it at once ------------------------------------------------------------------------


class Run:
    """A matrix, workers that come and go, and what has been answered, failed and dropped."""

    def __init__(self, works: list[Work], chance: Random) -> None:
        self.works, self.chance = works, chance
        self.board = Board(cut(works, chance.randint(1, 4)))
        self.hands: list[Hand] = []
        self.answers, self.dropped = Counter[tuple[int, str]](), set[int]()

    def join(self) -> None:
        hand = Hand(self.chance.choice([1, 2]), room=self.chance.choice([1, 20]))
        self.hands.append(hand)
        self.board.join(hand)

    def take(self, hand: Hand) -> None:
        taken = self.board.next(hand)
        if not hand.shards:
            assert hand.gpus not in self.board.waits
        elif taken:
            assert (hand.group, hand.gpus) == (taken.group, taken.gpus)
            assert len(hand.shards) == 1 or not any(one.failures for one in hand.shards)
            assert all(qids for qids in taken.parts.values())

    def answer(self, hand: Hand) -> None:
        held = self.chance.choice(hand.shards)
        number, qid = self.chance.choice(sorted((n, q) for n, qs in held.parts.items() for q in qs))
        self.answers[number, qid] += 1
        assert self.board.answered(hand, held, number, qid) == (held not in hand.shards)

    def fail(self, hand: Hand, failed: bool) -> None:
        for held in list(hand.shards):
            if held in hand.shards and not self.board.give_back(hand, held, failed=failed):
                for number in held.parts:
                    self.dropped.add(number)
                    self.board.drop(number)

    def leave(self, hand: Hand, failed: bool) -> None:
        self.fail(hand, failed)
        self.board.leave(hand)
        self.hands.remove(hand)

    def step(self) -> None:
        done = self.chance.random()
        hand = self.chance.choice(self.hands) if self.hands else None
        if hand is None or done < 0.05:
            self.join()
        elif not hand.shards:
            self.take(hand)
        elif done < 0.1:
            self.fail(hand, failed=True)
        elif done < 0.15:
            self.leave(hand, failed=self.chance.random() < 0.5)
        elif done < 0.3:
            self.take(hand)
        else:
            self.answer(hand)

    def drain(self) -> None:
        """Healthy workers of every size do what is left."""
        for hand in list(self.hands):
            self.leave(hand, failed=False)
        for gpus in (1, 2):
            hand = Hand(gpus, room=3)
            self.board.join(hand)
            self.take(hand)
            while hand.shards:
                self.answer(hand)
                self.take(hand)


@given(works=works, seed=st.integers(0, 10**6), steps=st.integers(0, 300))
def test_whatever_dies_every_query_is_answered_once_or_its_cell_dropped(
    works: list[Work], seed: int, steps: int
) -> None:
    run = Run(works, Random(seed))
    for _ in range(steps):
        run.step()
    run.drain()
    wanted = {(n, qid) for n, w in enumerate(works) for qid in w.qids if n not in run.dropped}
    kept = Counter({one: count for one, count in run.answers.items() if one[0] not in run.dropped})
    assert kept == Counter(wanted)
    assert run.board.open == []
    assert left(run.board) == pytest.approx(0, abs=1e-6)
