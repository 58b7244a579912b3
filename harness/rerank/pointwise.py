"""Pointwise reranking: every passage is scored alone; all calls of a query are independent."""

from __future__ import annotations

import re
from dataclasses import replace

from harness.prompts import Prompt
from harness.types import Fault, Flow, Parsed, Query, Request


def score_each(query: Query, prompt: Prompt) -> Flow:
    """One scoring call per candidate; a passage without a score sinks below all that have one.

    pointwise.qlm: mean token log-probability of the query given the passage (Sachan et al. 2022).
    pointwise.yesno: log-odds of yes over no at the next token.
    """
    requests = [prompt.render(query, [c]) for c in query.candidates]
    answers = (yield requests) if requests else []
    parsed = [prompt.parse(answer, 1) for answer in answers]
    return query.ranking(_by_score(parsed), parsed)


def reason_then_score(query: Query, prompt: Prompt) -> Flow:
    """Rank1: reason, then read p(true) at the last generated token; where the answer is not
    there, the thought is closed by force and one more token asked for (rank1, section 6)."""
    requests = [prompt.render(query, [c]) for c in query.candidates]
    answers = (yield requests) if requests else []
    parsed = [prompt.parse(answer, 1) for answer in answers]
    unread = [i for i, p in enumerate(parsed) if p.score is None and not p.order]
    second = (yield [_closed(requests[i], answers[i].text) for i in unread]) if unread else []
    again = [prompt.parse(answer, 1) for answer in second]
    retried = [replace(p, faults=(*p.faults, Fault.RETRIED)) for p in again]
    final = list(parsed)
    for i, p in zip(unread, retried, strict=True):
        final[i] = p if p.score is not None else replace(p, score=0.0)
    return query.ranking(_by_score(final), [*parsed, *retried])


def _closed(request: Request, thought: str) -> Request:
    """The same prompt with the thought cut at its last sentence end and closed."""
    ends = [m.end() for m in re.finditer(r"[.!?]", thought)]
    text = f"{request.text}\n{thought[: ends[-1]] if ends else thought}\n</think>"
    return replace(request, text=text, max_tokens=0, stop=())


def _by_score(parsed: list[Parsed]) -> list[int]:
    """Positions by falling score; ties and passages without a score keep first-stage order."""
    scores = [p.score if p.score is not None else float("-inf") for p in parsed]
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))
