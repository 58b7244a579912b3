"""The regression gate: committed cells against the code of today, and against fresh cells.

Exact gates put a cell's stored answers to its method again, without an engine: prompts, plan,
parsing, ranking and results must come out as they were. Statistical gates compare a fresh cell
query by query. What cannot be decided is said to be so and never passes. It prints nothing.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from operator import itemgetter
from typing import Any, Literal

from harness import cell as cells
from harness import env, plan, stats, store
from harness.cache import Identity
from harness.data.formats import read_run, write_run
from harness.engines import open_engine
from harness.types import (
    Call,
    CellResult,
    Completion,
    DataError,
    HarnessError,
    MissingResourceError,
    Outcome,
    Query,
    Ranking,
)

Verdict = Literal["pass", "fail", "inconclusive", "not checked"]
VERDICTS: tuple[Verdict, ...] = ("fail", "inconclusive", "pass", "not checked")
CODE, EQUAL = "this code", "equal"
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Gate:
    """One question about a cell; queries: those where it went wrong, the worst first."""

    what: str
    value: str
    limit: str
    verdict: Verdict
    queries: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Check:
    """The gates of one baseline cell against something else.

    other   what it was held against: CODE, or the folder of a fresh cell
    why     the settings, data and versions in which the two differ, as `key: old -> new`
    """

    base: CellResult
    other: str
    gates: tuple[Gate, ...]
    why: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Limits:
    """What a fresh cell may lose: measure units, shares of the baseline's cost, share of calls."""

    margin: float = 0.01
    tokens: float = 0.10
    latency: float = 0.20
    faults: float = 0.005


def overall(gates: Iterable[Gate]) -> Verdict:
    """One failure fails all; what was not checked counts only where nothing was."""
    return min((gate.verdict for gate in gates), key=VERDICTS.index, default="not checked")


def _equal(what: str, value: str, same: bool, wrong: Iterable[str] = ()) -> Gate:
    return Gate(what, value, EQUAL, "pass" if same else "fail", tuple(wrong))


# --- what differs between two records ---------------------------------------------------------

SETTINGS = ("prompt", "model", "depth", "limit", "protocol")  # what a user decides
SECTIONS = (*SETTINGS, "first_stage", "dataset", "environment")
REMARKS = re.compile(  # names and facts that decide neither an answer nor its cost
    r"prompt\.(name|source|note)|environment\.(platform|serving\.load_seconds)"
    r"|dataset\.(?!name|family|sha256|measures)"
    r"|model\.(name|parameters|license|trained_on|paper|source|differs|note|overrides)"
)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """`section.key: old -> new` for all in two records that can decide a result or its cost.

    A key that only one version of the record's format has says nothing; in a table that a user
    fills, such as model.sampling, it does.
    """
    before, after = _values(old), _values(new)
    told = []
    for path in {**before, **after}:
        pair, table = (before.get(path), after.get(path)), path.rpartition(".")[0]
        free = table.count(".") and table in before and table in after
        if pair[0] != pair[1] and (free or None not in pair):
            told.append(f"{path}: {_part(*pair)} -> {_part(*pair[::-1])}")
    return sorted(told, key=lambda text: SECTIONS.index(re.split(r"\W", text, maxsplit=1)[0]))


def _values(record: Mapping[str, Any]) -> dict[str, str]:
    """JSON by dotted path; a table as such, and all that is in it."""
    out: dict[str, str] = {}
    waiting = [(section, record.get(section)) for section in SECTIONS]
    for path, value in waiting:
        if isinstance(value, Mapping):
            waiting += [(f"{path}.{name}", below) for name, below in value.items()]
        if not REMARKS.match(path):
            out[path] = "{}" if isinstance(value, Mapping) else json.dumps(value)
    return out


def _part(text: str | None, other: str | None, width: int = 60) -> str:
    """Of a long text the part where it departs from the other."""
    if text is None or len(text) <= width:
        return text or "nothing"
    same = next((i for i, (a, b) in enumerate(zip(text, other or "")) if a != b), 0)
    start = max(0, same - 20)
    return "..." * (start > 0) + text[start : start + width] + "..."


# --- exact gates ------------------------------------------------------------------------------

