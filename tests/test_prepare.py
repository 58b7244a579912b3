"""Prepared candidates: made by ir_datasets' own loaders from stand-ins in its cache layout, and
read again where neither ir_datasets nor its files are.

Every command has a process of its own, because ir_datasets fixes its home when it is imported.
"""

import gzip
import hashlib
import http.server
import json
import os
import random
import subprocess
import sys
import threading
import weakref
import zipfile
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

from harness.data import formats, libraries, load, lucene, prepare, prepared
from harness.specs import Registry
from harness.types import Candidate, DataError, MissingResourceError, Query, UsageError

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


def test_what_is_there_and_intact_is_not_made_again(copied):
    asked = (scifact_spec(), "bm25s", 100, copied.parent)
    assert prepare.ready(*asked) == copied / "bm25s.jsonl.gz"
    assert prepare.ready(scifact_spec(), "bm25s", 10, copied.parent)  # deeper than asked for
    assert prepare.ready(scifact_spec(), "bm25s", 101, copied.parent) is None
    assert prepare.ready(scifact_spec(), "bm25", 10, copied.parent) is None
    assert prepare.ready(replace(scifact_spec(), irds="beir/other"), *asked[1:]) is None
    (copied / "bm25s.jsonl.gz").write_bytes(b"half")
    assert prepare.ready(*asked) is None


def test_a_run_file_that_changed_is_prepared_again(copied):
    run = copied.parent / "other.trec"
    run.write_text("q1 Q0 11 1 2.5 x\n")
    topics, qrels = [Query("q1", "x", (Candidate("11", "y"),))], {"q1": {"11": 1}}
    facts = {"depth": 100, "source": prepare._source(scifact_spec(), run)}
    prepared.write(copied, "other", topics, qrels, facts)
    assert prepare.ready(scifact_spec(), str(run), 100, copied.parent)
    run.write_text("q1 Q0 12 1 2.5 x\n")
    assert prepare.ready(scifact_spec(), str(run), 100, copied.parent) is None


def test_prepare_says_that_it_skips_and_force_makes_it_again(scifact):
    line = ("prepare", "-d", "scifact", "--first-stage", "bm25s")
    out, err = harness(scifact, *line, block="ir_datasets")
    assert out.strip().endswith("bm25s.jsonl.gz")
    assert "is there and intact" in err
    _, err = harness(scifact, *line, "--force", block="ir_datasets", code=3)
    path = scifact / "data" / "beir_scifact" / "bm25s.jsonl.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    harness(scifact, *line, "-q")
    assert path.read_bytes() == whole


def test_one_set_that_fails_does_not_stop_the_others(scifact):
    line = ("prepare", "-d", "nfcorpus,scifact", "--first-stage", "bm25s")
    out, err = harness(scifact, *line, code=4)
    assert out.strip().endswith("bm25s.jsonl.gz")
    assert "harness: beir/nfcorpus: " in err


# --- downloads ----------------------------------------------------------------------------------

# ir_datasets with another address for SciFact, from where it is really fetched.
FETCH = """
import json, pkgutil, sys
url, md5, *line = json.loads(sys.argv[1])
shipped = pkgutil.get_data

def get_data(package, name):
    data = shipped(package, name)
    if name != "etc/downloads.json":
        return data
    table = json.loads(data)
    table["beir"]["scifact"] |= {"url": url, "expected_md5": md5}
    return json.dumps(table).encode()

pkgutil.get_data = get_data
from harness.cli import main
main(line)
"""


