"""Measures: trec_eval's numbers on real runs, and what a lost query costs."""

import random
from pathlib import Path

import ir_measures
import pytest

from harness import measure
from harness.data import formats
from harness.types import RegistryError

SHARED = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
BIOLOGY = "bright/biology/reasonir_gpt4cot_top100.trec"
STACKOVERFLOW = "bright/stackoverflow/reasonir_gpt4cot_top100.trec"
GPT = "runs/dl19.gpt-3.5-turbo.rankgpt.trec"
real_data = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the runs in ../shared/data")


def one(run, qrels, name="nDCG@10", qids=None):
    """The mean of one measure; `run` is {qid: docids, best first} or {qid: {docid: score}}."""
    scored = {
        qid: docs if isinstance(docs, dict) else {d: -float(i) for i, d in enumerate(docs)}
        for qid, docs in run.items()
    }
    [values] = measure.per_query(scored, qrels, [name], qids or list(qrels)).values()
    return measure.mean(values)


def real(run, qrels):
    read = formats.read_run(SHARED / run)
    as_scored = {qid: {c.docid: c.score for c in rows} for qid, rows in read.items()}
    in_order = {qid: [c.docid for c in rows] for qid, rows in read.items()}
    return as_scored, in_order, formats.read_qrels(SHARED / qrels)


@real_data
@pytest.mark.parametrize(
    ("run", "qrels", "expected"),
    [
        ("dl19/bm25.trec", "dl19/qrels.txt", 0.5058),
        (GPT, "dl19/qrels.txt", 0.6799),
        (BIOLOGY, "bright/biology/qrels.txt", 0.4349),
        (STACKOVERFLOW, "bright/stackoverflow/qrels.txt", 0.3096),
    ],
)
def test_the_published_ndcg_of_a_real_run_is_reproduced(run, qrels, expected):
    scored, _, judged = real(run, qrels)
    assert round(one(scored, judged), 4) == expected


@real_data
def test_runs_without_ties_measure_the_same_by_score_and_by_rank():
    """The scores of the GPT-3.5 run are first-stage scores by position: untied here, so harmless."""
    for run, expected in [("dl19/bm25.trec", 0.5058), (GPT, 0.6799)]:
        scored, in_order, judged = real(run, "dl19/qrels.txt")
        assert all(len(set(docs.values())) == len(docs) for docs in scored.values())
        assert round(one(in_order, judged), 4) == expected
        reversed_ids = {qid: dict(sorted(docs.items())) for qid, docs in scored.items()}
        assert one(reversed_ids, judged) == one(scored, judged)


@real_data
@pytest.mark.parametrize(
    ("run", "qrels", "by_rank"),
    [
        (BIOLOGY, "bright/biology/qrels.txt", 0.4337),
        (STACKOVERFLOW, "bright/stackoverflow/qrels.txt", 0.3073),
    ],
)
def test_tied_bright_runs_measure_differently_in_rank_order(run, qrels, by_rank):
    """trec_eval breaks the ties of these runs by docid; a cell keeps the order of their ranks."""
    scored, in_order, judged = real(run, qrels)
    assert any(len(set(docs.values())) < len(docs) for docs in scored.values())
    assert round(one(in_order, judged), 4) == by_rank


@real_data
def test_every_line_with_spaces_in_its_docid_is_kept():
    scored, _, _ = real(STACKOVERFLOW, "bright/stackoverflow/qrels.txt")
    assert len(scored) == 117
    assert sum(map(len, scored.values())) == 11_700
    assert any(" " in docid for docs in scored.values() for docid in docs)


def test_a_lost_query_scores_zero():
    qrels = {"q1": {"d1": 1}, "q2": {"d1": 1}}
    assert one({"q1": ["d1"]}, qrels) == 0.5
    assert one({"q1": ["d1"], "q2": []}, qrels) == 0.5
    assert one({}, qrels) == 0.0


def test_a_query_without_judgements_does_not_count():
    qrels = {"q1": {"d1": 1}}
    assert one({"q1": ["d1"], "q9": ["d1"]}, qrels) == 1.0


def test_a_declared_query_without_judgements_scores_zero():
    assert one({"q1": ["d1"]}, {"q1": {"d1": 1}}, qids=["q1", "q2"]) == 0.5


def test_a_query_whose_grades_are_all_zero_scores_zero_and_counts():
    assert one({"q1": ["d1"], "q2": ["d1"]}, {"q1": {"d1": 1}, "q2": {"d1": 0}}) == 0.5


