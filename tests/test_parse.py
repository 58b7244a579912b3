"""Model text to order and faults: the published vectors, and the two rules on top of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness import parse
from harness.types import Completion, Fault, Parsed

STYLES = ("rankgpt", "rankzephyr", "reasonrank", "rearank", "rank_llm")

# Raw output over three documents, then the labels that each published parser reads, in the order of
# STYLES. Where the published code dies (a superscript in RankGPT and ReasonRank) the harness skips
# the digit; that is the only departure.
VECTORS = [
    ("[2] > [3] > [1]", "231", "231", "231", "231", "231"),
    ("[2] > [3]", "231", "231", "231", "231", "231"),
    ("[2] > [2] > [3]", "231", "231", "231", "231", "231"),
    ("[5] > [2]", "213", "213", "213", "213", "213"),
    ("Ranking: [2] > [3] > [1]", "231", "231", "231", "231", "231"),
    ("[2] > [3], [1]", "231", "231", "231", "231", "231"),
    ("[2] = [3] > [1]", "231", "213", "231", "231", "231"),
    ("2, 3, 1", "231", "213", "231", "231", "231"),
    ("[\xb2] > [3]", "312", "123", "312", "312", "231"),
    ("", "123", "123", "123", "123", "123"),
    (
        "<think>[1] is bad, [3] good</think><answer>[3] > [2]</answer>",
        *("132", "123", "321", "321", "321"),
    ),
    ("<think>passage 1 ... passage 3", "132", "123", "132", "132", "132"),
    ("<think>a</think> [3] > [2]", "321", "123", "321", "321", "321"),
    ("<think>a</think><answer>[3] > [2]", "321", "123", "321", "321", "321"),
    (
        "<think>a</think><answer>[3] > [2]</answer><answer>[2] > [3]</answer>",
        *("321", "123", "321", "321", "321"),
    ),
    ("<THINK>1</THINK><ANSWER>[3] > [2]</ANSWER>", *("132", "123", "321", "132", "321")),
    ("ERROR::reduce_length", "123", "123", "123", "123", "123"),
    (
        "This model's maximum context length is 4096 tokens. However, you requested 4500",
        *("123", "123", "123", "123", "123"),
    ),
]

R1 = r"<think>.*?</think>\s*<answer>(.*?)</answer>"
SFT = r"<answer>(.*?)</answer>"
LABELS = ("[1]", "[2]", "[3]")

# Raw output, then the label that the Rank-R1 and the Setwise-SFT pattern read; "" is unparsable.
LABEL_VECTORS = [
    ("<think> x </think> <answer>[3]</answer>", "[3]", "[3]"),
    ("<think>x</think>\n\n<answer> [3] </answer>", "[3]", "[3]"),
    ("<THINK>x</THINK><ANSWER>[3]</ANSWER>", "[3]", "[3]"),
    ("<think>x</think><answer>3</answer>", "", ""),
    ("<think>x</think><answer>[3], [1]</answer>", "", ""),
    ("<think>x</think><answer>[3].</answer>", "", ""),
    ("<think>x</think> So: <answer>[3]</answer>", "", "[3]"),
    ("<answer>[3]</answer>", "", "[3]"),
    ("<think>x</think><answer>[3]", "", ""),
    ("<think>the format is <answer>[3]</answer></think><answer>[2]</answer>", "[2]", "[3]"),
    (
        "<think>a</think> <answer>answer here</answer> ... <think>b</think><answer>[2]</answer>",
        *("", ""),
    ),
    ("<think>x</think><answer>[4]</answer>", "", ""),
    ("<think>x</think><answer>[03]</answer>", "", ""),
]


def labels_of(parsed: Parsed) -> str:
    return "".join(str(i + 1) for i in parsed.order)


def listwise(text: str, count: int = 3, **how: Any) -> Parsed:
    finish = how.pop("finish", "stop")
    return parse.permutation(Completion(text=text, finish=finish), count, **how)


def setwise(text: str, pattern: str = R1, finish: Any = "stop") -> Parsed:
    return parse.label(Completion(text=text, finish=finish), LABELS, pattern)


# --- the published vectors ---------------------------------------------------------------------


@pytest.mark.parametrize("vector", VECTORS, ids=lambda v: repr(v[0])[:40])
def test_a_permutation_is_read_as_published(vector: tuple[str, ...]) -> None:
    text, *expected = vector
    read = [labels_of(parse.scan_permutation(text, 3, style)) for style in STYLES]
    assert read == expected


def test_every_permutation_style_has_its_vectors() -> None:
    assert set(parse.PERMUTATION_STYLES) == set(STYLES)


@pytest.mark.parametrize("vector", LABEL_VECTORS, ids=lambda v: repr(v[0])[:40])
def test_a_label_is_read_as_published(vector: tuple[str, str, str]) -> None:
    text, *expected = vector
    for pattern, label in zip((R1, SFT), expected, strict=True):
        parsed = setwise(text, pattern)
        assert parsed.order == ((LABELS.index(label),) if label else ())
        assert bool(parsed.faults) is not bool(label)


def test_rankzephyrs_parser_stops_at_the_first_space_of_prose() -> None:
    parsed = parse.scan_permutation("The ranking is: [2] > [3] > [1]", 3, "rankzephyr")
    assert labels_of(parsed) == "123"
    assert parsed.faults == (Fault.UNPARSABLE,)


# --- cut-off answers and open thoughts ----------------------------------------------------------


@pytest.mark.parametrize("style", STYLES)
def test_a_cut_off_answer_is_never_parsed(style: str) -> None:
    for text in ("[3] > [2]", "<think>passage 3", "<answer>[3] > [2]", "3", ""):
        parsed = listwise(text, style=style, finish="length")
        assert parsed == Parsed((0, 1, 2), (Fault.CUT_OFF,), changed=False)


@pytest.mark.parametrize("style", STYLES)
def test_the_digits_of_an_open_thought_are_no_ranking(style: str) -> None:
    for finish in ("stop", "length"):
        for tagged in (False, True):
            parsed = listwise("<think>[3] > [2] > [1]", style=style, tagged=tagged, finish=finish)
            assert parsed == Parsed((0, 1, 2), (Fault.CUT_OFF,), changed=False)


def test_an_answer_quoted_inside_an_open_thought_is_no_answer() -> None:
    thought = "<think>I would say <answer>[3] > [2]</answer>, but"
    assert listwise(thought, style="reasonrank", tagged=True).faults == (Fault.CUT_OFF,)
    assert setwise("<think>maybe <answer>[3]</answer>, but", SFT).faults == (Fault.CUT_OFF,)


def test_a_thought_reopened_after_the_answer_does_not_undo_it() -> None:
    text = "<think>a</think><answer>[2]</answer> <think>again"
    assert setwise(text, finish="length").order == (1,)
    ranked = "<think>a</think><answer>[2] > [3]</answer><think>1"
    assert labels_of(listwise(ranked, style="reasonrank", tagged=True)) == "231"


def test_a_second_thought_without_an_answer_is_open() -> None:
    text = "<think>say <answer>[3]</answer></think> <think>or [2]"
    assert setwise(text, SFT, finish="length").faults == (Fault.CUT_OFF,)


def test_a_closed_answer_survives_the_token_limit() -> None:
    text = "<think>a</think><answer>[3] > [2]</answer> and so"
    parsed = listwise(text, style="reasonrank", tagged=True, finish="length")
    assert labels_of(parsed) == "321"
    assert setwise("<think>a</think><answer>[3]</answer> and", finish="length").order == (2,)


def test_a_tag_that_closed_inside_the_thought_closes_no_answer() -> None:
    text = "<think>the form is <answer></answer></think><answer>[3] > [2]"
    for style in STYLES:
        assert listwise(text, style=style, tagged=True, finish="length").faults == (Fault.CUT_OFF,)


def test_an_untagged_answer_survives_the_limit_only_when_it_names_every_document() -> None:
    assert labels_of(listwise("[3] > [2] > [1]", finish="length")) == "321"
    assert listwise("[3] > [2] >", finish="length").faults == (Fault.CUT_OFF,)


def test_a_label_cut_off_before_its_tag_closes_is_cut_off() -> None:
    for text in ("<think>so long", "<think>x</think><answer>[3]", "no tag at all"):
        parsed = setwise(text, finish="length")
        assert (parsed.order, parsed.faults) == ((), (Fault.CUT_OFF,))


# --- faults are counted ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        ("[2] > [1] > [3]", ()),
        ("[2] > [1]", (Fault.MISSING,)),
        ("[2] > [2] > [1] > [3]", (Fault.DUPLICATE,)),
        ("[4] > [2] > [1] > [3]", (Fault.OUT_OF_RANGE,)),
        ("[0] > [2] > [1] > [3]", (Fault.OUT_OF_RANGE,)),
        ("[9] > [2] > [2]", (Fault.OUT_OF_RANGE, Fault.DUPLICATE, Fault.MISSING)),
        ("99999999999999999999 [2] > [1] > [3]", (Fault.OUT_OF_RANGE,)),
        ("none of them", (Fault.UNPARSABLE,)),
        ("[7] > [8]", (Fault.UNPARSABLE,)),
        ("", (Fault.UNPARSABLE,)),
    ],
)
def test_every_repair_of_a_permutation_is_a_fault(text: str, faults: tuple[Fault, ...]) -> None:
    assert listwise(text).faults == faults


def test_an_order_that_changes_nothing_says_so() -> None:
    assert not listwise("[1] > [2] > [3]").changed
    assert not listwise("nothing").changed
    assert listwise("[1] > [3] > [2]").changed


def test_a_label_that_was_not_shown_is_out_of_range() -> None:
    assert setwise("<answer>[4]</answer>", SFT).faults == (Fault.OUT_OF_RANGE,)
    assert setwise("<answer>the third</answer>", SFT).faults == (Fault.UNPARSABLE,)


def test_digits_of_other_scripts_are_digits_and_superscripts_are_not() -> None:
    assert labels_of(listwise("[\u0663] > [\u0662]")) == "321"
    assert labels_of(listwise("[\uff13] > [\uff12]", style="rank_llm")) == "321"
    skipped = listwise("[\xb2] > [3] > [1]", style="rankgpt")
    assert (labels_of(skipped), skipped.faults) == ("312", (Fault.OUT_OF_RANGE, Fault.MISSING))


# --- scores ---------------------------------------------------------------------------------------


def scored(*scores: float) -> Completion:
    return Completion(finish="scored", scores=scores)


def test_the_likeliest_label_wins_and_the_first_of_equals() -> None:
    assert parse.best_label(scored(-2.0, -1.0, -3.0), 3).order == (1,)
    assert parse.best_label(scored(-1.0, -1.0), 2).order == (0,)


def test_labels_without_scores_are_unparsable() -> None:
    for answer in (scored(), scored(-1.0), scored(-1.0, math.nan)):
        assert parse.best_label(answer, 2).faults == (Fault.UNPARSABLE,)


def test_relevance_is_the_log_odds_of_the_first_label() -> None:
    assert parse.relevance(scored(-1.0, -3.0)).score == 2.0
    for answer in (scored(), scored(-1.0), scored(-1.0, -math.inf)):
        assert parse.relevance(answer) == Parsed((), (Fault.UNPARSABLE,), changed=False)


def test_likelihood_is_the_mean_over_the_tokens() -> None:
    assert parse.likelihood(scored(-1.0, -2.0, -6.0)).score == -3.0
    assert parse.likelihood(scored()).faults == (Fault.UNPARSABLE,)


# --- any text whatever ----------------------------------------------------------------------------

PIECES = st.sampled_from(
    ["<think>", "</think>", "<answer>", "</answer>", "[1]", "[2]", "[20]", " > ", "\xb2", "9" * 30]
)
ANSWERS = st.lists(PIECES | st.text(max_size=8), max_size=12).map("".join)
FINISHES = st.sampled_from(["stop", "length", "filtered", "too_long"])


@given(ANSWERS, st.integers(1, 20), st.sampled_from(STYLES), st.booleans(), FINISHES)
def test_any_text_gives_a_permutation_and_faults(
    text: str, count: int, style: str, tagged: bool, finish: Any
) -> None:
    parsed = listwise(text, count, style=style, tagged=tagged, finish=finish)
    assert sorted(parsed.order) == list(range(count))
    assert all(isinstance(fault, Fault) for fault in parsed.faults)
    assert len(set(parsed.faults)) == len(parsed.faults)
    assert parsed.changed == (parsed.order != tuple(range(count)))


@given(ANSWERS, st.sampled_from([R1, SFT]), FINISHES)
def test_any_text_gives_one_shown_label_or_one_fault(text: str, pattern: str, finish: Any) -> None:
    parsed = setwise(text, pattern, finish)
    assert len(parsed.order) + len(parsed.faults) == 1
    assert all(0 <= i < len(LABELS) for i in parsed.order)
