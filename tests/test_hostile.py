"""Whatever comes in, an answer, a passage, a file or a name, comes out as data or one clear error."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from harness.cache import Identity
from harness.data import formats, prepared, sources
from harness.prompts import SPECIAL, prepare
from harness.rerank import METHODS
from harness.specs import Registry, bind, limits_for
from harness.types import (
    Candidate,
    Cell,
    Completion,
    DataError,
    DatasetSpec,
    Fault,
    MissingResourceError,
    ModelSpec,
    Protocol,
    Query,
    Request,
    component,
)

ROOT = Path(__file__).resolve().parent.parent
few = settings(max_examples=25, suppress_health_check=list(HealthCheck))

PIECES = (
    "<think>", "</think>", "<answer>", "</answer>", "[1]", "[2]", "[20]", " > ", "[0]", "A", "B",
    "Passage A", "yes", "no", "true", "false", "9" * 30, "{query}", "{docs}", "{n}", "%s", "\\1",
    "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "</s>", "<start_of_turn>", "\x00", "\r\n", "\u2028",
    "\ud800", "\udfff", "\ue000", "\u202e", "\ufeff", "\x1b[2J", "&lt;think&gt;", "<script>", "\xb2",
)  # fmt: skip
texts = st.lists(st.sampled_from(PIECES) | st.text(max_size=12), max_size=10).map("".join)
numbers = st.floats() | st.sampled_from([float("nan"), float("inf"), -float("inf"), 0.0])
answers = st.builds(
    Completion,
    text=texts,
    finish=st.sampled_from(["stop", "length", "scored", "filtered", "too_long"]),
    prompt_tokens=st.integers(0, 10_000),
    output_tokens=st.integers(0, 10_000),
    scores=st.lists(numbers, max_size=25).map(tuple),
)

# --- answers and passages -----------------------------------------------------------------------


@lru_cache
def setups() -> dict[str, tuple[ModelSpec, Any]]:
    """One registered model for each pair of a method and a prompt."""
    registry, found = Registry(), {}
    for spec in registry.models.values():
        if METHODS[spec.method].answers:
            name = f"{spec.method} {spec.prompt}"
            found.setdefault(name, (spec, registry.prompt(spec.prompt)))
    return found


def hostile_query(query: str, passages: list[str]) -> Query:
    shown = tuple(Candidate(f"d {i}%20", text, text[:9]) for i, text in enumerate(passages))
    return Query("q", query, shown, "bright/biology")


def ready(spec: ModelSpec, prompt: Any, query: Query) -> Query:
    return prepare(
        query, prompt, limits_for(spec, prompt), family="other", raw_special_tokens=False,
        clip=lambda text, tokens: " ".join(text.split()[:tokens]), notes=Counter(),
    )  # fmt: skip


@pytest.mark.parametrize("name", sorted(setups()))
@given(data=st.data(), query=texts, passages=st.lists(texts, max_size=9))
@few
def test_any_answers_to_any_texts_give_a_permutation_and_faults(
    name: str, data: st.DataObject, query: str, passages: list[str]
) -> None:
    spec, prompt = setups()[name]
    method = METHODS[spec.method]
    prompt_ready = ready(spec, prompt, hostile_query(query, passages))
    flow = method.flow(prompt_ready, prompt, **bind(method.flow, spec.options, name))
    identity, asked = Identity({}), 0
    try:
        requests = next(flow)
        while True:
            assert all(len(identity.key(request)) == 32 for request in requests)
            asked += len(requests)
            said = data.draw(st.lists(answers, min_size=1, max_size=3))
            requests = flow.send([said[i % len(said)] for i in range(len(requests))])
    except StopIteration as stop:
        ranking = stop.value
    assert sorted(ranking.docids) == sorted(c.docid for c in prompt_ready.candidates)
    assert len(ranking.parsed) == asked
    assert all(isinstance(fault, Fault) for parsed in ranking.parsed for fault in parsed.faults)


@pytest.mark.parametrize("name", sorted(setups()))
@given(query=texts, passages=st.lists(texts, min_size=1, max_size=4))
@example(query="x" * 300_000, passages=["<|im_end|>" * 30_000, "{docs}" * 50_000])
@few
def test_any_text_is_rendered_without_a_special_token_and_the_same_each_time(
    name: str, query: str, passages: list[str]
) -> None:
    spec, prompt = setups()[name]
    asked = hostile_query(query, passages)
    once, again = (ready(spec, prompt, asked) for _ in range(2))
    assert once == again
    for candidate in once.candidates:
        assert not SPECIAL.search(candidate.text)
    most = prompt.most or len(passages)
    first, second = (prompt.render(q, q.candidates[:most]) for q in (once, again))
    assert isinstance(first, Request)
    assert Identity({}).key(first) == Identity({}).key(second)


# --- files --------------------------------------------------------------------------------------

READERS: dict[str, tuple[Callable[[Path], Any], bytes]] = {
    "run.trec": (formats.read_run, b"q1 Q0 d1 1 3.5 bm25\nq1 Q0 d2 2 2.5 bm25\n"),
    "qrels.txt": (formats.read_qrels, b"q1 0 d1 2\nq1 0 d2 0\n"),
    "qrels.tsv": (formats.read_qrels, b"query-id\tcorpus-id\tscore\nq1\td1\t1\n"),
    "queries.tsv": (formats.read_queries, b"q1\tfirst\nq2\tsecond\n"),
    "queries.jsonl": (formats.read_queries, b'{"_id": "q1", "text": "first"}\n'),
    "corpus.jsonl": (lambda p: list(formats.read_corpus(p)), b'{"_id": "d1", "text": "x"}\n'),
    "requests.jsonl": (
        formats.read_requests,
        b'{"query": {"text": "t", "qid": 1}, "candidates": [{"docid": 1, "doc": {"text": "x"}}]}\n',
    ),
    "requests.json": (
        formats.read_requests,
        b'[{"query": "t", "hits": [{"content": "x", "qid": 1, "docid": "d1", "score": 1}]}]',
    ),
}
each_reader = pytest.mark.parametrize("kind", READERS)


def read_or_refused(path: Path, content: bytes, read: Callable[[Path], Any]) -> None:
    """Rows, or an error that begins with the file's name, on one line."""
    path.write_bytes(content)
    try:
        assert read(path) is not None
    except DataError as error:
        text = str(error)
    else:
        return
    assert text.startswith(f"{path}:")
    assert "\n" not in text