def test_gain_is_linear_and_negative_grades_gain_nothing():
    qrels = {"q1": {"d1": 3, "d2": 1, "d3": -1}}
    best = 3 + 1 / 1.5849625007211562
    assert one({"q1": ["d2", "d1"]}, qrels) == pytest.approx((1 + 3 / 1.5849625007211562) / best)
    assert one({"q1": ["d3", "d1", "d2"]}, qrels) < one({"q1": ["d1", "d3", "d2"]}, qrels)


@pytest.mark.parametrize("name", ["nDCG@1", "RR@10", "RR", "AP", "P@1", "R@1", "Success@1"])
def test_every_measure_breaks_ties_by_docid_descending(name):
    """ir-measures' RR with a cut-off comes from another program, which breaks them ascending."""
    tied = {"q1": {"a": 1.0, "b": 1.0}}
    assert one(tied, {"q1": {"b": 1}}, name) == 1.0
    assert one(tied, {"q1": {"a": 1}}, name) == (0.5 if name[:2] in ("RR", "AP") else 0.0)


def test_scores_equal_in_single_precision_are_ties_as_in_trec_eval():
    assert one({"q1": {"a": 1.0000000001, "b": 1.0}}, {"q1": {"b": 1}}, "P@1") == 1.0


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        *(
            (s, "nDCG@10")
            for s in ["nDCG@10", "ndcg_cut_10", "ndcg_cut.10", "NDCG@10", "ndcg@10", "ndcg_at_10"]
        ),
        *((s, "R@100") for s in ["R@100", "recall_100", "recall.100", "r@100"]),
        *((s, "AP") for s in ["AP", "map", "MAP", "ap"]),
        *((s, "RR") for s in ["RR", "recip_rank", "mrr"]),
        *((s, "RR@10") for s in ["RR@10", "MRR@10", "rr@10"]),
        ("P_5", "P@5"),
        ("success_5", "Success@5"),
        ("judged@10", "Judged@10"),
        ("AP(rel=2)@1000", "AP(rel=2)@1000"),
    ],
)
def test_a_measure_is_found_under_every_spelling(spelling, name):
    assert str(measure.parse_measure(spelling)) == name


def test_values_are_those_of_ir_measures_to_the_last_digit():
    """Its own reading of every query, whichever of its programs computes the measure."""
    draw = random.Random(3)
    docs = [f"d{n}" for n in range(60)]
    run = {f"q{n}": {d: -float(i) for i, d in enumerate(draw.sample(docs, 40))} for n in range(20)}
    qrels = {qid: {d: draw.randrange(4) for d in draw.sample(docs, 25)} for qid in run}
    names = ["nDCG@10", "nDCG", "AP", "AP(rel=2)@20", "P(rel=3)@5", "R@10", "RR", "RR@10", "Bpref",
             "Judged@10", "Success@5", "SetF", "SetF(beta=0.5)", "IPrec@0.1", "Rprec", "NumRet"]  # fmt: skip
    parsed = [measure.parse_measure(name) for name in names]
    found = measure.per_query(run, qrels, names, list(run))
    rows = list(ir_measures.iter_calc(parsed, qrels, run))
    assert len(rows) == len(names) * len(run)
    assert all(found[str(row.measure)][row.query_id] == row.value for row in rows)


def test_values_are_keyed_by_the_canonical_name():
    values = measure.per_query({}, {}, ["ndcg_cut_10", "nDCG@10", "map"], ["q1"])
    assert values == {"nDCG@10": {"q1": 0.0}, "AP": {"q1": 0.0}}


def test_an_unknown_measure_shows_the_nearest():
    with pytest.raises(RegistryError, match=r"unknown measure 'nDGC@10' \(did you mean nDCG@10"):
        measure.parse_measure("nDGC@10")


@pytest.mark.parametrize(
    "name", ["", "nDCG@", "nDCG@x", "nDCG(", "10", "nDCG@10@5", "nDCG(foo=1)@10", "f()", "a b"]
)
def test_nonsense_is_an_unknown_measure(name):
    with pytest.raises(RegistryError, match="unknown measure"):
        measure.parse_measure(name)


@pytest.mark.parametrize("name", ["nDCG@0", "P@0", "P@-1", "RBP", "ERR@10", "alpha_nDCG@10"])
def test_a_measure_that_cannot_be_computed_is_refused_before_a_run(name):
    with pytest.raises(RegistryError, match="unknown measure"):
        measure.parse_measure(name)


def test_the_mean_of_nothing_is_zero():
    assert measure.mean({}) == 0.0
