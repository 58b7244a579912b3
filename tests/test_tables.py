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

from harness.published import Published
from harness.report import tables, writers
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


def at(table: tables.Table, model: str, column: str, block: str = "bm25, top 100") -> tables.Value:
    [row] = [row for row in table.rows if (row.label, row.group) == (model, block)]
    return row.cells[[c.key for c in table.columns].index(column)]


def test_baselines_come_first_and_the_oracle_last() -> None:
    cells = [cell("oracle"), cell("b"), cell("random"), cell("a"), cell("first-stage")]
    labels = [row.label for row in tables.quality(cells).rows]
    assert labels == ["first-stage", "random", "b", "a", "oracle"]


def test_best_and_second_are_marked_on_unrounded_values() -> None:
    cells = [cell("a", values=[0.50001]), cell("b", values=[0.50002]), cell("c", values=[0.4])]
    table = tables.quality(cells)
    marks = {row.label: row.cells[0].mark for row in table.rows}
    assert {row.label: row.cells[0].text for row in table.rows} == {
        "a": "50.0",
        "b": "50.0",
        "c": "40.0",
    }
    assert marks == {"a": "second", "b": "best", "c": ""}


def test_ties_share_their_mark() -> None:
    cells = [
        cell(name, values=[v])
        for name, v in {"a": 0.5, "b": 0.5, "c": 0.4, "d": 0.4, "e": 0.3}.items()
    ]
    marks = [row.cells[0].mark for row in tables.quality(cells).rows]
    assert marks == ["best", "best", "second", "second", ""]


def test_values_that_differ_by_the_order_of_a_sum_are_a_tie() -> None:
    cells = [cell("a", values=[0.1 + 0.2]), cell("b", values=[0.3])]
    assert [row.cells[0].mark for row in tables.quality(cells).rows] == ["best", "best"]


@pytest.mark.parametrize("sanity", tables.SANITY)
def test_a_baseline_never_takes_a_mark(sanity: str) -> None:
    cells = [cell(sanity, values=[0.99]), cell("a", values=[0.5]), cell("b", values=[0.4])]
    table = tables.quality(cells)
    assert at(table, sanity, "dl19").mark == ""
    assert at(table, "a", "dl19").mark == "best"


def test_marks_are_given_within_a_first_stage() -> None:
    other = {"first_stage": {"name": "splade+depth=50"}, "depth": 50}
    cells = [
        cell("a", values=[0.5]),
        cell("b", values=[0.4]),
        cell("a", values=[0.9], **other),
        cell("b", values=[0.8], **other),
    ]
    table = tables.quality(cells)
    assert at(table, "a", "dl19").mark == "best"
    assert at(table, "b", "dl19", "splade, top 50").mark == "second"


def test_a_missing_cell_is_a_dash_and_its_row_has_no_average() -> None:
    cells = [cell("a", "dl19"), cell("a", "dl20"), cell("b", "dl19")]
    table = tables.quality(cells)
    assert at(table, "a", "average dl").text == "60.0"
    for column in ("dl20", "average dl"):
        assert at(table, "b", column) == tables.Value(None, "—")
    assert any(note.startswith("— not run") for note in table.notes)


def test_a_failed_cell_is_a_dash_and_its_error_a_note() -> None:
    cells = [cell("a"), cell("b", state="failed", measures={}, error="the engine died")]
    table = tables.quality(cells)
    assert at(table, "b", "dl19").number is None
    assert "Failed on DL19 (bm25, top 100), the engine died: b." in table.notes


def test_a_half_done_cell_is_signed_and_neither_competes_nor_counts() -> None:
    half = cell("b", values=[0.9], state="partial")
    cells = [cell("a"), cell("a", "dl20"), half, cell("b", "dl20"), cell("c"), cell("c", "dl20")]
    table = tables.quality(cells)
    assert at(table, "b", "dl19").note == "‡"
    assert at(table, "b", "dl19").mark == ""
    assert at(table, "b", "average dl").number is None


def test_a_limited_dataset_is_a_column_of_its_own_outside_the_average() -> None:
    cells = [cell("a"), cell("a", "dl20"), cell("a", "dl19+limit=2", [0.0, 0.0], limit=2)]
    table = tables.quality(cells)
    assert [c.head for c in table.columns] == ["DL19", "DL20", "DL19, first 2", "avg. of 2"]
    assert at(table, "a", "dl19+limit=2").note == "‡"
    assert at(table, "a", "average dl").text == "60.0"


def test_suites_have_headings_and_averages_of_their_own() -> None:
    beir = {"dataset_more": {"suite": "beir"}}
    cells = [cell("a"), cell("a", "covid", **beir), cell("a", "touche", [0.1], **beir)]
    columns = tables.quality(cells).columns
    assert [(c.group, c.head) for c in columns] == [
        ("dl", "DL19"), ("beir", "COVID"), ("beir", "TOUCHE"), ("beir", "avg. of 2"),
    ]  # fmt: skip


