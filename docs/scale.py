"""The whole matrix on many GPUs, on a virtual clock: python docs/scale.py [GPUS...] [--gpu h100]

Shards are cut and handed out by harness/cluster/placement itself, and calls, tokens and a GPU's
speed are harness/forecast's. What else is assumed stands in docs/scale.md. Nothing is asked of an
engine and no data is read: texts are of the lengths that were published for each collection.
"""

from __future__ import annotations

import argparse
import heapq
import math
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from random import Random

import numpy as np

from harness import cell as cells
from harness import flops
from harness.cache import Cache
from harness.cluster.placement import Board, Hand, Shard, Work, cut
from harness.data import Collection
from harness.forecast import TOKENS_PER_WORD, Forecaster, gpu_hours
from harness.specs import Registry, limits_for
from harness.types import Candidate, Cell, DatasetSpec, ModelSpec, Protocol, Query, Serving

SAMPLE = 4  # queries that a method is simulated with
ROOM = 384  # queries that a worker with vLLM on a GPU likes to have
LOAD, LOAD_A_GB = 30.0, 1.0  # seconds to start an engine; to read a gigabyte of weights
SPLIT = 0.68 ** (1 / 2)  # of the speed that remains whenever a model is split in two again
FEWEST = 8  # calls in flight that a worker must have memory for
MISTAKE = 0.3  # deviation of a cell's true cost from what was predicted, of its logarithm
ANSWERS, SORTS = 0.4, 0.1  # deviations of an answer's length, and of a query's number of calls
BUNDLES = 8  # of queries of one length that a cell's part of a shard is simulated in
BIN = 60.0  # seconds over which a rate is averaged

# Words of a query and of a passage. BEIR: arXiv 2104.08663, Table 1.
WORDS = {
    "dl": (6, 56), "bright": (120, 180), "bright-long": (120, 2000), "other": (15, 60),
    "beir/msmarco": (6, 56), "beir/trec-covid": (11, 161), "beir/nfcorpus": (3, 232),
    "beir/bioasq": (8, 203), "beir/nq": (9, 79), "beir/hotpotqa": (18, 46), "beir/fiqa": (11, 132),
    "beir/signal1m": (9, 14), "beir/trec-news": (11, 635), "beir/robust04": (15, 466),
    "beir/arguana": (193, 167), "beir/webis-touche2020": (7, 292), "beir/cqadupstack": (9, 129),
    "beir/quora": (10, 11), "beir/dbpedia-entity": (5, 50), "beir/scidocs": (9, 176),
    "beir/fever": (8, 85), "beir/climate-fever": (20, 85), "beir/scifact": (12, 214),
}  # fmt: skip


