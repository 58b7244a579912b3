"""A scriptable engine for tests of logic. Its answers are never shown as results."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any

from harness.types import Completion, EngineError, ModelSpec, Request, Serving


@dataclass(eq=False)
class FakeEngine:
    """Answers come in a seeded random order and in lumps; `grade` decides who is better.

    mode: oracle | noisy | reversed | garbled | cut-off | dying (after `survive` answers)
    """

    spec: ModelSpec
    mode: str = "oracle"
    grade: Callable[[Request, str], float] = lambda request, docid: Random(docid).random()
    seed: int = 0
    survive: int = 0
    lump: int = 3
    capacity: int = 16
    group: str = ""
    serving: Serving = field(default_factory=Serving)
    facts: Mapping[str, Any] = field(default_factory=dict)
    fingerprint: Mapping[str, Any] = field(init=False)
    asked: list[Request] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.fingerprint = {"engine": "fake", "model": self.spec.name, "mode": self.mode}
        self._left = self.survive if self.mode == "dying" else 10**9
        self._random = Random(self.seed)
        self._pending: list[tuple[int, Request]] = []

    def submit(self, number: int, request: Request) -> None:
        self.asked.append(request)
        self._pending.append((number, request))

    def poll(self) -> list[tuple[int, Completion]]:
        if not self._pending:
            raise EngineError("poll without a submitted call")
        if not self._left:
            raise EngineError("the fake engine died, as it was told to")
        self._random.shuffle(self._pending)
        count = min(self._random.randint(1, self.lump), self._left)
        lump, self._pending = self._pending[:count], self._pending[count:]
        self._left -= len(lump)
        return [(number, self.answer(request)) for number, request in lump]

    def clip(self, text: str, tokens: int) -> str:
        """White-space words stand in for tokens."""
        words = text.split()
        return text if len(words) <= tokens else " ".join(words[:tokens])

    def close(self) -> None:
        self._pending.clear()

    def answer(self, request: Request) -> Completion:
        """What the scripted model says; its token counts and times depend on the request alone."""
        prompt = " ".join(m.content for m in request.messages) + (request.text or "")
        grades = [self._graded(request, docid) for docid in request.shown or ("nothing shown",)]
        text = self._text(prompt, grades) if request.max_tokens or request.exact_length_of else ""
        if request.prefill == " Passage:":  # an answer holds its prefill
            text = text.replace("Passage", "Passage:")
        cut = self.mode == "cut-off" and text != ""
        return Completion(
            text=text[: len(text) // 3] if cut else text,
            finish="length" if cut else "stop" if text else "scored",
            prompt_tokens=len(prompt.split()),
            output_tokens=len(text.split()),
            scores=_scores(request, grades),
            prefill=0.001,
            decode=0.001 * len(text.split()),
        )

    def _graded(self, request: Request, docid: str) -> float:
        noise = 0.5 if self.mode == "noisy" else 0.0
        grade = self.grade(request, docid) + Random(f"{docid}:{request.shown}").gauss(0, noise)
        return -grade if self.mode == "reversed" else grade

    def _text(self, prompt: str, grades: list[float]) -> str:
        if self.mode == "garbled":
            mess = ["", "I cannot say.", "[0] > [99]", "<answer>9 9</answer>", "[2]"]
            return Random(prompt).choice(mess)
        if "true" in prompt and "false" in prompt:
            return " it is so.\n</think> true"
        order = sorted(range(len(grades)), key=lambda i: -grades[i])
        letters = 'Passage A: "' in prompt
        labels = [f"Passage {chr(65 + i)}" if letters else f"[{i + 1}]" for i in order]
        answer = " > ".join(labels) if "> [" in prompt or "[X] >" in prompt else labels[0]
        thought = "<think> first [1], then [2] </think> " if "<think>" in prompt else ""
        return f"{thought}<answer>{answer}</answer>" if "<answer>" in prompt else answer


def _scores(request: Request, grades: list[float]) -> tuple[float, ...]:
    """Log-probabilities: of a continuation's words, of two labels, or of a label per passage."""
    if request.continuation is not None:
        return (grades[0] - 2.0,) * len(request.continuation.split())
    if not request.labels:
        return ()
    return tuple(g - 2.0 for g in grades) if len(grades) > 1 else (grades[0], 1 - grades[0])
