"""Figures and reports: complete, byte-stable, honest about what they leave out."""

from __future__ import annotations

import csv
import gzip
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_tables import HOSTILE, cell, fake, suite

from harness.report import build, plots
from harness.types import CellResult, RegistryError

KINDS = ["svg", "pdf", "png", "csv"]


def rows_of(paths: list[Path]) -> list[dict[str, str]]:
    with paths[-1].open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def content(paths: list[Path]) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def cells() -> list[CellResult]:
    return suite(2, ("dl19",), queries=12)


def test_a_figure_is_written_in_every_format_with_its_data(
    cells: list[CellResult], tmp_path: Path
) -> None:
    paths = plots.quality_against(cells, "generated_tokens", tmp_path)
    assert [path.suffix[1:] for path in paths] == KINDS
    assert sorted(tmp_path.iterdir()) == sorted(paths)  # and no temporary file is left


def test_figures_drawn_twice_have_the_same_bytes(cells: list[CellResult], tmp_path: Path) -> None:
    drawn = [
        content(
            [
                *plots.quality_against(cells, "seconds", out),
                *plots.gain_heatmap(cells, out),
                *plots.per_query_bars(cells[3], cells[0], out),
            ]
        )
        for out in (tmp_path / "a", tmp_path / "b")
    ]
    assert len(drawn[0]) == 12
    assert drawn[0] == drawn[1]


