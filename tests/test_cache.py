"""The call cache: what makes two calls the same, and what damage does to it."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

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


# --- damaged files ------------------------------------------------------------------------------

ROWS = 60


def answer(n: int) -> Completion:
    return Completion(text=f"answer {n} " * (n % 40), prompt_tokens=n, scores=(-float(n),))


def keyed(n: int) -> bytes:
    return Identity({"engine": "fake"}).key(replace(REQUEST, prefill=str(n % 3), text=f"call {n}"))


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of some pages, closed properly."""
    path = tmp_path_factory.mktemp("sound") / "calls.sqlite"
    cache = Cache(path)
    for n in range(ROWS):
        cache.put_many([(keyed(n), answer(n))])
    cache.close()
    return path


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a killed process leaves it: half of the answers are in the log alone."""
    folder = tmp_path_factory.mktemp("unfinished")
    cache = Cache(folder / "work" / "calls.sqlite")
    for n in range(ROWS):
        cache.put_many([(keyed(n), answer(n))])
        if n == ROWS // 2:
            cache._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    shutil.copytree(folder / "work", folder / "left")
    cache.close()
    return folder / "left"


def outcome(path: Path) -> str:
    """How a damaged cache is met: an error, or how many answers it still gives.

    Never a wrong answer. Storing again repairs it, or not, where the index is damaged: then some
    calls are asked every time, and `cache verify` says so.
    """
    wanted = {keyed(n): answer(n) for n in range(ROWS)}
    try:
        cache = Cache(path)
    except DataError as error:
        return "refused" if str(error).startswith(f"{path}: ") else repr(error)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = cache.get_many(list(wanted))
            assert all(wanted[key] == completion for key, completion in found.items())
            cache.put_many(wanted.items())
            after = cache.get_many(list(wanted))
        assert all(wanted[key] == completion for key, completion in after.items())
        assert len(after) == ROWS or cache.fault()
    except DataError as error:
        clear = str(error).startswith(f"{path}: cannot store answers: ")
        return "not repaired" if clear else repr(error)
    finally:
        cache.close()
    return f"{len(found) * 4 // ROWS} quarters found"


def test_a_flipped_byte_is_never_a_wrong_answer(sound: Path, tmp_path: Path) -> None:
    whole, rng, path = sound.read_bytes(), Random(929), tmp_path / "calls.sqlite"
    places = [*range(16, 100, 3), *(rng.randrange(len(whole)) for _ in range(200))]
    met = set()
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        met.add(outcome(path))
    assert {"refused", "3 quarters found", "4 quarters found"} <= met
    assert met <= {"refused", "not repaired", *(f"{n} quarters found" for n in range(5))}


def test_an_index_that_leads_to_another_call_s_row_is_a_miss(sound: Path, tmp_path: Path) -> None:
    path, damaged, one, two = tmp_path / "calls.sqlite", bytearray(sound.read_bytes()), 5, 9
    with sqlite3.connect(sound) as db:
        pages = [page for (page,) in db.execute("SELECT pageno FROM dbstat WHERE name = 'by_key'")]
    for n, other in ((one, two), (two, one)):
        places = [damaged.find(keyed(n), page * 4096 - 4096, page * 4096) for page in pages]
        [place] = [place for place in places if place > 0]
        assert damaged[place + 32] == n + 1, "the row's number follows the key"
        damaged[place + 32] = other + 1
    path.write_bytes(damaged)
    cache = Cache(path)
    with pytest.warns(UserWarning, match="damaged row"):
        assert cache.get_many([keyed(one)]) == {}
    assert cache.fault()
    cache.close()


def test_a_truncated_file_is_refused_or_gives_what_it_has(sound: Path, tmp_path: Path) -> None:
    whole, path = sound.read_bytes(), tmp_path / "calls.sqlite"
    sizes = [15, 16, 50, 99, 100, 101, 511, 512, 4095, 4096, 4097, 8191, 8192, 9000]
    sizes += [len(whole) // 2, len(whole) - 4097, len(whole) - 4096]
    for size in sizes:
        path.write_bytes(whole[:size])
        assert outcome(path) in ("refused", "not repaired"), size
    for size in (0, 1):  # an empty file is what a process killed at its very start leaves
        path.write_bytes(whole[:size])
        assert outcome(path) == "0 quarters found"


def test_a_log_that_is_gone_or_cut_off_or_damaged_only_loses_answers(
    unfinished: Path, tmp_path: Path
) -> None:
    log, rng = (unfinished / "calls.sqlite-wal").read_bytes(), Random(929)
    assert len(log) > 4096

    def met(damaged: bytes | None) -> str:
        shutil.copytree(unfinished, tmp_path / "r", dirs_exist_ok=True)
        place = tmp_path / "r" / "calls.sqlite-wal"
        place.unlink() if damaged is None else place.write_bytes(damaged)
        return outcome(tmp_path / "r" / "calls.sqlite")

    assert met(log) == "4 quarters found"
    assert met(None) == "2 quarters found"
    cuts = [0, 1, 31, 32, 40, 4000, *(rng.randrange(len(log)) for _ in range(20)), len(log) - 1]
    seen = {met(log[:size]) for size in cuts}
    for _ in range(60):
        damaged = bytearray(log)
        damaged[rng.randrange(len(log))] ^= 1 << rng.randrange(8)
        seen.add(met(bytes(damaged)))
    assert seen == {"2 quarters found", "3 quarters found"}


def test_text_in_a_row_that_is_no_text_costs_that_row_alone(sound: Path, tmp_path: Path) -> None:
    path = tmp_path / "calls.sqlite"
    shutil.copy(sound, path)
    with sqlite3.connect(path) as db:
        db.execute("UPDATE calls SET value = CAST(x'ff22fe' AS TEXT) WHERE key = ?", (keyed(7),))
    cache = Cache(path)
    with pytest.warns(UserWarning, match=f"damaged row {keyed(7).hex()[:12]}, asked again"):
        assert len(cache.get_many([keyed(n) for n in range(ROWS)])) == ROWS - 1
    cache.put_many([(keyed(7), answer(7))])
    assert cache.get_many([keyed(7)]) == {keyed(7): answer(7)}
    cache.close()


def test_what_precedes_the_damage_is_saved_by_a_merge(sound: Path, tmp_path: Path) -> None:
    path, whole = tmp_path / "calls.sqlite", bytearray(sound.read_bytes())
    with sqlite3.connect(sound) as db:
        sql = "SELECT MAX(pageno) FROM dbstat WHERE name = 'calls' AND pagetype = 'leaf'"
        [last] = db.execute(sql).fetchone()
    whole[(last - 1) * 4096] = 0xFF
    path.write_bytes(whole)
    fresh, damaged = Cache(tmp_path / "new"), Cache(path)
    with pytest.raises(DataError, match=r"calls\.sqlite: cannot be read: "):
        fresh.merge(damaged)
    assert 0 < fresh.count() < ROWS
    for cache in (fresh, damaged):
        cache.close()


# --- files that are none of ours, or cannot be written ------------------------------------------


def test_a_file_that_is_no_cache_is_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "calls.sqlite"
    path.write_text("not a database, but long enough to be taken for one" * 50)
    with pytest.raises(DataError, match=r"calls\.sqlite: cannot be used as a call cache"):
        Cache(path)


def test_a_database_of_another_program_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "bookmarks.sqlite"
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE bookmarks(url TEXT)")
    before = path.read_bytes()
    with pytest.raises(DataError, match=r"bookmarks\.sqlite: is a database of another program"):
        Cache(path)
    assert path.read_bytes() == before


def test_a_cache_of_a_newer_version_is_refused_untouched(tmp_path: Path) -> None:
    path = tmp_path / "calls.sqlite"
    cache = Cache(path)
    cache.put_many([(b"k", ANSWER)])
    cache.close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version=99")
    before = path.read_bytes()
    with pytest.raises(DataError, match="newer version"):
        Cache(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("place", ["/proc/calls.sqlite", "/proc/none/calls.sqlite"])
def test_a_folder_that_takes_no_file_is_one_clear_error(place: str) -> None:
    if not Path("/proc/self").exists():
        pytest.skip("there is no /proc, which takes no file even from root")
    with pytest.raises(DataError, match=f"{place}: cannot be used as a call cache: "):
        Cache(Path(place))


def test_a_path_through_a_file_or_to_a_folder_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file" / "calls.sqlite", tmp_path):
        with pytest.raises(DataError, match="cannot be used as a call cache"):
            Cache(path)


def test_a_full_disk_is_one_clear_error_and_nothing_stored_is_lost(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "calls.sqlite")
    cache.put_many([(b"before", ANSWER)])
    pages = cache._db.execute("PRAGMA page_count").fetchone()[0]
    cache._db.execute(f"PRAGMA max_page_count={pages}")
    large = Completion(text="x" * 100_000)
    with pytest.raises(DataError, match=r"calls\.sqlite: cannot store answers: .*full"):
        cache.put_many([(b"small", ANSWER), (b"large", large)])
    assert cache.get_many([b"before", b"small", b"large"]) == {b"before": ANSWER}
    cache._db.execute("PRAGMA max_page_count=100000")
    cache.put_many([(b"small", ANSWER), (b"large", large)])
    assert cache.count() == 3
    cache.close()


class Interrupting:
    """A connection in which Ctrl-C comes at one of its statements."""

    def __init__(self, db: sqlite3.Connection, at: int) -> None:
        self.db, self.left = db, at

    def __getattr__(self, name: str) -> Any:
        if name.startswith("execute"):
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt
        return getattr(self.db, name)


def test_an_interrupt_while_storing_loses_no_answer() -> None:
    items = [(keyed(n), answer(n)) for n in range(3)]
    for at in range(1, 6):  # begin, look, insert, origins, commit
        cache = Cache(None)
        cache._db = Interrupting(cache._db, at)  # type: ignore[assignment]
        with pytest.raises(KeyboardInterrupt):
            cache.put_many(items)
        assert cache.get_many([key for key, _ in items]) == dict(items), at


# --- several files, several processes -----------------------------------------------------------


def test_merging_takes_over_sound_rows_once(tmp_path: Path) -> None:
    one, two = Cache(tmp_path / "1"), Cache(tmp_path / "2")
    one.put_many([(b"a", ANSWER), (b"b", ANSWER)])
    two.put_many([(b"b", Completion(text="other")), (b"c", ANSWER)])
    assert one.merge(two) == 1
    assert one.count() == 3
    assert one.get_many([b"b"]) == {b"b": ANSWER}


def without_origins(path: Path) -> Path:
    """A cache as it was before origins were stored."""
    with sqlite3.connect(path) as db:
        db.execute("DROP TABLE origins")
    return path


def test_a_cache_from_before_origins_is_read_and_goes_on(sound: Path, tmp_path: Path) -> None:
    path = tmp_path / "calls.sqlite"
    shutil.copy(sound, path)
    cache = Cache(without_origins(path))
    assert cache.get_many([keyed(3)]) == {keyed(3): answer(3)}
    assert cache.origins() == []
    cache.put_many([(keyed(ROWS), answer(ROWS))])
    assert len(cache.origins()) == 1
    cache.close()


WRITER = """
import sys
from pathlib import Path
from harness.cache import Cache
from harness.types import Completion
cache = Cache(Path(sys.argv[1]))
for n in range(60):
    cache.put_many([(f"{n}".encode(), Completion(text=f"{n}"))])
