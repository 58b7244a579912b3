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

from harness import stats
from harness.cli import main
from harness.report import quality, tables, writers
from harness.specs import Registry
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
    labels = [row.label for row in quality.quality(cells).rows]
    assert labels == ["first-stage", "random", "b", "a", "oracle"]


def test_best_and_second_are_marked_on_unrounded_values() -> None:
    cells = [cell("a", values=[0.50001]), cell("b", values=[0.50002]), cell("c", values=[0.4])]
    table = quality.quality(cells)
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
    marks = [row.cells[0].mark for row in quality.quality(cells).rows]
    assert marks == ["best", "best", "second", "second", ""]


def test_values_that_differ_by_the_order_of_a_sum_are_a_tie() -> None:
    cells = [cell("a", values=[0.1 + 0.2]), cell("b", values=[0.3])]
    assert [row.cells[0].mark for row in quality.quality(cells).rows] == ["best", "best"]


@pytest.mark.parametrize("sanity", tables.SANITY)
def test_a_baseline_never_takes_a_mark(sanity: str) -> None:
    cells = [cell(sanity, values=[0.99]), cell("a", values=[0.5]), cell("b", values=[0.4])]
    table = quality.quality(cells)
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
    table = quality.quality(cells)
    assert at(table, "a", "dl19").mark == "best"
    assert at(table, "b", "dl19", "splade, top 50").mark == "second"


def test_a_missing_cell_is_a_dash_and_its_row_has_no_average() -> None:
    cells = [cell("a", "dl19"), cell("a", "dl20"), cell("b", "dl19")]
    table = quality.quality(cells)
    assert at(table, "a", "average dl").text == "60.0"
    for column in ("dl20", "average dl"):
        assert at(table, "b", column) == tables.Value(None, "—")
    assert any(note.startswith("— no finished cell") for note in table.notes)


def test_a_failed_cell_is_a_dash_and_its_error_a_note() -> None:
    cells = [cell("a"), cell("b", state="failed", measures={}, error="the engine died")]
    table = quality.quality(cells)
    assert at(table, "b", "dl19").number is None
    assert "Failed on DL19 (bm25, top 100), the engine died: b." in table.notes


def test_a_half_done_cell_is_signed_and_neither_competes_nor_counts() -> None:
    half = cell("b", values=[0.9], state="partial")
    cells = [cell("a"), cell("a", "dl20"), half, cell("b", "dl20"), cell("c"), cell("c", "dl20")]
    table = quality.quality(cells)
    assert at(table, "b", "dl19").note == "‡"
    assert at(table, "b", "dl19").mark == ""
    assert at(table, "b", "average dl").number is None


def test_a_limited_dataset_is_a_column_of_its_own_outside_the_average() -> None:
    cells = [cell("a"), cell("a", "dl20"), cell("a", "dl19+limit=2", [0.0, 0.0], limit=2)]
    table = quality.quality(cells)
    assert [c.head for c in table.columns] == ["DL19", "DL20", "DL19, first 2", "avg. of 2"]
    assert at(table, "a", "dl19+limit=2").note == "‡"
    assert at(table, "a", "average dl").text == "60.0"


def test_suites_have_headings_and_averages_of_their_own() -> None:
    beir = {"dataset_more": {"suite": "beir"}}
    cells = [cell("a"), cell("a", "covid", **beir), cell("a", "touche", [0.1], **beir)]
    columns = quality.quality(cells).columns
    assert [(c.group, c.head) for c in columns] == [
        ("dl", "DL19"), ("beir", "COVID"), ("beir", "TOUCHE"), ("beir", "avg. of 2"),
    ]  # fmt: skip


def test_an_in_domain_cell_is_signed() -> None:
    table = quality.quality([cell("a", dataset_more={"in_domain": True}), cell("b")])
    assert (at(table, "a", "dl19").note, at(table, "b", "dl19").note) == ("§", "")
    assert any(note.startswith("§ in-domain") for note in table.notes)


