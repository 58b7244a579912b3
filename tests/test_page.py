"""The leaderboard page as bytes: what is in it, what cannot get out of it, what is left away."""

from __future__ import annotations

import gzip
import html
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("jinja2")

from harness import store
from harness.published import Published
from harness.report import page, shards, tables
from harness.types import Candidate, CellResult, Query

HOSTILE = "</script><img src=x onerror=alert(1)><!--<script>alert(2)//\u2028"
QIDS = ("q1", "q2", "q3")
DOCIDS = ("d1", "d 2", "d%203", "d4")
PASSAGES = (
    Candidate("d1", f"Light scatters. {HOSTILE}"),
    Candidate("d 2", "The  sea.", title="Blue"),
    Candidate("d4", "Paint."),
)
TEXTS = {
    "toy": {
        "q1": Query("q1", f"why is the sky blue {HOSTILE}", PASSAGES, "toy", {"d1": 3, "d 2": 0}),
        "q2": Query("q2", "two", PASSAGES, "toy", {"d4": 1}),
        "q3": Query("q3", "three", PASSAGES, "toy"),
    }
}
PROMPT = {
    "name": "toy", "source": "a paper", "answer": "label", "passage": "[{n}] {text}",
    "messages": [{"role": "user", "content": "Rank for {query}:\n{docs}", "each": False}],
    "limits": {"unit": "words", "passage": 4, "max_tokens": 9},
}  # fmt: skip


def write_cell(
    root: Path,
    model: str,
    *,
    method: str = "setwise.heapsort",
    order: tuple[int, ...] = (1, 0, 2, 3),
    values: tuple[float, ...] = (0.5, 0.7, 0.9),
    text: str = "<think>d1 explains it</think> [2]",
    changed: Mapping[str, Any] | None = None,
    **dataset: Any,
) -> CellResult:
    """A cell folder as the store lays it out, read back through the store."""
    folder = root / f"cell{len(list(root.glob('cell*'))) if root.exists() else 0}"
    folder.mkdir(parents=True)
    asked = method not in tables.SANITY
    calls = len(QIDS) if asked else 0
    record = {
        "schema_version": 1, "key": f"key of {model}", "state": "complete",
        "model": {"label": model, "name": model, "method": method, "base": "org/base",
                  "revision": "main", "parameters": 7.6 if asked else None, "trained_on": ["toy"],
                  "options": {"num_child": 4}},
        "prompt": PROMPT if asked else None,
        "dataset": {"label": "toy", "name": "toy", "sha256": "5e", "in_domain": asked, **dataset},
        "first_stage": {"name": "bm25", "sha256": "f1"}, "depth": 4, "limit": None,
        "protocol": {"kind": "quality"}, "queries": len(QIDS),
        "measures": {"nDCG@10": sum(values) / len(values), "AP": 0.25},
        "faults": {"unparsable": 1 if asked else 0, "calls": calls, "no_op_rate": 0.0},
        "efficiency": {"calls": calls, "prompt_tokens": 90, "generated_tokens": 30 * calls,
                       "seconds": 1.5 * calls, "calls_from_cache": 0},
        "environment": {"python": "3.11", "engine": {"engine": "hf"} if asked else None},
        "command": f"harness run -m {model} -d toy", "started": "2026-01-01T00:00:00Z",
        "finished": "2026-01-01T00:01:00Z", **(changed or {}),
    }  # fmt: skip
    rows = [
        {"qid": q, "nDCG@10": v, "calls": 1, "rounds": 1, "generated_tokens": 30, "seconds": 1.5,
         "faults": "unparsable=1" if q == "q3" else ""}
        for q, v in zip(QIDS, values, strict=True)
    ]  # fmt: skip
    ranked = [DOCIDS[i].replace("%20", "%2520").replace(" ", "%20") for i in order]
    lines = [f"{q} Q0 {d} {n} {5 - n} tag\n" for q in QIDS for n, d in enumerate(ranked, 1)]
    call = {"round": 1, "docids": list(DOCIDS), "key": "ab12", "finish": "stop", "prompt_tokens": 9,
            "generated_tokens": 30, "reasoning_tokens": 5, "order": [1], "score": None,
            "faults": [], "changed": True, "seconds": 1.5, "from_cache": False}  # fmt: skip
    (folder / "result.json").write_text(json.dumps(record))
    (folder / "per_query.csv").write_text(store.table(rows))
    (folder / "run.trec").write_text("".join(lines))
    with gzip.open(folder / "trace.jsonl.gz", "wt", encoding="utf-8") as file:
        for qid in QIDS if asked else ():
            file.write(json.dumps({"qid": qid, "text": text, **call}) + "\n")
    found = store.read(folder)
    assert found is not None
    return found


