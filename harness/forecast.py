"""What a matrix would cost, before anything starts: calls, tokens and GPU-hours of every cell.

Nothing is stored, downloaded or asked of an engine. A method that sorts is simulated with judges
that agree with the first stage in part; a GPU's hours come from a roofline over the assumptions in
registry/gpus.toml, without the time to load a model.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from random import Random
from statistics import mean
from types import SimpleNamespace
from typing import Any

from harness import cell as cells
from harness import flops, schedule, store
from harness.cache import Cache
from harness.engines.fake import FakeEngine
from harness.engines.wording import Wording
from harness.matrix import open_for
from harness.specs import data_root, read_toml
from harness.types import (
    Engine,
    EngineError,
    MissingPackageError,
    MissingResourceError,
    ModelSpec,
    Outcome,
    RegistryError,
    Request,
    Serving,
    UsageError,
)

NOT_HERE = (MissingPackageError, MissingResourceError, EngineError)
JUDGES = 2  # that every sort is simulated with; where they ask alike, the method fixes it
AGREEMENT = 0.58  # weight of the first stage in a judge's grades: they correlate with 0.5
COUNTED = 200  # prompts of a cell that are tokenised
TOKENS_PER_WORD = 1.4  # of English prompts with their labels, where there is no tokenizer
NUMBERS = ("queries", "calls", "rounds", "cached", "prompt_tokens", "generated_tokens")
HOURS = "_hours"
FEW, AT_ONCE, USUAL = 8, 256, "Qwen/Qwen2.5-7B-Instruct"  # of a rough prediction
GPUS = ("h200", "h100", "a100")


def facts(name: str) -> dict[str, Any]:
    """One of the registry's tables of figures and assumptions: gpus, answers."""
    return read_toml(data_root() / "registry" / f"{name}.toml")


