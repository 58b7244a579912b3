"""A scriptable engine for tests of logic. Its answers are never shown as results.

`grade(request, docid)` decides who is better; by default a hash of (query text, docid), so that
every run over the same input agrees. Answers come back in a seeded random order and in lumps.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from random import Random
from typing import Any

from harness.types import Completion, EngineError, ModelSpec, Request

Grade = Callable[[Request, str], float]
_LABELLED = re.compile(r'Passage [A-Z]: "')


def hashed_grade(request: Request, docid: str) -> float:
    """A stable pseudo-relevance in [0, 1)."""
    return int(hashlib.sha256(f"grade:{docid}".encode()).hexdigest()[:8], 16) / 2**32


class FakeEngine:
    """mode: oracle | noisy | reversed | garbled | cut-off | dying (after `survive` answers)."""

    def __init__(
        self,
        spec: ModelSpec,
        *,
        mode: str = "oracle",
        grade: Grade = hashed_grade,
        seed: int = 0,
        survive: int = 0,
        lump: int = 3,
    ) -> None:
        self.fingerprint: Mapping[str, Any] = {"engine": "fake", "model": spec.name, "mode": mode}
        self.capacity = 16
        self.mode, self.grade, self.survive, self.lump = mode, grade, survive, lump
        self.random = Random(seed)
        self.asked: list[Request] = []
        self.load_seconds = 0.0
        self._pending: list[tuple[int, Request]] = []
        self._answered = 0

    def submit(self, number: int, request: Request) -> None:
        self.asked.append(request)
        self._pending.append((number, request))

    def poll(self) -> list[tuple[int, Completion]]:
        if not self._pending:
            raise EngineError("poll without a submitted call")
        if self.mode == "dying" and self._answered >= self.survive:
            raise EngineError("the fake engine died, as it was told to")
        self.random.shuffle(self._pending)
        count = self.random.randint(1, self.lump)
        if self.mode == "dying":
            count = min(count, self.survive - self._answered)
        lump, self._pending = self._pending[:count], self._pending[count:]
        self._answered += len(lump)
        return [(number, self.answer(request)) for number, request in lump]

    def clip(self, text: str, tokens: int) -> str:
        """White-space words stand in for tokens."""
        words = text.split()
        return text if len(words) <= tokens else " ".join(words[:tokens])

    def close(self) -> None:
        self._pending.clear()

    def answer(self, request: Request) -> Completion:
        """What the scripted model says; its token counts and times depend on the request alone."""
        grades = [self._graded(request, docid) for docid in request.shown or ("nothing shown",)]
        prompt = " ".join(m.content for m in request.messages) + (request.text or "")
        scores: tuple[float, ...] = ()
        if request.continuation is not None:
            scores = (grades[0] - 2.0,) * len(request.continuation.split())
        elif request.labels:
            pointwise = len(grades) == 1
            scores = (grades[0], 1 - grades[0]) if pointwise else tuple(g - 2.0 for g in grades)
        said = self._text(prompt, grades) if request.max_tokens or request.exact_length_of else ""
        # An answer holds its prefill; the scripted ones that name a passage begin with theirs.
        text = said.replace("Passage", "Passage:") if request.prefill == " Passage:" else said
        cut = self.mode == "cut-off" and bool(text)
        return Completion(
            text=text[: len(text) // 3] if cut else text,
            finish="length" if cut else "stop" if text else "scored",
            prompt_tokens=len(prompt.split()),
            output_tokens=len(text.split()),
            scores=scores,
            prefill=0.001,
            decode=0.001 * len(text.split()),
        )

    def _graded(self, request: Request, docid: str) -> float:
        grade = self.grade(request, docid)
        if self.mode == "reversed":
            return -grade
        if self.mode == "noisy":
            return grade + Random(f"{docid}:{len(request.shown)}").gauss(0, 0.5)
        return grade

    def _text(self, prompt: str, grades: list[float]) -> str:
        if self.mode == "garbled":
            mess = ["", "I cannot say.", "[0] > [99]", "<answer>9 9</answer>", "[2]"]
            return Random(prompt).choice(mess)
        order = sorted(range(len(grades)), key=lambda i: (-grades[i], i))
        if "true" in prompt and "false" in prompt:
            return " it is so.\n</think> true"
        letters = bool(_LABELLED.search(prompt))
        labels = [f"Passage {chr(65 + i)}" if letters else f"[{i + 1}]" for i in order]
        permutes = "> [" in prompt or "[X] >" in prompt
        answer = " > ".join(labels) if permutes else labels[0]
        if "<answer>" in prompt:
            answer = f"<answer>{answer}</answer>"
            answer = (
                f"<think> first [1], then [2] </think> {answer}" if "<think>" in prompt else answer
            )
        return answer
