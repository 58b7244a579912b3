"""Rankings + qrels -> per-query measures, through ir-measures; a missing query scores 0.

Owns the names of measures and the rule of the mean. It must not know models or files.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from harness.types import RegistryError

Qrels = Mapping[str, Mapping[str, int]]
Run = Mapping[str, Mapping[str, float]]

KNOWN = ("nDCG@10", "nDCG@5", "nDCG@1", "RR@10", "AP", "R@100", "P@10", "Judged@10", "Success@5")
_NAMES = {
    "ndcg_cut": "nDCG", "ndcg_at": "nDCG", "ndcg": "nDCG", "recall": "R", "r": "R",
    "recip_rank": "RR", "mrr": "RR", "rr": "RR", "map_cut": "AP", "map": "AP", "ap": "AP",
    "p": "P", "judged": "Judged", "success": "Success",
}  # fmt: skip
_ALIAS = re.compile(rf"^({'|'.join(_NAMES)})(?:[_.@]?(\d+))?$", re.IGNORECASE)


def parse_measure(name: str) -> Any:
    """A measure from ir_measures' spelling or trec_eval's (`ndcg_cut_10`, `ndcg_cut.10`).

    Raises RegistryError for a name that is unknown or that nothing in this process computes.
    """
    import ir_measures

    plain = name.strip()
    if match := _ALIAS.match(plain):
        base, cut = _NAMES[match.group(1).lower()], match.group(2)
        plain = f"{base}@{cut}" if cut else base
    try:
        measure = ir_measures.parse_measure(plain)
        usable = _pipeline().supports(measure) and int(measure.params.get("cutoff", 1)) > 0
    except Exception as error:  # whatever its parser makes of a name
        raise _unknown(name, plain) from error
    if not usable:  # a cut-off of 0 would end the process inside trec_eval
        raise _unknown(name, plain)
    return measure


def _unknown(name: str, plain: str) -> RegistryError:
    return RegistryError(f"unknown measure {name!r}", known=KNOWN, given=plain)


def _pipeline() -> Any:
    """trec_eval's own code, and what it lacks: RR with a cut-off, Judged. No outside program."""
    import ir_measures

    return ir_measures.providers.FallbackProvider(
        [ir_measures.pytrec_eval, ir_measures.judged, ir_measures.msmarco]
    )


def per_query(
    run: Run, qrels: Qrels, measures: Iterable[str], qids: Sequence[str]
) -> dict[str, dict[str, float]]:
    """{measure: {qid: value}} over the declared queries `qids`; a query the run lacks has 0.

    trec_eval semantics: linear gain, queries sorted by score, ties by docid descending.
    """
    parsed = {str(m): m for m in map(parse_measure, measures)}
    out = {name: dict.fromkeys(qids, 0.0) for name in parsed}
    wanted = {q: r if isinstance(r := qrels[q], dict) else dict(r) for q in qids if q in qrels}
    found = {qid: _untied(run[qid]) for qid in wanted if run.get(qid)}
    for name, values in _computed(list(parsed.values()), wanted, found) if found else ():
        out[name].update(values)
    return out


def _computed(
    measures: Sequence[Any], qrels: Run, run: Run
) -> Iterator[tuple[str, dict[str, float]]]:
    """(measure, its values by query); trec_eval's as pytrec_eval hands them over, in one table.

    ir_measures makes an object of each value, which costs half as much again as the value.
    """
    import ir_measures

    native = [m for m in measures if ir_measures.pytrec_eval.supports(m)]
    for part in ir_measures.pytrec_eval.evaluator(native, qrels).invokers:
        rows = part.evaluator.evaluate(run)
        for column, (measure, _) in part.measure_map.items():
            yield str(measure), {qid: row[column] for qid, row in rows.items()}
    if others := [m for m in measures if m not in native]:
        for metric in _pipeline().iter_calc(others, qrels, run):
            if metric.query_id in run:
                yield str(metric.measure), {metric.query_id: float(metric.value)}


def _untied(scores: Mapping[str, float]) -> dict[str, float]:
    """n, n-1, ..., 1 in trec_eval's order: single precision, then docid descending.

    Providers break ties in different ways (RR@10 by docid ascending); without ties they agree.
    """
    if list(scores.values()) == _falling(len(scores)):  # ours always are
        return scores if isinstance(scores, dict) else dict(scores)
    single = array("f", scores.values())
    order = sorted(zip(single, scores), reverse=True)
    return {docid: float(len(order) - i) for i, (_, docid) in enumerate(order)}


@lru_cache(maxsize=256)
def _falling(count: int) -> list[float]:
    return [float(n) for n in range(count, 0, -1)]


def mean(values: Mapping[str, float]) -> float:
    """The plain mean over the declared queries, summed in their order."""
    return sum(values.values()) / len(values) if values else 0.0