def test_an_in_domain_cell_is_signed() -> None:
    table = tables.quality([cell("a", dataset_more={"in_domain": True}), cell("b")])
    assert (at(table, "a", "dl19").note, at(table, "b", "dl19").note) == ("§", "")
    assert any(note.startswith("§ in-domain") for note in table.notes)


def test_the_notes_tell_what_inputs_lost_and_what_is_not_pinned() -> None:
    engine = {"engine": {"engine": "hf", "base": {"repo": "org/m", "revision": "main"}}}
    table = tables.quality([cell("a", inputs={"passages_clipped": 7}, environment=engine)])
    assert "Passages clipped: 7 on DL19 (bm25, top 100): a." in table.notes
    assert "Revision not pinned (main): a." in table.notes
    assert "nDCG@10 x 100" in table.caption
    assert "top 100" in table.caption
    assert "2 (DL19)" in table.caption


def test_weights_that_are_named_without_a_revision_are_not_told() -> None:
    table = tables.quality([cell("a", environment={"engine": {"base": "org/m"}})])
    assert not any("pinned" in note for note in table.notes)


def test_cells_over_different_candidates_are_told() -> None:
    cells = [cell(n, first_stage={"name": "bm25", "sha256": n}) for n in ("a", "b")]
    assert any(note.startswith("Not comparable: DL19") for note in tables.quality(cells).notes)


def test_the_dagger_marks_what_differs_from_the_baseline_after_holm() -> None:
    draw = random.Random(1)
    first = [draw.random() / 2 for _ in range(40)]
    better = [v + 0.2 + draw.random() / 10 for v in first]
    same = [v + draw.gauss(0, 0.1) for v in first]
    table = tables.quality(
        [cell("first-stage", values=first), cell("good", values=better), cell("same", values=same)],
        baseline="first-stage",
    )
    assert [at(table, m, "dl19").note for m in ("first-stage", "good", "same")] == ["", "†", ""]
    assert "Holm over the 2 comparisons" in table.caption
    assert any("power 0.8" in note for note in table.notes)


def test_other_queries_than_the_baseline_are_not_tested_but_told() -> None:
    cells = [cell("first-stage"), cell("a", values=[0.5, 0.6, 0.7])]
    table = tables.quality(cells, baseline="first-stage")
    assert "†" not in table.caption
    assert any(note.startswith("Not comparable") for note in table.notes)


def test_cells_of_the_fake_engine_are_left_out_of_every_report() -> None:
    cells = [cell("real"), fake()]
    for table in (tables.quality(cells), tables.efficiency(cells)):
        assert [row.label for row in table.rows] == ["real"]
        assert "Left out, answered by the fake engine: pretender." in table.notes
    assert "pretender" not in writers.to_long_csv(cells)


def test_the_summary_signs_a_fake_cell() -> None:
    table = tables.summary([fake()])
    assert table.rows[0].cells[0].note == "¶"
    assert "¶ answered by the fake engine: not a result." in table.notes


def test_the_summary_fits_a_terminal_for_usual_names() -> None:
    name = "rearank-zs-7b@published-windows"
    text = writers.to_text(tables.summary([cell("first-stage"), cell(name)]))
    assert max(map(len, text.splitlines())) <= 100


def printed(value: float, dataset: str = "dl19", **more: Any) -> Published:
    """A published figure of model m over BM25."""
    fields = {"model": "m", "name_as_published": "M-7B", "first_stage": "bm25"}
    rest = {"measure": "nDCG@10", "source": "its paper", "confidence": "high"}
    return Published(dataset=dataset, value=value, **{**fields, **rest, **more})


def test_a_published_figure_stands_below_its_model_and_changes_nothing_measured() -> None:
    cells = [cell(), cell(dataset="dl20"), cell("a"), cell("oracle")]
    plain = tables.quality(cells)
    table = tables.quality(cells, [printed(99.9)])
    assert [(row.label, row.kind) for row in table.rows] == [
        ("m", "measured"), ("m (published)", "published"), ("a", "measured"), ("oracle", "measured"),
    ]  # fmt: skip
    assert [row for row in table.rows if row.kind == "measured"] == list(plain.rows)
    assert at(table, "m (published)", "dl19") == tables.Value(99.9, "99.9")
    assert at(table, "m (published)", "average dl").text == "—"
    assert "m (published), bm25, top 100: M-7B in its paper: DL19 99.9." in table.notes
    assert "not measured here" in table.caption
    assert '"bm25, top 100",published,m (published),99.9,,' in writers.to_csv(table)


