"""Prepared candidates: made by ir_datasets' own loaders from stand-ins in its cache layout, and
read again where neither ir_datasets nor its files are.

Every command has a process of its own, because ir_datasets fixes its home when it is imported.
"""

import gzip
import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest

from harness.data import formats, load, prepare, prepared
from harness.specs import Registry
from harness.types import DataError, MissingResourceError, UsageError

ROOT = Path(__file__).resolve().parent.parent
OFFLINE = {
    "https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9",
    "IR_DATASETS_DL_TRIES": "1", "IR_DATASETS_DL_403_TRIES": "1",
}  # fmt: skip
SCIFACT = {
    "corpus.jsonl": [
        {"_id": "11", "title": "Cells", "text": "mitochondria make energy", "metadata": {}},
        {"_id": "12", "title": "", "text": "energy of the sun", "metadata": {}},
        {"_id": "q1", "title": "energy", "text": "energy energy energy", "metadata": {}},
        {"_id": "13", "title": "Plants", "text": "leaves are green", "metadata": {}},
    ],
    "queries.jsonl": [
        {"_id": "q1", "text": "what makes energy", "metadata": {}},
        {"_id": "q2", "text": "green leaves", "metadata": {}},
        {"_id": "q3", "text": "never judged", "metadata": {}},
    ],
}
SCIFACT_QRELS = "query-id\tcorpus-id\tscore\nq1\t11\t1\nq2\t13\t1\n"


def harness(home, *args, code=0, block=""):
    """stdout and stderr of `harness ...` in its own process; `block` takes a package away."""
    lines = ["import sys", "from harness.cli import main"]
    if block:
        lines.insert(1, f"sys.modules[{block!r}] = None")
    lines.append(f"main({[str(a) for a in args]!r})")
    env = {**os.environ, **OFFLINE, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    env |= {"IR_DATASETS_HOME": str(home / "ir"), prepared.VARIABLE: str(home / "data")}
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], env=env, cwd=home, capture_output=True, text=True
    )
    assert done.returncode == code, done.stderr[-2000:]
    return done.stdout, done.stderr


def topics_of(path):
    return {t.qid: t for t in formats.read_requests(path)}


@pytest.fixture(scope="module")
def scifact(tmp_path_factory):
    """SciFact's zip as ir_datasets downloads it, with four documents, and what prepare made."""
    home = tmp_path_factory.mktemp("scifact")
    path = home / "ir" / "beir" / "scifact" / "source.zip"
    path.parent.mkdir(parents=True)
    with zipfile.ZipFile(path, "w") as file:
        for name, rows in SCIFACT.items():
            text = "".join(json.dumps(row) + "\n" for row in rows)
            file.writestr(f"scifact/{name}", text)
        for split in ("train", "test"):
            file.writestr(f"scifact/qrels/{split}.tsv", SCIFACT_QRELS)
    harness(home, "prepare", "-d", "scifact", "--first-stage", "bm25s", "-q")
    return home


def test_beir_is_prepared_with_titles_and_without_the_query_itself(scifact):
    topics = topics_of(scifact / "data" / "beir_scifact" / "bm25s.jsonl.gz")
    assert list(topics) == ["q1", "q2"]
    assert [c.docid for c in topics["q1"].candidates] == ["12", "11"]
    first = topics["q2"].candidates[0]
    assert (first.docid, first.title, first.text) == ("13", "Plants", "leaves are green")
    facts = json.loads((scifact / "data" / "beir_scifact" / "prepared.json").read_text())
    stage = facts["first_stages"]["bm25s"]
    assert stage["warnings"]["candidates_that_are_the_query_removed"] == 1
    assert (stage["queries"], stage["candidates"], stage["depth"]) == (2, 3, 100)
    assert stage["source"]["irds"] == "beir/scifact/test"


