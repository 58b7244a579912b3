"""The command line as a user meets it: in its own process, judged by output and exit code."""

import csv
import gzip
import json
import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
DOCIDS = ["d5", "d 2", "d1", "d3", "d4", "d6"]
RUN = "".join(
    f"{qid}\tQ0\t{docid}\t{rank}\t{9 - rank}\tbm25\n"
    for qid in ("q1", "q2")
    for rank, docid in enumerate(DOCIDS, 1)
)
SMALL = {
    "queries.tsv": "q1\tfirst question\nq2\tsecond question\nq9\tnever judged\n",
    "qrels.txt": "q1 0 d1 2\nq1 0 d 2 0\nq2 0 d3 1\n",
    "corpus.jsonl": "".join(f'{{"_id": "{d}", "text": "passage {d}"}}\n' for d in DOCIDS),
    "run.trec": RUN,
}
BASELINES = "first-stage,random,reverse,oracle"
MODELS = (
    "rank-r1-7b rankzephyr-7b rearank-7b rank1-7b reasonrank-7b setwise-sft-7b smollm2-135m-qlm"
)
HEAVY = (
    "torch transformers vllm peft pyserini ir_datasets matplotlib ray openai pandas scipy numpy"
    " ir_measures bm25s"
)

Said = namedtuple("Said", "code out err")

# Many command lines in one process: starting Python for each would take most of the time.
DRIVER = """
import contextlib, io, json, sys
from harness.cli import main
said = []
for args in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    sys.argv = ["harness", *args]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code
        except BaseException as error:
            code = f"Traceback: {error!r}"
    said.append([code, out.getvalue(), err.getvalue()])
json.dump(said, sys.__stdout__)
"""


@pytest.fixture
def place(tmp_path):
    """A working folder with the dataset `small`, and `textless`, which has no corpus."""
    for name in ("small", "textless"):
        write(
            tmp_path / name,
            {k: v for k, v in SMALL.items() if name == "small" or k != "corpus.jsonl"},
        )
    return tmp_path