def toy_board(root: Path) -> list[CellResult]:
    """Two models, one of them hostile in every text it controls, over their first stage."""
    return [
        write_cell(root, "first-stage", method="first-stage", order=(0, 1, 2, 3), values=(0.2,) * 3,
                   show_text=True),
        write_cell(root, "steady-7b", show_text=True),
        write_cell(root, f"evil {HOSTILE}", values=(0.9, 0.1, 0.3), text=f"{HOSTILE} so [2]",
                   order=(3, 1, 0, 2), show_text=True),
    ]  # fmt: skip


def files(out: Path) -> dict[str, str]:
    return {
        p.relative_to(out).as_posix(): p.read_text("utf-8") for p in out.rglob("*") if p.is_file()
    }


def shard(text: str) -> Any:
    """A data file's content: its script is one call with two JSON arguments."""
    found = re.fullmatch(r'__shard\(("[cd0-9a-f-]+"),(.*)\)\n', text)
    assert found
    return json.loads(found[2])


def embedded(index: str) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', index, re.DOTALL)
    assert found
    return json.loads(found[1])


def test_hostile_text_is_escaped_in_every_file(tmp_path: Path) -> None:
    page.render(toy_board(tmp_path / "r"), tmp_path / "out", texts=TEXTS, with_text=True)
    written = files(tmp_path / "out")
    assert "<img" not in "".join(written.values())
    assert written["index.html"].count("</script>") == 2
    for name, text in written.items():
        assert name == "index.html" or not set("<>&\u2028") & set(text)
    assert "evil &lt;/script&gt;&lt;img" in written["index.html"]


def test_hostile_text_comes_back_unchanged_from_the_data(tmp_path: Path) -> None:
    page.render(toy_board(tmp_path / "r"), tmp_path / "out", texts=TEXTS, with_text=True)
    written = files(tmp_path / "out")
    board = embedded(written["index.html"])
    [row] = [row for row in board["rows"] if row["model"].startswith("evil")]
    assert row["model"] == f"evil {HOSTILE}"
    calls = shard(written[f"data/{row['cells']['0']['id']}-0.js"])
    assert calls["q1"]["calls"][0][shards.CALL.index("text")] == f"{HOSTILE} so [2]"
    data = board["groups"][0]["data"]
    texts = {qid: query.text for qid, query in TEXTS["toy"].items()}
    assert shard(written[f"data/{data}.js"])["queries"] == texts
    assert shard(written[f"data/{data}-0.js"])["q1"]["d1"][1].endswith(HOSTILE)


def test_only_the_page_s_own_script_may_run(tmp_path: Path) -> None:
    page.render(toy_board(tmp_path / "r"), tmp_path / "out")
    index = files(tmp_path / "out")["index.html"]
    [policy] = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', index)
    policy = html.unescape(policy)
    assert policy.startswith("default-src 'none';")
    assert re.search(r"script-src [^;]*sha256-", policy)
    assert "unsafe" not in re.findall(r"script-src [^;]*", policy)[0]
    assert not re.findall(r'(?:src|href)="(?!#)', index)


def test_equal_cells_give_equal_bytes_in_any_order(tmp_path: Path) -> None:
    cells = toy_board(tmp_path / "r")
    page.render(cells, tmp_path / "a", texts=TEXTS)
    page.render(cells[::-1], tmp_path / "b", texts=TEXTS)
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_names_of_files_are_hashes_whatever_a_cell_is_called(tmp_path: Path) -> None:
    cells = [write_cell(tmp_path / "r", name) for name in ("../../evil", "/etc/x", "a\\..\\b", "")]
    written = page.render(cells, tmp_path / "deep" / "out")
    assert written[-1] == tmp_path / "deep" / "out" / "index.html"
    assert all(re.fullmatch(r"[cd][0-9a-f]{16}(-\d+)?\.js", path.name) for path in written[:-1])
    assert {p for p in tmp_path.rglob("*") if p.is_file() and "r" not in p.parts} == set(written)