# What the lines of a trace say about each of these; the faults are in per_query.csv as well.
CALLS = {"prompts": ("key",), "plan": ("round", "docids"), "parsing": ("order", "score")}


def stored_calls(cell: CellResult) -> dict[str, list[Row]]:
    """A cell's calls by query, in the order of asking. Raises DataError for a damaged trace."""
    out: dict[str, list[Row]] = defaultdict(list)
    try:
        for row in store.read_trace(cell.folder):
            itemgetter("key", "round", "docids", "order", "score", "faults")(row)  # all are there
            tokens = {"output_tokens": row["generated_tokens"], "scores": tuple(row["scores"])}
            answer = Completion(row["text"], row["finish"], row["prompt_tokens"], **tokens)
            out[row["qid"]].append(row | {"answer": answer})
    except (OSError, EOFError, zlib.error, KeyError, TypeError, ValueError) as error:
        path = cell.folder / "trace.jsonl.gz"
        raise DataError(f"is no whole trace: {type(error).__name__} {error}", path=path) from error
    return out


def replay(base: CellResult, loader: plan.Loader, read: Callable[[str], plan.Selection]) -> Check:
    """The exact gates of a cell; one whose data is not at hand is not checked.

    read   turns the command in the cell's record into what it asks for
    """
    try:
        if base.record.get("state") != "complete" or "imported" in base.record:
            raise MissingResourceError("no complete cell with its calls")
        asked = read(base.record.get("command") or "")
        made = plan.cells_of(loader.registry, asked)
        if len(made) > 1:
            raise DataError(f"its command makes {len(made)} cells", path=base.folder)
        job = loader.job(made[0], asked.first_stage)
        environment = {**base.record["environment"], **env.environment()}
        today = cells.record_head(job, "", "") | {"environment": environment}
        why = differences(base.record, today)
        return Check(base, CODE, tuple(exact(base, job, why)), tuple(why))
    except HarnessError as error:
        missing = error.exit_code in (3, 4)  # a package or a file
        gate = Gate("replay", str(error), EQUAL, "not checked" if missing else "fail")
        return Check(base, CODE, (gate,))


class _Clip:
    """Cuts texts as the engine would, if the tokenizer can be had."""

    def __init__(self, job: cells.Job) -> None:
        plain = replace(job.cell.model, adapter="", quantization="")  # no weights are wanted
        self.open, self.missing = cache(lambda: open_engine("hf", plain)), ""

    def clip(self, text: str, tokens: int) -> str:
        try:
            return text if self.missing else self.open().clip(text, tokens)
        except HarnessError as error:
            self.missing = str(error)
            return text


def exact(base: CellResult, job: cells.Job, why: Sequence[str]) -> Iterator[Gate]:
    """Data and settings must be as recorded, and the stored answers lead where they led."""
    for name in ("run.trec", *["trace.jsonl.gz"] * job.needs_engine):
        if not (base.folder / name).is_file():
            raise MissingResourceError(f"{base.folder / name}: is not there")
    calls, tools = stored_calls(base), _Clip(job)
    sha, changed = job.collection.sha256, [text for text in why if text.startswith(SETTINGS)]
    yield _equal("data", f"sha256 {sha[:12]}", sha == base.record["dataset"]["sha256"])
    yield _equal("settings", f"{len(changed)} changed", not changed)
    protocol, engine = base.record["protocol"], base.record["environment"].get("engine")
    if protocol.get("strict_cache"):
        tools.missing = "the keys of --strict-cache hold versions and hardware"
    identity = Identity(engine or {}, protocol.get("replicate", 0))
    wrong, outcomes = {what: list[str]() for what in CALLS}, list[Outcome]()
    for query in job.queries:
        outcome, then = _again(job, query, tools, calls[query.qid], identity), calls[query.qid]
        now = list(cells.trace_rows([outcome]))
        parted = len(now) < len(then) or len(outcome.ranking.docids) < len(query.candidates)
        for what, names in CALLS.items():
            differs = any(x[name] != y[name] for x, y in zip(now, then) for name in names)
            if differs or (parted and what == "plan"):
                wrong[what].append(query.qid)
        outcomes.append(outcome)
    for what, found in wrong.items() if job.needs_engine else ():
        gate = _equal(what, _of(job, found), not found, found)
        missing = what == "prompts" and tools.missing
        yield Gate(what, tools.missing, EQUAL, "inconclusive") if missing else gate
    for what, found in _other_results(base, job, outcomes).items():
        yield _equal(what, _of(job, found), not found, found)


