"""The paper kit: every number has its cells, and what is no finished cell is no number."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_against import printed
from test_tables import cell, suite

from harness import plan
from harness.cli import main
from harness.published import load
from harness.report import paper, quality, writers
from harness.report.against import against
from harness.report.tables import Table
from harness.specs import Registry, build
from harness.types import Cell, CellResult, DataError, DatasetSpec, ModelSpec, Protocol

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "registry" / "suites" / "demo.toml"
SUITES = sorted(
    name for name, table in Registry().suites.items() if "paper" in table and name != "demo"
)
TERMS = paper.Terms(title="A table & its title")
HEADS = {"dl19": "DL19", "dl20": "DL20"}
COLUMNS = quality.columns_of({"trec-dl": HEADS}, {"trec-dl": tuple(HEADS)})


def slot(model: str, dataset: str, result: CellResult | None = None, **more: Any) -> paper.Slot:
    spec = DatasetSpec(name=dataset, source="irds", short=dataset.upper())
    cell = Cell(
        ModelSpec(name=model, method="setwise.heapsort"), spec, "bm25", 100, None, Protocol()
    )
    missing = "" if result else more.get("missing", "not run")
    return paper.Slot(cell, f"harness run -m {model} -d {dataset}", result, missing)


def slots() -> list[paper.Slot]:
    """Two finished models on two datasets, and a third that has one cell of its two."""
    found = {(c.model, c.dataset): c for c in suite(3)}
    del found["reranker-2-7b", "dl20"]
    models = ("first-stage", *(f"reranker-{n}-7b" for n in range(3)), "oracle")
    return [slot(m, d, found.get((m, d))) for d in HEADS for m in models]


def write(out: Path, given: list[paper.Slot] | None = None, **more: Any) -> list[Table]:
    return paper.write("a-suite1", given or slots(), COLUMNS, TERMS, out, **more)


def numbers(out: Path) -> dict[tuple[str, str], dict[str, Any]]:
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    return {(n["model"], n["column"]): n for n in manifest["numbers"]}


def macros(out: Path) -> dict[str, str]:
    text = (out / "macros.tex").read_text(encoding="utf-8")
    return dict(re.findall(r"^\\newcommand\{\\(\w+)\}\{(.*)\}$", text, re.MULTILINE))


def test_a_macro_the_manifest_the_csv_and_the_latex_hold_the_same_number(tmp_path: Path) -> None:
    write(tmp_path)
    found, printed_ = numbers(tmp_path), macros(tmp_path)
    with (tmp_path / "table.csv").open(encoding="utf-8") as file:
        rows = {row["model"]: row for row in csv.DictReader(file)}
    latex = (tmp_path / "table.tex").read_text(encoding="utf-8")
    for (model, column), number in found.items():
        assert rows[model][column] == (number["printed"] or "")
        assert printed_[number["macro"]] == (number["printed"] or r"\textbf{??}")
        assert number["printed"] is None or number["printed"] in latex
    assert found["oracle", "average trec-dl"]["printed"] is not None


def test_macro_names_have_letters_only_and_tell_suite_model_and_column(tmp_path: Path) -> None:
    write(tmp_path)
    assert all(name.isalpha() for name in macros(tmp_path))
    name = numbers(tmp_path)["reranker-0-7b", "dl19"]["macro"]
    assert name == "ASuiteOneRerankerZeroSevenBDlOneNine"


def test_two_names_that_only_differ_in_signs_cannot_share_a_macro(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="share the macro"):
        write(tmp_path, [slot("a-b", "dl19"), slot("a_b", "dl19")])


def test_what_is_not_there_is_no_number_and_has_its_command(tmp_path: Path) -> None:
    write(tmp_path)
    found = numbers(tmp_path)
    for column in ("dl20", "average trec-dl"):
        number = found["reranker-2-7b", column]
        assert (number["value"], number["low"], number["printed"]) == (None, None, None)
        assert macros(tmp_path)[number["macro"]] == r"\textbf{??}"
    assert found["reranker-2-7b", "dl19"]["printed"]
    command = "harness run -m reranker-2-7b -d dl20"
    assert (
        f"% dl20 / bm25 / reranker-2-7b, not run: {command}" in (tmp_path / "table.tex").read_text()
    )
    assert f"{command}  # not run" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_the_manifest_names_the_cells_behind_a_number(tmp_path: Path) -> None:
    write(tmp_path)
    average = numbers(tmp_path)["reranker-0-7b", "average trec-dl"]
    assert [cell["folder"] for cell in average["cells"]] == [
        "dl19/bm25/reranker-0-7b",
        "dl20/bm25/reranker-0-7b",
    ]
    one = average["cells"][0]
    assert (one["key"], one["state"], one["queries"]) == ("reranker-0-7b-dl19", "complete", 43)
    assert one["engine"] == "hf"
    assert average["low"] < average["value"] < average["high"] < 1


def test_the_kit_is_the_same_bytes_on_every_run(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / name, published=[printed(60.0, model="reranker-0-7b")])
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == [
        "README.md", "against.csv", "against.tex", "macros.tex", "manifest.json", "table.csv",
        "table.tex",
    ]  # fmt: skip
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_one_query_has_a_number_and_no_interval(tmp_path: Path) -> None:
    write(tmp_path, [slot("m", "dl19", cell("m", values=[0.5]))])
    number = numbers(tmp_path)["m", "dl19"]
    assert (number["value"], number["low"], number["high"]) == (0.5, None, None)
    assert "NaN" not in (tmp_path / "manifest.json").read_text(encoding="utf-8")


def test_a_reason_with_a_line_break_stays_in_its_comment(tmp_path: Path) -> None:
    write(tmp_path, [slot("m", "dl19", missing="broken\n\\input{x}")])
    last = (tmp_path / "table.tex").read_text(encoding="utf-8").splitlines()[-1]
    assert last.startswith("% dl19 / bm25 / m, broken \\input{x}: harness run")


def test_letters_and_another_scale_can_be_asked_for_in_the_suite_file(tmp_path: Path) -> None:
    stated = {"title": "T", "marks": "letters", "scale": 1, "digits": 3}
    [table] = paper.write("s", slots(), COLUMNS, build(paper.Terms, stated, "s"), tmp_path)
    assert table.rows[0].label == "(a) first-stage"
    assert re.fullmatch(r"0\.\d{3}", table.rows[0].cells[0].text)


# --- the command ------------------------------------------------------------------------------


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A copy of the committed cells of the demo."""
    committed = ROOT / "results" / "pocket"
    if not committed.is_dir():
        pytest.skip("the committed cells of the demo are not there")
    shutil.copytree(committed, tmp_path / "results" / "pocket")
    return tmp_path / "results"


