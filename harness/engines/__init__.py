"""Inference engines behind submit/poll, and the lazy table that names them.

An engine is cheap to construct: its fingerprint is known and its weights are not loaded before the
first call is submitted, so a cell whose answers are all cached costs no load.
"""

from __future__ import annotations

import importlib
from typing import Any

from harness.types import Engine, ModelSpec, RegistryError

ENGINES = {"hf": "harness.engines.hf_local:HfEngine", "fake": "harness.engines.fake:FakeEngine"}


def open_engine(family: str, spec: ModelSpec, **settings: Any) -> Engine:
    """An engine for one model; `settings` are the engine's own (base_url, served_model, ...)."""
    if family not in ENGINES:
        there = " (--engine hf runs the same model)" if family in ("vllm", "http") else ""
        raise RegistryError(f"unknown engine {family!r}{there}", known=ENGINES, given=family)
    module, _, name = ENGINES[family].partition(":")
    engine: Engine = getattr(importlib.import_module(module), name)(spec, **settings)
    return engine
