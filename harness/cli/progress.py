"""How far a run is: bars on a terminal, lines elsewhere, and a note for `status` and `serve`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from harness import store
from harness.cli.base import complain
from harness.types import HarnessError


class Notes:
    """The cells of this run and how far they are, where `harness serve` looks for them."""

    def __init__(self, results: Path) -> None:
        self.results, self.written = results, 0.0
        self.cells: dict[str, dict[str, Any]] = {}
        self.crew: dict[str, Any] = {}

    def note(self, cell: str, state: str, done: int = 0, total: int = 0, calls: int = 0) -> None:
        """Every change of a state is written at once, the rest once a second."""
        known, now = self.cells.get(cell, {}).get("state"), time.monotonic()
        told = {"cell": cell, "state": state, "done": done, "total": total, "calls": calls}
        self.cells[cell] = told
        if state != known or now > self.written + 1:
            self._write(now)

    def tell(self, crew: dict[str, Any]) -> None:
        """How far the workers are, all cells together."""
        self.crew = crew
        self._write(time.monotonic())

    def _write(self, now: float) -> None:
        store.write_progress(self.results, list(self.cells.values()), self.crew)
        self.written = now


@dataclass
class _Shown:
    """The progress of one cell as plain lines, for logs and CI."""

    head: str
    note: Callable[..., None]
    quiet: bool = False

    def line(self, text: str) -> None:
        if not self.quiet:
            print(f"{self.head}: {text}", file=sys.stderr, flush=True)

    def started(self) -> None:
        self.note("running")
        self.line("started")

    def skipped(self) -> None:
        self.note("complete")
        self.line("finished before")

    def failed(self, error: HarnessError) -> None:
        self.note("failed")
        complain(f"{self.head.partition(' ')[2]}: {error}")

    def progress(self, done: int, total: int, calls: int) -> None:
        """Lines would flood a log; only a bar shows every query."""
        self.note("running", done, total, calls)

    def finished(self, result: Any) -> None:
        self.note("complete")
        name, value = next(iter(result.measures.items()))
        self.line(f"{name} {value:.4f}")


@dataclass
class _Bar(_Shown):
    """The progress of one cell as a bar, on a terminal."""

    bars: Any = None
    task: Any = None

    def line(self, text: str) -> None:
        self.bars.console.print(f"{self.head}: {text}", markup=False, highlight=False)

    def started(self) -> None:
        self.note("running")
        self.task = self.bars.add_task(self.head, total=None, calls=0)

    def progress(self, done: int, total: int, calls: int) -> None:
        super().progress(done, total, calls)
        self.bars.update(self.task, completed=done, total=total, calls=calls)

    def finished(self, result: Any) -> None:
        self.bars.remove_task(self.task)
        super().finished(result)


@dataclass
class _Progress:
    total: int
    quiet: bool
    notes: Notes
    bars: Any = None

    def of(self, number: int, cell: Any) -> _Shown:
        head, note = f"[{number}/{self.total}] {cell}", partial(self.notes.note, str(cell))
        note("planned")
        return _Bar(head, note, bars=self.bars) if self.bars else _Shown(head, note, self.quiet)


@contextmanager
def progress(total: int, quiet: bool, notes: Notes) -> Iterator[_Progress]:
    if quiet or not sys.stderr.isatty():
        yield _Progress(total, quiet, notes)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
        TextColumn("queries, {task.fields[calls]} calls"), TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        yield _Progress(total, quiet, notes, bars)
