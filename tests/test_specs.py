"""Names: how registries are read, laid over each other, looked up and overridden."""

from typing import Annotated, Literal

import pytest
from annotated_types import Ge

from harness import specs
from harness.specs import Registry
from harness.types import MissingResourceError, ModelSpec, RegistryError

MINE = """
[defaults]
method = "setwise.heapsort"
prompt = "rank-r1"
base = "me/base"
options = { num_child = 19, k = 10 }

[rank-r1-7b]
parameters = 7

[mine]
options = { k = 5 }

[mine.variants.wide]
options = { num_child = 9 }
differs = "ten passages"
"""


@pytest.fixture
def overlay(tmp_path):
    """A user's own registry folder with the given files."""

    def build(**files):
        for name, text in files.items():
            path = tmp_path / name.replace("__", "/")
            path = path.with_name(f"{path.name}.toml")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        return Registry(tmp_path)

    return build


def refused(call, *parts):
    with pytest.raises(RegistryError) as caught:
        call()
    for part in parts:
        assert part in str(caught.value), caught.value


# --- reading ------------------------------------------------------------------------------------


def test_tables_merge_over_their_defaults_one_option_at_a_time(overlay):
    models = overlay(models__mine=MINE).models
    assert models["mine"].base == "me/base"
    assert models["mine"].options == {"num_child": 19, "k": 5}


def test_a_variant_is_its_model_with_changes(overlay):
    wide = overlay(models__mine=MINE).models["mine@wide"]
    assert (wide.name, wide.options) == ("mine@wide", {"num_child": 9, "k": 5})
    assert wide.differs == "ten passages"


def test_an_overlay_replaces_and_adds(overlay):
    shipped, mine = Registry().models, overlay(models__mine=MINE).models
    assert mine["rank-r1-7b"].base == "me/base" != shipped["rank-r1-7b"].base
    assert mine.keys() - shipped.keys() == {"mine", "mine@wide"}
    assert mine["rank-r1-3b"] == shipped["rank-r1-3b"]


def test_an_overlay_may_bring_datasets_prompts_and_suites(overlay, tmp_path):
    registry = overlay(
        datasets__own='[own]\nsource = "folder"\nlocation = "x"\naliases = ["my-own"]\n',
        datasets__here__dataset='name = "here"\ndepth = 7\n',
        suites__both='datasets = ["own", "here"]\n',
    )
    assert [d.name for d in registry.find_datasets("both")] == ["own", "here"]
    assert registry.find_datasets("My_Own")[0].name == "own"
    assert registry.datasets["here"].location == str(tmp_path / "datasets/here")
    assert registry.datasets["here"].depth == 7


def test_a_registry_folder_that_is_not_there_is_named(tmp_path):
    refused(lambda: Registry(tmp_path / "no").models, "no: no such registry folder")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('[m]\nmethd = "x"\n', ["mine.toml: [m]: unknown key 'methd' (did you mean method"]),
        ("[m]\nname = 'm'\n", ["mine.toml: [m]: key 'method'"]),
        ('[m]\nmethod = "x"\ntensor_parallel = "two"\n', ["[m]: key 'tensor_parallel'"]),
        ('[m]\nmethod = "x"\ndtype = "int8"\n', ["[m]: key 'dtype'"]),
        ('[m]\nmethod = "x"\n[m.limits]\npasage = 3\n', ["[m].limits: unknown key 'pasage'"]),
        ('[m]\nmethod = "x"\n[m.variants.v]\nk = 3\n', ["[m.variants.v]: unknown key 'k'"]),
        ("[m\n", ["mine.toml: ", "line 1"]),
        ("method = 3\n", ["mine.toml: [method]: expected a table, got 3"]),
        ('[m]\nmethod = "x"\nvariants = 3\n', ["mine.toml: [m.variants]: expected a table"]),
        ('[m]\nmethod = "x"\noptions = 3\n', ["mine.toml: [m]: key 'options'"]),
        ('[m]\nmethod = "x"\nlimits = 3\n', ["mine.toml: [m]: key 'limits'"]),
        ("defaults = 3\n", ["mine.toml: [defaults]: expected a table"]),
    ],
)
def test_a_wrong_model_table_names_file_table_and_key(overlay, text, parts):
    registry = overlay(models__mine=text)
    refused(lambda: registry.models, *parts)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ('[d]\nsource = "folder"\ndepht = 3\n', "unknown key 'depht' (did you mean depth"),
        ('[d]\nsource = "foldr"\n', "key 'source'"),
        ("source = 3\n", "expected a table"),
    ],
)
def test_a_wrong_dataset_table_names_file_and_key(overlay, text, part):
    registry = overlay(datasets__mine=text)
    refused(lambda: registry.datasets, "mine.toml", part)


def test_a_file_that_is_not_there_is_a_missing_resource(tmp_path):
    with pytest.raises(MissingResourceError, match=r"nope\.toml: "):
        specs.read_toml(tmp_path / "nope.toml")


def test_a_file_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "latin.toml").write_bytes(b'name = "caf\xe9"\n')
    refused(lambda: specs.read_toml(tmp_path / "latin.toml"), "latin.toml: ")


# --- finding ------------------------------------------------------------------------------------


def test_a_glob_finds_variants_only_when_it_asks_for_them():
    plain = [m.name for m in Registry().find_models("rank-r1-*")]
    assert "rank-r1-7b" in plain
    assert not any("@" in name for name in plain)
    variants = [m.name for m in Registry().find_models("rank-r1-7b@*")]
    assert variants
    assert all(name.startswith("rank-r1-7b@") for name in variants)


