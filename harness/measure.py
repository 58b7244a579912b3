"""Rankings + qrels -> per-query measures, through ir-measures; a missing query scores 0.

Owns the names of measures and the rule of the mean. It must not know models or files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from harness.types import RegistryError

Qrels = Mapping[str, Mapping[str, int]]
Run = Mapping[str, Mapping[str, float]]

_TREC = re.compile(r"^(ndcg_cut|ndcg_at|ndcg|recall|recip_rank|map_cut|map|p)[_.@]?(\d+)?$", re.I)
_NAMES = {
    "ndcg_cut": "nDCG", "ndcg_at": "nDCG", "ndcg": "nDCG", "recall": "R",
    "recip_rank": "RR", "map_cut": "AP", "map": "AP", "p": "P",
}  # fmt: skip


def parse_measure(name: str) -> Any:
    """A measure from ir_measures' spelling or trec_eval's (`ndcg_cut_10`, `ndcg_cut.10`)."""
    import ir_measures

    plain = name.strip()
    if match := _TREC.match(plain):
        base, cut = _NAMES[match.group(1).lower()], match.group(2)
        plain = f"{base}@{cut}" if cut else base
    try:
        return ir_measures.parse_measure(plain)
    except (NameError, ValueError, SyntaxError, AttributeError) as error:
        known = ["nDCG@10", "nDCG@5", "nDCG@1", "RR@10", "AP", "R@100", "P@10", "Judged@10"]
        raise RegistryError(f"unknown measure {name!r}", known=known, given=plain) from error


def per_query(
    run: Run, qrels: Qrels, measures: Iterable[str], qids: Sequence[str]
) -> dict[str, dict[str, float]]:
    """{measure: {qid: value}} over the declared queries `qids`; a query the run lacks has 0.

    trec_eval semantics: linear gain, queries sorted by score, ties by docid descending.
    """
    import ir_measures

    parsed = {str(m): m for m in map(parse_measure, measures)}
    out = {name: dict.fromkeys(qids, 0.0) for name in parsed}
    wanted = {qid: dict(qrels[qid]) for qid in qids if qid in qrels}
    found = {qid: dict(run[qid]) for qid in wanted if run.get(qid)}
    if found:
        for metric in ir_measures.iter_calc(list(parsed.values()), wanted, found):
            if metric.query_id in found:
                out[str(metric.measure)][metric.query_id] = float(metric.value)
    return out


def mean(values: Mapping[str, float]) -> float:
    """The plain mean over the declared queries, summed in their order."""
    return sum(values.values()) / len(values) if values else 0.0