def test_cells_of_the_fake_engine_are_never_shown(tmp_path: Path) -> None:
    fake = {"environment": {"engine": {"engine": "fake"}}}
    cells = [*toy_board(tmp_path / "r"), write_cell(tmp_path / "r", "made-up", changed=fake)]
    page.render(cells, tmp_path / "out")
    assert "made-up" not in "".join(files(tmp_path / "out").values())


def test_failed_cells_are_left_out_and_partial_ones_marked(tmp_path: Path) -> None:
    cells = [
        write_cell(tmp_path / "r", "broken-1b", changed={"state": "failed", "measures": {}}),
        write_cell(tmp_path / "r", "half-1b", values=(1, 1, 1), changed={"state": "partial"}),
        write_cell(tmp_path / "r", "whole-1b"),
    ]
    page.render(cells, tmp_path / "out")
    index = files(tmp_path / "out")["index.html"]
    assert "broken-1b" not in index
    marks = {row["model"]: row["cells"]["0"]["mark"] for row in embedded(index)["rows"]}
    assert marks == {"half-1b": 0, "whole-1b": 1}
    assert ">partial<" in index


def test_texts_of_calls_stay_out_of_the_index_and_are_cut_with_a_count(tmp_path: Path) -> None:
    long = "first " + "x" * 50_000 + " last"
    cells = [write_cell(tmp_path / "r", f"m{n}", text=long) for n in range(8)]
    page.render(cells, tmp_path / "out", texts=TEXTS)
    written = files(tmp_path / "out")
    assert len(written["index.html"]) < 100_000
    assert "xxx" not in written["index.html"]
    name = embedded(written["index.html"])["rows"][0]["cells"]["0"]["id"]
    call = dict(
        zip(shards.CALL, shard(written[f"data/{name}-0.js"])["q1"]["calls"][0], strict=True)
    )
    assert call["left_out"] == len(long) - shards.CUT
    assert call["text"].startswith("first")
    assert call["text"].endswith("last")
    assert len(call["text"]) == shards.CUT + 3


def test_passages_go_in_only_where_the_licence_or_the_caller_allows(tmp_path: Path) -> None:
    closed = [write_cell(tmp_path / "closed", "m")]
    opened = [write_cell(tmp_path / "open", "m", show_text=True)]
    for cells, flag, shown in ((closed, False, False), (closed, True, True), (opened, False, True)):
        page.render(cells, tmp_path / "out", texts=TEXTS, with_text=flag)
        assert ("Light scatters" in "".join(files(tmp_path / "out").values())) == shown
        assert "why is the sky blue" in "".join(files(tmp_path / "out").values())
    page.render(opened, tmp_path / "out")
    assert "why is the sky blue" not in "".join(files(tmp_path / "out").values())


def test_docids_with_white_space_and_percent_signs_are_decoded(tmp_path: Path) -> None:
    cell = write_cell(tmp_path / "r", "m")
    page.render([cell], tmp_path / "out")
    run = shard(files(tmp_path / "out")[f"data/{shards.cell_name(cell)}.js"])["run"]
    assert run["q1"] == ["d 2", "d1", "d%203", "d4"]


