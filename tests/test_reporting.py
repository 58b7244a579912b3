"""`harness report`: which passages come into the page, and where its files lie."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness import cli


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A registry of one small collection whose licence lets its passages be shown."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "own" / "datasets" / "skies"
    folder.mkdir(parents=True)
    docs = {"d1": "Air scatters blue light.", "d2": "At dusk the sky is red.", "d3": "Blue paint."}
    lines = [json.dumps({"_id": d, "title": d.upper(), "text": t}) + "\n" for d, t in docs.items()]
    (folder / "corpus.jsonl").write_text("".join(lines))
    (folder / "queries.tsv").write_text("q1\twhy is the sky blue\n")
    (folder / "qrels.txt").write_text("q1 0 d1 3\nq1 0 d2 1\n")
    (folder / "dataset.toml").write_text('depth = 3\nshow_text = true\nmeasures = ["nDCG@10"]\n')
    return tmp_path / "own"


def harness(*words: str) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(list(words))
    assert ended.value.code in (None, 0)


def page(*words: str) -> str:
    """The page of ./results and all of its data."""
    harness("report", "--format", "html", "--quiet", *words)
    folder = Path("reports/leaderboard")
    assert (folder / "index.html").is_file()
    return "".join(path.read_text() for path in sorted(folder.rglob("*.js")))


def test_passages_are_shown_where_the_licence_allows_it(registry: Path) -> None:
    harness("run", "-m", "first-stage", "-d", "skies", "--registry", str(registry))
    assert "Air scatters" in page("--registry", str(registry))


def test_candidates_of_every_first_stage_are_shown(registry: Path) -> None:
    common = ("run", "-m", "first-stage", "-d", "skies", "--registry", str(registry))
    texts = ("Air scatters", "At dusk", "Blue paint")
    harness(*common, "--depth", "2")
    shown = page("--registry", str(registry))
    assert sum(text in shown for text in texts) == 2
    harness(*common)
    shown = page("--registry", str(registry))
    assert all(text in shown for text in texts)


def test_passages_that_are_not_those_measured_are_left_out(
    registry: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    harness("run", "-m", "first-stage", "-d", "skies", "--registry", str(registry))
    corpus = registry / "datasets" / "skies" / "corpus.jsonl"
    corpus.write_text(corpus.read_text().replace("scatters", "swallows"))
    assert "swallows" not in page("--registry", str(registry))
    assert "what was measured is not at hand" in capsys.readouterr().err


def test_a_collection_without_such_a_licence_is_shown_on_request_alone(registry: Path) -> None:
    table = registry / "datasets" / "skies" / "dataset.toml"
    table.write_text(table.read_text().replace("show_text = true\n", ""))
    harness("run", "-m", "first-stage", "-d", "skies", "--registry", str(registry))
    assert "Air scatters" not in page("--registry", str(registry))
    assert "Air scatters" in page("--registry", str(registry), "--with-text")