def test_the_notes_tell_what_inputs_lost_and_what_is_not_pinned() -> None:
    engine = {"engine": {"engine": "hf", "base": {"repo": "org/m", "revision": "main"}}}
    table = quality.quality([cell("a", inputs={"passages_clipped": 7}, environment=engine)])
    assert "Passages clipped: 7 on DL19 (bm25, top 100): a." in table.notes
    assert "Revision not pinned (main): a." in table.notes
    assert "nDCG@10 x 100" in table.caption
    assert "top 100" in table.caption
    assert "2 (DL19)" in table.caption


def test_weights_that_are_named_without_a_revision_are_not_told() -> None:
    table = quality.quality([cell("a", environment={"engine": {"base": "org/m"}})])
    assert not any("pinned" in note for note in table.notes)


def test_cells_over_different_candidates_are_told() -> None:
    cells = [cell(n, first_stage={"name": "bm25", "sha256": n}) for n in ("a", "b")]
    assert any(note.startswith("Not comparable: DL19") for note in quality.quality(cells).notes)


def test_the_dagger_marks_what_differs_from_the_baseline_after_holm() -> None:
    draw = random.Random(1)
    first = [draw.random() / 2 for _ in range(40)]
    better = [v + 0.2 + draw.random() / 10 for v in first]
    same = [v + draw.gauss(0, 0.1) for v in first]
    table = quality.quality(
        [cell("first-stage", values=first), cell("good", values=better), cell("same", values=same)]
    )
    assert [at(table, m, "dl19").note for m in ("first-stage", "good", "same")] == ["", "†", ""]
    assert "Holm over the 2 comparisons" in table.caption
    assert any("power 0.8" in note for note in table.notes)


def bright(
    *splits: str, models: tuple[str, ...] = ("first-stage", "a", "b", "oracle")
) -> list[CellResult]:
    """Cells of BRIGHT splits; b is better than a, and both than the first stage."""
    out = []
    for split in splits:
        draw = random.Random(split)
        first = [draw.random() / 3 for _ in range(30)]
        gains = {"first-stage": 0.0, "a": 0.15, "b": 0.3, "oracle": 0.5}
        suite = {"suite": "bright-12", "short": split.title()}
        for model in models:
            values = [v + gains[model] + draw.gauss(0, 0.03) * (model in "ab") for v in first]
            out.append(cell(model, f"bright/{split}", values, dataset_more=suite))
    return out


def test_an_average_is_printed_for_a_whole_suite_of_the_registry_only() -> None:
    splits = [name.removeprefix("bright/") for name in Registry().suites["bright-12"]["datasets"]]
    part = quality.quality(bright(*splits[:5]))
    assert [column.head for column in part.columns] == [name.title() for name in splits[:5]]
    whole = quality.quality(bright(*splits, models=("first-stage", "b")))
    assert [column.head for column in whole.columns][-1] == "avg. of 12"


def test_an_average_is_tested_with_its_columns_and_has_a_note_of_its_own() -> None:
    cells = [*suite(1, queries=40), *suite(1, ("dl20",), seed=3, queries=40)]
    table = quality.quality([c for c in cells if c.model in ("first-stage", "oracle")] + [
        cell("good", name, [v["nDCG@10"] + 0.1 for v in c.per_query])
        for c in cells if c.model == "first-stage" for name in [c.dataset]
    ])  # fmt: skip
    assert [v.note for v in table.rows[1].cells] == ["†", "†", "†"]
    assert "Holm over the 3 comparisons" in table.caption


def test_models_that_cannot_be_told_apart_share_their_ranks() -> None:
    draw = random.Random(4)
    first = [draw.random() / 2 for _ in range(40)]
    gains = {"first-stage": 0.0, "low": 0.0, "same": 0.005, "high": 0.3}
    cells = [cell(m, values=[v + g + draw.gauss(0, 0.05) for v in first]) for m, g in gains.items()]
    table = quality.quality(cells)
    ranks = {row.label: row.cells[1].text for row in table.rows}
    assert ranks == {"first-stage": "", "low": "2-3", "same": "2-3", "high": "1"}
    assert "Tukey" in table.caption