def _of(job: cells.Job, wrong: Sequence[str]) -> str:
    return f"{len(job.queries) - len(wrong)} of {len(job.queries)} queries"


def _again(
    job: cells.Job, query: Query, tools: Any, rows: Sequence[Row], identity: Identity
) -> Outcome:
    """Put the stored answers to a method again.

    Where it asks about other documents than were answered, its calls end and nothing is ranked.
    """
    flow = cells.flow(job, query, tools, Counter())
    asked, rounds, answers = list[tuple[int, Any]](), 0, None
    try:
        while True:
            requests = flow.send(answers)  # type: ignore[arg-type]
            part, rounds = rows[len(asked) : len(asked) + len(requests)], rounds + 1
            if [row["docids"] for row in part] != [[*r.shown] for r in requests]:
                break
            asked += [(rounds, request) for request in requests]
            answers = [row["answer"] for row in part]
        flow.close()
        assert job.prompt is not None
        read = (job.prompt.parse(row["answer"], len(row["docids"])) for row in rows)
        ranking = Ranking((), tuple(read))
    except StopIteration as stop:
        ranking = stop.value
    calls = (
        Call(number, identity.key(request).hex(), request, row["answer"], parsed, False)
        for (number, request), row, parsed in zip(asked, rows, ranking.parsed)
    )
    return Outcome(query.qid, ranking, tuple(calls), rounds)


def _other_results(
    base: CellResult, job: cells.Job, outcomes: Sequence[Outcome]
) -> dict[str, list[str]]:
    """Queries whose lines differ in run.trec, and (but for times) in per_query.csv."""
    scores, then = cells.measured(job, outcomes), (base.folder / "run.trec").read_text("utf-8")
    now = write_run({o.qid: zip(o.ranking.docids, o.ranking.scores) for o in outcomes})
    moved = {line.partition(" ")[0] for line in {*now.splitlines()} ^ {*then.splitlines()}}
    rows = {o.qid: cells.per_query_row(q, o, scores) for q, o in zip(job.queries, outcomes)}
    changed = [
        row["qid"]
        for row in base.per_query
        if any(rows.get(row["qid"], {}).get(k) != v for k, v in row.items() if "seconds" not in k)
    ]
    return {"ranking": sorted(moved), "results": changed}


# --- a fresh cell -----------------------------------------------------------------------------

Values = dict[str, tuple[float, float]]  # by query: new, old
Asked = dict[tuple[Any, ...], Row]  # by query, documents, and how often they were shown before
TWO_RUNS = 2.33  # 1.645 x the root of 2: one pair of runs in twenty is worse by so many sd
UNREAD = {"unparsable", "missing", "duplicate", "out_of_range", "refused", "too_long"}


def place_of(cell: CellResult) -> tuple[str, str, str]:
    """What repeated runs have in common: dataset without its limit, first stage, model."""
    model = re.sub(r"\+replicate=\d+", "", cell.model)
    return str(cell.record["dataset"]["name"]), cell.first_stage, model


def against(base: CellResult, fresh: CellResult, limits: Limits) -> Check:
    """The statistical gates, over the queries of the fresh cell."""
    partly = fresh.record["limit"] != base.record["limit"]  # fewer queries have other hashes
    hidden = ("limit:", "dataset.sha256:", "first_stage.sha256:") if partly else ()
    why = [d for d in differences(base.record, fresh.record) if not d.startswith(hidden)]
    changed = [text for text in why if text.startswith("prompt.")]
    prompt = _equal("prompt", f"{len(changed)} changed", not changed)
    gates = (prompt, *_compared(base, fresh, limits))
    return Check(base, str(fresh.folder), gates, tuple(why))


