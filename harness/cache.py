"""Completions by request identity in one SQLite file; every answer is stored before it is used.

Owns what "the same call" means. It must not know queries, methods or datasets.

The key is SHA-256 over the engine's fingerprint (model, adapter, weights, dtype, sampling), the
rendered request and the replicate number; not in it: engine version, GPU, concurrency and prefix
caching, which are recorded elsewhere. Several processes may share one file (WAL).
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from harness.types import Completion, DataError, Request, digest

SCHEMA = 1
_MOST_KEYS = 500  # SQLite allows 999 parameters in old builds


class Identity:
    """Computes the key of any request to one engine; the fingerprint is hashed once."""

    def __init__(self, fingerprint: Mapping[str, Any], replicate: int = 0) -> None:
        self._base = hashlib.sha256(digest(dict(fingerprint) | {"replicate": replicate}).encode())

    def key(self, request: Request) -> bytes:
        """32 bytes over everything in the request that reaches the engine."""
        state = self._base.copy()
        state.update(_canonical(request).encode("utf-8", "surrogatepass"))
        return state.digest()


def _canonical(request: Request) -> str:
    """A request as JSON text. Messages first: length-prefixed by JSON, so nothing can collide."""
    r = request
    return json.dumps(
        [
            [(m.role, m.content) for m in r.messages],
            r.text, r.prefill, r.bos, r.max_tokens, r.exact_length_of,
            r.stop, r.labels, r.continuation,
        ],
        ensure_ascii=False,
        separators=(",", ":"),
    )  # fmt: skip


class Cache:
    """A store of completions. `path=None` keeps them in memory for the life of the object.

    Raises DataError for a file that is no cache or was written by a newer version. A damaged row
    is a miss with a warning: its checksum does not hold, and the new answer replaces it.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        try:
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path or ":memory:", timeout=60, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._create()
        except (sqlite3.Error, OSError) as error:
            raise DataError(f"cannot be used as a call cache: {error}", path=path or "") from error

    def _create(self) -> None:
        [version] = self._db.execute("PRAGMA user_version").fetchone()
        if version > SCHEMA:
            raise DataError(
                f"was written by a newer version (schema {version}, this one reads {SCHEMA})",
                path=self.path or "",
            )
        self._db.execute(
            "CREATE TABLE IF NOT EXISTS calls"
            "(key BLOB NOT NULL, value TEXT NOT NULL, crc INTEGER NOT NULL, stored REAL NOT NULL)"
        )
        # With random keys a rowid table and a unique index beat WITHOUT ROWID threefold.
        self._db.execute("CREATE UNIQUE INDEX IF NOT EXISTS by_key ON calls(key)")
        self._db.execute(f"PRAGMA user_version={SCHEMA}")

    def get_many(self, keys: Sequence[bytes]) -> dict[bytes, Completion]:
        """The stored completions among the keys."""
        found: dict[bytes, Completion] = {}
        for start in range(0, len(keys), _MOST_KEYS):
            part = keys[start : start + _MOST_KEYS]
            marks = ",".join("?" * len(part))
            sql = f"SELECT key, value, crc FROM calls WHERE key IN ({marks})"
            try:
                rows = self._db.execute(sql, part).fetchall()
            except sqlite3.DatabaseError as error:
                warnings.warn(f"{self.path}: unreadable, asking again: {error}", stacklevel=2)
                continue
            for key, value, crc in rows:
                if (completion := _decode(value, crc)) is None:
                    warnings.warn(
                        f"{self.path}: damaged row {key.hex()[:12]}, asked again", stacklevel=2
                    )
                else:
                    found[key] = completion
        return found

    def put_many(self, items: Iterable[tuple[bytes, Completion]]) -> None:
        """Store and commit. The first answer to a key stays, unless its row is damaged."""
        rows = []
        for key, completion in items:
            value = json.dumps(asdict(completion), ensure_ascii=True, separators=(",", ":"))
            rows.append((key, value, _crc(value), time.time()))
        try:
            self._db.execute("BEGIN IMMEDIATE")
            for row in rows:
                old = self._db.execute("SELECT value, crc FROM calls WHERE key=?", row[:1])
                stored = old.fetchone()
                if stored is None or _decode(*stored) is None:
                    self._db.execute("INSERT OR REPLACE INTO calls VALUES (?,?,?,?)", row)
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise DataError(f"cannot store answers: {error}", path=self.path or "") from error

    def count(self) -> int:
        return int(self._db.execute("SELECT COUNT(*) FROM calls").fetchone()[0])

    def rows(self) -> Iterator[tuple[bytes, Completion | None]]:
        """Every row in storage order; None for a damaged one."""
        for key, value, crc in self._db.execute("SELECT key, value, crc FROM calls ORDER BY rowid"):
            yield key, _decode(value, crc)

    def merge(self, other: Cache) -> int:
        """Take over every sound row of another cache; returns how many were new."""
        before = self.count()
        batch: list[tuple[bytes, Completion]] = []
        for key, completion in other.rows():
            if completion is not None:
                batch.append((key, completion))
            if len(batch) >= 2000:
                self.put_many(batch)
                batch = []
        self.put_many(batch)
        return self.count() - before

    def close(self) -> None:
        self._db.close()


def _crc(value: str) -> int:
    return zlib.crc32(value.encode("utf-8", "surrogatepass"))


_FIELDS = {f.name for f in fields(Completion)}


def _decode(value: Any, crc: Any) -> Completion | None:
    """The completion of a row, or None when the row is not what was written."""
    if not isinstance(value, str) or _crc(value) != crc:
        return None
    try:
        row = json.loads(value)
    except ValueError:
        return None
    if not isinstance(row, dict) or not row.keys() <= _FIELDS:
        return None
    return Completion(**row | {"scores": tuple(row.get("scores", ()))})
