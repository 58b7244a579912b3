"""Published figures: the shipped file loads whole, and a wrong row is named by file and line."""

import shutil
from collections import Counter
from pathlib import Path

import pytest

from harness.published import COLUMNS, Published, load
from harness.specs import Registry, data_root
from harness.types import DataError

REGISTRY = Registry()
HEADER = ",".join(COLUMNS)
GOOD = "BM25,none,dl19,nDCG@10,50.58,a paper,high"


def folder_with(tmp_path: Path, *rows: str) -> Path:
    shutil.copy(data_root() / "registry" / "published_names.toml", tmp_path)
    (tmp_path / "published.csv").write_text("\n".join([HEADER, *rows]) + "\n", encoding="utf-8")
    return tmp_path


@pytest.fixture(scope="module")
def published() -> tuple[Published, ...]:
    return load(REGISTRY)


def one(published: tuple[Published, ...], **wanted: str) -> list[float]:
    """The values of the rows that match, source by substring."""
    source = wanted.pop("source", "")
    return [
        p.value
        for p in published
        if source in p.source and all(getattr(p, key) == value for key, value in wanted.items())
    ]


def test_every_published_row_loads(published):
    lines = (data_root() / "registry" / "published.csv").read_text(encoding="utf-8").splitlines()
    assert len(published) == len(lines) - 1 > 1500


def test_published_names_are_registry_names_or_empty(published):
    assert {p.model for p in published} <= {"", "first-stage", *REGISTRY.models}


def test_the_rerankers_of_the_registry_have_published_figures(published):
    rows = Counter(p.model for p in published)
    for model in ("rank-r1-7b", "rank-r1-14b", "rankzephyr-7b", "reasonrank-32b", "rearank-7b"):
        assert rows[model] > 20, model


def test_a_first_stage_alone_is_the_model_first_stage(published):
    found = one(published, model="first-stage", first_stage="bm25", dataset="dl19", source="2cr")
    assert found == [50.58]
    reasonir = {"first_stage": "reasonir+gpt4_reason", "dataset": "bright-12"}
    assert 30.59 in one(published, model="first-stage", **reasonir)


def test_an_average_is_named_by_its_suite(published):
    found = one(published, model="rearank-7b", dataset="beir-7", measure="nDCG@10")
    assert 54.59 in found
    where = {"first_stage": "reasonir+gpt4_reason", "dataset": "bright-12"}
    assert 38.03 in one(published, model="reasonrank-32b", **where)


def test_a_published_average_is_the_mean_of_its_columns(published):
    source = "ReasonRank arXiv 2508.07050v3 Table 1"
    columns = [spec.name for spec in REGISTRY.find_datasets("bright-12")]
    where = {"first_stage": "reasonir+gpt4_reason", "source": source}
    for model in ("reasonrank-7b", "reasonrank-32b", "first-stage"):
        values = [one(published, model=model, dataset=d, **where)[0] for d in columns]
        (average,) = one(published, model=model, dataset="bright-12", **where)
        assert sum(values) / 12 == pytest.approx(average, abs=0.011)


def test_another_depth_shows_in_the_first_stage(published):
    shallow = {p.first_stage for p in published if "top-20" in p.source}
    assert shallow == {"reasonir+gpt4_reason+depth=20"}


def test_an_external_model_keeps_its_published_name(published):
    rows = [p for p in published if p.name_as_published == "Rank-K-32B"]
    assert rows
    assert {p.model for p in rows} == {""}


def test_rejudged_figures_do_not_mix_with_the_official_ones(published):
    rejudged = [p for p in published if "re-judged" in p.dataset]
    assert rejudged
    assert all(p.dataset not in REGISTRY.datasets for p in rejudged)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("No-Such-Model,BM25 top100,dl19,nDCG@10,50,a paper,high", "No-Such-Model"),
        ("Rank-K-32B,a strange retriever,dl19,nDCG@10,50,a paper,high", "a strange retriever"),
        ("BM25,none,bright/biologie,nDCG@10,50,a paper,high", "did you mean"),
        ("BM25,none,dl19,nDCG@10,105.8,a paper,high", "out of range"),
        ("BM25,none,dl19,nDCG@10,-1,a paper,high", "out of range"),
        ("BM25,none,dl19,nDCG@10,nan,a paper,high", "out of range"),
        ("BM25,none,dl19,nDCG@10,fifty,a paper,high", "fifty"),
        ("BM25,none,dl19,nDCG@10,50,a paper,certain", "certain"),
        ("BM25,none,dl19,nDCG@10,50,high", "expected 7 columns, got 6"),
    ],
)
def test_a_broken_row_names_file_and_line(tmp_path, row, message):
    folder = folder_with(tmp_path, GOOD, row)
    with pytest.raises(DataError) as error:
        load(REGISTRY, folder)
    assert str(error.value).startswith(f"{folder / 'published.csv'}:3: ")
    assert message in str(error.value)


def test_a_wrong_header_is_line_1(tmp_path):
    folder = folder_with(tmp_path)
    (folder / "published.csv").write_text("model,value\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"published\.csv:1: expected the columns model, "):
        load(REGISTRY, folder)


def test_seconds_may_exceed_100(tmp_path):
    folder = folder_with(tmp_path, "BM25,none,dl19,seconds_total,275.7,a paper,high")
    assert load(REGISTRY, folder)[0].value == 275.7
