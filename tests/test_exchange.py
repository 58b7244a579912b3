"""Foreign runs become cells with the scores their makers would get, and cells become files again."""

import contextlib
import io
import json
from dataclasses import replace
from pathlib import Path

import ir_measures
import pytest
import yaml

from harness import cli, exchange, store
from harness.cli import datasets
from harness.data import formats
from harness.specs import Registry
from harness.types import DataError, DatasetSpec, ModelSpec, UsageError

DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
QUERIES = "q1\tfirst question\nq2\tsecond question\n"
CORPUS = "".join(f'{{"_id": "{d}", "text": "passage {d}"}}\n' for d in ("d1", "d 2", "d3", "d4"))
STAGE = "".join(
    f"{q}\tQ0\t{d}\t{i}\t{9 - i}\tbm25\n"
    for q in ("q1", "q2")
    for i, d in enumerate(("d1", "d 2", "d3"), 1)
)
QRELS = "q1 0 d3 2\nq1 0 d1 0\nq2 0 d 2 1\n"
# Of the two that share a score trec_eval puts the later docid first, whatever their ranks say.
TIED = (
    "q1 Q0 d1 1 0.5 other\nq1 Q0 d3 2 0.5 other\nq1 Q0 d 2 3 0.1 other\n"
    "q2 Q0 d 2 1 0.9 other\nq2 Q0 d1 2 0.8 other\nq2 Q0 d3 3 0.7 other\n"
)


QUIET = ("-q", "--format", "json")


@pytest.fixture
def place(tmp_path):
    """A folder dataset `small`, and a foreign run over its candidates, with one tie."""
    folder = tmp_path / "small"
    folder.mkdir()
    files = {"queries.tsv": QUERIES, "corpus.jsonl": CORPUS, "run.trec": STAGE, "qrels.txt": QRELS}
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    (tmp_path / "other.run").write_text(TIED, encoding="utf-8")
    return tmp_path


