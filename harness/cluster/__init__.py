"""A matrix over the GPUs of a Ray cluster: workers answer, the driver alone writes.

The driver keeps every answer in the cache before anything else, so it can be killed and started
again. What runs where is placement's; nothing of it is in a seed or a key. Nothing here prints.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from harness import cell as cells
from harness import matrix
from harness.cache import Cache
from harness.cluster.driver import Drive, bare, first_line
from harness.cluster.worker import described
from harness.types import (
    Engine,
    MissingPackageError,
    MissingResourceError,
    Serving,
    UsageError,
    digest,
)


@dataclass
class RayExecutor:
    """The executor over a Ray cluster.

    address  of a running cluster ("auto" finds this machine's); None starts one on this machine
    workers  at most so many; 0: one for each GPU (or tensor-parallel group), or node without GPUs
    seconds  predicted seconds of one query of a job
    tell     hears once a second how far the run is
    """

    serving: Serving
    address: str | None = None
    workers: int = 0
    seconds: Callable[[cells.Job], float] = lambda job: 1.0
    tell: Callable[[Mapping[str, Any]], None] = lambda told: None
    _asked: dict[str, tuple[dict[str, Any], int, str]] = field(default_factory=dict, init=False)

    def open(self, job: cells.Job) -> Engine | None:
        if not job.needs_engine:
            return None
        if job.alone or job.cell.protocol.strict_cache:
            what = "--protocol latency" if job.alone else "--strict-cache"
            raise UsageError(f"{what} is about one machine: use --executor local")
        here = matrix.open_for(job, self.serving)
        assert here is not None
        fingerprint, capacity, group = self._described(job)
        group = group or digest(fingerprint)
        return cells.Elsewhere(fingerprint, capacity, group, {}, here.clip)

    def run(self, waiting: matrix.Waiting, cache: Cache, results: Path, done: matrix.Done) -> None:
        here = [one for one in waiting if one[1].engine is None]
        there = [one for one in waiting if one[1].engine is not None]
        waiting.clear()
        matrix.Local(self.serving).run(here, cache, results, done)
        if there:
            Drive(self, there, cache, results, done).run()

    @cached_property
    def ray(self) -> Any:
        """Ray, connected."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Ray's 15 is for background work: beside a busy process workers hardly get a processor.
        os.environ.setdefault("RAY_worker_niceness", "0")
        try:
            import ray
        except ImportError as error:
            raise MissingPackageError("ray", "ray") from error
        _reach(self.address or "")
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        if self.address is None:
            quiet["include_dashboard"] = False
        stop = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(address=self.address or "local", **quiet)
        except SystemExit:  # Ray's own handler of SIGTERM
            raise KeyboardInterrupt from None
        except (OSError, RuntimeError, ValueError) as error:
            where = f"no Ray cluster at {self.address or 'this machine'}"
            raise MissingResourceError(f"{where}: {first_line(error)}") from error
        signal.signal(signal.SIGTERM, stop)  # in place of Ray's
        return ray

    def __enter__(self) -> RayExecutor:
        return self

    def __exit__(self, *error: Any) -> None:
        """Leave the cluster; one that was started here ends."""
        if "ray" in self.__dict__:
            self.ray.shutdown()

    def room(self, gpus: int) -> int:
        """How many workers of so many GPUs the nodes that are up can hold."""
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        boards = [int(node.get("GPU", 0)) for node in nodes]
        if not any(boards):
            return self.workers if self.workers and nodes else len(nodes)
        most = sum(board // gpus for board in boards)
        return min(most, self.workers or most)

    def options(self, gpus: int) -> dict[str, Any]:
        """What Ray is to set aside for a worker."""
        if not self.ray.cluster_resources().get("GPU"):
            return {"num_cpus": 1, "scheduling_strategy": "SPREAD"}
        return {"num_cpus": 1, "num_gpus": gpus}

    def _described(self, job: cells.Job) -> tuple[dict[str, Any], int, str]:
        """Of each model once: its cells on other data have the same engine."""
        name = digest([asdict(job.cell.model), job.cell.protocol.replicate])
        if name in self._asked:
            return self._asked[name]
        gpus = job.cell.model.tensor_parallel
        if not self.room(gpus):
            raise MissingResourceError(f"{job.cell}: no node of the cluster has {gpus} GPUs")
        ask = self.ray.remote(described).options(**self.options(gpus))
        try:
            self._asked[name] = self.ray.get(ask.remote(bare(job), self.serving))
        except self.ray.exceptions.RayTaskError as error:
            raise error.cause from None
        return self._asked[name]


def _reach(address: str) -> None:
    """Raise MissingResourceError if nothing listens at host:port: Ray itself tries for minutes."""
    host, _, port = address.rpartition(":")
    if port.isdecimal() and "/" not in host:
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
        except OSError as error:
            raise MissingResourceError(f"no Ray cluster at {address}: {error}") from error