def test_preparing_again_gives_the_same_bytes_and_leaves_no_other_file(scifact):
    folder = scifact / "data" / "beir_scifact"
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    harness(scifact, "prepare", "-d", "beir/scifact", "--first-stage", "bm25s")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert set(before) == {"bm25s.jsonl.gz", "qrels.txt", "prepared.json"}
    assert before["bm25s.jsonl.gz"][4:8] == bytes(4)  # no time of day in the packed file


def test_a_run_on_prepared_data_needs_no_ir_datasets(scifact, tmp_path):
    data = tmp_path / "elsewhere"
    (scifact / "data").rename(data)
    try:
        line = ("run", "-m", "first-stage", "-d", "scifact", "--results", tmp_path / "r", "-q")
        out, _ = harness(scifact, *line, "--data", data, "--format", "json", block="ir_datasets")
        [record] = json.loads(out)
        assert record["first_stage"]["name"] == "bm25s"
        assert record["queries"] == 2
        assert record["inputs"]["candidates_that_are_the_query_removed"] == 1
        assert 0 < record["measures"]["nDCG@10"] < 1
        _, err = harness(scifact, *line, code=4, block="ir_datasets")
        assert "harness prepare -d beir/scifact" in err
    finally:
        data.rename(scifact / "data")


def test_a_run_file_is_prepared_to_the_same_collection_that_it_is_read_to(scifact, monkeypatch):
    run = scifact / "dense.trec"
    run.write_text("q1 Q0 11 1 2.5 x\nq1 Q0 12 2 1.5 x\nq2 Q0 13 1 1 x\n")
    results = ("--results", scifact / "results", "-q", "--format", "json")
    line = ("run", "-m", "first-stage", "-d", "scifact", "--first-stage")
    direct, _ = harness(scifact, *line, run, *results)
    harness(scifact, "prepare", "-d", "scifact", "--first-stage", run)
    again, _ = harness(scifact, *line, "dense", *results, block="ir_datasets")
    assert json.loads(again)[0]["key"] == json.loads(direct)[0]["key"]
    harness(
        scifact, *line, "bm25s", *results, block="ir_datasets"
    )  # the other stage is still there


def test_without_network_and_files_the_error_says_what_is_missing(tmp_path):
    line = ("prepare", "-d", "scifact", "--first-stage", "bm25s")
    _, err = harness(tmp_path, *line, code=4)
    assert err.count("harness: ") == 1
    assert "beir/scifact" in err


def test_an_unknown_first_stage_shows_the_known_ones(scifact):
    _, err = harness(scifact, "prepare", "-d", "scifact", "--first-stage", "bm25z", code=2)
    assert "expected a TREC run file, bm25 or bm25s" in err
    _, err = harness(scifact, "prepare", "-d", "scifact", "--first-stage", "bm25s+gpt4", code=2)
    assert "unknown query 'gpt4'" in err


# --- damage, without any loader -----------------------------------------------------------------


@pytest.fixture
def copied(scifact, tmp_path, monkeypatch):
    """A copy of the prepared folder, where `load` looks for it."""
    folder = tmp_path / "beir_scifact"
    folder.mkdir()
    for path in (scifact / "data" / "beir_scifact").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    monkeypatch.setenv(prepared.VARIABLE, str(tmp_path))
    return folder


def scifact_spec():
    return Registry().datasets["beir/scifact"]


@pytest.mark.parametrize("name", ["bm25s.jsonl.gz", "qrels.txt"])
def test_a_wrong_checksum_names_file_expected_and_got(copied, name):
    path = copied / name
    facts = json.loads((copied / "prepared.json").read_text())
    expected = (
        facts["qrels_sha256"] if name == "qrels.txt" else facts["first_stages"]["bm25s"]["sha256"]
    )
    path.write_bytes(path.read_bytes() + b"\n")
    got = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(DataError) as caught:
        load(scifact_spec(), "bm25s")
    for part in (str(path), expected, got):
        assert part in str(caught.value)