def statistical(
    bases: Sequence[CellResult],
    results: Iterable[CellResult],
    limits: Limits,
    repeats: Iterable[CellResult] = (),
) -> Iterator[Check]:
    """Every baseline against its fresh cell, the one with most queries.

    repeats   runs of the same cells: their differences by chance widen the margin
    """
    own = {base.folder.resolve() for base in bases}
    known = sorted(results, key=lambda cell: cell.record.get("queries", 0))  # none of a failed one
    fresh = {place_of(cell): cell for cell in known if cell.folder.resolve() not in own}
    chance = {tuple(row.values())[:4]: row["sd"] for row in noise(repeats)}
    for base in bases:
        what = (*place_of(base), next(iter(base.measures), ""))
        margin = max(limits.margin, TWO_RUNS * chance.get(what, 0.0))  # nan is not more
        found = fresh.get(place_of(base))
        if found and found.record.get("state") == "complete" and base.measures:
            yield against(base, found, replace(limits, margin=margin))
        else:
            verdict: Verdict = "inconclusive" if found else "not checked"
            state = str(found.record.get("state")) if found else "none"
            yield Check(base, "fresh cells", (Gate("fresh cell", state, "complete", verdict),))


def _compared(base: CellResult, fresh: CellResult, limits: Limits) -> Iterator[Gate]:
    old, new = _rankings(base), _rankings(fresh)
    expected = new if fresh.record["limit"] else {**old, **new}
    other = [q for q in expected if sorted(new.get(q, ())) != sorted(old.get(q, ()))]
    value = f"{len(expected) - len(other)} of {len(expected)} queries"
    yield Gate("candidates", value, EQUAL, "inconclusive" if other else "pass", tuple(other))
    if other:
        return
    for measure in [name for name in base.measures if name in fresh.measures][:1]:
        yield _not_worse(measure, values(fresh, base, measure), limits.margin)
    before, after = _asked(base, new), _asked(fresh, new)
    if not (before and after):
        return
    alike = sum(_read(row) == _read(before.get(call)) for call, row in after.items())
    tops = sum(old[qid][:10] == new[qid][:10] for qid in new)
    value = f"{alike} of {len(after)} calls, {tops} of {len(new)} top tens"
    yield Gate("same decisions", value, "none", "pass")
    for column in ("prompt_tokens", "generated_tokens"):
        yield _within(column, values(fresh, base, column), limits.tokens)
    if base.record["protocol"]["kind"] == fresh.record["protocol"]["kind"] == "latency":
        gate = _within("seconds", values(fresh, base, "seconds"), limits.latency)
        machines = [cell.record["environment"].get("hardware") for cell in (base, fresh)]
        same = machines[0] == machines[1]
        yield gate if same else replace(gate, value="other hardware", verdict="not checked")
    yield _not_more("parse failures", UNREAD, before, after, limits.faults)
    yield _not_more("cut-off answers", {"cut_off"}, before, after, limits.faults)


def _rankings(cell: CellResult) -> dict[str, list[str]]:
    """Docids by query, of every query that the cell was to answer."""
    run = read_run(cell.folder / "run.trec")
    return {row["qid"]: [c.docid for c in run.get(row["qid"], ())] for row in cell.per_query}


def _asked(cell: CellResult, queries: Iterable[str]) -> Asked:
    """Calls by what was asked, which is the same under another engine or prompt."""
    calls, out = stored_calls(cell), Asked()
    for qid in queries:
        seen = Counter[tuple[str, ...]]()
        for row in calls[qid]:
            shown = tuple(row["docids"])
            out[qid, shown, seen[shown]] = row
            seen[shown] += 1
    return out


def _read(row: Row | None) -> Any:
    """What was understood; scores of one model on two machines differ in their last digits."""
    return row and (row["order"], None if row["score"] is None else round(row["score"], 3))


def values(new: CellResult, old: CellResult, column: str) -> Values:
    """A column of per_query.csv in two cells, of the queries that both have."""
    ours, theirs = stats.by_query(new, column), stats.by_query(old, column)
    return {qid: (ours[qid], theirs[qid]) for qid in ours if qid in theirs}


def _rising(found: Values) -> list[str]:
    return sorted(found, key=lambda qid: found[qid][0] - found[qid][1])


def _not_worse(measure: str, found: Values, margin: float) -> Gate:
    new, old = zip(*found.values())
    test = stats.non_inferiority(new, old, margin)
    worse = tuple(qid for qid in _rising(found) if found[qid][0] < found[qid][1])
    value = f"{test.mean:+.4f} [{test.low:+.4f}, {test.high:+.4f}]"
    return Gate(measure, value, f"above -{margin:.4f}", test.verdict, worse)


