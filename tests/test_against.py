"""Published figures beside ours: what is held against what, and what is said to differ."""

from __future__ import annotations

from typing import Any

import pytest
from test_tables import at, cell, suite

from harness.published import Published
from harness.report import quality, tables
from harness.report.against import against
from harness.types import CellResult

BLOCK = "dl19, bm25, top 100"


def printed(value: float, dataset: str = "dl19", **more: Any) -> Published:
    """A published figure of model m over BM25."""
    fields = {"model": "m", "name_as_published": "M-7B", "first_stage": "bm25"}
    rest = {"measure": "nDCG@10", "source": "its paper", "confidence": "high"}
    return Published(dataset=dataset, value=value, **{**fields, **rest, **more})


def beside(cells: list[CellResult], *figures: Published, **more: Any) -> tables.Table:
    return against(quality.sheet_of(cells, quality.USUAL), figures, **more)


def many(mean: float, **more: Any) -> CellResult:
    """A cell of model m whose 95 % interval is about 8 to each side of its mean."""
    shift = mean - 0.5
    return cell("m", values=[v + shift for v in (0.2, 0.4, 0.6, 0.8) * 8], **more)


@pytest.mark.parametrize(("value", "within"), [(70.0, "yes"), (64.0, "yes"), (60.0, "no"), (95.0, "no")])  # fmt: skip
def test_a_figure_is_within_the_noise_when_our_interval_holds_it(value: float, within: str) -> None:
    table = beside([many(0.7)], printed(value))
    row = {c.key: v for c, v in zip(table.columns, table.rows[0].cells, strict=True)}
    low, high = row["95% low"].number, row["high"].number
    assert low is not None
    assert high is not None
    assert (low < value < high) == (within == "yes")
    assert (row["ours"].text, row["published"].number) == ("70.0", value)
    assert row["within noise"].text == within
    assert row["diff."].number == pytest.approx(70 - value)


def test_the_rounding_of_a_figure_widens_our_interval() -> None:
    cells = [cell("m", values=[0.7249, 0.7249])]
    assert beside(cells, printed(72.5)).rows[0].cells[-1].text == "yes"
    assert beside(cells, printed(72.54)).rows[0].cells[-1].text == "no"


def test_every_source_is_a_row_of_its_own_and_is_named_below() -> None:
    table = beside([cell("m")], printed(60.0), printed(61.0, source="another"))
    assert [row.label for row in table.rows] == ["m", "m"]
    assert [row.cells[3].note for row in table.rows] == ["[1]", "[2]"]
    assert table.notes[:2] == ("[1] its paper.", "[2] another.")


def test_only_the_sources_asked_for_are_cited_and_table_1_is_not_table_10() -> None:
    figures = [printed(50.0 + n, source=f"paper Table {n}") for n in (1, 10)]
    table = beside([cell("m")], *figures, sources=["paper Table 1"])
    assert [row.cells[3].number for row in table.rows] == [51.0]


def test_a_variant_stands_for_its_model() -> None:
    assert [row.label for row in beside([cell("m@paper")], printed(60.0)).rows] == ["m@paper"]


def test_a_figure_over_other_candidates_is_shown_for_want_of_one_over_the_same_and_told() -> None:
    other = printed(70.0, first_stage="splade+depth=50")
    table = beside([cell("m")], other)
    assert "In print over other candidates (splade, top 50): m on DL19." in table.notes
    table = beside([cell("m")], other, printed(60.0))
    assert [row.cells[3].number for row in table.rows] == [60.0]
    assert not any("other candidates" in note for note in table.notes)


def test_another_first_stage_is_not_the_first_stage() -> None:
    figures = [printed(70.0, model="first-stage", first_stage=name) for name in ("bm25", "splade")]
    assert len(beside([cell("first-stage")], *figures).rows) == 1


def test_a_first_stage_that_differs_is_the_suspected_cause() -> None:
    cells = [cell("first-stage", values=[0.3075, 0.3075]), cell("m")]
    first = {"model": "first-stage"}
    table = beside(cells, printed(60.0), printed(32.18, **first))
    assert "The first stage itself is another (30.75 here, 32.18 there): DL19." in table.notes
    table = beside(cells, printed(60.0), printed(30.8, **first))
    assert not any("itself" in note for note in table.notes)


def test_what_the_record_says_of_engine_weights_changes_and_faults_is_told() -> None:
    engine = {"engine": {"engine": "hf", "base": {"repo": "o/m", "revision": "main"}}}
    ours = cell("m", environment=engine)
    ours.record["model"]["overrides"] = {"num_child": "9"}
    table = beside([ours], printed(60.0, confidence="low"))
    for text in (
        "In print at second hand only, or from memory: m.",
        "Engine hf, not vLLM: m.",
        "Weights not pinned (main): m.",
        "Changed (num_child=9): m.",
        "Faults in 20.0 % of the answers: m.",
    ):
        assert text in table.notes


def test_an_average_is_held_against_the_published_one_with_an_interval_within_datasets() -> None:
    cells = suite(1)
    columns = quality.columns_of({"dl-both": {"dl19": "DL19", "dl20": "DL20"}}, {"dl-both": ["dl19", "dl20"]})  # fmt: skip
    frame = quality.Frame((("bm25, top 100", "reranker-0-7b"),), columns)
    sheet = quality.sheet_of(cells, quality.USUAL, frame)
    table = against(sheet, [printed(50.0, "dl-both", model="reranker-0-7b")])
    value = at(table, "reranker-0-7b", "ours", "average dl-both, bm25, top 100").number
    two = [c.measures["nDCG@10"] for c in cells if c.model == "reranker-0-7b"]
    assert value == pytest.approx(50 * sum(two))
    low = at(table, "reranker-0-7b", "95% low", "average dl-both, bm25, top 100").number
    assert low is not None
    assert low < value


def test_without_a_number_of_ours_a_figure_is_shown_on_request_only() -> None:
    half = cell("m", state="partial")
    assert beside([half], printed(60.0)).rows == ()
    table = beside([half], printed(60.0), missing=True)
    assert [v.text for v in table.rows[0].cells] == ["—", "—", "—", "60.0", "—", "no number"]


def test_figures_of_part_of_the_queries_and_of_other_measures_are_not_held_against_ours() -> None:
    cells = [cell("m", "dl19+limit=2", limit=2), cell("m", "dl20")]
    figures = [printed(60.0), printed(9.0, "dl20", measure="seconds_total")]
    assert beside(cells, *figures).rows == ()
