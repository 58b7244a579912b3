"""Readers and sources: every odd file gives its rows or an error that names file and line."""

import contextlib
import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.data import formats, libraries, load
from harness.specs import Registry
from harness.types import DataError, DatasetSpec, MissingResourceError

QUERIES = "q1\tfirst question\nq2\tsecond question\n"
QRELS = "q1 0 d1 2\nq1 0 d2 0\nq2 0 d3 1\n"
RUN = "q1 Q0 d1 1 3.5 bm25\nq1 Q0 d2 2 2.5 bm25\nq2 Q0 d3 1 9 bm25\nq2 Q0 d1 2 8 bm25\n"
CORPUS = (
    '{"_id": "d1", "title": "One", "text": "the first passage"}\n'
    '{"_id": "d2", "title": "", "text": "second question passage"}\n'
    '{"_id": "d3", "text": "a third"}\n'
)


@pytest.fixture
def file(tmp_path):
    """Write text or bytes to a file, packed when the name says so."""

    def write(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = content if isinstance(content, bytes) else content.encode("utf-8")
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return path

    return write


def docids(run):
    return {qid: [c.docid for c in rows] for qid, rows in run.items()}


def refused(read, path, *parts):
    """The reader raises a DataError whose text has the path in front and all the parts."""
    with pytest.raises(DataError) as caught:
        list(read(path))
    text = str(caught.value)
    assert text.startswith(str(path)), text
    for part in parts:
        assert part in text, text
    assert "\n" not in text


# --- what all readers share ---------------------------------------------------------------------

READERS = {
    "run": (formats.read_run, "q1 Q0 d1 1 3.5 bm25\n"),
    "qrels": (formats.read_qrels, "q1 0 d1 2\n"),
    "queries.tsv": (formats.read_queries, "q1\tfirst\n"),
    "queries.jsonl": (formats.read_queries, '{"_id": "q1", "text": "first"}\n'),
    "corpus.jsonl": (lambda path: list(formats.read_corpus(path)), '{"_id": "d1", "text": "x"}\n'),
    "requests.jsonl": (
        formats.read_requests,
        '{"query": {"text": "first", "qid": 1}, "candidates": []}\n',
    ),
    "requests.json": (
        formats.read_requests,
        '[\n{"query": "first", "hits": [{"content": "x", "qid": 1, "docid": "d1"}]}\n]\n',
    ),
}
each_reader = pytest.mark.parametrize("kind", READERS)


@each_reader
def test_line_ends_marks_and_packing_change_nothing(kind, file):
    read, text = READERS[kind]
    plain = read(file(kind, text))
    assert plain
    variants = {
        f"crlf-{kind}": text.replace("\n", "\r\n"),
        f"bom-{kind}": "\ufeff" + text,
        f"blank-{kind}": text + "\n \n\n",
        f"open-{kind}": text.rstrip("\n"),
        f"{kind}.gz": text,
    }
    for name, content in variants.items():
        assert read(file(name, content)) == plain, name


@each_reader
def test_an_absent_file_is_a_missing_resource(kind, tmp_path):
    read, _ = READERS[kind]
    for path in (tmp_path / kind, tmp_path):
        if path == tmp_path and kind.startswith("corpus"):
            continue  # a corpus may be a folder
        with pytest.raises(MissingResourceError, match="no such file"):
            read(path)


@each_reader
def test_text_that_is_not_utf8_names_its_line(kind, file):
    read, text = READERS[kind]
    latin = text.encode() + b"\n" * 3000 + b"q9 Q0 caf\xe9 1 2 x\n"
    line = latin.count(b"\n")
    refused(read, file(kind, latin), f":{line}: expected UTF-8 text")


@each_reader
def test_a_damaged_gzip_file_is_invalid_data(kind, file):
    read, text = READERS[kind]
    whole = gzip.compress(text.encode() + b"\n" * 5000)
    for number, damaged in enumerate((b"plain text", whole[:-12], whole[:20] + b"\x00" * 40)):
        path = file(f"{number}-{kind}.gzip", damaged)
        refused(read, path.rename(path.with_suffix(".gz")), "cannot be read")


@pytest.mark.parametrize("kind", [k for k in READERS if not k.startswith("corpus")])
@pytest.mark.parametrize("empty", ["", "\n\n", "\ufeff"])
def test_an_empty_file_is_said_to_hold_nothing(kind, empty, file):
    refused(READERS[kind][0], file(kind, empty), "holds no")


@each_reader
@given(text=st.text())
@settings(max_examples=60, deadline=None)
def test_any_text_is_read_or_refused(kind, text, tmp_path_factory):
    read, sound = READERS[kind]
    path = tmp_path_factory.mktemp("any") / kind
    for content in (text, sound + text):
        path.write_bytes(content.encode("utf-8", "surrogatepass"))
        with contextlib.suppress(DataError):
            read(path)


# --- runs ---------------------------------------------------------------------------------------


def test_run_columns_are_split_by_spaces_or_tabs(file):
    spaced = formats.read_run(file("run", "q1 Q0  d1 1   3.5 bm25 x\n".replace(" x", "")))
    tabbed = formats.read_run(file("tabs", "q1\tQ0\td1\t1\t3.5\tbm25\n"))
    assert spaced == tabbed
    assert docids(spaced) == {"q1": ["d1"]}


def test_a_docid_may_hold_spaces_and_tabs(file):
    text = (
        "q1 Q0 a b.txt 1 3 x\n"
        "q1\tQ0\tc  d.txt\t2\t2\tx\n"
        "q1\tQ0\te\tf\t3\t1\tx\n"
        "q 2\tQ0\tg\t1\t1\tmy tag\n"
    )
    assert docids(formats.read_run(file("run", text))) == {
        "q1": ["a b.txt", "c  d.txt", "e\tf"],
        "q 2": ["g"],
    }


def test_comments_in_a_run_are_skipped(file):
    text = "# ir_metadata.start\n# tag: x\n# ir_metadata.end\nq1 Q0 d1 1 1 x\n"
    assert docids(formats.read_run(file("run", text))) == {"q1": ["d1"]}


def test_candidates_come_by_score_and_ties_by_rank(file):
    text = "q1 Q0 c 3 5 x\nq1 Q0 z 2 5 x\nq1 Q0 a 1 7 x\nq1 Q0 b 10 5 x\n"
    assert docids(formats.read_run(file("run", text))) == {"q1": ["a", "z", "c", "b"]}


def test_only_runs_of_ours_are_decoded(file):
    theirs = formats.read_run(file("theirs", "q1 Q0 a%20b 1 1 bm25\n"))
    ours = formats.read_run(file("ours", "q1 Q0 a%20b 1 1 rerank-harness\n"))
    assert (docids(theirs), docids(ours)) == ({"q1": ["a%20b"]}, {"q1": ["a b"]})


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("q1 Q0 d1 1 3.5", "expected `qid Q0 docid rank score tag`, got 'q1 Q0 d1 1 3.5'"),
        ("q1\tQ0\t\t1\t3.5\tx", "expected `qid Q0 docid rank score tag`"),
        ("q1 Q0 d1 1 high x", "expected a finite number as score, got 'high'"),
        ("q1 Q0 d1 1 nan x", "expected a finite number as score, got 'nan'"),
        ("q1 Q0 d1 1 -inf x", "expected a finite number as score, got '-inf'"),
        ("q1 Q0 d1 1 1e999 x", "expected a finite number as score, got '1e999'"),
        ("q1 Q0 d1 1 1_0 x", "expected a finite number as score, got '1_0'"),
        ("q1 Q0 d1 first 1 x", "expected a finite number as rank, got 'first'"),
    ],
)
def test_a_wrong_run_line_names_file_line_and_form(line, said, file):
    refused(formats.read_run, file("run", f"q1 Q0 d0 1 4 x\n\n{line}\n"), f":3: {said}")