"""


@pytest.mark.parametrize("old", [False, True])
def test_four_processes_share_one_file_without_losing_or_doubling_a_row(
    old: bool, tmp_path: Path
) -> None:
    path = tmp_path / "calls.sqlite"
    if old:
        Cache(path).close()
        without_origins(path)
    runs = [subprocess.Popen([sys.executable, "-c", WRITER, str(path)]) for _ in range(4)]
    assert [run.wait(timeout=120) for run in runs] == [0] * 4
    cache = Cache(path)
    assert cache.count() == 60
    assert {k: c.text for k, c in cache.rows() if c} == {f"{n}".encode(): f"{n}" for n in range(60)}
    assert cache.fault() == ""
    cache.close()


def test_many_keys_are_found_in_one_question() -> None:
    cache = Cache(None)
    keys = [n.to_bytes(4, "big") for n in range(3000)]
    cache.put_many((k, Completion(text=k.hex())) for k in keys)
    found = cache.get_many(keys)
    assert len(found) == 3000
    assert found[keys[2999]].text == keys[2999].hex()


# --- why a call is asked ------------------------------------------------------------------------

FINGERPRINT = {
    "engine": "hf",
    "base": {"repo": "org/model", "revision": "main"},
    "dtype": "float32",
}


def asked(**changes: Any) -> Request:
    return replace(REQUEST, stop=("</answer>",), labels=("A", "B"), **changes)


@pytest.mark.parametrize(
    ("fingerprint", "replicate", "changes", "said"),
    [
        ({"dtype": "bfloat16"}, 0, {}, "dtype: 'bfloat16' asked, 'float32' stored"),
        ({"base": {"repo": "org/model", "revision": "v2"}}, 0, {}, "base: {'repo': 'org/model', 'revision': 'v2'} asked"),
        ({"dtype": "float16", "template": {"x": 1}}, 0, {"max_tokens": 9}, "dtype: 'float16' asked"),
        ({"template": {"x": 1}}, 0, {}, "template: {'x': 1} asked, None stored"),
        ({}, 2, {}, "replicate: 2 asked, 0 stored"),
        ({}, 0, {"max_tokens": 9}, "max_tokens: 9 asked, 5 stored"),
        ({}, 0, {"prefill": "<think>"}, "prefill: '<think>' asked, '' stored"),
        ({}, 0, {"stop": ()}, "stop: [] asked, ['</answer>'] stored"),
        ({}, 0, {"messages": (Message("user", "other"),)}, "the texts: no stored call shows them"),
        ({}, 0, {"text": "other"}, "the texts: no stored call shows them"),
    ],
)  # fmt: skip
def test_a_miss_is_explained_by_the_first_field_that_differs(
    fingerprint: dict[str, Any], replicate: int, changes: dict[str, Any], said: str
) -> None:
    cache = Cache(None)
    cache.put_many([(Identity(FINGERPRINT).key(asked()), ANSWER)])
    # With fewer differences, but about something else.
    near = Identity(FINGERPRINT | {"dtype": "bfloat16", "template": {"x": 1}}, replicate)
    other = asked(messages=(Message("user", "something else"),))
    cache.put_many([(near.key(replace(other, max_tokens=9)), ANSWER)])
    question = replace(asked(), **changes)
    assert cache.nearest(Identity(FINGERPRINT | fingerprint, replicate), question).startswith(said)


def test_without_stored_calls_there_is_nothing_to_compare() -> None:
    cache = Cache(None)
    cache.put_many([(b"k", ANSWER)])  # as old caches hold them
    assert cache.nearest(Identity({}), REQUEST) == "no stored call tells what it was"


def test_origins_are_stored_once_and_survive_a_merge(tmp_path: Path) -> None:
    one, two = Cache(tmp_path / "1"), Cache(tmp_path / "2")
    for n in range(5):
        one.put_many([(Identity(FINGERPRINT).key(asked(text=f"{n}")), ANSWER)])
    assert len(one.origins()) == 1
    assert two.merge(one) == 5
    assert two.origins() == one.origins()
    assert (
        two.nearest(Identity(FINGERPRINT), asked(text="1", bos=True))
        == "bos: True asked, False stored"
    )
    for cache in (one, two):
        cache.close()


def test_keys_are_those_of_every_cache_before() -> None:
    known = "9b7977a5428406317e8d8b82cf68684091bb4d473c7ef02d6817bda8fb9b9952"
    assert Identity(FINGERPRINT, 1).key(asked()).hex() == known


# --- the command line ---------------------------------------------------------------------------


def harness(words: str, place: Path) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent), "COLUMNS": "200"}
    command = [sys.executable, "-m", "harness", *words.split()]
    return subprocess.run(command, cwd=place, env=env, capture_output=True, text=True)


def test_why_explains_a_finished_and_a_planned_cell(tmp_path: Path) -> None:
    cell = "-m rank-r1-7b -d pocket --limit 2 --engine fake"
    assert harness(f"run {cell} -q", tmp_path).returncode == 0
    [folder] = tmp_path.glob("results/*/*/*")
    name = "pocket+limit=2 / bm25s / rank-r1-7b"
    for words, said in {
        str(folder): [f"{name}+engine=fake: 0 of 2 queries ask something new"],
        f"{cell} --replicate 1": [
            f"{name}+engine=fake+replicate=1: 2 of 2 queries ask something new",
            "  2 x replicate: 1 asked, 0 stored",
        ],
        "-m oracle -d pocket": ["pocket / bm25s / oracle: asks no engine"],
    }.items():
        done = harness(f"cache why {words}", tmp_path)
        assert (done.stdout.splitlines(), done.stderr, done.returncode) == (said, "", 0)
    for words, said in {
        "results": "holds no cell of `harness run`",
        f"{cell} --cache none.sqlite": "none.sqlite: no such cache file",
    }.items():
        done = harness(f"cache why {words}", tmp_path)
        assert (done.returncode, done.stdout) == (4, "")
        assert said in done.stderr


def test_verify_names_what_is_damaged_and_a_merge_saves_the_rest(
    sound: Path, tmp_path: Path
) -> None:
    path = tmp_path / "calls.sqlite"
    shutil.copy(sound, path)
    done = harness("cache verify calls.sqlite", tmp_path)
    assert (done.stdout, done.returncode) == (f"calls.sqlite: {ROWS} answers, 0 damaged\n", 0)
    with sqlite3.connect(path) as db:
        db.execute("UPDATE calls SET crc = crc + 1 WHERE key = ?", (keyed(3),))
    done = harness("cache verify calls.sqlite", tmp_path)
    assert (done.stdout, done.returncode) == (f"calls.sqlite: {ROWS} answers, 1 damaged\n", 5)
    assert "calls.sqlite: 1 damaged rows; `cache merge NEW calls.sqlite` saves" in done.stderr
    done = harness("cache merge new.sqlite calls.sqlite", tmp_path)
    assert (done.stdout, done.returncode) == (f"calls.sqlite: {ROWS - 1} new answers\n", 0)
    cache = Cache(tmp_path / "odd.sqlite")
    cache.put_many([(b"k", ANSWER)])
    cache.close()
    done = harness("cache export odd.sqlite", tmp_path)
    exported = json.loads(done.stdout)
    assert (exported["key"], exported["text"]) == (b"k".hex(), ANSWER.text)
    path.write_bytes(b"not a database" * 100)
    for command in ("stats", "verify", "export", "merge new.sqlite"):
        done = harness(f"cache {command} calls.sqlite", tmp_path)
        assert (done.returncode, done.stdout) == (5, "")
        assert "calls.sqlite: cannot be used as a call cache: file is not a database" in done.stderr
        assert "Traceback" not in done.stderr
