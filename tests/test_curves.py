"""Budget curves: every point in the data, the same bytes twice, nothing where nothing is known."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from test_tables import HOSTILE, cell, fake

from harness.report import curves
from harness.types import CellResult


def spending(model: str, calls: int, first: float, last: float, **more: Any) -> CellResult:
    """A cell whose quality grows from the first stage's to its own."""
    points = [
        {
            "budget": n, "calls": n * 0.9, "tokens": 2050.0 * n, "nDCG@10": first + (last - first) * n / calls,
        }
        for n in range(calls + 1)
    ]  # fmt: skip
    return cell(model, budget=points, **more)


def rows_of(paths: list[Path]) -> list[dict[str, str]]:
    with paths[-1].open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_a_figure_has_a_line_a_model_and_its_data_beside_it(tmp_path: Path) -> None:
    cells = [cell("first-stage"), spending("a", 4, 0.5, 0.7), spending("b", 2, 0.5, 0.6)]
    paths = curves.budget_curves(cells, tmp_path)
    assert [path.suffix for path in paths] == [".svg", ".pdf", ".png", ".csv"]
    rows = rows_of(paths)
    assert [row["model"] for row in rows] == ["a"] * 5 + ["b"] * 3
    assert (rows[0]["calls"], rows[0]["tokens"], rows[0]["nDCG@10 x 100"]) == ("0.0", "0.0", "50.0")
    assert (rows[4]["budget"], rows[4]["tokens"]) == ("4", "8200.0")
    assert float(rows[4]["nDCG@10 x 100"]) == 70.0


def test_datasets_and_depths_have_figures_of_their_own(tmp_path: Path) -> None:
    cells = [spending("a", 4, 0.5, 0.7), spending("a", 4, 0.4, 0.7, dataset="dl20")]
    cells.append(spending("a", 2, 0.5, 0.6, depth=30, first_stage={"name": "bm25+depth=30"}))
    paths = curves.budget_curves(cells, tmp_path)
    assert len({path.stem for path in paths}) == 3
    assert len(paths) == 12


def test_the_same_cells_are_drawn_to_the_same_bytes(tmp_path: Path) -> None:
    cells = [spending("a", 100, 0.5, 0.7), spending("b", 1, 0.5, 0.6)]
    drawn = [
        {path.name: path.read_bytes() for path in curves.budget_curves(cells, tmp_path / out)}
        for out in ("x", "y")
    ]
    assert drawn[0] == drawn[1]


def test_cells_without_a_curve_fake_ones_and_latency_runs_are_not_drawn(tmp_path: Path) -> None:
    pretender = fake()
    pretender.record["budget"] = spending("x", 2, 0.1, 0.2).record["budget"]
    timed = spending("slow", 2, 0.1, 0.2, protocol={"kind": "latency"})
    assert curves.budget_curves([cell("a"), cell("b", budget=[]), pretender, timed], tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_a_hostile_name_is_only_text(tmp_path: Path) -> None:
    paths = curves.budget_curves([spending(HOSTILE, 3, 0.5, 0.6)], tmp_path)
    assert "<script" not in paths[0].read_text(encoding="utf-8")
    assert {path.parent for path in paths} == {tmp_path}
