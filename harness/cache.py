"""Completions by request identity in one SQLite file; every answer is stored before it is used.

Owns what "the same call" means. It must not know queries, methods or datasets.

The key is SHA-256 over the engine's fingerprint (model, adapter, weights, dtype, sampling), the
rendered request and the replicate number; not in it: engine version, GPU, concurrency and prefix
caching, which are recorded elsewhere. Several processes may share one file (WAL).

    calls    key -> completion, its checksum, and when it was stored
    origins  what keys are made of besides texts, each once, so that a miss can be explained
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

from harness.types import Completion, DataError, Request, digest

SCHEMA = 1
_MOST_KEYS = 500  # SQLite allows 999 parameters in old builds
_TABLES = (
    "CREATE TABLE IF NOT EXISTS calls"
    "(key BLOB NOT NULL, value TEXT NOT NULL, crc INTEGER NOT NULL, stored REAL NOT NULL)",
    # With random keys a rowid table and a unique index beat WITHOUT ROWID threefold.
    "CREATE UNIQUE INDEX IF NOT EXISTS by_key ON calls(key)",
    f"PRAGMA user_version={SCHEMA}",
    "CREATE TABLE IF NOT EXISTS origins(settings TEXT PRIMARY KEY)",  # absent from older files
)
# The key comes from the row itself: a damaged index may lead to the row of another call.
_FIND = (
    "SELECT key, value, crc FROM calls WHERE rowid IN (SELECT rowid FROM calls WHERE key IN (%s))"
)


class Key(bytes):
    """32 bytes that compare as such; `origin` tells what they were made of besides texts."""

    origin = ""


class Identity:
    """Computes the key of any request to one engine; what calls have in common is hashed once."""

    def __init__(self, fingerprint: Mapping[str, Any], replicate: int = 0) -> None:
        self._fingerprint = dict(fingerprint) | {"replicate": replicate}
        self._known: dict[tuple[Any, ...], tuple[Any, str]] = {}

    def key(self, request: Request) -> Key:
        """Over everything in the request that reaches the engine.

        The hash goes over the origin, the lengths of the texts (-1 for none) and the texts as they
        are: equal bytes mean equal parts, and ten thousand characters need no escaping.
        """
        texts = [text for m in request.messages for text in (m.role, m.content)]
        lengths = [*map(len, texts)]
        for end in (request.text, request.continuation):
            lengths.append(-1 if end is None else len(end))
            texts.append(end or "")
        begun, origin = self._begun(request)
        state = begun.copy()
        state.update("".join([repr(lengths), *texts]).encode("utf-8", "surrogatepass"))
        key = Key(state.digest())
        key.origin = origin
        return key

    def origin(self, request: Request) -> str:
        """Fingerprint, replicate and settings as a JSON object, for `Cache.nearest`."""
        return self._begun(request)[1]

    @property
    def begin(self) -> str:
        """How the origin of every request begins."""
        return json.dumps(self._fingerprint)[:-1] + ", "

    def _begun(self, request: Request) -> tuple[Any, str]:
        """The hash so far, and what it is over: the same for most calls of a cell."""
        settings = _settings(request)
        if settings not in self._known:
            origin = json.dumps(self._fingerprint | dict(zip(_SETTINGS, settings)))
            begun = hashlib.sha256(digest([self._fingerprint, settings]).encode())
            self._known[settings] = (begun, origin)
        return self._known[settings]


_SETTINGS = ("prefill", "bos", "max_tokens", "exact_length_of", "stop", "labels")
_settings = attrgetter(*_SETTINGS)


class Cache:
    """A store of completions. `path=None` keeps them in memory for the life of the object.

    Raises DataError for a file that is no cache, was written by a newer version or is damaged
    beyond reading. A damaged row is a miss with a warning: its checksum does not hold, and the
    new answer replaces it.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._origins: set[str] = set()
        with self._doing("cannot be used as a call cache"):
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path or ":memory:", timeout=60, isolation_level=None)
            self._db.text_factory = bytes  # damaged text need not be UTF-8
            try:
                self._create()
            except BaseException:
                self._db.close()
                raise

    @contextmanager
    def _doing(self, what: str) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError, ValueError) as error:
            raise DataError(f"{what}: {error}", path=self.path or "") from error

    def _create(self) -> None:
        """Make the tables that are missing; a file that is not ours stays untouched."""
        found = {name for (name,) in self._db.execute("SELECT name FROM sqlite_master")}
        if found and b"calls" not in found:
            raise DataError("is a database of another program", path=self.path or "")
        [version] = self._db.execute("PRAGMA user_version").fetchone()
        if version > SCHEMA:
            what = f"was written by a newer version (schema {version}, this one reads {SCHEMA})"
            raise DataError(what, path=self.path or "")
        self._log_ahead()
        self._db.execute("PRAGMA synchronous=NORMAL")
        for statement in _TABLES if b"origins" not in found else ():
            self._db.execute(statement)

    def _log_ahead(self) -> None:
        for left in range(100, -1, -1):
            try:
                self._db.execute("PRAGMA journal_mode=WAL")
                return
            except sqlite3.OperationalError as error:  # here SQLite does not wait for others
                if not left or "locked" not in str(error):
                    raise
                time.sleep(0.05)

    def get_many(self, keys: Sequence[bytes]) -> dict[bytes, Completion]:
        """The stored completions among the keys."""
        found: dict[bytes, Completion] = {}
        for start in range(0, len(keys), _MOST_KEYS):
            try:
                rows = self._stored(keys[start : start + _MOST_KEYS])
            except sqlite3.DatabaseError as error:
                warnings.warn(f"{self.path}: unreadable, asking again: {error}", stacklevel=2)
                continue
            for key, completion in rows:
                if completion is None:
                    warnings.warn(
                        f"{self.path}: damaged row {key.hex()[:12]}, asked again", stacklevel=2
                    )
                else:
                    found[key] = completion
        return found

    def _stored(self, keys: Sequence[bytes]) -> list[tuple[bytes, Completion | None]]:
        """The rows of at most _MOST_KEYS keys; None for a damaged one."""
        rows = self._db.execute(_FIND % ",".join("?" * len(keys)), keys).fetchall()
        asked = set(keys)
        return [(k, _decode(value, crc) if k in asked else None) for k, value, crc in rows]

    def put_many(self, items: Iterable[tuple[bytes, Completion]]) -> None:
        """Store and commit. The first answer to a key stays, unless its row is damaged."""
        kept = list(items)
        told = {key.origin for key, _ in kept if isinstance(key, Key)} - self._origins
        with self._doing("cannot store answers"):
            try:
                self._db.execute("BEGIN IMMEDIATE")
                for start in range(0, len(kept), _MOST_KEYS):
                    self._put(kept[start : start + _MOST_KEYS])
                self._tell(told)
                self._db.execute("COMMIT")
                self._origins |= told
            except BaseException as error:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                if isinstance(error, KeyboardInterrupt):  # what is paid for is kept
                    self.put_many(kept)
                raise

    def _put(self, items: Sequence[tuple[bytes, Completion]]) -> None:
        """Store what is not there; of two answers to one key the first."""
        known = {key for key, completion in self._stored([k for k, _ in items]) if completion}
        now, rows = time.time(), []
        for key, completion in items:
            if key not in known:
                known.add(key)
                value = _encoded(completion)
                rows.append((key, value, zlib.crc32(value.encode()), now))
        self._db.executemany("INSERT OR REPLACE INTO calls VALUES (?,?,?,?)", rows)

    def _tell(self, origins: Iterable[str]) -> None:
        rows = [(origin,) for origin in origins]
        self._db.executemany("INSERT OR IGNORE INTO origins VALUES (?)", rows)

    def knows(self, identity: Identity) -> bool:
        """Could there be an answer to one of its calls? Older files do not tell whose they hold."""
        begin = identity.begin
        with self._doing("cannot be read"):
            origins = self.origins()
            empty = not self._db.execute("SELECT 1 FROM calls LIMIT 1").fetchall()
        return not empty and (not origins or any(o.startswith(begin) for o in origins))

    def count(self) -> int:
        with self._doing("cannot be read"):
            return int(self._db.execute("SELECT COUNT(*) FROM calls").fetchone()[0])

    def rows(self) -> Iterator[tuple[bytes, Completion | None]]:
        """Every row in storage order; None for a damaged one."""
        sql = "SELECT key, value, crc FROM calls ORDER BY rowid"
        with self._doing("cannot be read"):
            for key, value, crc in self._db.execute(sql):
                yield key, _decode(value, crc)

    def origins(self) -> list[str]:
        with self._doing("cannot be read"):
            found = self._db.execute("SELECT settings FROM origins ORDER BY rowid").fetchall()
        return [settings.decode("utf-8", "replace") for (settings,) in found]

    def fault(self) -> str:
        """What SQLite finds wrong with the file; empty when it is sound."""
        with self._doing("cannot be read"):
            [(said,)] = self._db.execute("PRAGMA integrity_check(1)").fetchall()
        return "" if said == b"ok" else str(said, "utf-8", "replace")

    def merge(self, other: Cache) -> int:
        """Take over every sound row of another cache; returns how many were new."""
        before, part = self.count(), list[tuple[bytes, Completion]]()
        try:
            for key, completion in other.rows():
                part += [(key, completion)] if completion else []
                if len(part) >= 2000:
                    self.put_many(part)
                    part.clear()
        finally:  # what precedes damage beyond reading is kept
            self.put_many(part)
        self._tell(other.origins())
        return self.count() - before

    def nearest(self, identity: Identity, request: Request) -> str:
        """The first field in which the nearest stored call differs, asked and stored.

        Nearest is a call with the same texts, then one with few other differences.
        """
        asked, ranks = json.loads(identity.origin(request)), []
        with self._doing("cannot be read"):
            origins = [json.loads(origin) for origin in self.origins()]
        for stored in origins:
            values = [tuple(v) if isinstance(v := stored[n], list) else v for n in _SETTINGS]
            settings: dict[str, Any] = dict(zip(_SETTINGS, values))
            own = {name: value for name, value in stored.items() if name not in settings}
            key = Identity(own, own["replicate"]).key(replace(request, **settings))
            names = [n for n in asked | stored if asked.get(n) != stored.get(n)]
            ranks.append((not self.get_many([key]), len(names), names, stored))
        if not ranks:
            return "no stored call tells what it was"
        *_, names, stored = min(ranks, key=lambda rank: rank[:2])
        for name in names:
            return f"{name}: {asked.get(name)!r} asked, {stored.get(name)!r} stored"
        return "the texts: no stored call shows them"

    def close(self) -> None:
        self._db.close()


_DEFAULTS = {f.name: f.default for f in fields(Completion)}
_values = attrgetter(*_DEFAULTS)  # asdict copies, ten times as slow
_json, _read = json.JSONEncoder(separators=(",", ":")).encode, json.JSONDecoder().raw_decode


def _encoded(completion: Completion) -> str:
    """As ASCII JSON; what has its default value goes without saying."""
    pairs = zip(_DEFAULTS.items(), _values(completion))
    return _json({name: value for (name, default), value in pairs if value != default})


def _decode(value: Any, crc: Any) -> Completion | None:
    """The completion of a row, or None when the row is not what was written."""
    if not isinstance(value, bytes) or zlib.crc32(value) != crc:
        return None
    try:
        row, _ = _read(str(value, "ascii"))
        if "scores" in row:
            row["scores"] = tuple(row["scores"])
        return Completion(**row)
    except (ValueError, TypeError):  # no JSON, or not what a completion is made of
        return None