def run(results: Path, *more: str) -> int:
    try:
        main(["paper", str(DEMO), "--results", str(results), "--out", str(results / "out"), *more])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def change(results: Path, model: str, edit: Callable[[dict[str, Any]], None]) -> None:
    [path] = results.glob(f"pocket/*/{model}/result.json")
    record = json.loads(path.read_text(encoding="utf-8"))
    edit(record)
    path.write_text(json.dumps(record), encoding="utf-8")


def value_of(results: Path, model: str) -> Any:
    return numbers(results / "out" / "demo")[model, "pocket"]["value"]


def test_the_committed_demo_is_whole_without_its_data_or_engine(results: Path) -> None:
    assert run(results) == 0
    assert value_of(results, "smollm2-135m-qlm") == pytest.approx(0.6944, abs=1e-4)


def test_a_cell_that_was_not_run_makes_the_kit_partial(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    [folder] = results.glob("pocket/*/smollm2-135m-qlm")
    shutil.rmtree(folder)
    assert run(results, "--quiet") == 7
    assert value_of(results, "smollm2-135m-qlm") is None
    said = capsys.readouterr()
    assert "1 of 6 cells" in said.err
    assert "harness run" in said.err
    readme = (results / "out" / "demo" / "README.md").read_text(encoding="utf-8")
    assert "harness run -m smollm2-135m-qlm -d pocket --depth 10  # not run" in readme


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        (lambda r: r.update(state="partial"), "partial"),
        (lambda r: r.update(key="0" * 64), "stale"),
        (lambda r: r["model"].update(base="wheel:another"), "stale (model.base:"),
        (lambda r: r["prompt"].update(separator="\n\n"), "stale (prompt.separator:"),
        (lambda r: r["environment"]["engine"].update(engine="fake"), "answered by the fake engine"),
        (lambda r: r.update(schema_version=99), "newer"),
    ],
)
def test_a_cell_that_todays_registry_would_not_make_is_no_number(
    results: Path, edit: Callable[[dict[str, Any]], None], why: str
) -> None:
    change(results, "smollm2-135m-qlm", edit)
    assert run(results, "--quiet") == 7
    assert value_of(results, "smollm2-135m-qlm") is None
    [cell] = numbers(results / "out" / "demo")["smollm2-135m-qlm", "pocket"]["cells"]
    assert why in cell["state"]