printable = st.text(
    st.characters(exclude_categories=("Cs", "Cn", "Co")) | st.sampled_from(" \t%20\u00a0\u3000#"),
    min_size=1,
).filter(lambda text: text.strip() and "\ufeff" not in text)


@given(names=st.lists(printable, min_size=1, max_size=5, unique=True), qid=printable)
@settings(deadline=None)
def test_a_written_run_reads_back_with_the_same_ids(names, qid, tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "run.trec"
    ranked = [(name, float(len(names) - i)) for i, name in enumerate(names)]
    path.write_text(formats.write_run({qid: ranked}), encoding="utf-8", newline="\n")
    assert docids(formats.read_run(path)) == {qid: names}
    assert all(len(line.split()) == 6 for line in path.read_text(encoding="utf-8").splitlines())


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1))
@settings(deadline=None)
def test_a_written_score_reads_back_exactly(scores):
    text = formats.write_run({"q1": [(f"d{i}", s) for i, s in enumerate(scores)]})
    assert [float(line.split()[4]) for line in text.splitlines()] == scores


def test_whole_scores_are_written_without_a_point():
    assert formats.write_run({"q": [("d", 2.0)]}) == "q Q0 d 1 2 rerank-harness\n"


# --- qrels --------------------------------------------------------------------------------------


