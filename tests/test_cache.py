"""The call cache: what makes two calls the same, and what damage does to it."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.cache import Cache, Identity
from harness.types import Completion, DataError, Message, Request

REQUEST = Request(messages=(Message("user", "hello"),), max_tokens=5, shown=("d1",))
ANSWER = Completion(text="[1] ü \ud800 \x00", scores=(-0.1, -2.5), prompt_tokens=3, decode=0.125)


def test_an_answer_comes_back_as_it_was_stored(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "a" / "calls.sqlite")
    key = Identity({"m": 1}).key(REQUEST)
    cache.put_many([(key, ANSWER)])
    cache.close()
    assert Cache(tmp_path / "a" / "calls.sqlite").get_many([key, b"other"]) == {key: ANSWER}


CHANGES = [
    {"messages": (Message("system", "hello"),)},
    {"messages": (Message("user", "hello "),)},
    {"messages": (Message("user", "hel"), Message("user", "lo"))},
    {"text": "hello"},
    {"prefill": "x"},
    {"bos": True},
    {"max_tokens": 6},
    {"exact_length_of": "[1]"},
    {"stop": ("x",)},
    {"labels": ("x",)},
    {"continuation": "x"},
]


def test_everything_that_reaches_the_engine_is_part_of_the_key() -> None:
    identity = Identity({"engine": "hf"})
    keys = {identity.key(REQUEST)} | {identity.key(replace(REQUEST, **c)) for c in CHANGES}
    assert len(keys) == len(CHANGES) + 1
    assert Identity({"engine": "vllm"}).key(REQUEST) not in keys
    assert Identity({"engine": "hf"}, replicate=1).key(REQUEST) not in keys


def test_what_was_shown_for_the_trace_is_not_part_of_the_key() -> None:
    identity = Identity({})
    other = replace(REQUEST, shown=("d2",))
    assert identity.key(REQUEST) == identity.key(other)
    assert other == REQUEST
    assert hash(other) == hash(REQUEST)


@given(st.lists(st.text(), min_size=1, max_size=4), st.lists(st.text(), min_size=1, max_size=4))
def test_different_messages_never_share_a_key(one: list[str], two: list[str]) -> None:
    identity = Identity({})
    first = Request(messages=tuple(Message("user", t) for t in one))
    second = Request(messages=tuple(Message("user", t) for t in two))
    assert (identity.key(first) == identity.key(second)) == (one == two)


def test_the_first_answer_to_a_call_stays() -> None:
    cache = Cache(None)
    cache.put_many([(b"k", ANSWER), (b"k", Completion(text="later"))])
    cache.put_many([(b"k", Completion(text="much later"))])
    assert cache.get_many([b"k"]) == {b"k": ANSWER}
    assert cache.count() == 1


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE calls SET value = replace(value, '1', '2')",
        "UPDATE calls SET value = substr(value, 1, 20)",
        "UPDATE calls SET crc = crc + 1",
        "UPDATE calls SET value = x'00ff'",
    ],
)
def test_a_damaged_row_is_a_miss_with_a_warning_and_is_replaced(
    tmp_path: Path, damage: str
) -> None:
    path = tmp_path / "calls.sqlite"
    cache = Cache(path)
    cache.put_many([(b"k", ANSWER)])
    cache.close()
    with sqlite3.connect(path) as db:
        db.execute(damage)
    cache = Cache(path)
    with pytest.warns(UserWarning, match="damaged row"):
        assert cache.get_many([b"k"]) == {}
    cache.put_many([(b"k", Completion(text="again"))])
    assert cache.get_many([b"k"])[b"k"].text == "again"


def test_a_file_that_is_no_cache_is_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "calls.sqlite"
    path.write_text("not a database, but long enough to be taken for one" * 50)
    with pytest.raises(DataError, match=r"calls\.sqlite: cannot be used as a call cache"):
        Cache(path)


def test_a_cache_of_a_newer_version_is_refused_untouched(tmp_path: Path) -> None:
    path = tmp_path / "calls.sqlite"
    cache = Cache(path)
    cache.put_many([(b"k", ANSWER)])
    cache.close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version=99")
    with pytest.raises(DataError, match="newer version"):
        Cache(path)
    with sqlite3.connect(path) as db:
        assert db.execute("SELECT COUNT(*) FROM calls").fetchone() == (1,)


def test_merging_takes_over_sound_rows_once(tmp_path: Path) -> None:
    one, two = Cache(tmp_path / "1"), Cache(tmp_path / "2")
    one.put_many([(b"a", ANSWER), (b"b", ANSWER)])
    two.put_many([(b"b", Completion(text="other")), (b"c", ANSWER)])
    assert one.merge(two) == 1
    assert one.count() == 3
    assert one.get_many([b"b"]) == {b"b": ANSWER}


WRITER = """
import sys
from pathlib import Path
from harness.cache import Cache
from harness.types import Completion
cache = Cache(Path(sys.argv[1]))
for n in range(60):
    cache.put_many([(f"{n}".encode(), Completion(text=f"{n}"))])
"""


def test_four_processes_share_one_file_without_losing_or_doubling_a_row(tmp_path: Path) -> None:
    path = tmp_path / "calls.sqlite"
    runs = [subprocess.Popen([sys.executable, "-c", WRITER, str(path)]) for _ in range(4)]
    assert [run.wait(timeout=120) for run in runs] == [0] * 4
    cache = Cache(path)
    assert cache.count() == 60
    assert {k: c.text for k, c in cache.rows() if c} == {f"{n}".encode(): f"{n}" for n in range(60)}


def test_many_keys_are_found_in_one_question() -> None:
    cache = Cache(None)
    keys = [n.to_bytes(4, "big") for n in range(3000)]
    cache.put_many((k, Completion(text=k.hex())) for k in keys)
    found = cache.get_many(keys)
    assert len(found) == 3000
    assert found[keys[2999]].text == keys[2999].hex()