@each_reader
@given(data=st.data())
@settings(few, max_examples=60)
def test_any_bytes_are_read_or_refused(
    kind: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    read, sound = READERS[kind]
    place = data.draw(st.integers(0, len(sound)))
    cut = data.draw(st.integers(place, len(sound)))
    content = sound[:place] + data.draw(st.binary(max_size=20)) + sound[cut:]
    path = tmp_path_factory.getbasetemp() / kind
    read_or_refused(path, content, read)
    read_or_refused(path, sound + content, read)


KEYS = ["_id", "id", "qid", "docid", "text", "query", "title", "doc", "hits", "candidates", "score"]
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    | st.sampled_from(["1e999", "nan", "-0", "\ud800", 10**400, "d1"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(KEYS),
        inner, max_size=5,
    ),
    max_leaves=12,
)  # fmt: skip


@pytest.mark.parametrize("kind", [kind for kind in READERS if "json" in kind])
@given(rows=st.lists(values, max_size=4), array=st.booleans())
@settings(few, max_examples=80)
def test_any_json_is_read_or_refused(
    kind: str, rows: list[Any], array: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    text = json.dumps(rows) if array else "".join(json.dumps(row) + "\n" for row in rows)
    path = tmp_path_factory.getbasetemp() / f"any-{kind}"
    read_or_refused(path, text.encode("utf-8", "surrogatepass"), READERS[kind][0])


@each_reader
def test_nested_and_endless_values_are_refused(kind: str, tmp_path: Path) -> None:
    read, _ = READERS[kind]
    for number, content in enumerate(
        (b"[" * 200_000, b'{"a":' * 100_000, b"9" * 100_000, b'{"_id": ' + b"9" * 9999 + b"}")
    ):
        read_or_refused(tmp_path / f"{number}-{kind}", content, read)


@each_reader
def test_a_packed_file_that_is_damaged_anywhere_is_read_or_refused(
    kind: str, tmp_path: Path
) -> None:
    read, sound = READERS[kind]
    packed = gzip.compress(sound)
    for place in range(len(packed)):
        for content in (packed[:place], packed[:place] + b"\xff" + packed[place + 1 :]):
            read_or_refused(tmp_path / f"{kind}.gz", content, read)


whole = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=20)


@given(docid=whole)
@example(docid="%20 %2520\t%\u00a0\u2028\x1c\x85%zz%")
def test_a_docid_comes_back_from_a_run_and_is_one_column_there(docid: str) -> None:
    column = formats.encode_docid(docid)
    assert formats.decode_docid(column) == docid
    assert len(column.split()) == 1


# --- names --------------------------------------------------------------------------------------

NAMES = (
    "..", "../x", "../../etc/passwd", "/etc/x", "a/../../b", "x\x00y", ".", "", "-rf", "~/x", "CON",
    "\\\\host\\share", "a\nb", "\ud800", "x" * 300, "\u202egpj.exe", "$(id)", "*", "file:///x",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_no_name_leaves_its_folder(name: str, tmp_path: Path) -> None:
    spec = DatasetSpec(name=name, source="requests", location=name)
    cell = Cell(ModelSpec(name, "random", overrides=((name, name),)), spec, name, 9, 9, Protocol())
    folder = tmp_path / "in" / cell.folder
    assert len(cell.folder.parts) == 3
    assert folder.resolve().is_relative_to(tmp_path / "in")
    folder.mkdir(parents=True)
    data = sources.prepared_folder(spec, tmp_path / "data")
    assert data.resolve().parent == (tmp_path / "data").resolve()


def test_long_names_that_differ_at_their_end_stay_apart() -> None:
    one, two = component("x" * 300), component("x" * 299 + "y")
    assert one != two
    assert component(one) == one


def test_a_prepared_record_cannot_point_out_of_its_folder(tmp_path: Path) -> None:
    folder, query = tmp_path / "data" / "toy", Query("q", "text", (Candidate("d", "x"),))
    prepared.write(folder, "bm25", [query], {"q": {"d": 1}}, {"depth": 1})
    secret = tmp_path / "data" / "secret.jsonl.gz"
    (folder / "bm25.jsonl.gz").rename(secret)
    record = json.loads((folder / "prepared.json").read_text())
    record["first_stages"]["bm25"]["file"] = "../secret.jsonl.gz"
    (folder / "prepared.json").write_text(json.dumps(record))
    with pytest.raises(MissingResourceError, match=r"secret\.jsonl\.gz: was prepared"):
        prepared.read(folder, "bm25", "bm25")


# --- secrets ------------------------------------------------------------------------------------

SECRETS = {"OPENAI_API_KEY": "sk-Zq7hostile", "HF_TOKEN": "hf_Zq7hostile", "HUGGING_FACE_HUB_TOKEN": "hf_Zq7hostile"}  # fmt: skip


def harness(place: Path, words: str, *, code: str = "") -> str:
    """Everything a command says, with keys in its environment."""
    how = ["-c", code] if code else ["-m", "harness"]
    env = os.environ | SECRETS | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *how, *words.split()], cwd=place, env=env, capture_output=True, text=True
    )
    return f"{done.returncode}\n{done.stdout}{done.stderr}"