def test_a_wrong_key_of_the_paper_table_shows_the_nearest(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('models = ["oracle"]\ndatasets = ["pocket"]\n[paper]\ntitel = "x"\n')
    with pytest.raises(SystemExit) as stop:
        main(["paper", str(path), "--results", str(results), "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    assert "did you mean title" in capsys.readouterr().err


def test_only_published_figures_can_be_compared_with(results: Path) -> None:
    assert run(results, "--against", "publishd") == 2


# --- the suites -------------------------------------------------------------------------------


def test_there_is_a_suite_for_the_main_tables_of_the_three_papers() -> None:
    assert set(SUITES) == {
        "rank-r1-table1", "rank-r1-bright", "reasonrank-bright", "reasonrank-beir",
        "rearank-table1", "rearank-bright",
    }  # fmt: skip


@pytest.mark.parametrize("name", SUITES)
def test_a_paper_suite_runs_as_it_stands_and_its_figures_are_known(name: str) -> None:
    registry, path = Registry(), ROOT / "registry" / "suites" / f"{name}.toml"
    selection = plan.from_suite(path, plan.Selection())
    cells = plan.cells_of(registry, selection)
    assert {cell.model.name for cell in cells} >= {"first-stage", "oracle"}
    terms = build(paper.Terms, registry.suites[name]["paper"], name)
    suites = {
        text: {spec.name: spec.short for spec in registry.find_datasets(text)}
        for text in selection.datasets
    }
    columns = quality.columns_of(suites, {text: tuple(names) for text, names in suites.items()})
    lines = dict.fromkeys(paper.Slot(cell, "").line for cell in cells)
    sheet = quality.sheet_of([], terms, quality.Frame(tuple(lines), columns))
    table = against(sheet, load(registry), sources=terms.source, missing=True)
    rows = {row.label for row in table.rows}
    unknown = {model for _, model in lines} - rows
    assert unknown <= {"oracle", *(m for m in unknown if m.startswith(("setwise", "rank-r1")))}
    assert not any("other candidates" in note for note in table.notes)


# --- LaTeX ------------------------------------------------------------------------------------

DOCUMENT = r"""\documentclass{article}
\usepackage{booktabs}
\usepackage[a4paper, margin=2cm]{geometry}
\input{macros.tex}
\begin{document}
\input{table.tex}
\input{against.tex}
On DL19 it reaches \ASuiteOneRerankerTwoSevenBDlOneNine, on DL20 \ASuiteOneRerankerTwoSevenBDlTwoZero.
\end{document}
"""


@pytest.mark.parametrize("marks", ["dagger", "letters"])
def test_the_latex_compiles(tmp_path: Path, marks: str) -> None:
    if shutil.which("pdflatex") is None:
        pytest.skip("pdflatex is not installed")
    terms = build(paper.Terms, {"title": "100 % of a_b & c", "marks": marks}, "s")
    figures = [printed(60.0, model="reranker-0-7b", source="A & B_1 <100 %>")]
    paper.write("a-suite1", slots(), COLUMNS, terms, tmp_path, figures)
    writers.write_file(tmp_path / "main.tex", DOCUMENT)
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "main.tex"],
        cwd=tmp_path, capture_output=True, text=True, errors="replace", timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Overfull" not in done.stdout
    assert (tmp_path / "main.pdf").stat().st_size > 10_000