def test_trec_and_beir_judgements_read_the_same(file):
    trec = formats.read_qrels(file("qrels.txt", "q1 0 d1 2\nq1\t0\td 2\t-1\nq2 Q0 d3 +1\n"))
    beir = formats.read_qrels(
        file("test.tsv", "query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\td 2\t-1\nq2 d3 1\n")
    )
    assert trec == beir == {"q1": {"d1": 2, "d 2": -1}, "q2": {"d3": 1}}


def test_a_docid_in_space_separated_judgements_keeps_its_spaces(file):
    assert formats.read_qrels(file("qrels", "q1 0 a  b.txt 1\n")) == {"q1": {"a  b.txt": 1}}


def test_the_same_judgement_twice_passes(file):
    assert formats.read_qrels(file("qrels", "q1 0 d1 1\nq1 0 d1 1\n")) == {"q1": {"d1": 1}}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("q1 0 d1 3", "expected one grade for q1 d1: 1 before, 3 here"),
        ("q1 0 d2", "expected `qid 0 docid grade`, got 'q1 0 d2'"),
        ("q1 0 1234567", "expected `qid 0 docid grade`, got 'q1 0 1234567'"),
        ("q1\t0\t\t1", "expected `qid 0 docid grade`"),
        ("q1 0 d2 1.5", "expected a whole number as grade, got '1.5'"),
        ("q1 0 d2 good", "expected a whole number as grade, got 'good'"),
        ("q1 0 d2 " + "9" * 5000, "expected a whole number as grade, got '999"),
    ],
)
def test_a_wrong_judgement_names_file_line_and_form(line, said, file):
    refused(formats.read_qrels, file("qrels", f"q1 0 d1 1\n{line}\n"), f":2: {said}")


def test_beir_rows_need_three_columns(file):
    path = file("test.tsv", "query-id\tcorpus-id\tscore\nq1\td1\n")
    refused(formats.read_qrels, path, ":2: expected `qid docid grade`")


# --- queries and corpora ------------------------------------------------------------------------


def test_query_text_is_kept_raw(file):
    tsv = file("queries.tsv", "q1\t  two\ttabs  and spaces \r\n")
    jsonl = file(
        "queries.jsonl", '{"qid": 7, "query": " a\\n\\u2028b "}\n{"id": "x", "text": "y"}\n'
    )
    assert formats.read_queries(tsv) == {"q1": "  two\ttabs  and spaces "}
    assert formats.read_queries(jsonl) == {"7": " a\n\u2028b ", "x": "y"}