def test_one_model_alone_has_no_rank() -> None:
    assert [c.head for c in quality.quality([cell("first-stage"), cell("a")]).columns] == ["DL19"]


def test_letters_name_the_rows_that_a_number_is_better_than() -> None:
    layout = quality.Layout(marks="letters")
    table = quality.quality(bright("biology"), layout=layout)
    assert [row.label for row in table.rows] == [
        "(a) first-stage", "(b) a", "(c) b", "(d) oracle",
    ]  # fmt: skip
    assert [row.cells[0].note for row in table.rows] == ["", "a", "ab", ""]
    assert "Letters:" in table.caption
    assert "†" not in table.caption
    assert r"\textsuperscript{a}\textsuperscript{b}" in writers.to_latex(table)


def test_rows_beyond_z_are_named_by_numbers() -> None:
    cells = [cell(f"m{n}", values=[0.5, 0.5]) for n in range(28)]
    table = quality.quality(cells, layout=quality.Layout(marks="letters"))
    assert [row.label for row in table.rows][-3:] == ["(z) m25", "([27]) m26", "([28]) m27"]


def test_the_correction_is_the_one_asked_for_and_the_caption_names_it() -> None:
    draw = random.Random(8)
    noise = [draw.gauss(0, 0.1) for _ in range(40)]
    near = [n - sum(noise) / 40 + 0.034 for n in noise]
    cells = [cell(m, values=v) for m, v in {
        "first-stage": [0.0] * 40, "sure": [n / 9 + 0.2 for n in noise], "near": near,
    }.items()]  # fmt: skip
    p_values = stats.sign_flips([[stats.align([c, cells[0]], "nDCG@10")] for c in cells[1:]])
    assert p_values[0] < 0.001 < 0.025 < p_values[1] < 0.05  # Holm lets it through
    notes = {}
    for name in ("holm", "bonferroni"):
        table = quality.quality(cells, layout=quality.Layout(correction=name))
        notes[name] = at(table, "near", "dl19").note
        assert f"{name.title()} over the 2 comparisons" in table.caption
    assert notes == {"holm": "†", "bonferroni": ""}


def test_another_scale_and_number_of_digits_are_those_of_every_number_and_the_caption() -> None:
    table = quality.quality([cell("a", values=[1 / 3])], layout=quality.Layout(scale=1, digits=4))
    assert at(table, "a", "dl19").text == "0.3333"
    assert table.caption.startswith("nDCG@10 after")


def test_the_comparison_holds_what_stats_gives() -> None:
    cells = bright("biology")
    table = quality.comparison(cells)
    pair = stats.paired([[stats.align([cells[1], cells[0]], "nDCG@10")]])[0]
    row = {c.key: v for c, v in zip(table.columns, table.rows[0].cells, strict=True)}
    assert row["difference"].number == pytest.approx(100 * pair.difference)
    assert row["low"].number == pytest.approx(100 * pair.low)
    assert row["t_p"].text == row["adjusted"].text == "<0.0001"
    assert row["adjusted"].number == pytest.approx(2 * pair.fisher_p)
    assert row["counts"].text == f"{pair.wins}/{pair.ties}/{pair.losses}"
    gain = cells[1].measures["nDCG@10"] - cells[0].measures["nDCG@10"]
    most = cells[3].measures["nDCG@10"] - cells[0].measures["nDCG@10"]
    assert row["share"].number == pytest.approx(100 * gain / most)


def test_the_comparison_has_no_t_test_of_an_average_and_none_of_baselines() -> None:
    table = quality.comparison(suite(2))
    assert {row.label for row in table.rows} == {"reranker-0-7b", "reranker-1-7b"}
    assert at(table, "reranker-0-7b", "t_p", "average dl, bm25, top 100").text == "—"
    assert at(table, "reranker-0-7b", "fisher_p", "average dl, bm25, top 100").number is not None