def _within(what: str, found: Values, allowed: float) -> Gate:
    """A total as a ratio: with 95 % confidence, from a bootstrap over queries, it is allowed."""
    new, old = (sum(side) for side in zip(*found.values()))
    over = stats.bootstrap_interval([x - (1 + allowed) * y for x, y in found.values()], 0.9)
    more = stats.bootstrap_interval([x - y for x, y in found.values()], 0.9)
    worse: Verdict = "fail" if new > (1 + allowed) * old and more.low > 0 else "inconclusive"
    value = f"x{new / old:.3f}" if old else f"0 -> {new:g}"
    verdict = "pass" if over.high <= 0 else worse
    return Gate(what, value, f"at most x{1 + allowed:.2f}", verdict, tuple(_rising(found)[::-1]))


def _not_more(what: str, faults: set[str], before: Asked, after: Asked, allowed: float) -> Gate:
    """A share of calls; McNemar's exact test on the calls of both tells a rise from chance."""
    from scipy.stats import binomtest

    old, new = ({c for c in asked if faults & {*asked[c]["faults"]}} for asked in (before, after))
    shares = len(old) / max(1, len(before)), len(new) / len(after)
    worse, better = len(new & before.keys() - old), len(old & after.keys() - new)
    p = binomtest(worse, worse + better, alternative="greater").pvalue if worse + better else 1.0
    rise: Verdict = "fail" if p <= 0.05 else "inconclusive"
    verdict = "pass" if shares[1] - shares[0] <= allowed else rise
    value = f"{100 * shares[0]:.1f} % -> {100 * shares[1]:.1f} %, p = {p:.2g}"
    queries = tuple(sorted({call[0] for call in new - old}))
    return Gate(what, value, f"+{100 * allowed:.1f} points", verdict, queries)


# --- noise and comparison ---------------------------------------------------------------------

TOKENS = "generated_tokens"
COSTS = ("calls", "rounds", "prompt_tokens", TOKENS, "seconds")


def noise(repeats: Iterable[CellResult]) -> list[Row]:
    """How far repeated runs of each cell differ, a row for its first measure and its tokens.

    sd is that of one run; nan where there is only one.
    """
    from pandas import DataFrame

    names, rows = ["dataset", "first_stage", "model", "what"], list[tuple[Any, ...]]()
    for cell in (cell for cell in repeats if cell.measures):
        measure = next(iter(cell.measures))
        rows.append((*place_of(cell), measure, cell.measures[measure]))
        rows.append((*place_of(cell), TOKENS, _mean(cell, TOKENS)))
    runs = DataFrame(rows, columns=[*names, "value"]).groupby(names, sort=False)["value"]
    spread = runs.agg(runs="count", mean="mean", sd="std", lowest="min", highest="max")
    found: list[Row] = spread.reset_index().to_dict("records")
    return found


def _mean(cell: CellResult, column: str) -> float | None:
    found = stats.by_query(cell, column).values()
    return statistics.fmean(found) if found else None


def compared(a: CellResult, b: CellResult, most: int = 10) -> dict[str, list[Row]]:
    """a against b over queries: all measures and costs with tests, and where they differ most.

    Raises DataError unless both answer the same queries.
    """
    names = [name for name in a.measures if name in b.measures]
    costs = [name for name in COSTS if values(a, b, name)]
    rows: list[Row] = [{"mean": n, "a": _mean(a, n), "b": _mean(b, n)} for n in (*names, *costs)]
    tests = stats.paired([[stats.align([a, b], row["mean"])] for row in rows])
    for row, test in zip(rows, map(asdict, tests)):
        row["a / b"] = row["a"] / row["b"] if row["b"] else None
        row |= {name: None if math.isnan(number) else number for name, number in test.items()}
    found = values(a, b, names[0])
    apart = sorted(found.items(), key=lambda item: -abs(item[1][0] - item[1][1]))
    queries = [{"qid": qid, "a": x, "b": y, "a - b": x - y} for qid, (x, y) in apart[:most]]
    return {"means": rows, "queries": queries}