@pytest.mark.parametrize(
    ("name", "line", "said"),
    [
        ("queries.tsv", "q2 no tab", "expected `qid<TAB>text`, got 'q2 no tab'"),
        ("queries.tsv", "\ttext", "expected `qid<TAB>text`"),
        ("queries.tsv", "q2\t ", "query 'q2' has no text"),
        ("queries.tsv", "q1\tagain", "query 'q1' appears twice"),
        ("queries.jsonl", '{"_id": "q1", "text": "x"}', "query 'q1' appears twice"),
        ("queries.jsonl", '{"_id": "q2", "text": ""}', "query 'q2' has no text"),
        ("queries.jsonl", '{"_id": "q2"}', "expected the key 'text' or 'query'"),
        ("queries.jsonl", '{"_id": true, "text": "x"}', "expected the key '_id' or 'qid' or 'id'"),
        ("queries.jsonl", '{"_id": " ", "text": "x"}', "expected an id that is not empty"),
        ("queries.jsonl", '["q2", "x"]', "expected a JSON object, got ['q2', 'x']"),
        ("queries.jsonl", '{"_id": "q2", ', "not JSON"),
        ("queries.jsonl", "[" * 100_000, "not JSON"),
        ("queries.jsonl", '{"_id": "q2", "text": "\\ud800"}', "expected Unicode text"),
    ],
)
def test_a_wrong_query_names_file_line_and_form(name, line, said, file):
    first = "q1\tx\n" if name.endswith("tsv") else '{"_id": "q1", "text": "x"}\n'
    refused(formats.read_queries, file(name, f"{first}{line}\n"), f":2: {said}")


def test_a_corpus_may_name_its_fields_in_many_ways(file):
    text = (
        '{"_id": "a", "title": "T", "text": "x"}\n{"id": 2, "contents": "y", "title": null}\n'
        '{"docid": "c", "segment": "z"}\n'
    )
    documents = list(formats.read_corpus(file("corpus.jsonl", text)))
    assert [(d.docid, d.title, d.text) for d in documents] == [
        ("a", "T", "x"),
        ("2", "", "y"),
        ("c", "", "z"),
    ]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"_id": "d2"}', "document 'd2': expected a text under text, segment"),
        ('{"_id": "d2", "text": null}', "document 'd2': expected a text"),
        ('{"text": "x"}', "expected the key '_id' or 'id' or 'docid'"),
        ('{"_id": "\\ud83d", "text": "x"}', "expected Unicode text"),
        ('"d2"', "expected a JSON object"),
    ],
)
def test_a_wrong_document_names_file_line_and_form(line, said, file):
    path = file("corpus.jsonl", f'{{"_id": "d1", "text": "x"}}\n{line}\n')
    refused(formats.read_corpus, path, f":2: {said}")


# --- request files ------------------------------------------------------------------------------

HITS = {
    "query": "first question",
    "hits": [
        {"content": "the first", "qid": 1, "docid": "d1", "rank": 1, "score": 2.5},
        {"content": "the second", "qid": 1, "docid": "d2", "rank": 2, "score": 1},
    ],
}
CANDIDATES = {
    "query": {"text": "first question", "qid": "1"},
    "candidates": [
        {"docid": "d1", "score": 2.5, "doc": {"contents": "the first"}},
        {"docid": "d2", "score": 1.0, "doc": "the second"},
    ],
}


def test_both_request_forms_read_the_same_in_both_containers(file):
    read = [
        formats.read_requests(file(f"{number}.json{'l' * lines}{gz}", text))
        for number, form in enumerate((HITS, CANDIDATES))
        for gz in ("", ".gz")
        for lines, text in enumerate((json.dumps([form], indent=1), json.dumps(form)))
    ]
    assert len(read) == 8
    assert all(topics == read[0] for topics in read)
    [topic] = read[0]
    assert (topic.qid, topic.text) == ("1", "first question")
    assert [(c.docid, c.text, c.score) for c in topic.candidates] == [
        ("d1", "the first", 2.5),
        ("d2", "the second", 1.0),
    ]


def with_first(form, rows, **changed):
    first, *rest = form[rows]
    return {**form, rows: [{**first, **changed}, *rest]}