def test_without_an_oracle_there_is_no_share_of_its_gain() -> None:
    table = quality.comparison([cell("first-stage"), cell("a", values=[0.6, 0.9])])
    assert at(table, "a", "share", "dl19, bm25, top 100").text == "—"


def test_another_baseline_can_be_asked_for() -> None:
    table = quality.comparison(bright("biology"), layout=quality.Layout(baseline="a"))
    assert [row.label for row in table.rows] == ["b"]
    assert "against a" in table.caption


def test_a_frame_shows_rows_and_columns_that_have_no_cell() -> None:
    columns = quality.columns_of({"trec-dl": {"dl19": "DL19", "dl20": "DL20"}}, {})
    lines = (("bm25, top 100", "a"), ("bm25, top 100", "never run"))
    table = quality.quality([cell("a")], frame=quality.Frame(lines, columns))
    assert [v.text for v in table.rows[0].cells] == ["60.0", "—"]
    assert [v.text for v in table.rows[1].cells] == ["—", "—"]


def test_other_queries_than_the_baseline_are_not_tested_but_told() -> None:
    cells = [cell("first-stage"), cell("a", values=[0.5, 0.6, 0.7])]
    table = quality.quality(cells)
    assert "†" not in table.caption
    assert any(note.startswith("Not comparable") for note in table.notes)


def test_cells_of_the_fake_engine_are_left_out_of_every_report() -> None:
    cells = [cell("real"), fake()]
    for table in (quality.quality(cells), tables.efficiency(cells)):
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


def test_latency_cells_stay_out_of_quality_and_show_their_times_in_efficiency() -> None:
    timed = cell("a+protocol=latency", protocol={"kind": "latency"})
    timed.record["efficiency"]["latency"] = {"median": 1.5, "p90": 2.0, "p99": 3.0, "queries": 5}
    assert [row.label for row in quality.quality([cell("a"), timed]).rows] == ["a"]
    table = tables.efficiency([cell("a"), timed])
    group = "dl19, bm25, top 100"
    assert at(table, "a+protocol=latency", "latency_median", group).text == "1.50"
    assert at(table, "a", "latency_median", group).text == "—"
    assert at(table, "a", "seconds", group).text == "2.00"
    assert at(table, "a+protocol=latency", "seconds", group).text == "—", "another protocol"


def test_efficiency_is_per_query_and_absent_is_a_dash() -> None:
    cells = [cell("first-stage", values=[0.4, 0.4]), cell("a"), cell("oracle", values=[0.8, 0.8])]
    table = tables.efficiency(cells)
    found = {c.key: v.text for c, v in zip(table.columns, table.rows[0].cells, strict=True)}
    assert found == {
        "calls": "10.0", "rounds": "2.0", "prompt_tokens": "1000", "generated_tokens": "100",
        "seconds": "2.00", "queries_per_second": "—", "gain_share": "50.0", "unparsable": "15.0",
        "cut_off": "5.0", "no_op": "25.0", "kendall_tau": "0.50",
    }  # fmt: skip


def spent(model: str = "a", **efficiency: Any) -> CellResult:
    """A cell over two queries with these costs beside the usual ones."""
    found = cell(model)
    found.record["efficiency"].update(efficiency)
    return found


def test_operations_stand_with_what_a_pflop_buys_only_where_they_are_known() -> None:
    table = tables.efficiency([spent("a", flops=5e14), cell("b")])
    group = "dl19, bm25, top 100"
    assert at(table, "a", "tflop", group).text == "250.00"
    assert at(table, "a", "rpp", group).text == "2.40"  # nDCG@10 0.6 at a quarter of a PFLOP
    assert at(table, "a", "qpp", group).text == "4.00"
    assert at(table, "b", "qpp", group).text == "—"
    assert any("PFLOP" in note for note in table.notes)
    plain = tables.efficiency([cell("b")])
    assert not {"tflop", "qpp", "rpp"} & {c.key for c in plain.columns}
    assert not any("PFLOP" in note for note in plain.notes)


