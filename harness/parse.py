"""Model text -> Parsed: permutations, labels, yes/no; thinking is stripped or declared cut off.

It must not know prompts, engines or datasets. The text-scanning rules are those of the published
parsers (each named after its repository); on top stand two rules they lack: an answer that the
token limit cut off is CUT_OFF and is never read, and every repair is a counted fault.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import lru_cache, partial

from harness.types import Completion, Fault, Parsed

_THINK_ANSWER = re.compile(r"<think>.*?</think>\s*<answer>(.*?)</answer>", re.DOTALL)
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_THINK_END = re.compile("</think>", re.IGNORECASE)
_NOT_ASCII = re.compile(r"[^\x00-\x7f]")
_RANKZEPHYR = re.compile(r"\s*([\d+\s*>*\[\]]+)\s*", re.DOTALL)


def _rankzephyr(text: str) -> str:
    """llm-rankers run_listwise.py: the first run of digits, brackets, spaces and arrows."""
    match = _RANKZEPHYR.search(text.lower())
    return match.group(1) if match else ""


def _reasonrank(text: str) -> str:
    """ReasonRank rankllm.py `_clean_response`."""
    if match := _THINK_ANSWER.search(text.lower()):
        return match.group(1)
    return text.rpartition("<answer>")[2] if "<answer>" in text else text


def _rearank(text: str) -> str:
    """Rearank rank_gpt.py `clean_response`."""
    if "<answer>" in text and (match := _ANSWER.search(text)):
        text = match.group(1)
    return text.rpartition("</think>")[2] if "<think>" in text else text


def _rank_llm(text: str) -> str:
    """rank_llm response_utils.py: after the thinking; fancy digits count as digits."""
    answer = _THINK_END.split(text)[-1]
    return _NOT_ASCII.sub(lambda m: str(unicodedata.digit(m[0], m[0])), answer)


PERMUTATION_STYLES: dict[str, Callable[[str], str]] = {
    "rankgpt": str,
    "rankzephyr": _rankzephyr,
    "reasonrank": _reasonrank,
    "rearank": _rearank,
    "rank_llm": _rank_llm,
}


def scan_permutation(text: str, count: int, style: str) -> Parsed:
    """Read integers in order, drop repeats and strangers, append what is missing (PROTOCOLS 1.5).

    Always a permutation of range(count). Digits that int() refuses (superscripts) are skipped:
    the published RankGPT parser dies on them.
    """
    region = PERMUTATION_STYLES[style](text)
    words = "".join(c if c.isdigit() else " " for c in region).split()
    numbers = [int(w) - 1 for w in words if w.isdecimal() and len(w) < 10]
    faults: list[Fault] = []
    if len(numbers) < len(words) or any(not 0 <= n < count for n in numbers):
        faults.append(Fault.OUT_OF_RANGE)
    inside = [n for n in numbers if 0 <= n < count]
    order = list(dict.fromkeys(inside))
    if not order:
        return unread(count, Fault.UNPARSABLE)
    if len(order) < len(inside):
        faults.append(Fault.DUPLICATE)
    if len(order) < count:
        faults.append(Fault.MISSING)
        order += [n for n in range(count) if n not in set(order)]
    return Parsed(tuple(order), tuple(faults), changed=order != list(range(count)))


def unread(count: int, *faults: Fault) -> Parsed:
    """The answer that changes nothing: the shown order, with the reason."""
    return Parsed(tuple(range(count)), faults, changed=False)


def blocked(completion: Completion) -> Fault | None:
    """The fault of an answer that must not be read at all, whatever it says."""
    return _BLOCKED.get(completion.finish)


_BLOCKED = {"filtered": Fault.REFUSED, "too_long": Fault.TOO_LONG}


def unanswered(completion: Completion) -> Parsed:
    """No answer of the expected form, or none before the token limit."""
    return unread(0, Fault.CUT_OFF if completion.finish == "length" else Fault.UNPARSABLE)


def thinking_is_open(text: str) -> bool:
    """A thought that began, never ended and followed no answer; its numbers are no answer."""
    before, opened, after = text.lower().rpartition("<think>")
    if not opened or "</think>" in after:
        return False
    return "</answer>" not in before.rpartition("</think>")[2]


def permutation(
    completion: Completion, count: int, *, style: str = "rank_llm", tagged: bool = False
) -> Parsed:
    """Parse a listwise answer over `count` shown documents.

    tagged: the protocol answers inside <answer> tags; then a cut-off answer is complete if a tag
    closed after the thinking. Otherwise it counts only if it already names every document.
    """
    text = completion.text
    if thinking_is_open(text):
        return unread(count, Fault.CUT_OFF)
    parsed = scan_permutation(text, count, style)
    if completion.finish == "length":
        unfinished = {Fault.MISSING, Fault.UNPARSABLE} & set(parsed.faults)
        answer = _THINK_END.split(text)[-1].lower()
        if ("</answer>" not in answer) if tagged else unfinished:
            return unread(count, Fault.CUT_OFF)
    return parsed


_compiled = lru_cache(maxsize=64)(partial(re.compile, flags=re.DOTALL))


def label(completion: Completion, labels: Sequence[str], pattern: str) -> Parsed:
    """Parse a setwise answer: the pattern's first group must equal a shown label.

    llm-rankers run_setwise.py: the lower-cased text is searched (DOTALL), the group stripped.
    An unreadable answer has an empty order; the method's policy decides what follows.
    """
    if thinking_is_open(completion.text):
        return unread(0, Fault.CUT_OFF)
    match = _compiled(pattern).search(completion.text.lower())
    if not match:
        return unanswered(completion)
    found = match.group(1).strip()
    shown = [text.lower() for text in labels]
    if found in shown:
        return Parsed((shown.index(found),))
    stranger = bool(re.fullmatch(r"\[\d+\]|[a-z]", found))
    return unread(0, Fault.OUT_OF_RANGE if stranger else Fault.UNPARSABLE)


def best_label(completion: Completion, count: int) -> Parsed:
    """Setwise by likelihood: the label with the highest log-probability; ties to the first."""
    scores = completion.scores
    if len(scores) != count or any(math.isnan(s) for s in scores):
        return unread(0, Fault.UNPARSABLE)
    return Parsed((max(range(count), key=lambda i: (scores[i], -i)),))


def relevance(completion: Completion) -> Parsed:
    """p(first label) / (p(first) + p(second)) from two log-probabilities, as log-odds.

    The log-odds sort as the probability does and do not saturate. Without scores: no relevance.
    """
    if len(completion.scores) < 2 or not all(map(math.isfinite, completion.scores[:2])):
        return unread(0, Fault.UNPARSABLE)
    return Parsed((), score=completion.scores[0] - completion.scores[1])


def likelihood(completion: Completion) -> Parsed:
    """Mean log-probability of the continuation's tokens (query likelihood)."""
    if not completion.scores or not all(map(math.isfinite, completion.scores)):
        return unread(0, Fault.UNPARSABLE)
    return Parsed((), score=math.fsum(completion.scores) / len(completion.scores))