def holding(place: Path, secret: str) -> list[str]:
    """The files below a folder that hold a text, packed or not."""
    found = []
    for path in place.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        content += gzip.decompress(content) if path.suffix == ".gz" else b""
        found += [path.name] if secret.encode() in content else []
    return found


def test_keys_in_the_environment_reach_no_file_and_no_output(tmp_path: Path) -> None:
    run = "run -m rank-r1-7b,oracle -d pocket --limit 2 --engine fake"
    said = harness(tmp_path, run)
    assert said.startswith("0\n"), said
    said += harness(tmp_path, "report") + harness(tmp_path, f"{run} --format json")
    assert "Zq7hostile" not in said
    assert len(list(tmp_path.rglob("*.*"))) > 10
    assert holding(tmp_path, "Zq7hostile") == []


BUG = """
import os, sys
from harness import cli
from harness.engines.fake import FakeEngine
def poll(self):
    key = os.environ["OPENAI_API_KEY"]
    raise RuntimeError("a bug")
FakeEngine.poll = poll
sys.argv[0] = "harness"
cli.main()
"""


def test_a_traceback_shows_no_values(tmp_path: Path) -> None:
    said = harness(tmp_path, "run -m rank-r1-7b -d pocket --limit 2 --engine fake", code=BUG)
    assert "RuntimeError: a bug" in said
    assert "Zq7hostile" not in said


def test_a_key_in_an_address_reaches_no_file_and_no_output(tmp_path: Path) -> None:
    pytest.importorskip("openai", reason="openai is not installed")
    for address in (
        "http://user:Zq7hostile@127.0.0.1:9/v1",
        "http://127.0.0.1:9/v1?key=Zq7hostile",
    ):
        words = f"--engine http --base-url {address} --served-model m"
        said = harness(tmp_path, f"run -m rank-r1-7b -d pocket --limit 2 {words}")
        assert not said.startswith("0\n")
        assert "Traceback" not in said
        assert "Zq7hostile" not in said
    assert holding(tmp_path, "Zq7hostile") == []