def test_sources_that_disagree_in_print_make_a_range_with_every_source_in_the_notes() -> None:
    figures = [printed(72.7), printed(72.2, source="another"), printed(72.65, confidence="low")]
    table = tables.quality([cell()], figures)
    assert at(table, "m (published)", "dl19") == tables.Value(None, "72.2-72.7")
    assert [note for note in table.notes if "(published)" in note] == [
        "m (published), bm25, top 100: M-7B in its paper: DL19 72.7.",
        "m (published), bm25, top 100: M-7B in another: DL19 72.2.",
        "m (published), bm25, top 100: M-7B in its paper, low confidence: DL19 72.65.",
    ]
    same = tables.quality([cell()], [printed(50.58), printed(50.6)])
    assert at(same, "m (published)", "dl19").text == "50.6"


def test_a_figure_over_other_candidates_is_told_but_not_shown() -> None:
    other = {"first_stage": {"name": "bm25+depth=50"}, "depth": 50}
    table = tables.quality([cell(**other)], [printed(70.0), printed(60.0, first_stage="")])
    assert [row.kind for row in table.rows] == ["measured"]
    assert table.notes[-1].startswith("m (published), not shown beside bm25, top 50")
    assert table.notes[-1].endswith("DL19 (bm25, top 100), DL19 (unnamed candidates, top 100).")
    deep = tables.quality([cell(**other)], [printed(70.0, first_stage="bm25+depth=50")])
    assert at(deep, "m (published)", "dl19", "bm25, top 50").text == "70.0"


def test_published_figures_are_of_whole_datasets_and_of_the_measure_shown() -> None:
    limited = cell(dataset="dl19+limit=2", limit=2)
    figures = [printed(70.0), printed(9.0, "dl19+limit=2", measure="seconds_total")]
    assert [row.kind for row in tables.quality([limited], figures).rows] == ["measured"]


def test_a_variant_shows_the_figures_of_its_model() -> None:
    table = tables.quality([cell("m"), cell("a"), cell("m@paper")], [printed(70.0)])
    assert [row.label for row in table.rows] == ["m", "m@paper", "m (published)", "a"]


def test_figures_of_models_that_were_not_measured_are_not_shown() -> None:
    figures = [printed(70.0, model="", name_as_published="Other-8B")]
    assert len(tables.quality([cell()], figures).rows) == 1


def test_latency_cells_stay_out_of_quality_and_show_their_times_in_efficiency() -> None:
    timed = cell("a+protocol=latency", protocol={"kind": "latency"})
    timed.record["efficiency"]["latency"] = {"median": 1.5, "p90": 2.0, "p99": 3.0, "queries": 5}
    assert [row.label for row in tables.quality([cell("a"), timed]).rows] == ["a"]
    table = tables.efficiency([cell("a"), timed])
    group = "dl19, bm25, top 100"
    assert at(table, "a+protocol=latency", "latency_median", group).text == "1.50"
    assert at(table, "a", "latency_median", group).text == "—"


def test_efficiency_is_per_query_and_absent_is_a_dash() -> None:
    cells = [cell("first-stage", values=[0.4, 0.4]), cell("a"), cell("oracle", values=[0.8, 0.8])]
    table = tables.efficiency(cells)
    found = {c.key: v.text for c, v in zip(table.columns, table.rows[0].cells, strict=True)}
    assert found == {
        "calls": "10.0", "rounds": "2.0", "prompt_tokens": "1000", "generated_tokens": "100",
        "seconds": "2.00", "queries_per_second": "—", "gain_share": "50.0", "unparsable": "15.0",
        "cut_off": "5.0", "no_op": "25.0", "kendall_tau": "0.50",
    }  # fmt: skip


def test_the_summary_shows_the_change_against_the_first_stage() -> None:
    table = tables.summary([cell("first-stage", values=[0.5, 0.6]), cell("a")])
    group = "dl19, bm25, top 100"
    assert at(table, "a", "nDCG@10", group).text == "0.6000"
    assert at(table, "a", "gain", group).text == "+0.0500"
    assert at(table, "first-stage", "gain", group).text == "—"
    assert at(table, "a", "faults", group).text == "4"


def test_a_negative_zero_is_never_printed() -> None:
    assert tables.rounded(-0.04, 1) == "0.0"
    assert tables.rounded(-0.04, 1, signed=True) == "0.0"
    assert tables.rounded(-0.06, 1) == "-0.1"


PARTS = {
    "text": (writers.to_text, r"(?<![\d.])\d+\.\d(?![\d%])"),
    "md": (writers.to_markdown, r"(?<=[ *>])\d+\.\d(?=[ *<])"),
    "tex": (writers.to_latex, r"(?<=[ {])\d+\.\d(?=[ $}])"),
    "csv": (writers.to_csv, r"(?<=,)\d+\.\d"),
    "json": (writers.to_json, r'(?<="text": ")\d+\.\d'),
}