def test_a_prepared_file_that_is_gone_and_a_broken_record_are_errors(copied):
    (copied / "bm25s.jsonl.gz").unlink()
    with pytest.raises(MissingResourceError, match="prepare the dataset again"):
        load(scifact_spec(), "bm25s")
    (copied / "prepared.json").write_text("{")
    with pytest.raises(DataError, match="no record of prepared data"):
        load(scifact_spec())


def test_a_deeper_run_than_was_prepared_is_refused(copied):
    with pytest.raises(MissingResourceError, match="prepared to depth 100, asked for 200"):
        load(scifact_spec(), "bm25s", depth=200)


# --- BRIGHT -------------------------------------------------------------------------------------

REASONS = (
    "Gemini-1.0_reason",
    "claude-3-opus_reason",
    "gpt4_reason",
    "grit_reason",
    "llama3-70b_reason",
)
BRIGHT_DOCS = [
    ("a/one two.txt", "moths fly to lamps"),
    ("a/three.txt", "lamps attract moths at night"),
    ("a/three.txt", "the second text under one id: lamps lamps lamps"),
    ("a/gold.txt", "phototaxis is movement toward brightness"),
    ("a/bad.txt", "moths moths lamps lamps"),
]


@pytest.fixture(scope="module")
def bright(tmp_path_factory):
    """Parquet files as ir_datasets caches BRIGHT's leetcode split, which has excluded documents."""
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed: BRIGHT is parquet")
    import pyarrow.parquet as pq

    home = tmp_path_factory.mktemp("bright")
    folder = home / "ir" / "bright"
    folder.mkdir(parents=True)
    ids, texts = zip(*BRIGHT_DOCS)
    pq.write_table(pa.table({"id": ids, "content": texts}), folder / "leetcode.docs.parquet")
    query = {
        "id": ["0"], "query": ["Why do moths\nfly to lamps?"], "reasoning": [""],
        "gold_answer": [""], "gold_ids": [["a/gold.txt", "a/one two.txt", "a/gold.txt"]],
        "excluded_ids": [["a/bad.txt"]],
    }  # fmt: skip
    pq.write_table(pa.table(query), folder / "leetcode.queries.parquet")
    for name in REASONS:
        table = {
            "id": ["0"],
            "reasoning": ["phototaxis brightness" if name == "gpt4_reason" else ""],
        }
        pq.write_table(pa.table(table), folder / f"leetcode.{name}.queries.parquet")
    return home


def test_excluded_documents_of_bright_leave_before_the_cut(bright):
    line = ("prepare", "-d", "leetcode", "--depth", "2", "-q", "--first-stage")
    harness(bright, *line, "bm25s")
    folder = bright / "data" / "bright_leetcode"
    topic = topics_of(folder / "bm25s.jsonl.gz")["0"]
    assert [c.docid for c in topic.candidates] == ["a/one two.txt", "a/three.txt"]
    assert topic.candidates[1].text == "lamps attract moths at night"  # the first of two texts
    assert topic.text == "Why do moths\nfly to lamps?"
    qrels = formats.read_qrels(folder / "qrels.txt")
    assert qrels == {"0": {"a/gold.txt": 1, "a/one two.txt": 1}}
    facts = json.loads((folder / "prepared.json").read_text())["first_stages"]["bm25s"]
    assert facts["warnings"]["excluded_candidates_removed"] == 1


def test_a_rewritten_query_finds_other_documents_and_names_the_first_stage(bright):
    line = ("prepare", "-d", "leetcode", "--depth", "2", "-q", "--first-stage")
    harness(bright, *line, "bm25s+gpt4_reason")
    path = bright / "data" / "bright_leetcode" / "bm25s+gpt4_reason.jsonl.gz"
    topic = topics_of(path)["0"]
    assert [c.docid for c in topic.candidates] == ["a/gold.txt"]
    assert topic.text == "Why do moths\nfly to lamps?"  # the reranker reads the user's query
    _, err = harness(bright, *line, "bm25s+grit_reason", code=5)
    assert "has no grit_reason" in err