def test_nothing_is_drawn_without_cells(tmp_path: Path) -> None:
    assert plots.quality_against([], "calls", tmp_path) == []
    assert plots.gain_heatmap([], tmp_path) == []
    assert plots.quality_against([cell("first-stage")], "calls", tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_cells_of_the_fake_engine_are_not_drawn(tmp_path: Path) -> None:
    cells = [cell("first-stage"), fake()]
    assert plots.quality_against(cells, "calls", tmp_path) == []
    assert plots.gain_heatmap(cells, tmp_path) == []
    assert plots.per_query_bars(cells[1], cells[0], tmp_path) == []


def test_only_what_no_other_beats_is_on_the_front(tmp_path: Path) -> None:
    cells = [
        cell("cheap", values=[0.4, 0.5], tokens=10.0),
        cell("dear", values=[0.6, 0.7], tokens=1000.0),
        cell("beaten", values=[0.5, 0.6], tokens=2000.0),
        cell("first-stage", values=[0.3, 0.3]),
    ]
    rows = rows_of(plots.quality_against(cells, "generated_tokens", tmp_path))
    assert {row["model"]: row["on_front"] for row in rows} == {
        "cheap": "1", "dear": "1", "beaten": "0", "first-stage": "",
    }  # fmt: skip


def test_a_baseline_has_no_cost_and_a_point_lies_in_its_interval(
    cells: list[CellResult], tmp_path: Path
) -> None:
    for row in rows_of(plots.quality_against(cells, "seconds", tmp_path)):
        if row["model"] in ("first-stage", "random", "oracle"):
            assert row["seconds_per_query"] == ""
        else:
            assert float(row["low"]) < float(row["nDCG@10 x 100"]) < float(row["high"])


def test_points_at_the_same_place_can_be_drawn(tmp_path: Path) -> None:
    cells = [cell(name, values=[0.5]) for name in ("a", "b")]
    assert plots.quality_against(cells, "generated_tokens", tmp_path)


def test_a_cost_that_nobody_has_is_not_drawn(tmp_path: Path) -> None:
    free = [cell(name, tokens=0.0) for name in ("a", "b")]
    assert plots.quality_against(free, "generated_tokens", tmp_path) == []
    assert plots.quality_against([*free, cell("c")], "generated_tokens", tmp_path)


def test_half_done_and_latency_cells_are_not_drawn(tmp_path: Path) -> None:
    cells = [cell("a", state="partial"), cell("b", protocol={"kind": "latency"})]
    assert plots.quality_against(cells, "calls", tmp_path) == []


def test_floating_point_operations_are_a_cost_where_they_are_known(tmp_path: Path) -> None:
    known = cell("a", values=[0.5, 0.7])
    known.record["efficiency"]["flops"] = 3e12  # type: ignore[index]
    [row] = rows_of(plots.quality_against([known, cell("b")], "flops", tmp_path))
    assert (row["model"], float(row["flops_per_query"])) == ("a", 1.5e12)


def test_the_heat_map_holds_the_gain_and_leaves_gaps_empty(tmp_path: Path) -> None:
    cells = [
        cell("first-stage", values=[0.5]), cell("first-stage", "dl20", [0.5]),
        cell("a", values=[0.6]), cell("b", values=[0.4]), cell("b", "dl20", [0.7]),
    ]  # fmt: skip
    rows = rows_of(plots.gain_heatmap(cells, tmp_path))
    assert (rows[0]["model"], rows[0]["dl20"]) == ("a", "")
    assert [round(float(row["dl19"]), 6) for row in rows] == [10.0, -10.0]


def test_per_query_differences_are_sorted_and_named(tmp_path: Path) -> None:
    a, b = cell("a", values=[0.1, 0.9, 0.5]), cell("b", values=[0.5, 0.5, 0.5])
    paths = plots.per_query_bars(a, b, tmp_path)
    assert paths[0].name == "per_query_dl19_bm25_a_minus_b.svg"
    assert [row["qid"] for row in rows_of(paths)] == ["q1", "q2", "q0"]


def reasoner(folder: Path, lengths: list[list[int]], limit: int = 10_000) -> CellResult:
    """A cell whose n-th query thought as long as the n-th list says and gained 0.01 a query."""
    values = [0.5 + 0.01 * i for i in range(len(lengths))]
    made = cell("r", values=values)
    made.record["efficiency"]["reasoning_tokens"] = sum(map(sum, lengths))  # type: ignore[index]
    with gzip.open(folder / "trace.jsonl.gz", "wt") as file:
        for i, tokens in enumerate(lengths):
            for n in tokens:
                finish = "length" if n >= limit else "stop"
                call = {"qid": f"q{i}", "reasoning_tokens": min(n, limit), "finish": finish}
                file.write(json.dumps(call) + "\n")
    return replace(made, folder=folder)


def test_the_length_of_reasoning_is_counted_and_set_against_the_gain(tmp_path: Path) -> None:
    lengths = [[50 + 10 * i, 70 + 10 * i] for i in range(16)]
    ours, first = reasoner(tmp_path, lengths, 200), cell("first-stage", values=[0.5] * 16)
    paths = plots.reasoning_length(ours, first, tmp_path / "plots")
    assert paths[0].name == "reasoning_dl19_bm25_r.svg"
    rows = rows_of(paths)
    calls = [row for row in rows if row["part"] == "calls"]
    assert sum(float(row["calls"]) for row in calls) == 32
    assert sum(float(row["cut_off"]) for row in calls) == sum(n >= 200 for q in lengths for n in q)
    short, long = (row for row in rows if row["part"] == "queries")
    assert (float(short["from"]), float(short["to"])) == (60, 130)
    assert (float(short["gain"]), float(long["gain"])) == (pytest.approx(3.5), pytest.approx(11.5))
    assert float(long["low"]) < 11.5 < float(long["high"])


def test_a_cell_without_reasoning_has_no_such_figure(tmp_path: Path) -> None:
    assert plots.reasoning_length(cell("m"), cell("first-stage"), tmp_path) == []
    alike = reasoner(tmp_path, [[7], [7]])  # one length, and too few queries for two groups
    [*_, data] = plots.reasoning_length(alike, cell("first-stage"), tmp_path / "plots")
    assert data.is_file()


def test_a_hostile_name_is_text_in_an_svg_and_safe_in_a_file_name(tmp_path: Path) -> None:
    cells = [cell("first-stage"), cell(f"$x^{{{HOSTILE}../"), cell("排序")]
    svg = plots.quality_against(cells, "calls", tmp_path)[0].read_text(encoding="utf-8")
    assert "<script" not in svg
    assert "\x1b" not in svg
    [path, *_] = plots.per_query_bars(cells[1], cells[0], tmp_path)
    assert path.parent == tmp_path


def test_a_report_is_the_same_bytes_twice_whatever_was_there(
    cells: list[CellResult], tmp_path: Path
) -> None:
    formats = ("md", "csv", "tex", "json")
    first = content(build.write(cells, tmp_path / "a", formats))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "quality.md").write_text("old", encoding="utf-8")
    second = content(build.write(cells, tmp_path / "b", formats))
    assert first == second
    assert {"README.md", "quality.tex", "efficiency.json", "results_long.csv"} <= first.keys()


def test_the_index_shows_every_figure_and_links_only_what_exists(
    cells: list[CellResult], tmp_path: Path
) -> None:
    paths = build.write(cells, tmp_path, ("md",))
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    for path in paths:
        if path.suffix == ".png":
            assert f"](plots/{path.name})" in text
    links = [part.split(")")[0] for part in text.split("](")[1:]]
    assert links
    assert all((tmp_path / link).is_file() for link in links)