@pytest.mark.parametrize("kind", PARTS)
def test_every_format_prints_the_same_numbers_in_the_same_order(kind: str) -> None:
    table = tables.quality(suite(3))
    expected = [v.text for row in table.rows for v in row.cells]
    writer, pattern = PARTS[kind]
    text = writer(table.__class__(table.title, table.columns, table.rows))
    assert re.findall(pattern, text) == expected


def test_marks_look_the_same_in_every_format() -> None:
    cells = [cell("a", values=[0.5]), cell("b", values=[0.4])]
    table = tables.quality(cells)
    assert "**50.0**" in writers.to_markdown(table)
    assert "<u>40.0</u>" in writers.to_markdown(table)
    assert r"\textbf{50.0}" in writers.to_latex(table)
    assert r"\underline{40.0}" in writers.to_latex(table)


def test_latex_escapes_what_tex_reads_as_commands() -> None:
    text = writers.to_latex(tables.quality([cell(r"a_b%c&d#e$f{g}h\i~j^k")]))
    assert (
        r"a\_b\%c\&d\#e\$f\{g\}h\textbackslash{}i\textasciitilde{}j\textasciicircum{}k & 60.0 \\"
        in text
    )


def test_latex_has_one_block_head_a_first_stage_and_rules_under_headings() -> None:
    beir = {"dataset_more": {"suite": "beir"}}
    text = writers.to_latex(tables.quality([cell("a"), cell("a", "covid", **beir)]), "tab:x")
    assert r"\multicolumn{3}{l}{\textit{bm25, top 100}} \\" in text
    assert r"\cmidrule(lr){2-2}\cmidrule(lr){3-3}" in text
    assert r"\label{tab:x}" in text


def test_latex_keeps_an_absent_value_apart_from_a_negative_one() -> None:
    table = tables.summary([cell("first-stage", values=[0.7, 0.7]), cell("a")])
    text = writers.to_latex(table)
    assert "& --- &" in text
    assert "& $-$0.1000 &" in text


HOSTILE = "<script>alert(1)</script>|x\n\x1b[31m"


def test_a_hostile_name_stays_in_its_cell_in_markdown() -> None:
    text = writers.to_markdown(tables.quality([cell(HOSTILE)]))
    [line] = [line for line in text.splitlines() if "alert" in line]
    assert line.startswith(r"| &lt;script&gt;alert(1)&lt;/script&gt;\|x")
    assert line.endswith("| 60.0 |")


def test_a_hostile_name_cannot_steer_a_terminal() -> None:
    text = writers.to_text(tables.quality([cell(HOSTILE)]))
    assert "\x1b" not in text
    assert len([line for line in text.splitlines() if "60.0" in line]) == 1


def test_a_hostile_name_survives_csv_and_json() -> None:
    table = tables.quality([cell(HOSTILE)])
    rows = list(csv.reader(io.StringIO(writers.to_csv(table))))
    assert rows[1] == ["bm25, top 100", "measured", HOSTILE, "60.0"]
    assert json.loads(writers.to_json(table))["rows"][0]["label"] == HOSTILE


def test_the_text_table_lines_its_decimal_points_up() -> None:
    cells = [cell("a", dataset_more={"in_domain": True}), cell("b", values=[1.0])]
    lines = [
        line
        for line in writers.to_text(tables.quality(cells)).splitlines()
        if line.startswith("  ")
    ]
    assert len({line.index(".") for line in lines}) == 1


def test_the_long_csv_has_a_row_for_cell_and_measure_with_unrounded_values() -> None:
    rows = list(csv.DictReader(io.StringIO(writers.to_long_csv([cell("a", values=[1 / 3])]))))
    assert [row["measure"] for row in rows] == ["nDCG@10", "RR@10"]
    assert float(rows[0]["value"]) == 1 / 3
    assert (rows[0]["first_stage"], rows[0]["depth"], rows[0]["queries"]) == ("bm25", "100", "1")


def test_no_cells_make_a_table_without_rows_in_every_format() -> None:
    for table in (tables.quality([]), tables.efficiency([]), tables.summary([])):
        assert table.rows == ()
        assert all(writer(table) for writer in writers.WRITERS.values())
        assert "model" in writers.to_text(table)


def test_a_cell_without_cost_records_is_a_row_of_dashes() -> None:
    bare = cell(
        "imported", efficiency=None, faults=None, environment=None, protocol=None, inputs=None
    )
    for table in (tables.quality([bare]), tables.efficiency([bare]), tables.summary([bare])):
        assert [row.label for row in table.rows] == ["imported"]
    assert {v.text for v in tables.efficiency([bare]).rows[0].cells} == {"—", "0.50"}
    assert "imported" in writers.to_long_csv([bare])
