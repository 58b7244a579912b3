"""Listwise reranking by a window that slides from the bottom of the list to its top."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import replace
from typing import Annotated, Literal

from annotated_types import Ge

from harness.prompts import Prompt
from harness.types import Candidate, Completion, Fault, Flow, Parsed, Query, RegistryError, Request

Windows = Literal["clamped", "rearank"]


def sliding_window(
    query: Query,
    prompt: Prompt,
    *,
    size: Annotated[int, Ge(2)] = 20,
    stride: Annotated[int, Ge(1)] = 10,
    passes: Annotated[int, Ge(1)] = 1,
    windows: Windows = "clamped",
) -> Flow:
    """RankGPT's sliding window: each answer reorders its window before the next one is asked.

    windows="rearank" is the published loop of Rearank and llm-rankers, which leaves the head of
    some lists alone (PROTOCOLS 1.4); it exists for reproduction only.
    """
    if stride > size:
        raise RegistryError(
            f"stride {stride} is larger than size {size}: documents would be skipped"
        )
    order, log = list(range(len(query.candidates))), list[Parsed]()
    for _ in range(passes):
        for start, end in window_bounds(len(order), size, stride, windows):
            shown = [query.candidates[i] for i in order[start:end]]
            parsed = yield from _ask(query, prompt, shown, log)
            order[start:end] = [order[start + i] for i in parsed.order]
    return query.ranking(order, log)


def _ask(
    query: Query, prompt: Prompt, shown: list[Candidate], log: list[Parsed]
) -> Generator[list[Request], list[Completion], Parsed]:
    """The order of one window; where the protocol says so, with ever fewer words until it fits."""
    while True:
        [answer] = yield [prompt.render(query, shown)]
        parsed = prompt.parse(answer, len(shown))
        if (fewer := prompt.shortened(shown, answer)) is None:
            log.append(parsed)
            return parsed
        log.append(replace(parsed, faults=(Fault.SHORTENED,)))
        shown = fewer


def window_bounds(
    count: int, size: int, stride: int, kind: Windows = "clamped"
) -> Iterator[tuple[int, int]]:
    """[start, end) of each window, bottom first.

    clamped: the last window starts at 0, so that every document is shown (rank_llm, ReasonRank).
    A single document needs no window.
    """
    for end in range(count, 1, -stride):
        start = end - size
        if start >= 0 or kind == "clamped":
            yield max(start, 0), end
        if start <= 0:
            return