# --- what the calls of a cell cost ------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """Calls of a query of one cell, and what one of them takes of a worker's time.

    beside  calls of one query that are in flight together       steps  of decoding in one round
    A call takes `own` seconds of the worker, and `shared` over the calls in flight, of which
    `most` fit.
    """

    calls: float
    rounds: float
    steps: float
    own: float
    shared: float
    most: float

    @property
    def beside(self) -> float:
        return self.calls / self.rounds

    def call(self, flight: float) -> float:
        return self.own + self.shared / max(1.0, min(flight, self.most))

    @property
    def best(self) -> float:
        """Seconds of a query on a worker that is full."""
        return self.calls * self.call(math.inf)

    @property
    def chain(self) -> float:
        """Seconds of a query that is alone: its rounds wait for each other."""
        return self.calls * self.call(self.beside)


@cache
def cost(shape: flops.Shape, gpus: int, asked: Asked, prompt: float, gpu: str) -> Cost | None:
    """From three values of gpu_hours, which is linear in one over the calls in flight.

    A model on several GPUs is one of a part of its layers on each; `gpus` of them share a call.
    """
    part = replace(shape, layers=shape.layers // gpus, vocabulary=shape.vocabulary // gpus)
    at = [gpu_hours(part, 1, prompt, asked.answer, flight, gpu) for flight in (1, 2, math.inf)]
    slower = 3600 / SPLIT ** math.log2(gpus)
    one, two, full = (hours * slower if hours else 0.0 for hours in at)
    if not one:
        return None
    own, shared = 2 * two - one, 2 * (one - two)
    most = shared / (full - own) if shared > 1e-12 else math.inf
    return Cost(asked.calls, asked.rounds, max(1.0, asked.answer), own, shared, most)


@dataclass(frozen=True)
class Asked:
    """What `harness plan` says of a method on lists of one depth: of a query, and of a call."""

    calls: float
    rounds: float
    answer: float
    prompt: float  # tokens besides the texts
    queries: float  # how often the query stands in a prompt
    passages: float


def asked(forecaster: Forecaster, registry: Registry, model: ModelSpec, depth: int) -> Asked:
    """From plans of three short texts: what a longer query adds, and longer passages."""

    def row(query: int, passage: int) -> dict[str, float]:
        few = []
        for n in range(SAMPLE):
            texts = [f"{n}-{i}" + " word" * (passage - 1) for i in range(depth)]  # no two alike
            shown = tuple(Candidate(text.split()[0], text) for text in texts)
            few.append(Query(f"{n}", "word " * query, shown, "scale"))
        data = Collection(tuple(few), {}, "bm25", "", "", {}, has_texts=True)
        cell = Cell(model, DatasetSpec("scale", "irds"), "bm25", depth, None, Protocol())
        return forecaster.row(cells.resolve(cell, registry.prompt(model.prompt), data))

    base, longer, wider = row(1, 1), row(11, 1), row(1, 11)
    calls = base["calls"]
    one, q, p = (r["prompt_tokens"] / TOKENS_PER_WORD / calls for r in (base, longer, wider))
    rates = (calls / SAMPLE, base["rounds"] / SAMPLE, base["generated_tokens"] / calls)
    passages = (p - one) / 10
    queries = (q - one) / 10
    return Asked(*rates, one * TOKENS_PER_WORD - queries - passages, queries, passages)


def words(dataset: DatasetSpec) -> tuple[int, int]:
    name = dataset.name.partition("-")[0] if "cqadupstack" in dataset.name else dataset.name
    kind = "bright-long" if dataset.suite == "bright-long" else dataset.family
    return WORDS.get(name) or WORDS[kind]


class Matrix:
    """Every plain row of the registry that a GPU answers, on every dataset."""

    def __init__(self, gpu: str) -> None:
        self.gpu, registry = gpu, Registry()
        forecaster = Forecaster(Cache(None), Path("nowhere"), Serving(), ())
        models = registry.models.items()
        self.models = [m for name, m in models if m.engine == "vllm" and "@" not in name]
        self.shapes = {m.base: flops.known()[m.base] for m in self.models}
        self.limits = {m.name: limits_for(m, registry.prompt(m.prompt)) for m in self.models}
        datasets = list(registry.datasets.values())
        depths = {dataset.depth for dataset in datasets}
        pairs = [(model, depth) for model in self.models for depth in depths]
        self.asked = {(m.name, n): asked(forecaster, registry, m, n) for m, n in pairs}
        self.gpus = {m.name: self._gpus(m, datasets) for m in self.models}
        self.cells = [(m, d) for m in self.models for d in datasets]
        self.costs = [self.cost(m, d, self.gpus[m.name]) for m, d in self.cells]

    def _gpus(self, model: ModelSpec, datasets: Sequence[DatasetSpec]) -> int:
        """The fewest that have room for some calls of every dataset."""
        for gpus in (1, 2, 4):
            costs = [self.cost(model, dataset, gpus) for dataset in datasets]
            if all(one and one.most >= FEWEST for one in costs):
                return gpus
        return 8

    def cost(self, model: ModelSpec, dataset: DatasetSpec, gpus: int) -> Cost | None:
        known, limits = self.asked[model.name, dataset.depth], self.limits[model.name]
        unit = TOKENS_PER_WORD if limits.unit == "words" else 1
        prompt = known.prompt
        for what, times, count in zip(
            ("query", "passage"), (known.queries, known.passages), words(dataset)
        ):
            most = (limits.of(what, dataset.family) or math.inf) * unit
            prompt += times * min(count * TOKENS_PER_WORD, most)
        prompt = min(prompt, (limits.context or model.context or math.inf) - known.answer)
        return cost(self.shapes[model.base], gpus, known, prompt, self.gpu)

    def works(self) -> Iterator[Work]:
        """As the driver sees them: costs are predicted, on an H200."""
        for (model, dataset), known in zip(self.cells, self.costs):
            group = f"{model.base} {model.dtype.replace('auto', 'bfloat16')} {model.context}"
            qids = [f"q{n}" for n in range(dataset.queries or 0)]
            yield Work(group, dataset.name, self.gpus[model.name], qids, known.best)


# --- the farm on its clock --------------------------------------------------------------------


@dataclass
class Bundle:
    """Queries of one part of a shard that take equally long, and when they began."""

    shard: Shard
    number: int
    qids: list[str]
    length: float  # in steps of decoding
    begun: float = 0.0


@dataclass(eq=False)
class Worker:
    """One engine. `virtual` counts its steps of decoding; every query alive advances with them."""

    hand: Hand
    number: int
    loaded: str = ""
    ready: float = 0.0  # when its weights are there
    now: float = 0.0
    virtual: float = 0.0
    step: float = math.inf  # seconds
    calls: float = 0.0  # answered a second
    queued: deque[Bundle] = field(default_factory=deque)
    alive: list[tuple[float, int, Bundle]] = field(default_factory=list)
    counts: Counter[int] = field(default_factory=Counter)


class Rate:
    """Events a second over time, from pieces in which they came evenly."""

    def __init__(self) -> None:
        self.total, self.bins = 0.0, np.zeros(1 << 12)

    def add(self, start: float, end: float, count: float) -> None:
        first, last = int(start / BIN), int(end / BIN)
        while last >= len(self.bins):
            self.bins = np.concatenate([self.bins, np.zeros_like(self.bins)])
        self.total += count
        if first == last or end == start:
            self.bins[last] += count
            return
        each = count / (end - start)
        self.bins[first] += each * ((first + 1) * BIN - start)
        self.bins[first + 1 : last] += each * BIN
        self.bins[last] += each * (end - last * BIN)

    @property
    def peak(self) -> float:
        return float(self.bins.max() / BIN)


class Farm:
    """So many GPUs at work on the matrix."""

    def __init__(self, matrix: Matrix, gpus: int, seed: int = 0) -> None:
        self.matrix, self.gpus, self.free, self.chance = matrix, gpus, gpus, Random(seed)
        self.works = [w for w in matrix.works() if w.gpus <= gpus]
        self.costs = [c for c, w in zip(matrix.costs, matrix.works()) if w.gpus <= gpus]
        slow = [math.exp(self.chance.gauss(0, MISTAKE)) for _ in self.works]
        self.true = [
            replace(c, own=c.own * s, shared=c.shared * s) for c, s in zip(self.costs, slow)
        ]
        shards = cut(self.works, gpus)
        self.shards, self.longest = len(shards), max(c.chain for c in self.true)
        self.board = Board(shards)
        self.events: list[tuple[float, int, int]] = []
        self.workers: dict[int, Worker] = {}
        self.hired = self.bundles = self.loads = 0
        self.loading = self.held = self.end = 0.0  # GPU-seconds, GPU-seconds, seconds
        self.completions, self.messages = Rate(), Rate()

    def run(self) -> Farm:
        self.look(0.0)
        while self.events:
            now, _, number = heapq.heappop(self.events)
            worker = self.workers.get(number)
            if worker and worker.hand.shards and self.due(worker) <= now + 1e-9:
                self.advance(worker, now)
                self.feed(worker, now)
                if not worker.hand.shards:
                    self.look(now)
        assert not self.board.open
        return self

    def look(self, now: float) -> None:
        """Let go who can do nothing more, and hire as the driver does."""
        waits = self.board.waits
        for worker in [w for w in self.workers.values() if not w.hand.shards]:
            if worker.hand.gpus not in waits:
                self.board.leave(worker.hand)
                del self.workers[worker.number]
                self.free += worker.hand.gpus
        fresh = []
        for gpus in sorted(waits, reverse=True):
            for _ in range(min(self.free // gpus, waits[gpus])):
                self.hired, self.free = self.hired + 1, self.free - gpus
                fresh.append(Worker(Hand(gpus, ROOM), self.hired, now=now))
                self.board.join(fresh[-1].hand)
        for worker in fresh:
            self.workers[worker.number] = worker
            self.feed(worker, now)

    def feed(self, worker: Worker, now: float) -> None:
        while shard := self.board.next(worker.hand):
            if shard.group != worker.loaded:
                worker.loaded, seconds = shard.group, self.load(shard)
                worker.ready = now + seconds
                self.loads, self.loading = self.loads + 1, self.loading + seconds * shard.gpus
            for number, qids in shard.parts.items():
                worker.queued.extend(self.bundled(shard, number, sorted(qids)))
        self.admit(worker)
        if worker.alive:
            heapq.heappush(self.events, (self.due(worker), self.hired, worker.number))

    def load(self, shard: Shard) -> float:
        shape = self.matrix.shapes[shard.group.partition(" ")[0]]
        return LOAD + LOAD_A_GB * 2 * (shape.weights + shape.head) / 1e9

    def bundled(self, shard: Shard, number: int, qids: Sequence[str]) -> Iterator[Bundle]:
        known = self.true[number]
        size = min(32, math.ceil(len(qids) / BUNDLES))
        spread = math.hypot(ANSWERS / math.sqrt(known.rounds), SORTS)
        for start in range(0, len(qids), size):
            length = math.exp(self.chance.gauss(-(spread**2) / 2, spread))
            steps = known.rounds * known.steps * length
            yield Bundle(shard, number, list(qids[start : start + size]), steps)

    def admit(self, worker: Worker) -> None:
        """Fill the worker's places, then say how long a step takes with these queries in flight."""
        held = sum(worker.counts.values())
        while worker.queued and (held < ROOM or not held):
            bundle = worker.queued.popleft()
            self.bundles += 1
            bundle.begun = max(worker.now, worker.ready)
            heapq.heappush(worker.alive, (worker.virtual + bundle.length, self.bundles, bundle))
            worker.counts[bundle.number] += len(bundle.qids)
            held += len(bundle.qids)
        kinds = [(self.true[n], count) for n, count in worker.counts.items() if count]
        flight = sum(known.beside * count for known, count in kinds)
        steps = [(known, known.beside * count / known.steps) for known, count in kinds]
        worker.step = math.fsum(rate * known.call(flight) for known, rate in steps)
        worker.calls = sum(rate for _, rate in steps) / worker.step if steps else 0.0

    def due(self, worker: Worker) -> float:
        """When the next queries of a worker end."""
        return max(worker.now, worker.ready) + (worker.alive[0][0] - worker.virtual) * worker.step

    def advance(self, worker: Worker, now: float) -> None:
        begun = max(worker.now, worker.ready)
        steps = (now - begun) / worker.step
        self.messages.add(begun, now, (now - begun) * min(worker.calls, 1 / worker.step))
        self.held += (now - worker.now) * worker.hand.gpus
        worker.now, worker.virtual = now, worker.virtual + steps
        while worker.alive and worker.alive[0][0] <= worker.virtual * (1 + 1e-9):
            _, _, bundle = heapq.heappop(worker.alive)
            worker.counts[bundle.number] -= len(bundle.qids)
            calls = self.true[bundle.number].calls * len(bundle.qids)
            self.completions.add(bundle.begun, now, calls)
            for qid in bundle.qids:
                self.board.answered(worker.hand, bundle.shard, bundle.number, qid)
        if not worker.alive and not worker.queued:
            self.last = bundle
        self.end = max(self.end, now)

    # --- what came of it

    @property
    def work(self) -> float:
        """GPU-seconds that the calls take on GPUs that are always full."""
        return math.fsum(c.best * len(w.qids) * w.gpus for c, w in zip(self.true, self.works))

    def row(self) -> list[str]:
        whole = self.end * self.gpus
        shares = (self.loading, self.held - self.loading - self.work, whole - self.held)
        last = self.matrix.cells[self.last.number]
        return [
            f"{self.gpus}",
            f"{self.shards:,}",
            spell(self.end),
            spell(self.work / self.gpus),
            *(f"{max(share, 0.0) / whole:.1%}" for share in (whole - self.work, *shares)),
            f"{self.loads:,}",
            f"{self.completions.total / self.end:,.0f}",
            f"{self.completions.peak:,.0f}",
            f"{self.messages.peak:,.0f}",
            f"{last[0].name} on {last[1].name}",
        ]


HEAD = (
    "GPUs", "shards", "makespan", "if never idle", "idle", "loading", "not full", "nothing to take",
    "loads", "answers/s", "at most", "messages/s at most", "last to end",
)  # fmt: skip


def spell(seconds: float) -> str:
    return f"{seconds / 86400:.1f} d" if seconds > 3 * 86400 else f"{seconds / 3600:.2f} h"


def markdown(head: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [list(head), ["---:"] * len(HEAD), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gpus", nargs="*", type=int, default=[1, 8, 64, 512])
    parser.add_argument("--gpu", default="h200", help="a board of registry/gpus.toml")
    asked = parser.parse_args(words)

    matrix = Matrix(asked.gpu)

    print(markdown(HEAD, [Farm(matrix, gpus).run().row() for gpus in asked.gpus]))


if __name__ == "__main__":
    main()