def test_machine_formats_alone_draw_nothing(cells: list[CellResult], tmp_path: Path) -> None:
    names = {path.name for path in build.write(cells, tmp_path, ("csv",))}
    assert names == {"quality.csv", "comparison.csv", "efficiency.csv", "results_long.csv"}


def test_an_unknown_format_is_an_error_with_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="did you mean"):
        build.write([], tmp_path, ("cvs",))


def test_a_report_without_cells_says_so(tmp_path: Path) -> None:
    build.write([], tmp_path, ("md", "csv", "tex", "json"))
    assert "No finished cells." in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_datasets_keep_their_order_and_baselines_frame_the_models() -> None:
    cells = [cell("oracle", "z"), cell("m", "a"), cell("m", "z"), cell("first-stage", "z")]
    found = [(c.dataset, c.model) for c in build.arranged(cells)]
    assert found == [("z", "first-stage"), ("z", "m"), ("z", "oracle"), ("a", "m")]


def test_reports_are_imported_without_heavy_packages_and_without_the_engines() -> None:
    code = (
        "import sys, harness.report.build\n"
        "bad = {'matplotlib', 'numpy', 'scipy', 'torch', 'harness.cell', 'harness.rerank',"
        " 'harness.engines'}\n"
        "print(sorted(bad & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- budget curves ----------------------------------------------------------------------------


def spending(model: str, calls: int, first: float, last: float, **more: Any) -> CellResult:
    """A cell whose quality grows from the first stage's to its own."""
    points = [
        {
            "budget": n, "calls": n * 0.9, "tokens": 2050.0 * n, "nDCG@10": first + (last - first) * n / calls,
        }
        for n in range(calls + 1)
    ]  # fmt: skip
    return cell(model, budget=points, **more)


def test_a_figure_has_a_line_a_model_and_its_data_beside_it(tmp_path: Path) -> None:
    cells = [cell("first-stage"), spending("a", 4, 0.5, 0.7), spending("b", 2, 0.5, 0.6)]
    paths = plots.budget_curves(cells, tmp_path)
    assert [path.suffix for path in paths] == [".svg", ".pdf", ".png", ".csv"]
    rows = rows_of(paths)
    assert [row["model"] for row in rows] == ["a"] * 5 + ["b"] * 3
    assert (rows[0]["calls"], rows[0]["tokens"], rows[0]["nDCG@10 x 100"]) == ("0.0", "0.0", "50.0")
    assert (rows[4]["budget"], rows[4]["tokens"]) == ("4", "8200.0")
    assert float(rows[4]["nDCG@10 x 100"]) == 70.0


def test_datasets_and_depths_have_figures_of_their_own(tmp_path: Path) -> None:
    cells = [spending("a", 4, 0.5, 0.7), spending("a", 4, 0.4, 0.7, dataset="dl20")]
    cells.append(spending("a", 2, 0.5, 0.6, depth=30, first_stage={"name": "bm25+depth=30"}))
    paths = plots.budget_curves(cells, tmp_path)
    assert len({path.stem for path in paths}) == 3
    assert len(paths) == 12


def test_the_same_cells_are_drawn_to_the_same_bytes(tmp_path: Path) -> None:
    cells = [spending("a", 100, 0.5, 0.7), spending("b", 1, 0.5, 0.6)]
    drawn = [
        {path.name: path.read_bytes() for path in plots.budget_curves(cells, tmp_path / out)}
        for out in ("x", "y")
    ]
    assert drawn[0] == drawn[1]


def test_cells_without_a_curve_fake_ones_and_latency_runs_are_not_drawn(tmp_path: Path) -> None:
    pretender = fake()
    pretender.record["budget"] = spending("x", 2, 0.1, 0.2).record["budget"]
    timed = spending("slow", 2, 0.1, 0.2, protocol={"kind": "latency"})
    assert plots.budget_curves([cell("a"), cell("b", budget=[]), pretender, timed], tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_a_hostile_name_is_only_text(tmp_path: Path) -> None:
    paths = plots.budget_curves([spending(HOSTILE, 3, 0.5, 0.6)], tmp_path)
    assert "<script" not in paths[0].read_text(encoding="utf-8")
    assert {path.parent for path in paths} == {tmp_path}