def test_energy_is_per_query_and_memory_is_not() -> None:
    table = tables.efficiency([spent(energy_joules=500.0, gpu_memory_gib=70.5)])
    group = "dl19, bm25, top 100"
    assert at(table, "a", "energy_joules", group).text == "250.0"
    assert at(table, "a", "gpu_memory_gib", group).text == "70.5"


def test_a_price_is_shown_for_cells_that_ran_on_a_gpu_here() -> None:
    gpu = {"engine": {"engine": "vllm"}, "hardware": {"gpu": ["one"]}}
    ours, theirs = cell("ours", environment=gpu), cell("theirs")
    elsewhere = cell("served", environment={**gpu, "engine": {"engine": "http"}})
    ours.record["model"]["tensor_parallel"] = 2
    table = tables.efficiency([ours, theirs, elsewhere], price=1.8)
    group = "dl19, bm25, top 100"
    assert at(table, "ours", "money", group).text == "2.000"  # 1,000 x 2 s x 2 boards x 1.8 / 3,600
    assert at(table, "theirs", "money", group).text == "—"
    assert at(table, "served", "money", group).text == "—"
    assert "money" not in {c.key for c in tables.efficiency([ours]).columns}


def test_machines_get_every_number_below_a_nested_table() -> None:
    tokens = {"prompt": {"mean": 12.5, "max": 20}, "cut_off": 0.25}
    known = spent(tokens=tokens, breakdown={"load": None, "wait": 3.5})
    table = tables.efficiency([known, cell("b")], details=True)
    group = "dl19, bm25, top 100"
    assert at(table, "a", "efficiency.tokens.prompt.mean", group).number == 12.5
    assert at(table, "a", "efficiency.breakdown.wait", group).number == 3.5
    assert at(table, "b", "efficiency.tokens.cut_off", group).text == "—"
    assert "efficiency.breakdown.load" not in {c.key for c in table.columns}
    assert not any("." in c.key for c in tables.efficiency([known]).columns)


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
    table = quality.quality(suite(3))
    expected = [v.text for row in table.rows for v in row.cells if v.number is not None]
    writer, pattern = PARTS[kind]
    text = writer(table.__class__(table.title, table.columns, table.rows))
    assert re.findall(pattern, text) == expected


def test_marks_look_the_same_in_every_format() -> None:
    cells = [cell("a", values=[0.5]), cell("b", values=[0.4])]
    table = quality.quality(cells)
    assert "**50.0**" in writers.to_markdown(table)
    assert "<u>40.0</u>" in writers.to_markdown(table)
    assert r"\textbf{50.0}" in writers.to_latex(table)
    assert r"\underline{40.0}" in writers.to_latex(table)


def test_latex_escapes_what_tex_reads_as_commands() -> None:
    text = writers.to_latex(quality.quality([cell(r"a_b%c&d#e$f{g}h\i~j^k")]))
    assert (
        r"a\_b\%c\&d\#e\$f\{g\}h\textbackslash{}i\textasciitilde{}j\textasciicircum{}k & 60.0 \\"
        in text
    )


def test_latex_has_one_block_head_a_first_stage_and_rules_under_headings() -> None:
    beir = {"dataset_more": {"suite": "beir"}}
    text = writers.to_latex(quality.quality([cell("a"), cell("a", "covid", **beir)]), "tab:x")
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
    text = writers.to_markdown(quality.quality([cell(HOSTILE)]))
    [line] = [line for line in text.splitlines() if "alert" in line]
    assert line.startswith(r"| &lt;script&gt;alert(1)&lt;/script&gt;\|x")
    assert line.endswith("| 60.0 |")


def test_a_hostile_name_cannot_steer_a_terminal() -> None:
    text = writers.to_text(quality.quality([cell(HOSTILE)]))
    assert "\x1b" not in text
    assert len([line for line in text.splitlines() if "60.0" in line]) == 1


