"""From a request to token ids, and from generated tokens back to an answer.

Owns the chat template, label tokens, clipping and the settings that decide a token, for engines
that hold a model's weights. It must not know how tokens are computed.
"""

from __future__ import annotations

import os
import time
from bisect import bisect_left
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any

import jinja2

from harness.engines import weights
from harness.types import DEFAULT_SEED, Completion, EngineError, ModelSpec, RegistryError, Request

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads make later forks warn

NEUTRAL = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}
_CONTEXT_TOKENS = 6  # decoded in front of an answer, so that its first space is not lost

Row = Sequence[int]


@dataclass(frozen=True)
class Asked:
    """A submitted call in the model's own tokens."""

    number: int
    request: Request
    row: tuple[int, ...]  # what the model reads: the prompt, and a continuation to score
    target: tuple[int, ...]  # the continuation's tokens, or the first token of every label
    budget: int  # most tokens to generate, 0 to score
    arrived: float


class Wording:
    """One model (and adapter) as far as its words go: the base of engines that load weights."""

    def __init__(self, spec: ModelSpec) -> None:
        if not spec.base:
            raise RegistryError(f"model {spec.name} names no weights; it needs --engine http")
        self.spec, adapted = spec, (spec.adapter, spec.adapter_revision)
        self.base = weights.locate(spec.base, spec.revision)
        self.adapter = weights.locate(*adapted) if spec.adapter else None
        self.sampling = _sampling(spec)
        self.clip = lru_cache(maxsize=1 << 18)(self._clip)
        self.tokenise_seconds = 0.0  # spent on calls so far
        self._thread = ThreadPoolExecutor(1, "tokenise")

    def identity(self, engine: str, dtype: str) -> dict[str, Any]:
        """What decides an answer apart from the request, whichever engine computes it."""
        return {
            "engine": engine,
            "base": self.base.identity,
            "adapter": self.adapter.identity if self.adapter else None,
            "adapter_mode": self.spec.adapter_mode if self.adapter else None,
            "dtype": dtype,
            "context": self.spec.context,  # decides which prompts are too long
            "sampling": self.sampling,
            "template": dict(self.spec.template),
        }

    def tokenised(self, number: int, request: Request) -> Future[Asked]:
        """`asked` in a thread of its own: the loop goes on, as fast tokenizers release the GIL."""
        _ = self.tokenizer  # loaded here: what loading prints is caught for the whole process
        return self._thread.submit(self.asked, number, request)

    def close(self) -> None:
        """Tokenise nothing more of what waits."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._thread = ThreadPoolExecutor(1, "tokenise")

    def asked(self, number: int, request: Request) -> Asked:
        """Render and tokenise a call, once."""
        started = time.perf_counter()
        row = self._ids(self.rendered(request), special=request.text is not None)
        if not row:
            raise EngineError("an empty prompt has no next token")
        if request.continuation is None:
            target = self._label_tokens(request.labels)
        else:
            target = self._ids(request.continuation)
            row += target
        budget = len(self._ids(request.exact_length_of)) or request.max_tokens
        arrived = time.perf_counter()
        self.tokenise_seconds += arrived - started
        return Asked(number, request, row, target, budget, arrived)

    def _clip(self, text: str, tokens: int) -> str:
        """tokenize + convert_tokens_to_string, as every published runner cuts (PROTOCOLS 2.1.4)."""
        pieces = self.tokenizer.tokenize(text)
        if len(pieces) <= tokens:
            return text
        return str(self.tokenizer.convert_tokens_to_string(pieces[:tokens]))

    @cached_property
    def tokenizer(self) -> Any:
        return weights.load_tokenizer(self.base)

    def rendered(self, request: Request) -> str:
        """The exact text that is tokenised: the model's own chat template, then the prefill."""
        if request.text is not None:
            return request.text + request.prefill
        turns = [{"role": m.role, "content": m.content} for m in request.messages]
        settings = {"tokenize": False, "add_generation_prompt": True, **self.spec.template}
        try:
            text = self.tokenizer.apply_chat_template(turns, **settings)
        except (ValueError, jinja2.TemplateError) as error:
            problem = f"{self.spec.base} cannot render the chat: {weights.first_line(error)}"
            raise EngineError(problem) from error
        bos = (self.tokenizer.bos_token or "") if request.bos else ""
        return f"{bos}{text}{request.prefill}"

    def _ids(self, text: str, *, special: bool = False) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    def _label_tokens(self, labels: tuple[str, ...]) -> tuple[int, ...]:
        ids = [self._ids(label) for label in labels]
        if not all(ids) or len({first for first, *_ in ids}) < len(ids):
            raise EngineError(f"labels {labels} are not told apart by their first token")
        return tuple(first for first, *_ in ids)

    def _text_of(self, before: Row, tokens: Row) -> str:
        """The text of `tokens` after others: alone, many tokenizers strip its leading space."""
        head = list(before[-_CONTEXT_TOKENS:])
        skip = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        known = self.tokenizer.decode(head, **skip)
        return str(self.tokenizer.decode([*head, *tokens], **skip)[len(known) :])

    def _completed(
        self, p: Asked, tokens: Row, end: int | None, watched: Sequence[Sequence[float]]
    ) -> Completion:
        """The answer in these tokens.

        end is the place of the first end token, which is the last that counts; watched has the
        log-probabilities of the call's labels at every token, or is empty.
        """
        text = self._text_of(p.row, tokens[:end])
        tokens = tokens if end is None else tokens[: end + 1]
        stops = [text.index(s) + len(s) for s in p.request.stop if s in text]
        if stops:
            text = text[: min(stops)]
            tokens = tokens[: self._count(p, tokens, text)]
        thought, tag, _ = text.rpartition("</think>")
        return Completion(
            text=p.request.prefill + text,
            finish="length" if end is None and not stops else "stop",
            prompt_tokens=len(p.row),
            output_tokens=len(tokens),
            reasoning_tokens=self._count(p, tokens, thought + tag),
            scores=tuple(watched[len(tokens) - 1]) if watched else (),
        )

    def _count(self, p: Asked, tokens: Row, text: str) -> int:
        """How many of the tokens write the text that they begin with."""
        counts, read = range(len(tokens)), partial(self._text_of, p.row)
        return bisect_left(counts, True, key=lambda n: read(tokens[:n]).startswith(text))


def _sampling(spec: ModelSpec) -> dict[str, float]:
    """Every setting that decides a token, spelt out for the fingerprint."""
    known = {*NEUTRAL, "seed", "min_p"}
    if unknown := sorted(set(spec.sampling) - known):
        problem = f"model {spec.name}: unknown sampling key {unknown[0]!r}"
        raise RegistryError(problem, known=known, given=unknown[0])
    seed = {"seed": DEFAULT_SEED} if spec.sampling.get("temperature") else {}
    return {**NEUTRAL, **seed, **spec.sampling}