@pytest.mark.parametrize(
    ("item", "said"),
    [
        (5, "expected a JSON object, got 5"),
        ({"query": "x"}, 'expected {"query"'),
        ({"query": None, "hits": []}, 'expected {"query"'),
        ({"query": "x", "hits": [3]}, "expected a JSON object, got 3"),
        ({"query": "x", "hits": []}, "expected the key 'qid'"),
        ({"query": {"qid": 1}, "candidates": []}, "expected the key 'text'"),
        ({"query": {"qid": 1, "text": " "}, "candidates": []}, "query '1' has no text"),
        (with_first(HITS, "hits", content=None), "document 'd1': expected a text"),
        (with_first(HITS, "hits", score="high"), "expected a finite number as score of 'd1'"),
        (with_first(HITS, "hits", score=None), "expected a finite number as score of 'd1'"),
        (with_first(HITS, "hits", docid=[1]), "expected the key 'docid'"),
        (with_first(CANDIDATES, "candidates", doc=[]), "document 'd1': expected a text"),
        (with_first(CANDIDATES, "candidates", doc=None), "document 'd1': expected a text"),
        (HITS, "query '1' appears twice"),
    ],
)
def test_a_wrong_request_names_file_line_and_form(item, said, file):
    lined = f"{json.dumps(CANDIDATES)}\n\n{json.dumps(item)}\n"
    refused(formats.read_requests, file("requests.jsonl", lined), f":3: {said}")
    array = f"[\n\n{json.dumps(CANDIDATES)},\n{json.dumps(item)}]\n"
    refused(formats.read_requests, file("requests.json", array), f":4: {said}")


ONE = '{"query": {"text": "x", "qid": 1}, "candidates": []}'


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (f"[\n{ONE}x\n]", 2),
        (f"[\n{ONE},\n", 2),
        ("[", 1),
        ("[\n[[" * 50_000, 2),
        (f"[{ONE}\n][]", 2),
    ],
)
def test_a_broken_array_names_file_and_line(text, line, file):
    refused(formats.read_requests, file("requests.json", text), f"requests.json:{line}: not JSON")


# --- sources ------------------------------------------------------------------------------------


@pytest.fixture
def folder(file, tmp_path):
    """Write a folder dataset, with some files replaced (None: left out); returns its spec."""

    def build(**changed):
        files = {
            "queries.tsv": QUERIES,
            "qrels.txt": QRELS,
            "corpus.jsonl": CORPUS,
            "run.trec": RUN,
        }
        files |= {name.replace("__", "/").replace("_", "."): c for name, c in changed.items()}
        for name, content in files.items():
            (tmp_path / "data" / name).unlink(missing_ok=True)
            if content is not None:
                file(f"data/{name}", content)
        return DatasetSpec("small", "folder", str(tmp_path / "data"))

    return build


def ranked(collection):
    return {q.qid: [c.docid for c in q.candidates] for q in collection.queries}


def test_a_folder_with_a_run_gives_its_candidates_with_texts(folder):
    data = load(folder())
    assert ranked(data) == {"q1": ["d1", "d2"], "q2": ["d3", "d1"]}
    assert data.first_stage == "run"
    first = data.queries[0].candidates[0]
    assert (first.title, first.text, first.score) == ("One", "the first passage", 3.5)
    assert data.has_texts
    assert data.warnings == {"queries_under_depth": 2}


def test_a_folder_without_a_run_is_searched_on_the_spot(folder):
    data = load(folder(run_trec=None))
    assert data.first_stage == "bm25s"
    assert ranked(data) == {"q1": ["d1", "d2"], "q2": ["d2"]}
    assert ranked(load(folder(), "bm25s")) == ranked(data)


def test_packed_files_and_beir_judgements_make_a_folder_too(folder):
    plain = load(folder())
    packed = folder(
        queries_tsv=None, queries_tsv_gz=QUERIES, run_trec=None, run_trec_gz=RUN,
        corpus_jsonl=None, corpus_jsonl_gz=CORPUS, qrels_txt=None,
        qrels__test_tsv="query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\td2\t0\nq2\td3\t1\n",
    )  # fmt: skip
    assert load(packed) == plain