def test_data_of_cells_that_are_gone_is_removed_and_nothing_else(tmp_path: Path) -> None:
    cells = toy_board(tmp_path / "r")
    page.render(cells, tmp_path / "out", texts=TEXTS)
    (tmp_path / "out" / "data" / "mine.js").write_text("kept")
    written = page.render(cells[:1], tmp_path / "out")
    left = {p for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert left == {*written, tmp_path / "out" / "data" / "mine.js"}


def test_other_candidates_make_another_column(tmp_path: Path) -> None:
    changed = {"first_stage": {"name": "bm25", "sha256": "other"}}
    cells = [write_cell(tmp_path / "r", "m"), write_cell(tmp_path / "r", "n", changed=changed)]
    page.render(cells, tmp_path / "out")
    groups = embedded(files(tmp_path / "out")["index.html"])["groups"]
    assert [(g["sha256"], g["twin"]) for g in groups] == [("f1", True), ("other", True)]


def test_an_infinite_score_is_no_invalid_json(tmp_path: Path) -> None:
    assert json.loads(shards.script_json({"a": [float("-inf"), float("nan"), 1.5]})) == {
        "a": [None, None, 1.5]
    }


def test_large_traces_are_split_by_query(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "PART", 100)
    cell = write_cell(tmp_path / "r", "m")
    page.render([cell], tmp_path / "out")
    written = files(tmp_path / "out")
    parts = shard(written[f"data/{shards.cell_name(cell)}.js"])["parts"]
    assert parts == {"q1": 0, "q2": 1, "q3": 2}
    assert list(shard(written[f"data/{shards.cell_name(cell)}-2.js"])) == ["q3"]


def test_a_page_without_cells_says_so(tmp_path: Path) -> None:
    page.render([], tmp_path / "out")
    assert "No finished cells" in files(tmp_path / "out")["index.html"]


def test_what_the_model_was_shown_stands_where_it_differs_from_the_text(tmp_path: Path) -> None:
    cell = write_cell(tmp_path / "r", "m", show_text=True)
    page.render([cell], tmp_path / "out", texts=TEXTS)
    asked = shard(files(tmp_path / "out")[f"data/{shards.cell_name(cell)}-0.js"])["q2"]
    assert asked["asked"] == "two"
    assert asked["texts"] == {"d1": "Light scatters. </script><img src=x", "d 2": "Blue The sea."}


def test_a_record_of_another_version_shows_no_rebuilt_prompt(tmp_path: Path) -> None:
    cell = write_cell(tmp_path / "r", "m", show_text=True, changed={"prompt": {"nname": "toy"}})
    page.render([cell], tmp_path / "out", texts=TEXTS)
    content = shard(files(tmp_path / "out")[f"data/{shards.cell_name(cell)}-0.js"])
    assert list(content["q1"]) == ["calls"]


def figure(name: str, value: float, **changed: Any) -> Published:
    known = {"model": "rank-r1-7b", "first_stage": "bm25+depth=4", "dataset": "toy"}
    told = {"measure": "nDCG@10", "source": "Table 1", "confidence": "high"}
    return Published(name_as_published=name, value=value, **(known | told | changed))


def test_published_figures_are_rows_of_their_own_in_columns_that_were_measured(
    tmp_path: Path,
) -> None:
    figures = [
        figure("Rank-R1", 71.5), figure("Rank-R1", 72.0, source="Table 2"),
        figure("Other", 99.0, model=""),
        figure("deeper", 50.0, first_stage="bm25"), figure("elsewhere", 50.0, dataset="dl20"),
        figure("AP", 50.0, measure="AP"),
    ]  # fmt: skip
    page.render([write_cell(tmp_path / "r", "m")], tmp_path / "out", published=figures)
    index = files(tmp_path / "out")["index.html"]
    rows = {row["model"]: row for row in embedded(index)["rows"]}
    assert {name: row["kind"] for name, row in rows.items()} == {
        "m": "measured", "Rank-R1": "published", "Other": "published",
    }  # fmt: skip
    cell = rows["Rank-R1"]["cells"]["0"]
    assert (cell["value"], cell["most"]) == (0.715, 0.72)
    assert [source for _, source, _ in cell["sources"]] == ["Table 1", "Table 2"]
    assert rows["m"]["cells"]["0"]["mark"] == 1  # no published figure takes a mark
    assert "71.5–72.0" in index


def test_a_published_model_that_trained_on_the_collection_is_marked(tmp_path: Path) -> None:
    cells = [write_cell(tmp_path / "r", "m", family="dl")]
    page.render(cells, tmp_path / "out", published=[figure("Rank-R1", 71.5)])
    rows = {row["model"]: row for row in embedded(files(tmp_path / "out")["index.html"])["rows"]}
    assert rows["Rank-R1"]["cells"]["0"]["in_domain"]
    assert (rows["Rank-R1"]["method"], rows["Rank-R1"]["parameters"]) == ("setwise.heapsort", 7.61)


def test_a_part_of_the_queries_is_no_column_for_published_figures(tmp_path: Path) -> None:
    cells = [write_cell(tmp_path / "r", "m", changed={"limit": 3})]
    page.render(cells, tmp_path / "out", published=[figure("Rank-R1", 71.5)])
    assert len(embedded(files(tmp_path / "out")["index.html"])["rows"]) == 1


def test_latency_runs_have_a_column_of_their_own(tmp_path: Path) -> None:
    timed = {"protocol": {"kind": "latency"}}
    cells = [write_cell(tmp_path / "r", "m"), write_cell(tmp_path / "r", "m+l", changed=timed)]
    page.render(cells, tmp_path / "out")
    groups = embedded(files(tmp_path / "out")["index.html"])["groups"]
    assert sorted(g["short"] for g in groups) == ["toy", "toy, latency runs"]