def total(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The sums of a plan's numbers; None as soon as one of them is unknown."""
    sums: dict[str, Any] = dict.fromkeys(rows[0], "") | {"dataset": "total"}
    for key in (key for key in sums if key in NUMBERS or key.endswith(HOURS)):
        column = [row[key] for row in rows]
        sums[key] = None if None in column else sum(column)
    return sums


def check(rows: Sequence[dict[str, Any]], most: float) -> None:
    """Raise UsageError if a GPU would take more hours than `most`, or nobody knows how many."""
    for key, hours in total(rows).items():
        if key.endswith(HOURS) and (hours is None or hours > most):
            needed = "an unknown number of" if hours is None else f"about {hours:.3g}"
            gpu = key.removesuffix(HOURS)
            raise UsageError(f"this needs {needed} GPU-hours on {gpu}; --max-gpu-hours is {most:g}")


@dataclass(frozen=True)
class Forecaster:
    """Estimates jobs; `results` tell what is finished and how long a model's answers were."""

    cache: Cache
    results: Path
    serving: Serving
    gpus: Sequence[str]

    def row(self, job: cells.Job) -> dict[str, Any]:
        """One line of the plan. A `by` column says on whose word the number before it stands;
        tokens are those of all calls, hours of the calls that nothing answers yet."""
        engine, state = self._opened(job)
        words = wording(job.cell.model)
        runs = [self._simulated(job, engine, words, seed) for seed in range(JUDGES)]
        counts = [[len(o.calls) for o in run] for run in runs]
        calls, rounds = mean(map(sum, counts)), mean(sum(o.rounds for o in run) for run in runs)
        hits = mean(sum(c.from_cache for o in run for c in o.calls) for run in runs)
        asked = [call.request for o in runs[0] for call in o.calls]
        (prompt, prompt_by), (answer, answer_by) = _prompt(asked, words), self._answer(job, asked)
        shape = flops.known().get(job.cell.model.base)
        alive = 1 if job.alone else job.cell.protocol.concurrency or len(job.queries)
        load = (0 if state == "complete" else calls - hits, prompt, answer)
        at_once = alive * calls / max(rounds, 1)
        return {
            "dataset": job.cell.dataset_name,
            "model": job.cell.model_name,
            "state": state,
            "queries": len(job.queries),
            "calls": round(calls),
            "calls_by": "method" if all(c == counts[0] for c in counts) else "simulation",
            "rounds": round(rounds),
            "cached": round(hits) if state != "unknown" else None,
            "prompt_tokens": round(calls * prompt),
            "prompt_by": prompt_by,
            "generated_tokens": round(calls * answer),
            "generated_by": answer_by,
            **{gpu + HOURS: gpu_hours(shape, *load, at_once, gpu) for gpu in self.gpus},
        }

    def seconds(self, job: cells.Job) -> float:
        """Roughly, of one query on one GPU: enough to tell long cells from short ones."""
        few = job.queries[:FEW]
        sample = replace(job, collection=replace(job.collection, queries=few))
        asked = [c.request for o in self._simulated(sample, None, None, 0) for c in o.calls]
        load = len(asked), _prompt(asked, None)[0], self._answer(sample, asked)[0]
        known, spec = flops.known(), job.cell.model
        hours = gpu_hours(known.get(spec.base, known[USUAL]), *load, AT_ONCE, GPUS[0])
        if hours is None:  # its weights take several GPUs, which share the work
            hours = gpu_hours(known[USUAL], *load, AT_ONCE, GPUS[0])
        return 3600 * (hours or 0.0) / max(1, len(few))

    def _opened(self, job: cells.Job) -> tuple[Engine | None, str]:
        """The engine, unless something it needs is not here, and the cell's state."""
        try:
            engine = open_for(job, self.serving)
            return engine, store.state(self.results, job.cell, cells.key(job, engine))
        except NOT_HERE:
            return None, "unknown"

    def _simulated(
        self, job: cells.Job, engine: Engine | None, words: Wording | None, seed: int
    ) -> list[Outcome]:
        """The cell as a judge decides it where the cache has no answer."""
        chance, depth = Random(f"{seed}:{job.cell.dataset.name}"), job.cell.depth
        ranked = (pair for query in job.queries for pair in enumerate(query.candidates))
        grades = {c.docid: chance.random() - AGREEMENT * rank / depth for rank, c in ranked}
        judge = FakeEngine(job.cell.model, grade=lambda request, docid: grades[docid])
        tokens = words or (engine if self.serving.tokenizer else None) or judge
        judge.clip = tokens.clip  # type: ignore[method-assign]
        known = SimpleNamespace(get_many=self.cache.get_many, put_many=lambda answers: None)
        done = schedule.run(
            ((q.qid, cells.flow(job, q, judge, Counter())) for q in job.queries),
            judge,
            known,
            key=cells.identity(job.cell, engine or judge).key,
            concurrency=judge.capacity,
            read_cache=not job.alone,
        )
        return sorted(done, key=lambda outcome: outcome.qid)

    def _answer(self, job: cells.Job, asked: Sequence[Request]) -> tuple[float, str]:
        """Generated tokens of a call: from results, as published for the model, or assumed."""
        name, most = job.cell.model.name, max((r.max_tokens for r in asked), default=0)
        if job.prompt is None or not (most or any(r.exact_length_of for r in asked)):
            return 0.0, "method"
        past = [record["efficiency"] for record in self._past if record["model"]["name"] == name]
        if calls := sum(cost["calls"] or 0 for cost in past):
            return sum(cost["generated_tokens"] for cost in past) / calls, "earlier results"
        table = facts("answers")
        named = [row for row in table.values() if fnmatch(name, row.get("models", ""))]
        row = (*named, table[job.prompt.answer])[0]
        passages = mean(len(r.shown) for r in asked) if row.get("per_passage") else 1
        return min(row["tokens"] * passages, most or math.inf), row["basis"]

    @cached_property
    def _past(self) -> list[dict[str, Any]]:
        """Records of finished cells, without those of the fake engine."""
        found = store.iterate(self.results) if self.results.is_dir() else ()
        engines = ((dict(c.record), c.record["environment"].get("engine") or {}) for c in found)
        return [record for record, engine in engines if engine.get("engine") != "fake"]


def wording(spec: ModelSpec) -> Wording | None:
    """The model's own tokens, if its tokenizer lies on this machine already."""
    try:
        from huggingface_hub import try_to_load_from_cache as kept

        words = Wording(spec)
        base = words.base
        local = base.gguf or Path(base.path).is_dir()
        if local or kept(base.path, "tokenizer.json", revision=base.revision):
            return words if words.tokenizer else None
    except (ImportError, RegistryError, *NOT_HERE):
        pass
    return None


def _prompt(asked: Sequence[Request], words: Wording | None) -> tuple[float, str]:
    """Tokens of a prompt, counted on some of them; else its words times a usual ratio."""
    some = asked[:: max(1, len(asked) // COUNTED)]
    if not some:
        return 0.0, "method"
    if words:
        return mean(len(words.asked(0, r).row) for r in some), "tokenizer"
    texts = [" ".join([*(m.content for m in r.messages), r.text or ""]) for r in some]
    return mean(len(text.split()) for text in texts) * TOKENS_PER_WORD, "words"


def gpu_hours(
    shape: flops.Shape | None, calls: float, prompt: float, answer: float, together: float, gpu: str
) -> float | None:
    """Hours of one GPU; None without a shape, or if the weights in bfloat16 do not fit.

    Arithmetic at its share of the peak, then every decoding step's reading of weights and keys,
    then the engine's own time a step. prompt, answer: tokens of a call; together: most in flight.
    """
    table = facts("gpus")
    if gpu == "engine" or gpu not in table:
        raise RegistryError(f"unknown GPU {gpu!r}", known=table.keys() - {"engine"}, given=gpu)
    if not calls or shape is None:
        return None if calls else 0.0
    engine, board = table["engine"], table[gpu]
    weights, kept = 2 * (shape.weights + shape.head), 4 * shape.layers * shape.groups * shape.width
    room = board["memory"] * 1e9 * engine["memory_use"] - weights
    flight = min(together, room // (kept * (prompt + answer)), engine["sequences"])
    if flight < 1:
        return None
    steps = calls * answer / flight
    work = calls * flops.of_call(shape, prompt, answer) / (board["tflops"] * 1e12 * board["mfu"])
    read = steps * (weights + flight * kept * (prompt + answer / 2))
    reading = read / (board["bandwidth"] * 1e12 * engine["bandwidth_use"])
    own = (steps + calls * prompt / engine["step_tokens"]) * engine["step_seconds"]
    return float(work + reading + own) / 3600
