"""The dataset tables and suites of registry/: ids, spellings, counts and orders."""

from collections import Counter
from pathlib import Path

import pytest

from harness import listing, plan
from harness.data import audit, load
from harness.specs import Registry, canonical
from harness.types import RegistryError

ROOT = Path(__file__).resolve().parent.parent
REGISTRY = Registry()
BRIGHT = (
    *("biology", "earth_science", "economics", "psychology", "robotics", "stackoverflow"),
    *("sustainable_living", "leetcode", "pony", "aops", "theoremqa_questions"),
    "theoremqa_theorems",
)
SPELLINGS = {
    "dl19": "dl19-passage DL19 msmarco-passage/trec-dl-2019/judged TRECDL2019",
    "dl20": "dl20-passage dl20 msmarco-passage/trec-dl-2020/judged TRECDL2020",
    "dl21": "dl21-passage msmarco-passage-v2/trec-dl-2021/judged",
    "beir/trec-covid": "trec-covid covid beir-v1.0.0-trec-covid.flat beir-v1.0.0-trec-covid-flat "
    "beir-v1.0.0-trec-covid-test TRECCOVID BeIR/trec-covid",
    "beir/nfcorpus": "nfc nfcorpus beir/nfcorpus/test NFCorpus beir-v1.0.0-nfcorpus.flat",
    "beir/dbpedia-entity": "dbpedia beir-v1.0.0-dbpedia-entity.flat beir/dbpedia-entity/test "
    "DBPedia dbpedia-entity dbpedia_entity",
    "beir/signal1m": "signal signal-1m SIGNAL-1M beir-v1.0.0-signal1m.flat",
    "beir/trec-news": "news trec-news beir-v1.0.0-trec-news.flat",
    "beir/robust04": "robust04 beir-v1.0.0-robust04.flat",
    "beir/webis-touche2020": "touche beir/webis-touche2020/v2 Touche2020 webis-touche2020",
    "beir/climate-fever": "cfever climate-fever ClimateFEVER",
    "beir/cqadupstack-android": "beir/cqadupstack/android beir-v1.0.0-cqadupstack-android.flat "
    "cqadupstack-android CQADupstackAndroidRetrieval",
    "bright/earth_science": "earth_science earth-science bright-earth-science bright/earth-science "
    "BrightEarthScienceRetrieval",
    "bright/theoremqa_questions": "theoremqa_questions bright-theoremqa-questions "
    "bright/theoremqa-questions BrightTheoremQAQuestionsRetrieval",
    "bright-long/earth_science": "bright/earth-science-long bright-earth-science-long "
    "BrightEarthScienceLongRetrieval bright-long/earth-science",
    "novel-eval": "NovelEval novel_eval",
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_finds_the_same_dataset(name):
    for spelling in [name, *SPELLINGS[name].split()]:
        assert [spec.name for spec in REGISTRY.find_datasets(spelling)] == [name], spelling


GLOBS = {
    "bright/earth-*": "bright/earth_science",
    "bright-earth*": "bright/earth_science",
    "Bright/EARTH_*": "bright/earth_science",
    "dl2?": "dl20 dl21 dl22 dl23",
    "msmarco-passage/trec-dl-*/judged": "dl19 dl20",
    "beir/t*": "beir/trec-covid beir/trec-news",
    "BrightTheorem*": "bright/theoremqa_questions bright/theoremqa_theorems",
}


@pytest.mark.parametrize("glob", GLOBS)
def test_a_glob_matches_in_every_spelling(glob):
    assert " ".join(spec.name for spec in REGISTRY.find_datasets(glob)) == GLOBS[glob]


def test_globs_over_a_family_find_all_of_it():
    beir = {name for name in REGISTRY.datasets if name.startswith("beir/")}
    assert {s.name for s in REGISTRY.find_datasets("beir/*")} == beir
    flat = {s.name for s in REGISTRY.find_datasets("beir-v1.0.0-*.flat")}
    assert flat == beir - {"beir/msmarco"}
    assert len(REGISTRY.find_datasets("cqadupstack-*")) == 12


def test_an_unknown_name_or_glob_shows_the_nearest():
    for name, near in (("bright/bilogy", "bright/biology"), ("beer/*", "beir"), ("dl18", "dl19")):
        with pytest.raises(RegistryError, match=rf"unknown dataset .*did you mean .*{near}"):
            REGISTRY.find_datasets(name)


def test_a_suite_that_holds_itself_is_an_error(tmp_path):
    (tmp_path / "suites").mkdir()
    (tmp_path / "suites" / "one.toml").write_text('datasets = ["dl19", "two"]\n')
    (tmp_path / "suites" / "two.toml").write_text('datasets = ["one"]\n')
    with pytest.raises(RegistryError, match="suite 'one' holds itself: one > two > one"):
        Registry(tmp_path).find_datasets("one")


def test_ids_of_other_tools_find_their_dataset():
    for spec in REGISTRY.datasets.values():
        ids = [spec.irds, spec.topics]
        if not spec.index.startswith("msmarco-"):  # one index, several query sets
            ids.append(spec.index)
        for spelling in filter(None, ids):
            if spec.source in ("irds", "pyserini"):
                assert REGISTRY.find_datasets(spelling) == [spec], spelling


def test_no_spelling_belongs_to_two_datasets():
    owners = Counter(
        spelling
        for spec in REGISTRY.datasets.values()
        for spelling in {canonical(n) for n in (spec.name, *spec.aliases)}
    )
    assert [spelling for spelling, n in owners.items() if n > 1] == []


def test_no_suite_hides_a_dataset():
    spellings = {n for s in REGISTRY.datasets.values() for n in (s.name, *s.aliases)}
    assert spellings.isdisjoint(REGISTRY.suites)


def test_every_irds_id_exists_with_the_counts_of_the_table(monkeypatch, tmp_path):
    pytest.importorskip("ir_datasets")
    monkeypatch.setenv("IR_DATASETS_HOME", str(tmp_path))
    import ir_datasets

    checked = [spec for spec in REGISTRY.datasets.values() if spec.source == "irds"]
    assert len(checked) > 50
    for spec in checked:
        assert spec.irds in ir_datasets.registry, spec.name
        facts = ir_datasets.registry[spec.irds].metadata()  # shipped with the package
        assert spec.queries == facts["queries"]["count"], spec.name
        assert spec.documents == facts["docs"]["count"], spec.name


def test_titles_are_where_ir_datasets_has_them(monkeypatch, tmp_path):
    ir_datasets = pytest.importorskip("ir_datasets")
    monkeypatch.setenv("IR_DATASETS_HOME", str(tmp_path))
    for spec in REGISTRY.datasets.values():
        if spec.source == "irds":
            fields = ir_datasets.load(spec.irds).docs_cls()._fields
            assert spec.titles == ("title" in fields), spec.name


def test_grades_are_the_positive_and_zero_levels_of_the_judgements(monkeypatch, tmp_path):
    pytest.importorskip("ir_datasets")
    monkeypatch.setenv("IR_DATASETS_HOME", str(tmp_path))
    import ir_datasets

    for spec in REGISTRY.datasets.values():
        if spec.source == "irds":
            facts = ir_datasets.registry[spec.irds].metadata()["qrels"]["fields"]["relevance"]
            levels = [int(level) for level in facts["counts_by_value"] if int(level) >= 0]
            low, high = min(levels), max(levels)
            assert spec.grades == (f"{low}-{high}" if low < high else f"{low}"), spec.name


def test_a_dataset_outside_ir_datasets_says_what_is_missing():
    outside = [spec for spec in REGISTRY.datasets.values() if spec.source == "pyserini"]
    assert {s.short for s in outside} == {"Signal", "News", "Robust04", "BioASQ"}
    assert all("ir_datasets has no" in spec.note and spec.index for spec in outside)


def test_every_measure_is_one_that_ir_measures_reads():
    ir_measures = pytest.importorskip("ir_measures")
    for measure in {m for spec in REGISTRY.datasets.values() for m in spec.measures}:
        assert str(ir_measures.parse_measure(measure)) == measure


def test_families_select_the_length_limits():
    for spec in REGISTRY.datasets.values():
        start = spec.name.split("/")[0]
        family = {"beir": "beir", "bright": "bright", "bright-long": "bright"}.get(start)
        if family or start.startswith("dl"):
            assert spec.family == (family or "dl"), spec.name


def test_column_heads_are_unique_in_a_suite():
    for name, suite in REGISTRY.suites.items():
        specs = [s for n in suite.get("datasets", ()) for s in REGISTRY.find_datasets(n)]
        heads = [spec.short for spec in specs]
        assert all(heads), name
        assert len(set(heads)) == len(heads), name


def test_bright_has_the_column_order_of_the_papers():
    specs = REGISTRY.find_datasets("bright-12")
    assert [spec.name for spec in specs] == [f"bright/{split}" for split in BRIGHT]
    heads = "Bio. Earth. Econ. Psy. Rob. Stack. Sus. Leet. Pony AoPS TheoQ. TheoT."
    assert " ".join(spec.short for spec in specs) == heads
    assert REGISTRY.find_datasets("bright-7-stackexchange") == specs[:7]
    assert REGISTRY.find_datasets("bright/*") == specs


def test_bright_adds_up_to_1384_queries():
    assert sum(spec.queries or 0 for spec in REGISTRY.find_datasets("bright-12")) == 1384


def test_three_bright_splits_exclude_documents():
    excluding = {spec.name for spec in REGISTRY.datasets.values() if spec.excludes}
    assert excluding == {"bright/leetcode", "bright/aops", "bright/theoremqa_questions"}


def test_long_documents_are_measured_at_rank_1():
    specs = REGISTRY.find_datasets("bright-long")
    assert len(specs) == 8
    assert {spec.measures[0] for spec in specs} == {"R@1"}


def test_suites_resolve_in_their_own_order():
    heads = {
        "trec-dl": "DL19 DL20",
        "trec-dl-v2": "DL21 DL22 DL23",
        "beir-7": "Covid NFCorpus DBPedia SciFact Signal News Robust04",
        "beir-8": "Covid NFCorpus Touche DBPedia SciFact Signal News Robust04",
    }
    for name, expected in heads.items():
        assert " ".join(spec.short for spec in REGISTRY.find_datasets(name)) == expected
    sizes = {"beir-9": 9, "beir-13": 13, "cqadupstack": 12}
    for name, size in sizes.items():
        assert len({spec.name for spec in REGISTRY.find_datasets(name)}) == size
    assert all(REGISTRY.suites[name]["description"] for name in [*heads, *sizes])


def test_beir_has_18_public_sets_and_12_forums():
    names = {name for name in REGISTRY.datasets if name.startswith("beir/")}
    forums = {name for name in names if name.startswith("beir/cqadupstack-")}
    assert len(forums) == 12
    assert len(names - forums - {"beir/msmarco"}) + 1 == 18  # the forums count as one


# --- the page -----------------------------------------------------------------------------------

PAGE = (ROOT / "docs" / "datasets.md").read_text(encoding="utf-8")
DL19 = ROOT.parent / "shared" / "data" / "dl19"


def audited(spec, first_stage=None):
    figures = audit.audit(spec, load(spec, first_stage, spec.depth), spec.depth)
    return listing.markdown(audit.rows(figures))


def test_the_page_shows_the_audit_of_pocket():
    shown = PAGE.partition("### pocket")[2].partition("### dl19")[0]
    assert shown.rpartition("```\n")[2].strip() == audited(REGISTRY.datasets["pocket"])


@pytest.mark.skipif(not DL19.is_dir(), reason="the DL19 candidates are not here")
def test_the_page_shows_the_audit_of_dl19():
    asked = plan.Selection(qrels=str(DL19 / "qrels.txt"), name="dl19")
    [spec] = plan.find_datasets(REGISTRY, str(DL19 / "bm25_top100.json"), asked)
    assert PAGE.partition("### dl19")[2].rpartition("```\n")[2].strip() == audited(spec)