def test_another_run_of_the_folder_or_of_anywhere_is_named_after_its_file(folder, file):
    spec = folder(dense_trec="q1 Q0 d2 1 1 x\nq2 Q0 d3 1 1 x\n")
    elsewhere = file("else/my.run.trec", RUN)
    assert load(spec, "dense").first_stage == "dense"
    assert ranked(load(spec, "dense.trec")) == {"q1": ["d2"], "q2": ["d3"]}
    assert load(spec, str(elsewhere)).first_stage == "my.run"


@pytest.mark.parametrize("asked", ["bm25", "run"])
def test_a_first_stage_that_is_not_there_is_missing(folder, asked):
    with pytest.raises(MissingResourceError, match=f"first stage '{asked}'"):
        load(folder(run_trec=None), asked)


@pytest.mark.parametrize("absent", ["queries_tsv", "qrels_txt"])
def test_a_folder_without_queries_or_judgements_is_missing_something(folder, absent):
    with pytest.raises(MissingResourceError, match="expected "):
        load(folder(**{absent: None}))


@pytest.mark.parametrize(
    "names",
    [
        ("queries.jsonl", "corpus.jsonl", "qrels/test.tsv"),  # BEIR
        ("topics.tsv", "collection.tsv", "qrels.txt"),  # MS MARCO, Anserini
        ("topics.tsv.gz", "collection/part0.jsonl.gz", "qrels.tsv"),
    ],
)
def test_folders_of_beir_and_anserini_read_alike(names, folder, file):
    texts = {
        "queries.jsonl": '{"_id": "q1", "text": "first question"}\n',
        "topics.tsv": "q1\tfirst question\n",
        "corpus.jsonl": '{"_id": "d1", "text": "the first"}\n{"_id": "d2", "text": "a second"}\n',
        "collection.tsv": "d1\tthe first\nd2\ta second\n",
        "part0.jsonl": '{"id": "d1", "contents": "the first"}\n{"id": "d2", "contents": "a second"}\n',
        "test.tsv": "query-id\tcorpus-id\tscore\nq1\td1\t1\n",
        "qrels.txt": "q1 0 d1 1\n",
        "qrels.tsv": "q1\t0\td1\t1\n",
    }
    for name in names:
        file(f"set/{name}", texts[name.rpartition("/")[2].removesuffix(".gz")])
    home = file("set/mark", "").parent
    data = load(DatasetSpec("set", "folder", str(home)))
    assert ranked(data) == {"q1": ["d1"]}
    assert data.queries[0].candidates[0].text == "the first"
    assert data.stated == "bm25s, k1=0.9, b=0.4, English stop words"


def test_a_folder_may_lack_texts_when_it_has_a_run(folder):
    data = load(folder(corpus_jsonl=None))
    assert not data.has_texts
    assert ranked(data) == {"q1": ["d1", "d2"], "q2": ["d3", "d1"]}
    with pytest.raises(MissingResourceError, match="expected a corpus"):
        load(folder(corpus_jsonl=None, run_trec=None))


def test_a_document_absent_from_the_corpus_is_named(folder):
    spec = folder(run_trec=RUN + "q2 Q0 d9 3 1 x\n")
    with pytest.raises(
        DataError, match=r"stage run: document 'd9' of query 'q2' is not in the collection"
    ):
        load(spec)


def test_equal_documents_twice_pass_and_different_ones_do_not(folder):
    assert load(folder(corpus_jsonl=CORPUS + CORPUS)) == load(folder())
    for run in (RUN, None):
        spec = folder(corpus_jsonl=CORPUS + '{"_id": "d3", "text": "other"}\n', run_trec=run)
        with pytest.raises(DataError, match=r"corpus\.jsonl:4: document 'd3' appears twice"):
            load(spec)


