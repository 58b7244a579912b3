"""Tokenizers and weights for the transformers engine, as a model's files hold them.

Owns what loading may not do: print, fill missing weights with noise, or let a model's own
generation_config through. It must not know requests or batches.
"""

from __future__ import annotations

import contextlib
import gc
import warnings
from functools import lru_cache
from typing import Any

from harness.engines.weights import Located, materialise, quiet
from harness.types import EngineError, MissingResourceError


def device_and_dtype(wanted: str) -> tuple[str, str]:
    """bf16 on GPUs and processors that compute in it; float32 elsewhere."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted != "auto":
        return device, wanted
    if device == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = bool({"avx512_bf16", "amx_bf16", "bf16"} & _cpu_flags())
    return device, "bfloat16" if fast else "float32"


def _cpu_flags() -> set[str]:
    """As Linux names them ("flags" on x86, "Features" on ARM); empty elsewhere."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        lines = (line for line in file if line.startswith(("flags", "Features")))
        return set(next(lines, "").split())
    return set()


@lru_cache(maxsize=4)
def load_tokenizer(base: str, located: Located) -> Any:
    from transformers import AutoTokenizer

    path = materialise(base, located)
    try:
        with quiet():
            # No length of its own: a long prompt is answered with too_long, not with a log line.
            return AutoTokenizer.from_pretrained(
                path, revision=located.revision or "main", model_max_length=1 << 40
            )
    except (OSError, ValueError) as error:
        raise MissingResourceError(
            f"cannot load the tokenizer of {base}: {first_line(error)}"
        ) from error


_kept: dict[tuple[Any, ...], Any] = {}  # the last model of this process, if any


def load_model(
    base: str, located: Located, adapter: Located | None, mode: str, device: str, dtype: str
) -> Any:
    """The weights, kept while the next engine asks for the same ones. Never two at a time."""
    key = (base, located, adapter, mode, device, dtype)
    if key not in _kept:
        _kept.clear()
        gc.collect()
        _kept[key] = _fresh_model(base, located, adapter, mode, device, dtype)
    return _kept[key]


def _fresh_model(
    base: str, located: Located, adapter: Located | None, mode: str, device: str, dtype: str
) -> Any:
    import torch
    from transformers import GenerationConfig

    try:
        with quiet():
            model = _base_model(materialise(base, located), located, dtype)
            ends = model.generation_config.eos_token_id
            # Its own penalties and sampling must not reach an answer.
            model.generation_config = GenerationConfig()
            if adapter is not None:
                model = _adapted(model, adapter, mode)
            model = model.to(device).eval()
    except (OSError, ValueError) as error:
        raise MissingResourceError(f"cannot load {base}: {first_line(error)}") from error
    except torch.OutOfMemoryError as error:
        raise EngineError(f"{base} does not fit the GPU: {first_line(error)}") from error
    model.harness_ends = [ends] if isinstance(ends, int) else list(ends or [])
    return model


def _base_model(path: str, located: Located, dtype: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        path,
        revision=located.revision or "main",
        dtype=getattr(torch, dtype),
        output_loading_info=True,
    )
    if missing := sorted(info["missing_keys"]):
        # transformers fills them with random numbers and goes on.
        raise ValueError(f"{len(missing)} weights are not in the files, {missing[0]} for one")
    return model


def _adapted(model: Any, adapter: Located, mode: str) -> Any:
    from peft import PeftModel

    # An adapter for another architecture would leave the base model as it is, with a warning.
    warnings.filterwarnings("error", message="Found missing adapter keys")
    try:
        model = PeftModel.from_pretrained(model, adapter.path, revision=adapter.revision)
    except UserWarning as warning:
        raise ValueError(
            f"the adapter {adapter.path} does not fit it: {first_line(warning)}"
        ) from None
    return model.merge_and_unload() if mode == "merged" else model


def first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
