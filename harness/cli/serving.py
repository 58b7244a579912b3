"""`serve`: the leaderboard page of a results folder, for browsers on this machine."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Annotated, Any

import typer

from harness import store
from harness.cli import base
from harness.cli.reporting import page_texts
from harness.published import load as load_published
from harness.types import CellResult, HarnessError, MissingResourceError, UsageError, digest

Render = Callable[[Sequence[CellResult], Path, str], object]


@base.app.command()
def serve(
    results: base.Results = base.RESULTS,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free port.")] = 0,
    host: Annotated[str, typer.Option(help="Another address lets others read it.")] = "127.0.0.1",
    with_text: base.WithText = False,
    published: base.PublishedToo = False,
    registry: base.RegistryDir = None,
) -> None:
    """Show the leaderboard page on this machine; it follows the results and a run that is going."""
    from harness.report import page

    if not results.is_dir():
        raise MissingResourceError(f"{results}: no such results folder")
    names = base.open_registry(registry)
    figures = load_published(names) if published else ()

    def render(cells: Sequence[CellResult], out: Path, live: str) -> None:
        texts = page_texts(cells, names, with_text)
        page.render(cells, out, texts=texts, with_text=with_text, published=figures, live=live)

    with tempfile.TemporaryDirectory(prefix="harness-") as folder:
        board = _Board(results, Path(folder), render)
        board.refresh()
        with _server(host, port, board) as server, contextlib.suppress(KeyboardInterrupt):
            print(f"{results}: http://{host}:{server.server_port}/ (Ctrl-C ends)", flush=True)
            server.serve_forever()


def _server(host: str, port: int, board: _Board) -> ThreadingHTTPServer:
    try:
        return ThreadingHTTPServer((host, port), partial(_Handler, board))
    except OSError as error:
        raise UsageError(f"--host {host} --port {port}: {error.strerror or error}") from error


class _Board:
    """The page of a results folder, made again when its cells have changed."""

    def __init__(self, results: Path, folder: Path, render: Render) -> None:
        self.results, self.folder, self.render = results, folder, render
        self.stamp, self.lock = "", Lock()

    def refresh(self) -> None:
        """Bring the page up to date. Raises HarnessError, once, for cells that it cannot show."""
        with self.lock:
            stamp = self.now
            if stamp != self.stamp:
                self.stamp = stamp
                cells = [c for c in store.iterate(self.results) if c.record["state"] == "complete"]
                self.render(cells, self.folder, stamp)

    @property
    def now(self) -> str:
        """The state of the folder: changes when a cell is written, replaced or removed."""
        found = []
        for path in sorted(self.results.rglob("result.json")):
            with contextlib.suppress(FileNotFoundError):  # being replaced
                found.append([str(path), path.stat().st_mtime_ns])
        return digest(found)[:16]

    def tell(self) -> None:
        """Write what the page asks for every other second, as a data file that it can load."""
        from harness.report import shards

        runs = store.read_progress(self.results)
        cells = [cell for run in runs for cell in run["cells"]]
        told = {"live": self.now, "cells": cells}
        shards.write_shard(self.folder / "data", "progress", told)


class _Handler(SimpleHTTPRequestHandler):
    """Serves the page's folder and nothing else; the base class keeps requests inside it."""

    server_version = "harness"

    def __init__(self, board: _Board, *args: Any) -> None:
        self.board = board
        super().__init__(*args, directory=str(board.folder))

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        try:
            if path in ("/", "/index.html"):
                self.board.refresh()
            elif path == "/data/progress.js":
                self.board.tell()
        except HarnessError as error:  # the page stays as it was
            base.complain(str(error))
        super().do_GET()

    def end_headers(self) -> None:
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        super().end_headers()

    def list_directory(self, path: Any) -> None:
        self.send_error(404)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: every open page asks every other second."""