def test_a_judged_query_without_candidates_counts(folder):
    spec = folder(qrels_txt=QRELS + "q3 0 d1 1\n", run_trec="q1 Q0 d1 1 3 x\n")
    data = load(spec)
    assert ranked(data) == {"q1": ["d1"], "q2": [], "q3": []}
    assert data.warnings["queries_without_candidates"] == 2
    assert data.warnings["judged_queries_without_a_query_text"] == 1


def test_candidates_without_judgements_do_not_count(folder):
    data = load(folder(qrels_txt="q1 0 d1 1\n"))
    assert ranked(data) == {"q1": ["d1", "d2"]}
    assert data.warnings["queries_without_judgements"] == 1


def test_the_first_of_repeated_candidates_is_kept_and_counted(folder):
    data = load(folder(run_trec=RUN + "q1 Q0 d1 3 1.5 x\n"))
    assert [(c.docid, c.score) for c in data.queries[0].candidates] == [("d1", 3.5), ("d2", 2.5)]
    assert data.warnings["duplicate_candidates_removed"] == 1


def test_excluded_documents_leave_before_the_cut_to_the_depth(folder):
    data = load(folder(qrels_txt="q1 0 d1 -100\nq1 0 d2 1\nq2 0 d3 -100\n"), depth=1)
    assert ranked(data) == {"q1": ["d2"]}
    assert data.qrels == {"q1": {"d2": 1}}
    assert data.warnings["excluded_candidates_removed"] == 1


def test_other_negative_grades_stay(folder):
    data = load(folder(qrels_txt="q1 0 d1 -2\nq1 0 d2 1\n"))
    assert data.qrels == {"q1": {"d1": -2, "d2": 1}}
    assert ranked(data) == {"q1": ["d1", "d2"]}


def test_one_candidate_is_enough(folder):
    assert ranked(load(folder(run_trec="q2 Q0 d1 1 1 x\n"))) == {"q1": [], "q2": ["d1"]}


def test_ties_and_empty_passages_are_counted(folder):
    corpus = CORPUS.replace("a third", "  ")
    data = load(folder(corpus_jsonl=corpus, run_trec=RUN.replace("2.5", "3.5")))
    assert data.warnings["tied_first_stage_scores"] == 1
    assert data.warnings["candidates_with_empty_text"] == 1


def test_depth_and_limit_cut(folder):
    assert ranked(load(folder(), depth=1)) == {"q1": ["d1"], "q2": ["d3"]}
    assert ranked(load(folder(), limit=1)) == {"q1": ["d1", "d2"]}
    for wrong in ({"depth": 0}, {"depth": -1}, {"limit": 0}):
        with pytest.raises(DataError, match="of at least 1"):
            load(folder(), **wrong)


def test_nothing_judged_or_nothing_found_is_invalid(folder):
    with pytest.raises(DataError, match="no query has a judgement"):
        load(folder(qrels_txt="q1 0 d1 -100\n"))
    with pytest.raises(DataError, match="no query has a candidate"):
        load(folder(run_trec="q7 Q0 d1 1 1 x\n"))
    with pytest.raises(DataError, match="holds no document with a text"):
        load(folder(run_trec=None, corpus_jsonl='{"_id": "d1", "text": " "}\n'))


def requests_spec(file, name, text, qrels="1 0 d1 2\n1 0 d2 0\nq2 0 d3 1\n"):
    path, judged = file(name, text), file("judged.txt", qrels)
    return DatasetSpec("small", "requests", str(path), str(judged), first_stage="requests")


def test_a_request_file_with_judgements_is_a_dataset(file):
    data = load(requests_spec(file, "requests.json", json.dumps([HITS])))
    assert ranked(data) == {"1": ["d1", "d2"], "q2": []}
    assert data.first_stage == "requests"
    with pytest.raises(DataError, match="add --qrels FILE"):
        load(DatasetSpec("small", "requests", "requests.json"))


