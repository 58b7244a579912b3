"""The served page: this machine only, nothing outside its folder, as fresh as the results."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

import pytest
from test_page import write_cell

from harness import cli, store

pytest.importorskip("jinja2")
HARNESS = (sys.executable, "-m", "harness")


class Server:
    """`harness serve` as a user starts it, and what it answers."""

    def __init__(self, results: Path, *flags: str) -> None:
        self.process = subprocess.Popen(
            [*HARNESS, "serve", "--results", str(results), *flags],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline()
        found = re.search(r"http://([\d.]+):(\d+)/", self.line)
        assert found, self.line or self.process.communicate()[1]
        self.host, self.port = found[1], int(found[2])

    def get(self, path: str, method: str = "GET") -> tuple[HTTPResponse, str]:
        connection = HTTPConnection(self.host, self.port, timeout=30)
        connection.request(method, path)
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        return answer, text

    def stop(self) -> tuple[int, str]:
        """End it as Ctrl-C does; returns the exit code and what it wrote to stderr."""
        self.process.send_signal(signal.SIGINT)
        _, said = self.process.communicate(timeout=30)
        return self.process.returncode, said


@pytest.fixture
def results(tmp_path: Path) -> Path:
    write_cell(tmp_path / "results", "first-1b")
    return tmp_path / "results"


@pytest.fixture
def server(results: Path) -> Iterator[Server]:
    running = Server(results)
    yield running
    if running.process.poll() is None:
        running.stop()


def test_the_page_and_its_data_are_served_on_loopback_until_ctrl_c(server: Server) -> None:
    assert server.host == "127.0.0.1"
    answer, page = server.get("/")
    assert answer.status == 200
    assert "first-1b" in page
    [name] = set(re.findall(r'"id":"(c[0-9a-f]{16})"', page))
    answer, text = server.get(f"/data/{name}.js")
    assert text.startswith("__shard(")
    assert answer.headers["Cache-Control"] == "no-store"
    assert server.stop() == (0, "")


def test_nothing_outside_the_page_s_folder_is_served(server: Server, results: Path) -> None:
    outside = [
        "/data/", "/../results/cell0/result.json", "/data/../../etc/passwd", "//etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd", f"/{results}/cell0/result.json", "/..%2f..%2fetc/passwd",
    ]  # fmt: skip
    assert {path: server.get(path)[0].status for path in outside} == dict.fromkeys(outside, 404)
    assert server.get("/", "POST")[0].status == 501


def test_the_page_is_made_again_when_the_results_change(server: Server, results: Path) -> None:
    before = server.get("/data/progress.js")[1]
    write_cell(results, "second-1b")
    assert server.get("/data/progress.js")[1] != before
    assert "second-1b" in server.get("/")[1]


def test_a_damaged_cell_is_reported_and_the_old_page_stays(server: Server, results: Path) -> None:
    (results / "bad").mkdir()
    (results / "bad" / "result.json").write_text("{")
    answer, page = server.get("/")
    assert (answer.status, "first-1b" in page) == (200, True)
    code, said = server.stop()
    assert code == 0
    assert "bad/result.json" in said


def test_a_run_that_is_going_is_told(server: Server, results: Path) -> None:
    cells = [
        {"cell": "toy/bm25/a", "state": "running", "done": 2, "total": 3, "calls": 7},
        {"cell": "toy/bm25/<b>", "state": "planned"},
    ]
    store.write_progress(results, cells)
    text = server.get("/data/progress.js")[1]
    assert "<" not in text
    assert json.loads(text[len('__shard("progress",') : -2])["cells"] == cells
    store.write_progress(results, [])
    assert '"cells":[]' in server.get("/data/progress.js")[1]


def test_what_a_killed_run_left_is_no_run(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True)  # fmt: skip
    (tmp_path / f".running-{done.stdout.strip()}.json").write_text('[{"cell": "x"}]')
    (tmp_path / f".running-{os.getpid()}.json").write_text("half a fi")
    assert store.read_progress(tmp_path) == []


def test_a_port_in_use_and_a_missing_folder_are_one_line_each(
    server: Server, results: Path, tmp_path: Path
) -> None:
    for flags, code, word in (
        (["--results", str(results), "--port", str(server.port)], 2, "in use"),
        (["--results", str(tmp_path / "none")], 4, "no such results folder"),
    ):
        done = subprocess.run([*HARNESS, "serve", *flags], capture_output=True, text=True)
        assert (done.returncode, done.stderr.count("\n")) == (code, 1)
        assert word in done.stderr


def test_a_run_tells_its_cells_from_planned_to_complete_and_takes_the_note_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[list[tuple[str, str]]] = []
    write = store.write_progress

    def heard(results: Path, *progress: Any) -> None:
        write(results, *progress)
        read = [row for run in store.read_progress(results) for row in run["cells"]]
        told.append([(row["cell"].rpartition(" ")[2], row["state"]) for row in read])

    monkeypatch.setattr(store, "write_progress", heard)
    words = ["run", "-m", "first-stage,oracle", "-d", "pocket", "--results", str(tmp_path)]
    with pytest.raises(SystemExit):
        cli.main([*words, "--quiet"])
    assert told[0] == [("first-stage", "planned")]
    assert [("first-stage", "complete"), ("oracle", "running")] in told
    assert told[-2:] == [[("first-stage", "complete"), ("oracle", "complete")], []]
    assert not list(tmp_path.glob(".running-*"))