def test_a_hostile_name_survives_csv_and_json() -> None:
    table = quality.quality([cell(HOSTILE)])
    rows = list(csv.reader(io.StringIO(writers.to_csv(table))))
    assert rows[1] == ["bm25, top 100", HOSTILE, "60.0"]
    assert json.loads(writers.to_json(table))["rows"][0]["label"] == HOSTILE


def test_a_wide_table_is_folded_to_the_width_of_a_terminal() -> None:
    cells = [cell("a-model-with-a-name-of-its-own", f"set{n:02}") for n in range(20)]
    text = writers.to_text(quality.quality(cells))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    assert text.count("a-model-with-a-name-of-its-own") == 3
    assert [line.count("SET") for line in lines if line.startswith("model")] == [9, 9, 2]


def test_the_text_table_lines_its_decimal_points_up() -> None:
    cells = [cell("a", dataset_more={"in_domain": True}), cell("b", values=[1.0])]
    lines = [
        line
        for line in writers.to_text(quality.quality(cells)).splitlines()
        if line.startswith("  ")
    ]
    assert len({line.index(".") for line in lines}) == 1


def test_the_long_csv_has_a_row_for_cell_and_measure_with_unrounded_values() -> None:
    rows = list(csv.DictReader(io.StringIO(writers.to_long_csv([cell("a", values=[1 / 3])]))))
    assert [row["measure"] for row in rows] == ["nDCG@10", "RR@10"]
    assert float(rows[0]["value"]) == 1 / 3
    assert (rows[0]["first_stage"], rows[0]["depth"], rows[0]["queries"]) == ("bm25", "100", "1")


def test_no_cells_make_a_table_without_rows_in_every_format() -> None:
    for table in (quality.quality([]), tables.efficiency([]), tables.summary([])):
        assert table.rows == ()
        assert all(writer(table) for writer in writers.WRITERS.values())
        assert "model" in writers.to_text(table)


def test_a_cell_without_cost_records_is_a_row_of_dashes() -> None:
    bare = cell(
        "imported", efficiency=None, faults=None, environment=None, protocol=None, inputs=None
    )
    for table in (quality.quality([bare]), tables.efficiency([bare]), tables.summary([bare])):
        assert [row.label for row in table.rows] == ["imported"]
    assert {v.text for v in tables.efficiency([bare]).rows[0].cells} == {"—", "0.50"}
    assert "imported" in writers.to_long_csv([bare])


def reported(capsys: pytest.CaptureFixture[str], folder: Path, *flags: str) -> tuple[int, str]:
    """What `harness report` says of the committed cells, and its exit code."""
    results = Path(__file__).resolve().parent.parent / "results"
    code = 0
    try:
        main(["report", "--results", str(results), "--out", str(folder), "--format", "csv", *flags])
    except SystemExit as stop:
        code = int(stop.code or 0)
    said = capsys.readouterr()
    return code, said.out + said.err


def test_the_command_takes_marks_baseline_scale_and_digits(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    baseline = ("--baseline", "smollm2-135m-setwise", "--correction", "bonferroni")
    code, said = reported(capsys, tmp_path, "--scale", "1", "--round", "3", *baseline)
    assert code == 0
    assert "0.694" in said
    comparison = (tmp_path / "comparison.csv").read_text(encoding="utf-8")
    assert "smollm2-135m-qlm" in comparison
    assert "smollm2-135m-setwise," not in comparison
    assert "(a) first-stage" in reported(capsys, tmp_path, "--marks", "letters")[1]


@pytest.mark.parametrize(
    ("flags", "nearest"),
    [
        (("--marks", "stars"), "'dagger' or 'letters'"),
        (("--correction", "fdr"), "'holm' or 'bonferroni'"),
        (("--scale", "10"), "1 or 100"),
        (("--round", "-1"), "greater than or equal to 0"),
        (("--baseline", "first-stag"), "did you mean first-stage"),
    ],
)
def test_what_a_table_cannot_be_is_a_usage_error(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, flags: tuple[str, ...], nearest: str
) -> None:
    code, said = reported(capsys, tmp_path, *flags)
    assert code == 2
    assert nearest in said