def test_only_content_changes_the_hash(file):
    base = load(requests_spec(file, "requests.json", json.dumps([HITS], indent=2)))
    same = load(requests_spec(file, "other.jsonl.gz", json.dumps(CANDIDATES)))
    beir = "query-id\tcorpus-id\tscore\nq2\td3\t1\n1\td2\t0\n1\td1\t2\n"
    also = load(requests_spec(file, "requests.json", json.dumps([HITS]), beir))
    assert base.sha256 == same.sha256 == also.sha256
    assert base.run_sha256 == same.run_sha256
    swapped = {**HITS, "hits": HITS["hits"][::-1]}
    changed = [
        load(requests_spec(file, "requests.json", json.dumps([item])))
        for item in (
            {**HITS, "query": "first question "},
            with_first(HITS, "hits", content="The first"),
            with_first(HITS, "hits", title="T"),
            with_first(HITS, "hits", score=2.25),
            with_first(HITS, "hits", docid="d9"),
            swapped,
        )
    ]
    graded = load(requests_spec(file, "requests.json", json.dumps([HITS]), "1 0 d1 1\nq2 0 d3 1\n"))
    hashes = [c.sha256 for c in (base, *changed, graded)]
    assert len(set(hashes)) == len(hashes)
    assert [c.run_sha256 == base.run_sha256 for c in changed] == [
        True,
        True,
        True,
        False,
        False,
        False,
    ]


def test_a_folder_and_a_request_file_with_the_same_content_have_one_hash(folder, file):
    spec = folder(qrels_txt="q1 0 d1 1\n", run_trec="q1 Q0 d1 1 3.50 x\n")
    request = {
        "query": {"qid": "q1", "text": "first question"},
        "candidates": [
            {"docid": "d1", "score": 3.5, "doc": {"title": "One", "text": "the first passage"}}
        ],
    }
    same = load(requests_spec(file, "same.jsonl", json.dumps(request), "q1 0 d1 1\n"))
    assert load(spec).sha256 == same.sha256


def test_a_dataset_in_a_foreign_index_says_what_to_bring():
    with pytest.raises(MissingResourceError, match="or a request file as the dataset"):
        load(DatasetSpec("news", "pyserini"))
    with pytest.raises(MissingResourceError, match="--first-stage FILE"):
        load(DatasetSpec("dl19", "irds", irds="msmarco-passage/trec-dl-2019/judged"))


# --- run files that others publish --------------------------------------------------------------

LAYOUTS = {
    "runs_bm25/bm25.biology.filtered.trec": ("bm25", "biology"),
    "bm25_gpt4_run/earth_science.trec": ("bm25+gpt4_reason", "earth_science"),
    "bm25_gpt4_run/bm25.pony.filtered.trec": ("bm25+gpt4_reason", "pony"),
    "runs/aops/reasonir_gpt4cot_top100.txt": ("reasonir+gpt4_reason", "aops"),
    "bright/stackoverflow/reasonir_gpt4cot_top100.trec.gz": ("reasonir+gpt4_reason", "stackoverflow"),
    "runs/economics/custom.txt": ("custom", "economics"),
    "runs/biology/e5-mistral-7b-instruct_top100.txt": ("e5-mistral-7b-instruct", "biology"),
    "run.msmarco-v1-passage.bm25-default.dl19.txt": ("bm25", "dl19"),
    "dl19/bm25.trec": ("bm25", ""),
    "mine/dense.v2.trec": ("dense.v2", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_run_files_of_rank_r1_and_reasonrank_say_what_they_are(name, tmp_path):
    found = libraries.layout(tmp_path / name)
    assert (found.first_stage, found.dataset) == LAYOUTS[name]
    if found.dataset:
        [spec] = Registry().find_datasets(found.dataset)
        assert spec.name in (f"bright/{found.dataset}", found.dataset)


def test_the_layout_names_the_first_stage_of_a_cell(folder, file):
    run = file("runs/biology/reasonir_gpt4cot_top100.txt", "q1 Q0 d1 1 0.4589 reasonir\n")
    assert load(folder(), str(run)).first_stage == "reasonir+gpt4_reason"