def test_bright_without_pyarrow_says_how_to_install_it(tmp_path):
    line = ("prepare", "-d", "biology", "--first-stage", "bm25s")
    path = tmp_path / "ir" / "bright" / "biology.queries.parquet"
    path.parent.mkdir(parents=True)
    path.touch()
    _, err = harness(tmp_path, *line, code=3, block="pyarrow")
    assert "'pyarrow' is not installed: pip install" in err


def test_a_corpus_too_large_for_bm25s_is_refused(scifact):
    spec, dataset = scifact_spec(), SimpleNamespace(docs_iter=lambda: docs)
    docs = (SimpleNamespace(doc_id=str(n), text="x") for n in range(12))
    with (
        mock.patch.object(prepare, "SMALL", 10),
        pytest.raises(UsageError, match="over 10 documents"),
    ):
        prepare.RETRIEVERS["bm25s"](spec, dataset, {"q": "x"}, 5)


def test_lucene_is_asked_for_as_many_more_as_are_excluded():
    """Lucene itself has tests of its own; here its search is replaced."""
    spec = Registry().datasets["bright/leetcode"]
    query = SimpleNamespace(query_id="0", text="why", default_text=lambda: "why")
    qrels = {"0": {"good": 1, "bad": -100, "worse": -100}}
    with mock.patch("harness.data.lucene.search", return_value={}) as search:
        assert prepare._retrieved(spec, None, [query], "bm25", 10, qrels) == {}
    search.assert_called_once_with("bright-leetcode", {"0": "why"}, 13)


# --- MS MARCO -----------------------------------------------------------------------------------


def test_a_run_over_ms_marco_gets_its_texts_and_the_judged_queries(tmp_path):
    home = tmp_path / "ir" / "msmarco-passage"
    files = {
        "collection.tsv": "0\tthe first passage\n1\tthe second\n2\tthe third\n",
        "trec-dl-2019/queries.tsv": "19335\tanthropological definition\n47923\tno judgements\n",
        "irds_version.txt": "v2",  # or ir_datasets takes the collection for one of an older form
        "trec-dl-2019/qrels": "19335 Q0 1 3\n19335 Q0 0 0\n",
    }
    for name, text in files.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(text)
    (tmp_path / "bm25.trec").write_text("19335 Q0 2 1 9 x\n19335 Q0 1 2 8 x\n47923 Q0 0 1 1 x\n")
    harness(tmp_path, "prepare", "-d", "dl19", "--first-stage", "bm25.trec", "-q")
    topics = topics_of(tmp_path / "data" / "dl19" / "bm25.jsonl.gz")
    assert list(topics) == ["19335"]
    assert [c.text for c in topics["19335"].candidates] == ["the third", "the second"]
    line = ("audit-data", "-d", "dl19", "--format", "json")
    [row] = json.loads(harness(tmp_path, *line, block="ir_datasets")[0])
    assert row["first_stage_measures"]["nDCG@10"] == pytest.approx(0.6309, abs=1e-4)


# --- every source -------------------------------------------------------------------------------


def test_a_folder_is_prepared_too_and_is_a_request_file(tmp_path):
    harness(tmp_path, "prepare", "-d", "pocket", "-q")
    folder = tmp_path / "data" / "pocket"
    path = folder / "bm25s.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        row = json.loads(next(file))
    assert row.keys() == {"query", "candidates"}
    assert row["candidates"][0].keys() == {"docid", "score", "doc"}
    from harness.plan import Selection, find_datasets

    [spec] = find_datasets(Registry(), str(path), Selection(qrels=str(folder / "qrels.txt")))
    own = load(Registry().datasets["pocket"], None, 20)
    assert load(spec, None, 20).sha256 == own.sha256
