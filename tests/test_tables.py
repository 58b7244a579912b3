"""Every format of a table prints the same numbers, and none hides what is missing."""

from __future__ import annotations

import csv
import io
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from harness.report import tables
from harness.types import CellResult


def cell(
    model: str = "m",
    dataset: str = "dl19",
    values: Any = (0.5, 0.7),
    *,
    method: str = "",
    **more: Any,
) -> CellResult:
    """A finished cell with one nDCG@10 value a query; `more` replaces parts of the record."""
    qids = [f"q{i}" for i in range(len(values))]
    n = max(1, len(values))
    tokens = more.pop("tokens", 100.0)
    sanity = model in tables.SANITY
    dataset_more = more.pop("dataset_more", {})
    name = more.pop("dataset_name", dataset.split("+")[0])
    record: dict[str, Any] = {
        "schema_version": 1,
        "key": f"{model}-{dataset}",
        "state": "complete",
        "model": {"label": model, "method": method or (model if sanity else "setwise.heapsort")},
        "dataset": {
            "label": dataset,
            "name": name,
            "short": name.upper(),
            "suite": "dl",
            "in_domain": False,
            **dataset_more,
        },
        "first_stage": {"name": "bm25"},
        "depth": 100,
        "limit": None,
        "protocol": {"kind": "quality"},
        "queries": len(values),
        "measures": {"nDCG@10": sum(values) / n, "RR@10": 0.25},
        "kendall_tau": 0.5,
        "faults": {"unparsable": 3, "cut_off": 1, "calls": 10 * n, "no_op_rate": 0.25},
        "inputs": {},
        "efficiency": {
            "calls": 0 if sanity else 10 * n,
            "rounds": 2 * n,
            "prompt_tokens": 1000 * n,
            "generated_tokens": tokens * n,
            "seconds": tokens * n / 50,
            "queries_per_second": None,
            "calls_from_cache": 0,
            "latency": None,
        },
        "environment": {"engine": None if sanity else {"engine": "hf"}},
        **more,
    }
    rows = tuple({"qid": q, "nDCG@10": v} for q, v in zip(qids, values, strict=True))
    return CellResult(record, rows, Path("unused"))


def fake(model: str = "pretender") -> CellResult:
    return cell(model, environment={"engine": {"engine": "fake"}})


def suite(
    models: int = 6, datasets: tuple[str, ...] = ("dl19", "dl20"), seed: int = 0, queries: int = 43
) -> list[CellResult]:
    """Cells of baselines and several models, better models costing more."""
    out = []
    for dataset in datasets:
        draw = random.Random(f"{seed}{dataset}")
        first = [min(1.0, draw.betavariate(2, 2)) for _ in range(queries)]
        out += [
            cell("first-stage", dataset, first),
            cell("random", dataset, [v * 0.4 for v in first]),
        ]
        out.append(cell("oracle", dataset, [0.9 + v / 20 for v in first]))
        for i in range(models):
            ours = [min(1.0, max(0.0, v + draw.gauss(0.04 * i, 0.12))) for v in first]
            out.append(cell(f"reranker-{i}-7b", dataset, ours, tokens=20.0 * 3**i))
    return out
