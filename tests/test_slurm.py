"""The recipe of docs/slurm.md, run as it stands there, with stand-ins for Slurm's own commands.

Ray is real. What `ray` takes for the processes of "this node" is only what the recipe started:
`ray symmetric-run` refuses a node that has another Ray, and ends every Ray on its node.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest
from openai_server import Body, Reply, Served, said, serving

from harness.cache import Cache

pytest.importorskip("ray", reason="ray is not installed")
pytest.importorskip("openai", reason="openai is not installed")

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "slurm.md").read_text(encoding="utf-8")
CALLS = 8 * 9  # queries, windows of 4 over 20 candidates
STAND_INS = {
    "scontrol": """#!/bin/sh
case "$*" in
    "show hostnames"*) echo 127.0.0.1 ;;
    *) echo "$@" >> scontrol.log ;;
esac
""",
    "srun": """#!/bin/sh
while [ "${1#-}" != "$1" ]; do shift; done
exec "$@"
""",
    "harness": f"""#!/bin/sh
exec {sys.executable} -m harness "$@"
""",
    "ray": f"""#!{sys.executable}
import os
import ray
import psutil  # Ray's, where no other is installed
from ray.scripts.scripts import main

everywhere = psutil.process_iter

def here(attrs=None):
    for process in everywhere(attrs):
        try:
            if os.getsid(process.pid) == os.getsid(0):
                yield process
        except OSError:
            pass

psutil.process_iter = here
main()
""",
}


def recipe() -> str:
    [found] = re.findall(r"^```bash\n(#!/bin/bash\n.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    return str(found)


def free_job() -> str:
    """The number of a job whose port nobody has."""
    for number in range(os.getpid() % 10000, 20000):
        with socket.socket() as taken:
            if taken.connect_ex(("127.0.0.1", 20000 + number % 10000)):
                return str(number)
    raise AssertionError("no port is free")


@dataclass
class Job:
    """A folder with the recipe as a script, and what Slurm would set."""

    folder: Path
    env: dict[str, str]

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", "recipe.sbatch", *words], cwd=self.folder, env=self.env, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def reported(self) -> int:
        """Answers that the driver says it has had."""
        for path in self.folder.glob("results/.running-*.json"):
            return int(json.loads(path.read_text())["crew"].get("calls", 0))
        return 0


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    short = tempfile.mkdtemp(dir="/tmp")  # the path of a socket has at most 107 bytes
    (tmp_path / "recipe.sbatch").write_text(recipe())
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in STAND_INS.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env = kept | {
        "PATH": f"{commands}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "OPENAI_API_KEY": "x",
        "RAY_TMPDIR": short,
        "TMPDIR": short,
        "SLURM_JOB_ID": free_job(),
        "SLURM_JOB_NODELIST": "here",
        "SLURM_JOB_NUM_NODES": "1",
    }
    yield Job(tmp_path, env)
    shutil.rmtree(short, ignore_errors=True)


def session(leader: int) -> set[int]:
    """The processes of a session that have not ended."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, leads = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(leads) == leader and state != "Z":
            found.add(int(stat.parent.name))
    return found


def ended(running: subprocess.Popen[str]) -> str:
    """What a job has said; nothing that it started is left, whatever happened."""
    try:
        told, _ = running.communicate(timeout=300)
        end = time.monotonic() + 60
        while session(running.pid) and time.monotonic() < end:
            time.sleep(0.1)
        assert not session(running.pid)
    finally:
        for pid in session(running.pid):
            os.kill(pid, signal.SIGKILL)
    return told


def words(server: Served) -> list[str]:
    matrix = ["-m", "smollm2-135m-listwise", "-d", "pocket", "--limit", "8", "--size", "4"]
    where = ["--engine", "http", "--base-url", server.url, "--served-model", "tiny"]
    return [*matrix, *where, "--stride", "2", "--concurrency", "2", "--results", "results"]


def test_a_job_that_nears_its_limit_stops_is_queued_again_and_goes_on(job: Job) -> None:
    pause = 0.25

    def slow(path: str, body: Body) -> Reply | Body:
        return Reply(said("[2] > [1] > [3] > [4]"), after=pause)

    with serving(slow) as server:
        first = job.start(*words(server))
        while not job.reported() and first.poll() is None:
            time.sleep(0.05)
        os.kill(first.pid, signal.SIGUSR1)  # what --signal=B:USR1@180 has Slurm do
        told = ended(first)
        assert first.returncode == 7, told
        assert "the same command goes on from there" in told
        requeued = (job.folder / "scontrol.log").read_text()
        assert requeued == f"requeue {job.env['SLURM_JOB_ID']}\n"
        with closing(Cache(job.folder / "results" / ".cache.sqlite")) as cache:
            kept = cache.count()
        asked, pause = len(server.bodies), 0.0
        second = job.start(*words(server))
        told = ended(second)
        assert second.returncode == 0, told
    assert 0 < kept < CALLS
    assert len(server.bodies) - asked == CALLS - kept
    [path] = job.folder.rglob("result.json")
    record = json.loads(path.read_text())
    assert record["state"] == "complete"
    assert record["environment"]["executor"]["name"] == "ray"
    assert (job.folder / "scontrol.log").read_text() == requeued


def test_a_job_whose_ray_does_not_start_fails(job: Job) -> None:
    job.env["RAY_TMPDIR"] = "/dev/null/no folder"
    running = job.start("-m", "first-stage", "-d", "pocket")
    told = ended(running)
    assert "Failed to start Ray" in told
    assert running.returncode == 6, told


def test_the_batch_system_is_asked_for_what_the_recipe_counts_on() -> None:
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=?(\S*)", recipe(), re.MULTILINE))
    assert asked["ntasks-per-node"] == "1"
    assert asked["signal"] == "B:USR1@180"
    assert asked.keys() >= {"nodes", "gpus-per-node", "exclusive", "requeue", "time"}
