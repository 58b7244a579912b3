"""Inference engines behind submit/poll, and the lazy table that names them.

An engine is cheap to construct: its fingerprint is known and its weights are not loaded before the
first call is submitted, so a cell whose answers are all cached costs no load.
"""

from __future__ import annotations

import importlib
from typing import Any

from harness.types import Engine, ModelSpec, RegistryError, Serving

ENGINES = {
    "hf": "harness.engines.hf_local:HfEngine",
    "vllm": "harness.engines.vllm_local:VllmEngine",
    "http": "harness.engines.http_server:HttpEngine",
    "fake": "harness.engines.fake:FakeEngine",
}


def open_engine(
    family: str, spec: ModelSpec, serving: Serving | None = None, **settings: Any
) -> Engine:
    """An engine for one model; `settings` are an engine's own, for tests."""
    if family not in ENGINES:
        raise RegistryError(f"unknown engine {family!r}", known=ENGINES, given=family)
    module, _, name = ENGINES[family].partition(":")
    opened = getattr(importlib.import_module(module), name)
    engine: Engine = opened(spec, serving=serving or Serving(), **settings)
    return engine