def write(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def python(place, *args, stdin=None, **settings):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", "NO_COLOR": "1", **settings}
    done = subprocess.run(
        [sys.executable, *args], cwd=place, env=env, input=stdin, capture_output=True, text=True
    )
    return Said(done.returncode, done.stdout, done.stderr)


def harness(place, line):
    """`harness <line>`, in a process of its own."""
    return python(place, "-m", "harness", *line.split())


def together(place, lines):
    """What each command line said, all of them in one process."""
    done = python(place, "-c", DRIVER, stdin=json.dumps([line.split() for line in lines]))
    assert done.code == 0, done.err
    return [Said(*said) for said in json.loads(done.out)]


def refused(place, expected):
    """Each line ends with its code and says its text on one line of stderr; nothing on stdout."""
    for (line, (code, text)), said in zip(
        expected.items(), together(place, list(expected)), strict=True
    ):
        told = [row for row in said.err.splitlines() if row.startswith("harness: ")]
        assert said.code == code, (line, said)
        assert len(told) == 1, (line, said)
        assert text in told[0], (line, told)
        assert "Traceback" not in said.err + said.out, line
        assert said.out == "", line


# --- starting -----------------------------------------------------------------------------------


def test_help_and_list_load_nothing_heavy(place):
    code = f"""
import sys
from harness.cli import main
for args in (["--help"], ["run", "--help"], ["list"], ["list", "datasets"], ["show", "rank-r1-7b"]):
    try:
        main(args)
    except SystemExit as stop:
        assert not stop.code, args
print("loaded:", sorted(set({HEAVY.split()!r}) & set(sys.modules)))
"""
    done = python(place, "-c", code)
    assert done.code == 0, done.err
    assert done.out.endswith("loaded: []\n")
    for word in (
        "Usage",
        "--first-stage",
        "rank-r1-7b",
        "bright/biology",
        "Qwen/Qwen2.5-7B-Instruct",
    ):
        assert word in done.out


def test_a_missing_command_shows_help_and_a_wrong_one_the_nearest(place):
    none, wrong, flag, number = together(
        place, ["", "rum", "run --dephts 3", "run -m first-stage -d small --limit x"]
    )
    assert (none.code, wrong.code, flag.code, number.code) == (2, 2, 2, 2)
    assert "Usage" in none.out + none.err
    assert "'run'" in wrong.err
    assert "--depth" in flag.err
    assert "--limit" in number.err


# --- what is refused ----------------------------------------------------------------------------


def test_unknown_names_show_the_nearest(place):
    write(place / "other/small", SMALL)
    run, fake = "run -m first-stage -d small", "run -m rank-r1-7b -d small --engine fake"
    refused(
        place,
        {
            "run -m rank-r1-7 -d small": (2, "unknown model 'rank-r1-7' (did you mean rank-r1-7b"),
            "run -m nope* -d small": (2, "no model matches 'nope*'"),
            "run -m first-stage -d trec-covd": (2, "unknown dataset 'trec-covd' (did you mean trec-covid"),
            f"{fake} --set num_chld=9": (2, "unknown key 'num_chld' (did you mean num_child?)"),
            f"{fake} --set limits.pasage=9": (2, "unknown key 'pasage' (did you mean passage"),
            f"{fake} --set num_child": (2, "--set expects option=value, got 'num_child'"),
            f"{fake} --prompt rank-r2": (2, "unknown prompt 'rank-r2' (did you mean rank-r1"),
            f"{fake} --method setwise.hepsort": (2, "(did you mean setwise.heapsort"),
            f"{fake} --method listwise.window": (2, "reads"),
            "run -m rank-r1-7b -d small --engine fak": (2, "unknown engine 'fak' (did you mean fake"),
            f"{run} --format jsn": (2, "unknown format 'jsn' (did you mean json?)"),
            f"{run} --protocol latncy": (2, "unknown protocol 'latncy' (did you mean latency"),
            f"{run} --registry nowhere": (2, "nowhere: no such registry folder"),
            "list modles": (2, "unknown list 'modles' (did you mean models"),
            "list --format mdd": (2, "unknown format 'mdd' (did you mean md?)"),
            "show rank-r1-7": (2, "unknown name 'rank-r1-7' (did you mean rank-r1-7b"),
            "prompt rank-r1-* -d small": (2, "name one of each"),
            "prompt rank-r1-7b -d small --query q7": (2, "unknown query 'q7'"),
            "run": (2, "name at least one model (-m) and one dataset (-d)"),
            "run -m first-stage -d small,other/small": (2, "two datasets or models with one name"),
            "report --out small/run.trec": (2, "--out small/run.trec: is not a folder"),
            "run -m small -d small": (2, "say how to ask it with --method and --prompt"),
        },
    )  # fmt: skip


def test_numbers_out_of_bounds_are_refused(place):
    run, zephyr = "run -m first-stage -d small", "run -m rankzephyr-7b -d small --engine fake"
    refused(
        place,
        {
            f"{zephyr} --stride 0": (
                2,
                "option stride=0: Input should be greater than or equal to 1",
            ),
            f"{zephyr} --step-size 0": (2, "option stride=0"),
            f"{zephyr} --window-size 1": (2, "option size=1"),
            f"{zephyr} --stride 21": (2, "stride 21 is larger than size 20"),
            f"{zephyr} --set stride=ten": (
                2,
                "option stride='ten': Input should be a valid integer",
            ),
            "run -m rank-r1-7b -d small --engine fake --num-child 40": (2, "labels for"),
            f"{run} --depth 0": (2, "--depth 0: expected at least 1"),
            f"{run} --hits -3": (2, "--depth -3: expected at least 1"),
            f"{run} --limit 0": (2, "--limit 0: expected at least 1"),
            f"{run} --concurrency 0": (2, "--concurrency 0: expected at least 1"),
        },
    )


def test_a_byte_that_is_not_utf8_is_refused_in_one_line(place):
    odd = b"od\xff".decode("utf-8", "surrogateescape")
    write(place / odd, SMALL)
    runs = f"run -m first-stage -d {odd}", f"status --results={odd}", f"list --registry {odd}"
    for line in runs:
        said = harness(place, line)
        assert (said.code, said.out) == (2, ""), said
        [told] = said.err.splitlines()
        assert told.startswith("harness: "), told
        assert "od\\udcff': expected UTF-8" in told


def test_what_the_terminal_cannot_show_is_escaped(place):
    said = python(place, "-m", "harness", "list", "methods", PYTHONIOENCODING="ascii")
    assert (said.code, said.err) == (0, "")
    assert "\\u2014" in said.out


def test_what_is_not_there_is_code_four(place):
    run = "run -m first-stage -d"
    write(place / "empty", {"queries.tsv": "q1\tx\n"})
    (place / "req.jsonl").write_text('{"query": {"text": "x", "qid": "q1"}, "candidates": []}\n')
    refused(
        place,
        {
            f"{run} nope.jsonl --qrels q": (4, "nope.jsonl: no such dataset file or folder"),
            f"{run} ./nope": (4, "./nope: no such dataset file or folder"),
            f"{run} req.jsonl --qrels nope.txt": (4, "nope.txt: no such file"),
            f"{run} small --first-stage nope.trec": (4, "first stage 'nope.trec'"),
            f"{run} empty": (4, "empty: expected qrels.txt or qrels/test.tsv"),
            "run nope.toml": (4, "nope.toml: "),
            "status --results nope": (4, "nope: no such results folder"),
            "report --results nope": (4, "nope: no such results folder"),
            "cache stats nope.sqlite": (4, "nope.sqlite: no such cache file"),
        },
    )


def test_a_malformed_line_is_code_five_with_its_place(place):
    broken = {
        "run.trec": "q1 Q0 d1 1 high bm25",
        "qrels.txt": "q1 0 d1 good",
        "queries.tsv": "no tab here",
        "corpus.jsonl": '{"_id": "x"}',
    }
    expected = {}
    for number, (name, line) in enumerate(broken.items()):
        write(place / f"bad{number}", {**SMALL, name: SMALL[name] + line + "\n"})
        count = SMALL[name].count("\n") + 1
        expected[f"run -m first-stage -d bad{number}"] = (
            5,
            f"bad{number}/{name}:{count}: expected",
        )
    expected["run -m first-stage -d bad3"] = (
        5,
        "bad3/corpus.jsonl:7: document 'x': expected a text",
    )
    (place / "req.jsonl").write_text(
        '{"query": {"text": "x", "qid": "q1"}, "candidates": []}\n{}\n'
    )
    expected["run -m first-stage -d req.jsonl --qrels small/qrels.txt"] = (
        5,
        "req.jsonl:2: expected",
    )
    expected["run -m first-stage -d req.jsonl"] = (5, "add --qrels FILE")
    expected["run -m rank-r1-7b -d textless --engine fake"] = (5, "the candidates have no texts")
    refused(place, expected)


def test_a_wrong_registry_file_is_named_with_its_key(place):
    good = 'method = "first-stage"\n'
    files = {
        "one/models/mine.toml": f"[mine]\n{good}paramters = 3\n",
        "two/models/mine.toml": f'[mine]\n{good}parameters = "many"\n',
        "three/models/mine.toml": "[mine\n",
        "four/datasets/mine.toml": '[mine]\nsource = "folder"\nlocaton = "x"\n',
        "five/models/mine.toml": '[mine]\nmethod = "first-stag"\n',
        "six/prompts/mine.toml": 'answr = "label"\n',
    }
    write(place, files)
    write(place / "measured", {**SMALL, "dataset.toml": 'measures = ["nDGC@10"]\n'})
    write(place / "shallow", {**SMALL, "dataset.toml": "depth = 0\n"})
    refused(
        place,
        {
            "run -m mine -d small --registry one": (2, "unknown key 'paramters' (did you mean parameters"),
            "run -m mine -d small --registry two": (2, "mine.toml: [mine]: key 'parameters'"),
            "list --registry three": (2, "three/models/mine.toml: "),
            "list datasets --registry four": (2, "unknown key 'locaton' (did you mean location"),
            "run -m mine -d small --registry five": (2, "unknown method 'first-stag' (did you mean first-stage"),
            "list prompts --registry six": (2, "mine.toml: unknown key 'answr' (did you mean answer"),
            "run -m first-stage -d measured": (2, "unknown measure 'nDGC@10' (did you mean nDCG@10"),
            "run -m first-stage -d shallow": (5, "expected a depth of at least 1, got 0"),
        },
    )  # fmt: skip


# --- what is run --------------------------------------------------------------------------------


def test_the_baselines_leave_complete_cells_and_the_second_run_skips_them(place):
    first = harness(place, f"run -m {BASELINES} -d small --results out")
    assert first.code == 0, first.err
    assert "[4/4] small / run / oracle: nDCG@10 1.0000" in first.err
    assert "the engine was asked nothing" in first.err
    assert "oracle" in first.out
    names = {
        "result.json",
        "run.trec",
        "run.trec.ir_metadata.yml",
        "per_query.csv",
        "trace.jsonl.gz",
    }
    for name in BASELINES.split(","):
        assert {p.name for p in (place / "out/small/run" / name).iterdir()} == names
    stamps = {p: p.stat().st_mtime_ns for p in (place / "out/small").rglob("*")}
    second, loud, other = together(
        place,
        [
            f"run -m {BASELINES} -d small --results out --format json --quiet",
            "run -m oracle -d small --results out --force",
            "status --results out --format json",
        ],
    )
    records = json.loads(second.out)
    assert (second.code, second.err) == (0, "")
    assert [r["model"]["label"] for r in records] == BASELINES.split(",")
    assert stamps.keys() == set((place / "out/small").rglob("*"))
    assert all(p.stat().st_mtime_ns == t for p, t in stamps.items() if p.parent.name == "random")
    assert "started" in loud.err
    assert [row["state"] for row in json.loads(other.out)] == ["complete"] * 4


def test_a_cell_holds_what_the_design_documents(place):
    line = "run -m oracle,first-stage -d small --results out --quiet"
    assert harness(place, line).err == ""
    cell = place / "out/small/run/oracle"
    record = json.loads((cell / "result.json").read_text())
    assert record["schema_version"] == 1
    assert record["state"] == "complete"
    assert len(record["key"]) == 64
    assert record["model"]["name"] == "oracle"
    assert record["dataset"]["name"] == "small"
    assert record["first_stage"]["name"] == "run"
    assert len(record["first_stage"]["sha256"]) == 64
    assert record["protocol"]["kind"] == "quality"
    assert record["queries"] == 2
    assert record["measures"]["nDCG@10"] == 1.0
    assert record["faults"]["unparsable"] == record["faults"]["calls"] == 0
    assert {"calls", "rounds", "prompt_tokens", "seconds", "calls_from_cache"} <= set(
        record["efficiency"]
    )
    assert record["efficiency"]["latency"] is None
    assert record["command"] == "harness run -m oracle -d small"
    assert record["started"] <= record["finished"]
    assert record["environment"]["python"]
    assert record["inputs"]["queries_without_judgements"] == 1
    run = (cell / "run.trec").read_text().splitlines()
    assert run[:3] == [
        "q1 Q0 d1 1 6 rerank-harness",
        "q1 Q0 d5 2 5 rerank-harness",
        "q1 Q0 d%202 3 4 rerank-harness",
    ]
    assert len(run) == 12
    rows = list(csv.DictReader((cell / "per_query.csv").read_text().splitlines()))
    assert [(r["qid"], r["nDCG@10"], r["calls"]) for r in rows] == [
        ("q1", "1.0", "0"),
        ("q2", "1.0", "0"),
    ]
    assert yaml.safe_load((cell / "run.trec.ir_metadata.yml").read_text())["method"]["automatic"]
    assert gzip.decompress((cell / "trace.jsonl.gz").read_bytes()) == b""


def test_every_method_runs_over_the_fake_engine_and_then_skips(place):
    models = MODELS.replace(" ", ",")
    line = f"run -m {models} -d small --engine fake --results out --format json"
    text = line.removesuffix(" --format json")
    changed = "run -m rank-r1-7b -d small --engine fake --num_child 3 --results out"
    said = together(place, [line, line, text, changed])
    first, second, third, _ = said
    assert [s.code for s in said] == [0, 0, 0, 0], first.err
    records = json.loads(first.out)
    assert [r["model"]["name"] for r in records] == MODELS.split()
    assert len({r["measures"]["nDCG@10"] for r in records}) == 1  # one judge, one order of the top
    assert all(r["efficiency"]["calls"] > 0 for r in records)
    assert json.loads(second.out) == records
    assert second.err.count("finished before") == len(records)
    assert "7 of them finished before; the engine was asked nothing" in third.err
    folders = {p.name for p in (place / "out/small/run").iterdir()}
    assert {"rank-r1-7b+engine=fake", "rank-r1-7b+num_child=3+engine=fake"} <= folders
    packed = place / "out/small/run/rankzephyr-7b+engine=fake/trace.jsonl.gz"
    call = json.loads(gzip.decompress(packed.read_bytes()).splitlines()[0])
    assert call["docids"] == DOCIDS
    assert sorted(call["order"]) == list(range(6))
    assert {
        "qid",
        "round",
        "key",
        "text",
        "finish",
        "faults",
        "seconds",
        "from_cache",
    } <= call.keys()


def test_flags_have_their_second_spellings(place):
    lines = [
        "run -m first-stage -d small --first_stage small/run.trec --hits 2 --results=out -q",
        "run -m rankzephyr-7b -d small --engine=fake --step_size 3 --window-size=6 --results out -q",
        "run -m random,rand* -d small,./small --seed 7 --limit 1 --results out -q",
    ]
    for line, said in zip(lines, together(place, lines), strict=True):
        assert (said.code, said.err) == (0, ""), (line, said)
    cells = {str(p.parent.relative_to(place / "out")) for p in (place / "out").rglob("result.json")}
    assert cells == {
        "small/run+depth=2/first-stage",
        "small/run/rankzephyr-7b+size=6+stride=3+engine=fake",
        "small+limit=1/run/random+seed=7",
    }


def test_whatever_changes_a_model_has_a_folder_of_its_own(place):
    (place / "lora").mkdir()
    run = "run -m rank-r1-7b -d small --engine fake --results out -q"
    changes = ["", "--adapter me/other", "--adapter ./lora", "--set limits.passage=2", "--num-child 4",
               "--protocol latency", "--prompt rank-r1-runner"]  # fmt: skip
    for said in together(place, [f"{run} {change}" for change in changes]):
        assert said.code == 0, said
    assert {p.name.replace("+engine=fake", "") for p in (place / "out/small/run").iterdir()} == {
        "rank-r1-7b",
        "rank-r1-7b+adapter=me_other",
        "rank-r1-7b+adapter=lora",
        "rank-r1-7b+limits.passage=2",
        "rank-r1-7b+num_child=4",
        "rank-r1-7b+protocol=latency",
        "rank-r1-7b+prompt=rank-r1-runner",
    }


def test_a_failing_cell_does_not_stop_the_others(place):
    (said,) = together(
        place,
        [
            "run -m rank-r1-7b,first-stage -d textless,small --engine fake --results out --format json"
        ],
    )
    assert said.code == 5
    assert said.err.count("the candidates have no texts") == 1
    assert "Traceback" not in said.err
    assert [(r["dataset"]["label"], r["model"]["name"]) for r in json.loads(said.out)] == [
        ("textless", "first-stage"),
        ("small", "rank-r1-7b"),
        ("small", "first-stage"),
    ]


def test_a_request_file_takes_over_a_registered_name(place):
    hits = [{"content": "x", "qid": 19335, "docid": d, "score": 2 - i} for i, d in enumerate("ab")]
    (place / "req.json").write_text(json.dumps([{"query": "x", "hits": hits}]))
    (place / "judged.txt").write_text("19335 0 b 1\n")
    said = harness(
        place,
        "run -m oracle -d req.json --qrels judged.txt --name dl19 --results out --format json -q",
    )
    [record] = json.loads(said.out)
    assert (record["dataset"]["name"], record["dataset"]["family"]) == ("dl19", "dl")
    assert record["first_stage"]["name"] == "requests"
    assert record["measures"]["nDCG@10"] == 1.0
    assert (place / "out/dl19/requests/oracle/result.json").is_file()


def test_a_suite_file_states_a_matrix_and_flags_win(place):
    (place / "mine.toml").write_text(
        'models = ["first-stage", "oracle"]\ndatasets = ["small"]\nlimit = 2\ndepth = 3\n'
    )
    (place / "wrong.toml").write_text('models = ["first-stage"]\ndataset = ["small"]\n')
    said, wrong = together(
        place, ["run mine.toml --limit 1 --results out --format json -q", "run wrong.toml"]
    )
    records = json.loads(said.out)
    assert [(r["model"]["name"], r["limit"], r["depth"]) for r in records] == [
        ("first-stage", 1, 3),
        ("oracle", 1, 3),
    ]
    assert wrong.code == 2
    assert "wrong.toml: unknown key 'dataset' (did you mean datasets" in wrong.err


def test_plan_asks_nothing_and_stores_nothing(place):
    line = "-m rank-r1-7b,first-stage -d small --engine fake --results out"
    before, run, after = together(
        place, [f"plan {line} --format json", f"run {line} -q", f"plan {line} --format json"]
    )
    assert run.code == 0
    rows, again = json.loads(before.out)["cells"], json.loads(after.out)["cells"]
    assert [r["state"] for r in rows] == ["planned", "planned"]
    assert [r["state"] for r in again] == ["complete", "complete"]
    assert rows[0]["calls"] > 0
    assert [r["cached"] for r in rows] == [0, 0]


def test_a_budget_of_gpu_hours_is_checked_before_anything_runs(place):
    line = "-m rank-r1-7b,random -d small --engine fake --results out"
    expected = {
        f"run {line} --gpu H200 --max-gpu-hours 0": (2, "GPU-hours on h200; --max-gpu-hours is 0"),
        f"plan {line} --gpu h20": (2, "unknown GPU 'h20' (did you mean h200"),
    }
    refused(place, expected)
    assert not (place / "out/small").exists()
    allowed, free = together(
        place,
        [
            f"plan {line} --gpu a100 --max-gpu-hours 1",
            "run -m random -d small --results out -q --max-gpu-hours 0",
        ],
    )
    assert (allowed.code, free.code) == (0, 0)
    assert [row.split()[0] for row in allowed.out.splitlines()[1:]] == ["small", "small", "total"]
    assert "a100_hours" in allowed.out.splitlines()[0]


def test_a_table_folds_at_the_width_of_the_terminal_and_loses_nothing(place):
    assert harness(place, "run -m first-stage,oracle -d small --results out -q").code == 0
    narrow, wide = (
        python(place, "-m", "harness", "status", "--results", "out", COLUMNS=width)
        for width in ("60", "200")
    )
    assert max(map(len, wide.out.splitlines())) > 60 >= max(map(len, narrow.out.splitlines()))
    assert narrow.out.split() == wide.out.split()
    assert len(wide.out.splitlines()) == 3
    first = [line for line in narrow.out.splitlines() if not line.startswith(" ")]
    assert [line.split()[0] for line in first] == ["dataset", "small", "small"]
    assert all(line.startswith("    ") for line in narrow.out.splitlines() if line not in first)


def test_the_table_after_a_run_folds_at_the_width_of_the_terminal(place):
    line = "run -m first-stage,oracle,setwise-sft-7b -d small --engine fake --results out -q"
    narrow, wide = (
        python(place, "-m", "harness", *line.split(), COLUMNS=width).out.splitlines()
        for width in ("50", "200")
    )
    assert max(map(len, wide)) > 50 >= max(map(len, narrow))
    assert sum(text.startswith("model") for text in wide) == 1
    assert set(" ".join(narrow).split()) == set(" ".join(wide).split())


def test_cells_with_different_first_measures_say_which_is_meant(place):
    rr = {**SMALL, "dataset.toml": 'name = "rr"\nmeasures = ["RR@10"]\n'}
    write(place / "rr", rr)
    assert harness(place, "run -m oracle -d small,rr --results out -q").code == 0
    rows = json.loads(harness(place, "status --results out --format json").out)
    assert [(row["dataset"], row["measure"]) for row in rows] == [
        ("rr", "RR@10"),
        ("small", "nDCG@10"),
    ]
    assert {row["value"] for row in rows} == {1.0}


def test_with_a_tokenizer_a_prompt_is_the_exact_text(place, tiny_model):
    messages, exact, lost = together(
        place,
        [
            "prompt rank-r1-7b -d small",
            f"prompt rank-r1-7b -d small --tokenizer {tiny_model}",
            "prompt rank-r1-7b -d small --tokenizer ./nowhere",
        ],
    )
    assert "without --tokenizer, limits in tokens are not applied" in messages.err
    assert exact.err == ""
    assert messages.out.startswith("<system>\n")
    assert exact.out.startswith("<|im_start|>system\n")
    assert exact.out.endswith("<|im_start|>assistant\n\n")
    assert "[1] passage d5\n[2] passage d 2\n" in exact.out
    assert (lost.code, lost.out) == (4, "")


def test_a_run_killed_while_writing_leaves_no_half_cell(place):
    killed = python(
        place,
        "-c",
        "import os, sys\nfrom harness import cli, store\n"
        "store._write_trace = lambda path, rows: os._exit(9)\n"
        "cli.main('run -m oracle -d small --results out -q'.split())",
    )
    assert killed.code == 9
    assert not (place / "out/small/run/oracle").exists()
    status, again = together(
        place, ["status --results out --format json", "run -m oracle -d small --results out -q"]
    )
    assert json.loads(status.out or "[]") == []
    assert again.code == 0
    assert (place / "out/small/run/oracle/result.json").is_file()