def test_a_glob_over_datasets_and_one_without_a_match():
    names = [d.name for d in Registry().find_datasets("bright/*")]
    assert len(names) == 12
    refused(lambda: Registry().find_datasets("brigth/*"), "unknown dataset 'brigth/*'", "bright")
    refused(lambda: Registry().find_models("rankr1-*x"), "no model matches 'rankr1-*x'")


def test_unknown_names_show_the_nearest():
    registry = Registry()
    refused(lambda: registry.find_models("rank-r1-7"), "did you mean rank-r1-7b")
    refused(lambda: registry.find_models("rank-r1-7b@brigt"), "did you mean rank-r1-7b@bright")
    refused(lambda: registry.find_datasets("trec-covd"), "did you mean trec-covid")
    refused(lambda: registry.prompt("rank-r2"), "unknown prompt 'rank-r2' (did you mean rank-r1")


@pytest.mark.parametrize(
    ("spelling", "same"),
    [
        ("BRIGHT-Earth_Science", "bright/earth-science"),
        ("beir-v1.0.0-trec-covid.flat", "trec-covid"),
        ("beir-v1.0.0-trec-covid-test", "trec-covid"),
        ("DL19_passage", "dl19-passage"),
    ],
)
def test_spellings_of_other_tools_have_one_canonical_form(spelling, same):
    assert specs.canonical(spelling) == specs.canonical(same) == same


def test_a_folder_is_a_dataset_named_after_itself_or_by_its_file(tmp_path):
    assert specs.folder_dataset(tmp_path).name == tmp_path.name
    (tmp_path / "dataset.toml").write_text('name = "own"\nmeasures = ["AP"]\n')
    spec = specs.folder_dataset(tmp_path)
    assert (spec.name, spec.measures, spec.location) == ("own", ("AP",), str(tmp_path))


# --- overriding ---------------------------------------------------------------------------------

SPEC = ModelSpec("m", "setwise.heapsort", options={"num_child": 19})


@pytest.mark.parametrize(
    ("assignment", "options", "shown"),
    [
        ("num_child=9", {"num_child": 9}, ("num_child", "9")),
        ("num-child = 9", {"num_child": 9}, ("num_child", "9")),
        ("options.num_child=9", {"num_child": 9}, ("num_child", "9")),
        ("top=5", {"num_child": 19, "k": 5}, ("k", "5")),
        ("step_size=5", {"num_child": 19, "stride": 5}, ("stride", "5")),
        ("shuffle=true", {"num_child": 19, "shuffle": True}, ("shuffle", "true")),
        ("x=1.5", {"num_child": 19, "x": 1.5}, ("x", "1.5")),
        ('x="9"', {"num_child": 19, "x": "9"}, ("x", '"9"')),
        ("x=root", {"num_child": 19, "x": "root"}, ("x", "root")),
        ("x=a=b", {"num_child": 19, "x": "a=b"}, ("x", "a=b")),
    ],
)
def test_set_reads_toml_values_and_keeps_what_changed(assignment, options, shown):
    changed = specs.override(SPEC, [assignment])
    assert changed.options == options
    assert changed.overrides == (shown,)
    assert SPEC.options == {"num_child": 19}


def test_set_reaches_limits_sampling_and_plain_fields():
    changed = specs.override(
        SPEC, ["limits.passage=9", "sampling.temperature=0.5", "dtype=float32"]
    )
    assert changed.limits == {"passage": 9}
    assert changed.sampling == {"temperature": 0.5}
    assert changed.dtype == "float32"
    assert dict(changed.overrides) == {
        "limits.passage": "9",
        "sampling.temperature": "0.5",
        "dtype": "float32",
    }


@pytest.mark.parametrize("text", ["num_child", "=3", " =3", ""])
def test_set_without_a_name_or_a_value_is_refused(text):
    refused(lambda: specs.override(SPEC, [text]), "--set expects option=value")


@pytest.mark.parametrize("text", ["dtype=int8", "adapter_mode=both", "raw_special_tokens=maybe"])
def test_set_checks_the_type_of_a_plain_field(text):
    refused(lambda: specs.override(SPEC, [text]), f"{text.partition('=')[0]}")


def test_the_last_of_two_assignments_wins_and_shows_once():
    changed = specs.override(SPEC, ["k=5", "k=6"])
    assert changed.options["k"] == 6
    assert changed.overrides == (("k", "6"),)


def test_another_method_drops_the_old_options():
    other = specs.with_method(SPEC, "listwise.window")
    assert (other.method, other.options) == ("listwise.window", {})
    assert other.overrides == (("method", "listwise.window"),)


# --- binding ------------------------------------------------------------------------------------


def method(
    query: object,
    *,
    stride: Annotated[int, Ge(1)] = 10,
    shuffle: bool = False,
    windows: Literal["clamped", "rearank"] = "clamped",
) -> None: ...


def test_options_are_bound_with_defaults_filled_in():
    assert specs.bind(method, {"stride": 3}, "here") == {
        "stride": 3,
        "shuffle": False,
        "windows": "clamped",
    }


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"strde": 3}, "here: unknown key 'strde' (did you mean stride?)"),
        ({"query": 3}, "here: unknown key 'query'"),
        ({"stride": 0}, "here: option stride=0: Input should be greater than or equal to 1"),
        ({"stride": "3"}, "here: option stride='3': Input should be a valid integer"),
        ({"stride": 3.0}, "here: option stride=3.0: Input should be a valid integer"),
        ({"stride": True}, "here: option stride=True: Input should be a valid integer"),
        ({"shuffle": 1}, "here: option shuffle=1: Input should be a valid boolean"),
        ({"windows": "clampd"}, "here: option windows='clampd': Input should be 'clamped' or"),
    ],
)
def test_a_wrong_option_names_its_place_and_bound(options, part):
    refused(lambda: specs.bind(method, options, "here"), part)