def said(*args):
    """What the command line prints on stdout, in this process."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        cli.main([str(a) for a in args])
    return out.getvalue()


def taken_in(place, **changes):
    spec = changes.pop("dataset", None) or DatasetSpec("small", "folder", str(place / "small"))
    model = changes.pop("model", ModelSpec("other", exchange.METHOD))
    path = changes.pop("path", place / "other.run")
    return exchange.take_in(exchange.Foreign(path, model, spec, **changes), place / "results")


def real(name, *parts):
    path = DATA.joinpath(*parts)
    if not path.is_file():
        pytest.skip(f"{name}: {path.name} is not here")
    return path


# --- real runs ----------------------------------------------------------------------------------

REAL = {
    "dl19 bm25": ("dl19", ("dl19", "bm25.trec"), ("dl19", "qrels.txt"), 0.5058),
    "dl19 gpt-3.5": (
        "dl19", ("runs", "dl19.gpt-3.5-turbo.rankgpt.trec"), ("dl19", "qrels.txt"), 0.6799,
    ),
    "biology": (
        "biology", ("bright", "biology", "reasonir_gpt4cot_top100.trec"),
        ("bright", "biology", "qrels.txt"), 0.4349,
    ),
    "stackoverflow": (
        "bright-stackoverflow", ("bright", "stackoverflow", "reasonir_gpt4cot_top100.trec"),
        ("bright", "stackoverflow", "qrels.txt"), 0.3096,
    ),
    "trec-covid": ("covid", ("beir", "trec-covid", "bm25.trec"), ("beir", "trec-covid", "qrels.txt"), None),
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_a_real_run_has_the_score_that_trec_eval_gives_it(name, tmp_path):
    dataset, run, qrels, expected = REAL[name]
    run, qrels = real(name, *run), real(name, *qrels)
    spec = replace(Registry().find_datasets(dataset)[0], qrels=str(qrels))
    foreign = exchange.Foreign(run, ModelSpec("x", exchange.METHOD), spec)
    cell = exchange.take_in(foreign, tmp_path)
    raw = {qid: {c.docid: c.score for c in rows} for qid, rows in formats.read_run(run).items()}
    direct = ir_measures.calc_aggregate([ir_measures.nDCG @ 10], formats.read_qrels(qrels), raw)
    assert cell.measures["nDCG@10"] == pytest.approx(direct[ir_measures.nDCG @ 10], abs=1e-9)
    if expected is not None:
        assert round(cell.measures["nDCG@10"], 4) == expected
    assert len((cell.folder / "run.trec").read_text().splitlines()) == sum(map(len, raw.values()))


def test_docids_with_spaces_come_through_an_import_and_an_export(tmp_path):
    run = real("stackoverflow", "bright", "stackoverflow", "reasonir_gpt4cot_top100.trec")
    qrels = real("stackoverflow", "bright", "stackoverflow", "qrels.txt")
    line = ("import", run, "-m", "reasonir", "-d", "stackoverflow", "--qrels", qrels)
    assert "1152 tied scores in 93 queries" in said(*line, "--results", tmp_path)
    folder = tmp_path / "bright_stackoverflow" / "reasonir+gpt4_reason" / "reasonir"
    before = {(q, c.docid) for q, rows in formats.read_run(run).items() for c in rows}
    after = {(q, c.docid) for q, r in formats.read_run(folder / "run.trec").items() for c in r}
    assert before == after
    assert len(before) == 11_700
    assert sum(" " in docid for _, docid in before) == 12
    assert said("export", folder) == (folder / "run.trec").read_text(encoding="utf-8")


# --- import -------------------------------------------------------------------------------------


def test_ties_are_broken_as_trec_eval_does_and_reported(place):
    cell = taken_in(place)
    rows = formats.read_run(cell.folder / "run.trec")
    assert [c.docid for c in rows["q1"]] == ["d3", "d1", "d 2"]
    assert [c.score for c in rows["q1"]] == [3, 2, 1]
    told = cell.record["imported"]
    assert (told["ties"], told["queries_with_ties"]) == (1, 1)
    assert cell.measures["nDCG@1"] == 1.0
    assert told["measures_in_rank_order"]["nDCG@1"] == 0.5


def test_scores_that_differ_only_beyond_single_precision_are_ties(place):
    text = TIED.replace("d1 1 0.5 ", "d1 1 0.50000000001 ")
    (place / "other.run").write_text(text, encoding="utf-8")
    cell = taken_in(place)
    assert cell.record["imported"]["ties"] == 1
    assert formats.read_run(cell.folder / "run.trec")["q1"][0].docid == "d3"


def test_a_reranking_of_the_candidates_here_shares_their_hashes_and_another_run_does_not(place):
    said("run", "-m", "first-stage", "-d", place / "small", "--results", place / "results", *QUIET)
    own = store.read(place / "results" / "small" / "run" / "first-stage").record
    same = taken_in(place).record
    assert same["first_stage"] == own["first_stage"]
    assert same["dataset"]["sha256"] == own["dataset"]["sha256"]
    (place / "other.run").write_text(TIED.replace("q2 Q0 d3", "q2 Q0 d4"), encoding="utf-8")
    differs = taken_in(place, first_stage="dense").record
    assert differs["first_stage"] == {"name": "dense", "sha256": ""}
    assert differs["dataset"]["sha256"] != own["dataset"]["sha256"]


def test_costs_are_unknown_never_zero(place):
    cell = store.read(taken_in(place).folder)
    assert set(cell.record["efficiency"].values()) == {None}
    assert cell.record["environment"] == {}
    assert cell.record["state"] == "complete"
    assert {row["calls"] for row in cell.per_query} == {None}
    assert list(store.read_trace(cell.folder)) == []


def test_a_registered_model_brings_its_facts(place):
    out = said(
        "import", place / "other.run", "-m", "rank-r1-7b", "-d", place / "small",
        "--results", place / "results", "--format", "json",
    )  # fmt: skip
    record = json.loads(out)
    assert record["model"]["base"] == "Qwen/Qwen2.5-7B-Instruct"
    assert record["model"]["label"] == "rank-r1-7b"


def test_an_import_never_takes_the_place_of_a_measured_cell(place):
    said("run", "-m", "reverse", "-d", place / "small", "--results", place / "results", *QUIET)
    with pytest.raises(UsageError, match="measured cell"):
        taken_in(place, model=ModelSpec("reverse", "reverse"))
    taken_in(place)
    taken_in(place)  # an import may be repeated


def test_a_new_dataset_name_needs_judgements_only(place):
    line = ["import", place / "other.run", "-m", "x", "-d", "mine", "--results", place / "results"]
    assert said(*line) == ""
    assert "nDCG@10" in said(*line, "--qrels", place / "small" / "qrels.txt")
    assert (place / "results" / "mine" / "bm25" / "x" / "run.trec").is_file()


def test_a_query_that_the_run_lost_scores_zero_and_is_counted(place):
    (place / "other.run").write_text(TIED.partition("q2")[0] + "q7 Q0 d1 1 1 x\n", encoding="utf-8")
    cell = taken_in(place)
    assert cell.record["queries"] == 2
    assert cell.record["inputs"]["queries_without_candidates"] == 1
    assert cell.record["inputs"]["queries_without_judgements"] == 1
    assert cell.measures["nDCG@10"] == 0.5


def test_a_deeper_run_is_kept_whole_unless_a_depth_is_given(place):
    assert taken_in(place).record["depth"] == 100
    cut = taken_in(place, depth=2).record
    assert cut["first_stage"]["name"] == "run+depth=2"
    assert cut["inputs"]["candidates_below_the_depth"] == 2
    rows = "".join(f"q1 Q0 x{n} {n} {200 - n} deep\n" for n in range(1, 121))
    (place / "other.run").write_text(rows, encoding="utf-8")
    assert taken_in(place).record["depth"] == 120


def test_excluded_and_repeated_documents_leave_a_foreign_run(place):
    (place / "small" / "qrels.txt").write_text(QRELS.replace("d1 0", "d1 -100"), encoding="utf-8")
    (place / "other.run").write_text(TIED + "q1 Q0 d3 9 0.01 other\n", encoding="utf-8")
    cell = taken_in(place)
    rows = formats.read_run(cell.folder / "run.trec")["q1"]
    assert [c.docid for c in rows] == ["d3", "d 2"]
    assert cell.record["inputs"]["excluded_candidates_removed"] == 1
    assert cell.record["inputs"]["duplicate_candidates_removed"] == 1


def test_a_run_of_other_queries_is_refused(place):
    (place / "other.run").write_text("x1 Q0 d1 1 1 x\n", encoding="utf-8")
    with pytest.raises(DataError, match="none of its queries is judged"):
        taken_in(place)


# --- export -------------------------------------------------------------------------------------


def test_requests_hold_the_texts_in_reranked_order_and_can_be_reranked_again(place):
    cell, out = taken_in(place), place / "again.jsonl"
    said("export", cell.folder, "--format", "requests", "--out", out, "-d", place / "small")
    topics = {t.qid: t for t in formats.read_requests(out)}
    assert topics["q1"].text == "first question"
    assert [(c.docid, c.text) for c in topics["q1"].candidates][:2] == [
        ("d3", "passage d3"),
        ("d1", "passage d1"),
    ]


def test_what_is_exported_comes_back_with_the_same_order_and_score(place):
    results, qrels = place / "results", place / "small" / "qrels.txt"
    said("run", "-m", "reverse", "-d", place / "small", "--results", results, *QUIET)
    cell = store.read(results / "small" / "run" / "reverse")
    own = formats.read_run(cell.folder / "run.trec")
    said("export", cell.folder, "--out", place / "back.trec")
    taken = taken_in(place, path=place / "back.trec")
    assert taken.measures == cell.measures
    for form in ("requests", "results"):
        said(
            "export",
            cell.folder,
            "--format",
            form,
            "--out",
            place / f"{form}.jsonl",
            "-d",
            place / "small",
        )
        line = ("run", "-m", "first-stage", "-d", place / f"{form}.jsonl", "--qrels", qrels)
        [record] = json.loads(said(*line, "--results", results, *QUIET))
        assert record["measures"]["nDCG@10"] == cell.measures["nDCG@10"]
        again = formats.read_run(results / form / "requests" / "first-stage" / "run.trec")
        assert {q: [c.docid for c in rows] for q, rows in again.items()} == {
            q: [c.docid for c in rows] for q, rows in own.items()
        }


def test_a_run_in_a_known_layout_needs_neither_dataset_nor_first_stage(place):
    folder = place / "runs" / "biology"
    folder.mkdir(parents=True)
    run = folder / "reasonir_gpt4cot_top100.txt"
    run.write_text("0 Q0 d1 1 0.9 reasonir\n0 Q0 d 2 2 0.8 reasonir\n")
    (place / "q.txt").write_text("0 0 d 2 1\n")
    line = ("import", run, "-m", "first-stage", "--qrels", place / "q.txt", "--results")
    assert "nDCG@10 0.6309" in said(*line, place / "results")
    assert (place / "results" / "bright_biology" / "reasonir+gpt4_reason" / "first-stage").is_dir()
    assert said("import", place / "other.run", "-m", "x", "--results", place / "results") == ""


def test_requests_without_the_dataset_say_so_and_hold_no_text(place, capsys):
    cell = taken_in(place)
    datasets.export(cell.folder, "requests")
    seen = capsys.readouterr()
    row = json.loads(seen.out.splitlines()[0])
    assert row["query"] == {"text": "", "qid": "q1"}
    assert [c["doc"] for c in row["candidates"]] == [{}, {}, {}]
    assert "no texts are written" in seen.err


def test_results_hold_every_answer_of_the_model(place):
    line = ("run", "-m", "rank-r1-7b", "--engine", "fake", "-d", place / "small", *QUIET)
    said(*line, "--results", place / "results")
    [cell] = store.iterate(place / "results")
    rows = [json.loads(r) for r in said("export", cell.folder, "--format", "results").splitlines()]
    history = [call for row in rows for call in row["invocations_history"]]
    assert len(history) == cell.record["efficiency"]["calls"] > 0
    assert history[0].keys() == {"prompt", "response", "input_token_count", "output_token_count"}


def test_the_metadata_names_collection_first_stage_and_model(place):
    cell = taken_in(place)
    content = yaml.safe_load(said("export", cell.folder, "--format", "ir-metadata"))
    assert content["data"]["test collection"]["name"] == "small"
    assert content["method"]["retrieval"] == [{"name": "run", "depth": 100}]
    assert content["method"]["reranking"] == [{"name": "other", "method": "imported"}]