class Flaky(http.server.BaseHTTPRequestHandler):
    """Breaks off the first answer half way; the rest is had by asking for the range."""

    content, asked = b"", []

    def do_GET(self):
        start = int((self.headers["Range"] or "bytes=0-")[6:-1])
        self.asked.append(start)
        self.send_response(206 if start else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(self.content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-/{len(self.content)}")
        self.end_headers()
        half = self.content[: len(self.content) // 2] if len(self.asked) == 1 else self.content
        self.wfile.write(half[start:])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(scifact, tmp_path):
    path = tmp_path / "served"
    path.write_bytes((scifact / "ir" / "beir" / "scifact" / "source.zip").read_bytes())
    with zipfile.ZipFile(path, "a") as file:  # long enough to break off between two reads
        file.writestr("scifact/more", random.Random(0).randbytes(1_000_000))
    Flaky.content, Flaky.asked = path.read_bytes(), []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Flaky) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/scifact.zip"
        server.shutdown()


def fetched(home, url, md5, **extra):
    line = [url, md5, "prepare", "-d", "scifact", "--first-stage", "bm25s", *extra.pop("flags", ())]
    env = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    env |= {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "IR_DATASETS_DL_TRIES": "3"}
    env |= {"IR_DATASETS_HOME": str(home / "ir"), prepared.VARIABLE: str(home / "data")}
    return subprocess.run(
        [sys.executable, "-c", FETCH, json.dumps(line)], env=env, capture_output=True, text=True
    )


def test_a_download_that_breaks_off_goes_on_from_there(server, tmp_path):
    done = fetched(tmp_path, server, hashlib.md5(Flaky.content).hexdigest())
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = Flaky.asked
    assert 0 == first < second <= len(Flaky.content) // 2
    assert "[starting]" in done.stderr or "%" in done.stderr  # progress
    assert len(topics_of(tmp_path / "data" / "beir_scifact" / "bm25s.jsonl.gz")) == 2


def test_a_download_with_a_wrong_checksum_is_an_error_and_leaves_nothing(server, tmp_path):
    done = fetched(tmp_path, server, "0" * 32, flags=["-q"])
    assert done.returncode == 5
    [line] = done.stderr.splitlines()
    assert line.startswith("harness: beir/scifact: ")
    assert "00000000" in line
    assert not list(tmp_path.rglob("*.zip*"))
    assert not (tmp_path / "data").exists()


# --- memory -------------------------------------------------------------------------------------


def test_preparing_holds_the_candidates_texts_and_no_others(monkeypatch):
    """The corpus is read twice, a document at a time; counted are those alive at once."""
    alive, most = weakref.WeakSet(), [0]

    class Text(str):  # a str cannot be referred to weakly
        __slots__ = ("__weakref__",)

    def documents(wanted):
        for n in range(5000):
            if wanted is None or str(n) in wanted:
                text = Text(f"word{n} common")
                alive.add(text)
                most[0] = max(most[0], len(alive))
                yield Candidate(str(n), text)

    topics = {str(q): {"text": f"word{q} word{q + 1} word{q + 2}"} for q in range(0, 300, 10)}
    parts = (topics, {q: {q: 1} for q in topics}, documents)
    monkeypatch.setitem(libraries.LIBRARIES, "irds", lambda spec: libraries.Library(spec, *parts))
    raw = libraries.gather(replace(scifact_spec(), family="other"), "bm25s", 2)
    assert sum(map(len, raw.candidates.values())) == 60
    assert 60 <= most[0] < 70


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


def test_rank_r1s_underscores_find_the_documents_whose_ids_hold_spaces(bright):
    run = bright / "bm25.leetcode.filtered.trec"
    run.write_text("0\tQ0\ta/one_two.txt\t1\t2.5\tfiltered\n0\tQ0\ta/three.txt\t2\t1.5\tfiltered\n")
    out, _ = harness(
        bright, "prepare", "-d", "leetcode", "--first-stage", run, "--data", bright / "r1"
    )
    assert out.strip().endswith("bright_leetcode/bm25.jsonl.gz")
    topic = topics_of(Path(out.strip()))["0"]
    assert [c.docid for c in topic.candidates] == ["a/one two.txt", "a/three.txt"]
    assert topic.candidates[0].text == "moths fly to lamps"


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


def library(topics, qrels, docs=()):
    """Makes a collection of these documents in place of ir_datasets' of that name."""
    return lambda spec: libraries.Library(spec, topics, qrels, lambda wanted: iter(docs))


def test_a_corpus_too_large_for_bm25s_is_refused(monkeypatch):
    docs = (Candidate(str(n), "x") for n in range(12))
    there = library({"q": {"text": "x"}}, {"q": {"1": 1}}, docs)
    monkeypatch.setattr(libraries, "SMALL", 10)
    monkeypatch.setitem(libraries.LIBRARIES, "irds", there)
    with pytest.raises(UsageError, match="over 10 documents"):
        libraries.gather(scifact_spec(), "bm25s", 5)


def test_lucene_is_asked_for_as_many_more_as_are_excluded(monkeypatch):
    """Lucene itself has tests of its own; here its search is replaced."""
    spec = Registry().datasets["bright/leetcode"]
    there = library({"0": {"text": "why"}}, {"0": {"good": 1, "bad": -100, "worse": -100}})
    monkeypatch.setitem(libraries.LIBRARIES, "irds", there)
    monkeypatch.setattr(lucene, "documents", lambda index, wanted: iter(()))
    with mock.patch("harness.data.lucene.search", return_value={}) as search:
        assert libraries.gather(spec, "bm25", 10).candidates == {"0": []}
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
