"""The audit's figures are those of hand-made collections, and what is pointless to run stops it."""

import contextlib
import io
import json
from pathlib import Path

import pytest

from harness import cli
from harness.data import audit, load
from harness.specs import Registry, folder_dataset
from harness.types import DatasetSpec

SHARED = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
FILES = {
    "queries.tsv": "q1\tone\nq2\ttwo\nq3\tone\nq9\tnever judged\n",
    "qrels.txt": "q1 0 d1 2\nq1 0 d9 1\nq1 0 d8 0\nq2 0 d 2 1\nq2 0 d3 -100\nq3 0 d7 1\n",
    "corpus.jsonl": "".join(
        json.dumps({"_id": d, "text": "" if d == "d4" else f"text {d}"}) + "\n"
        for d in ("d1", "d 2", "d3", "d4", "d5")
    ),
    "run.trec": (
        "q1\tQ0\td5\t1\t3\tbm25\nq1\tQ0\td1\t2\t2\tbm25\nq1\tQ0\td4\t3\t2\tbm25\n"
        "q2\tQ0\td3\t1\t9\tbm25\nq2\tQ0\td 2\t2\t8\tbm25\nq2\tQ0\td 2\t3\t7\tbm25\n"
    ),
}


@pytest.fixture
def folder(tmp_path):
    def make(**changes):
        for name, text in {**FILES, **changes}.items():
            (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path

    return make


def audited(folder, depth=10):
    spec = folder_dataset(folder)
    return audit.audit(spec, load(spec, None, depth), depth)


def said(*args):
    """Exit code, stdout and stderr of the command line, in this process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main([str(a) for a in args])
        except SystemExit as stop:
            code = stop.code or 0
    return code, out.getvalue(), err.getvalue()


def test_every_oddity_of_a_collection_is_counted(folder):
    found = audited(folder())
    assert found["warnings"] == {
        "candidates_with_empty_text": 1,
        "duplicate_candidates_removed": 1,
        "excluded_candidates_removed": 1,
        "identical_queries": 2,
        "ids_with_white_space": 1,
        "queries_under_depth": 2,
        "queries_without_candidates": 1,
        "queries_without_judgements": 1,
        "tied_first_stage_scores": 1,
    }
    assert (found["queries"], found["candidates"]) == (3, 4)
    assert [found[f"candidates_{n}"] for n in ("min", "median", "max")] == [0, 1, 3]
    assert found["judged_documents_no_candidates"] == 3
    assert found["relevant_documents_no_candidates"] == 2
    assert found["errors"] == []


def test_the_oracle_is_the_best_that_any_order_of_the_candidates_reaches(folder):
    found = audited(folder())
    ideal = 2 / (2 + 1 / 1.584962500721156)
    assert found["oracle_nDCG@10"] == pytest.approx((ideal + 1 + 0) / 3)
    assert found["first_stage_measures"]["nDCG@10"] < found["oracle_nDCG@10"]
    assert found["first_stage_measures"]["R@10"] == pytest.approx((1 / 2 + 1 + 0) / 3)


def test_ties_beyond_the_depth_are_not_counted(folder):
    assert audited(folder(), depth=2)["warnings"]["tied_first_stage_scores"] == 0


def test_the_text_hash_ignores_scores_and_judgements_but_no_text(folder):
    first = audited(folder())
    other = audited(folder(**{"qrels.txt": FILES["qrels.txt"].replace("d1 2", "d1 1")}))
    assert other["text_sha256"] == first["text_sha256"]
    assert other["sha256"] != first["sha256"]
    changed = audited(folder(**{"corpus.jsonl": FILES["corpus.jsonl"].replace("text d5", "x")}))
    assert changed["text_sha256"] != first["text_sha256"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"qrels.txt": "q1 0 z1 1\n"}, "use different document ids"),
        ({"qrels.txt": "q1 0 d1 0\n"}, "no document is judged relevant"),
        ({"qrels.txt": "q1 0 d1 -100\n"}, "no query has a judgement"),
        ({"run.trec": "q77 Q0 d1 1 1 x\n"}, "no query has a candidate"),
    ],
)
def test_what_is_pointless_to_run_ends_with_exit_code_5(folder, changes, reason):
    code, _, err = said("audit-data", "-d", folder(**changes))
    assert (code, err.count("harness: ")) == (5, 1)
    assert reason in err


def test_the_command_prints_figures_or_json(folder):
    code, out, _ = said("audit-data", "-d", folder(), "--depth", "10")
    assert code == 0
    assert "warnings: identical_queries" in out
    code, out, _ = said("audit-data", "-d", folder(), "--depth", "10", "--format", "json")
    [row] = json.loads(out)
    assert row == json.loads(json.dumps(audited(folder())))


def test_a_run_records_the_cheap_counts(folder, tmp_path):
    line = ("run", "-m", "first-stage", "-d", folder(), "--results", tmp_path / "results")
    code, out, _ = said(*line, "-q", "--format", "json")
    assert code == 0
    assert json.loads(out)[0]["inputs"]["identical_queries"] == 2


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """Runs the baseline over a dataset and returns (exit code, record or None, stderr)."""
    monkeypatch.setenv("RERANK_HARNESS_DATA", str(tmp_path / "data"))

    def run(place, *flags):
        line = ("run", "-m", "first-stage", "-d", place, "--results", tmp_path / "results")
        code, out, err = said(*line, *flags, "-q", "--format", "json")
        records = json.loads(out)
        return code, records[0] if records else None, err

    return run


def test_a_cell_records_the_whole_audit(folder, ran):
    place = folder()
    code, record, _ = ran(place, "--depth", "10")
    assert code == 0
    assert record["audit"] == json.loads(json.dumps(audited(place)))


def test_a_run_that_is_pointless_ends_with_exit_code_5_before_it_starts(folder, ran):
    code, record, err = ran(folder(**{"qrels.txt": "q1 0 z1 1\n"}))
    assert (code, record) == (5, None)
    assert "use different document ids" in err


def test_a_few_queries_may_have_nothing_judged_among_their_candidates(folder, ran):
    place = folder(**{"qrels.txt": FILES["qrels.txt"].replace("q1 0 d1 2", "q1 0 d7 2")})
    code, record, _ = ran(place, "--limit", "1")
    assert (code, record["queries"]) == (0, 1)
    assert record["audit"]["errors"]


def test_an_audit_is_kept_by_content_and_made_again_when_it_changes(folder, ran, tmp_path):
    place = folder()
    ran(place)
    [kept] = (tmp_path / "data" / "audits").iterdir()
    kept.write_text(json.dumps({**json.loads(kept.read_text()), "candidates": 99}))
    assert ran(place, "--force")[1]["audit"]["candidates"] == 99
    changed = folder(**{"corpus.jsonl": FILES["corpus.jsonl"].replace("text d5", "x")})
    assert ran(changed)[1]["audit"]["candidates"] == 4
    kept.write_text("{")
    assert ran(folder(), "--force")[1]["audit"]["candidates"] == 4


def test_judgements_in_place_of_a_registered_sets_own_are_used_and_named(ran, tmp_path):
    own = Registry().datasets["pocket"].location + "/qrels.txt"
    flat = tmp_path / "flat.txt"
    flat.write_text(Path(own).read_text().replace(" 3\n", " 1\n").replace(" 2\n", " 1\n"))
    _, plain, _ = ran("pocket")
    _, other, _ = ran("pocket", "--qrels", flat)
    assert other["dataset"]["label"] == "pocket+qrels=flat"
    assert other["measures"]["nDCG@10"] != plain["measures"]["nDCG@10"]
    assert other["key"] != plain["key"]
    assert "--qrels" in other["command"]
    code, _, err = said("run", "-m", "first-stage", "-d", "pocket", "--name", "mine")
    assert code == 2
    assert "--name is for a dataset given by its path" in err


def test_pocket_is_sound():
    spec = Registry().datasets["pocket"]
    found = audit.audit(spec, load(spec, None, spec.depth), spec.depth)
    assert found["errors"] == []
    assert set(found["warnings"].values()) == {0}
    assert found["first_stage_measures"]["Judged@20"] == 1.0


def test_the_audit_of_dl19_has_the_known_figures():
    folder = SHARED / "dl19"
    if not folder.is_dir():
        pytest.skip("the DL19 candidates are not here")
    spec = DatasetSpec(
        "dl19", "requests", str(folder / "bm25_top100.json"), str(folder / "qrels.txt"),
        measures=("nDCG@10", "R(rel=2)@100"),
    )  # fmt: skip
    found = audit.audit(spec, load(spec, None, 100), 100)
    assert round(found["first_stage_measures"]["nDCG@10"], 4) == 0.5058
    assert found["first_stage_measures"]["Judged@10"] == 1.0
    assert round(found["first_stage_measures"]["R(rel=2)@100"], 4) == 0.4910
    assert found["candidates"] == 4300
    assert set(found["warnings"].values()) == {0}
