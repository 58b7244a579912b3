"""transformers on a CPU or a GPU: `poll` runs one length-sorted, left-padded batch.

Owns the way from a request to token ids and back. It must not know methods or parsing. Of a
model's own generation_config only the end tokens reach an answer.
"""

from __future__ import annotations

import importlib.util
import os
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import jinja2

from harness.engines import hf_batches
from harness.engines.hf_batches import Generated, Net, Row
from harness.engines.hf_load import device_and_dtype, first_line, load_model, load_tokenizer
from harness.engines.weights import locate
from harness.types import (
    DEFAULT_SEED,
    Completion,
    EngineError,
    MissingPackageError,
    ModelSpec,
    RegistryError,
    Request,
)

NEUTRAL = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}
_CONTEXT_TOKENS = 6  # decoded in front of an answer, so that its first space is not lost


@dataclass(frozen=True)
class _Pending:
    number: int
    request: Request
    prompt: tuple[int, ...]
    target: tuple[int, ...]  # the continuation's tokens, or the first token of every label
    budget: int  # most tokens to generate
    arrived: float

    @property
    def kind(self) -> tuple[Any, ...]:
        """Requests that may share a batch."""
        if self.request.continuation is not None:
            return ("continuation",)
        if not self.budget:
            return ("labels",)
        return ("text", self.budget, bool(self.request.exact_length_of), self.request.stop)

    @property
    def length(self) -> int:
        """Tokens that the model reads before it answers."""
        return len(self.prompt) + (len(self.target) if self.kind[0] == "continuation" else 0)


class HfEngine:
    """One model (and adapter) in this process.

    batch_tokens bounds a batch's padded prompt tokens; batch_size its sequences. On a GPU an
    out-of-memory batch is halved and the smaller size remembered.
    """

    def __init__(
        self, spec: ModelSpec, *, batch_tokens: int | None = None, batch_size: int = 16
    ) -> None:
        for package in ("torch", "transformers", *(["peft"] if spec.adapter else [])):
            if importlib.util.find_spec(package) is None:
                raise MissingPackageError(package, "hf")
        if not spec.base:
            raise RegistryError(f"model {spec.name} names no weights; it needs --engine http")
        if spec.quantization:
            raise RegistryError(f"model {spec.name}: the hf engine does not quantise weights")
        self.spec = spec
        self.base = locate(spec.base, spec.revision)
        self.adapter = locate(spec.adapter, spec.adapter_revision) if spec.adapter else None
        self.device, self.dtype = device_and_dtype(spec.dtype)
        self.batch_size = batch_size
        self.batch_tokens = batch_tokens or (65536 if self.device == "cuda" else 16384)
        self.capacity = 4 * batch_size
        self.sampling = _sampling(spec)
        self.fingerprint = {
            "engine": "hf",
            "base": self.base.identity,
            "adapter": self.adapter.identity if self.adapter else None,
            "adapter_mode": spec.adapter_mode if self.adapter else None,
            "dtype": self.dtype,
            "context": spec.context,  # decides which prompts are too long
            "sampling": self.sampling,
            "template": dict(spec.template),
        }
        self.load_seconds = 0.0
        self._pending: list[_Pending] = []
        self.clip = lru_cache(maxsize=1 << 18)(self._clip)

    # --- the protocol -------------------------------------------------------------------------

    def submit(self, number: int, request: Request) -> None:
        """Queue a call; the prompt is rendered and tokenised here, once."""
        prompt = self._ids(self.rendered(request), special=request.text is not None)
        if not prompt:
            raise EngineError("an empty prompt has no next token")
        if request.continuation is not None:
            target = self._ids(request.continuation)
        else:
            target = self._label_tokens(request.labels)
        budget = len(self._ids(request.exact_length_of)) or request.max_tokens
        self._pending.append(_Pending(number, request, prompt, target, budget, time.perf_counter()))

    def poll(self) -> list[tuple[int, Completion]]:
        """Run the next batch: of the oldest call's kind, the longest prompts first."""
        if not self._pending:
            raise EngineError("poll without a submitted call")
        if unfit := [p for p in self._pending if not self._fits(p)]:
            batch, answers = unfit, [_too_long(p) for p in unfit]
        else:
            batch = self._next_batch()
            answers = self._answer(batch)
        taken = {p.number for p in batch}
        self._pending = [p for p in self._pending if p.number not in taken]
        return [(p.number, answer) for p, answer in zip(batch, answers, strict=True)]

    def _clip(self, text: str, tokens: int) -> str:
        """tokenize + convert_tokens_to_string, as every published runner cuts (PROTOCOLS 2.1.4)."""
        pieces = self.tokenizer.tokenize(text)
        if len(pieces) <= tokens:
            return text
        return str(self.tokenizer.convert_tokens_to_string(pieces[:tokens]))

    def close(self) -> None:
        """Drop what waits. The weights stay for this process's next engine of the same model."""
        self._pending.clear()
        self.__dict__.pop("net", None)

    # --- prompts ------------------------------------------------------------------------------

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.spec.base, self.base)

    def rendered(self, request: Request) -> str:
        """The exact text that is tokenised: the model's own chat template, then the prefill."""
        if request.text is not None:
            return request.text + request.prefill
        turns = [{"role": m.role, "content": m.content} for m in request.messages]
        try:
            text = self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True, **self.spec.template
            )
        except (ValueError, jinja2.TemplateError) as error:
            raise EngineError(
                f"{self.spec.base} cannot render the chat: {first_line(error)}"
            ) from error
        bos = (self.tokenizer.bos_token or "") if request.bos else ""
        return f"{bos}{text}{request.prefill}"

    def _ids(self, text: str, *, special: bool = False) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    def _label_tokens(self, labels: Sequence[str]) -> tuple[int, ...]:
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

    # --- batches ------------------------------------------------------------------------------

    @cached_property
    def net(self) -> Net:
        """The weights, loaded before the first batch."""
        started = time.perf_counter()
        model = load_model(
            self.spec.base, self.base, self.adapter, self.spec.adapter_mode, self.device, self.dtype
        )
        self.load_seconds = time.perf_counter() - started
        ends = {*model.harness_ends, self.tokenizer.eos_token_id} - {None}
        return Net(model, self.device, self.tokenizer.pad_token_id or 0, tuple(sorted(ends)))

    @property
    def context(self) -> int:
        """Most tokens of a prompt and its answer."""
        config = self.net.model.config.get_text_config()
        return int(self.spec.context or config.max_position_embeddings)

    def _fits(self, p: _Pending) -> bool:
        return p.length + p.budget <= self.context

    def _next_batch(self) -> list[_Pending]:
        kind = self._pending[0].kind
        same = sorted(
            (p for p in self._pending if p.kind == kind), key=lambda p: (-p.length, p.number)
        )
        return same[: max(1, min(self.batch_size, self.batch_tokens // same[0].length))]

    def _answer(self, batch: list[_Pending]) -> list[Completion]:
        started = time.perf_counter()
        if (answers := self._attempt(batch)) is None:
            # Outside the except block, whose traceback would keep the failed batch's memory.
            self.batch_size = half = len(batch) // 2
            return self._answer(batch[:half]) + self._answer(batch[half:])
        share = (time.perf_counter() - started) / len(batch)
        return [_timed(c, started - p.arrived, share) for p, c in zip(batch, answers, strict=True)]

    def _attempt(self, batch: list[_Pending]) -> list[Completion] | None:
        """The batch's answers, None if it is too big for the GPU."""
        import torch

        run = {"continuation": self._continuations, "labels": self._labels, "text": self._texts}
        try:
            with torch.inference_mode():
                return run[batch[0].kind[0]](batch)
        except torch.OutOfMemoryError as error:
            if len(batch) == 1:
                raise EngineError(f"out of memory on a prompt of {batch[0].length}") from error
        except (RuntimeError, ValueError, IndexError) as error:
            raise EngineError(f"transformers failed on a batch of {len(batch)}: {error}") from error
        torch.cuda.empty_cache()
        return None

    def _continuations(self, batch: list[_Pending]) -> list[Completion]:
        # Position -1-n predicts the n-th token from the end.
        places = [range(-1 - len(p.target), -1) for p in batch]
        rows = [p.prompt + p.target for p in batch]
        return _scored(batch, hf_batches.score(self.net, rows, places, [p.target for p in batch]))

    def _labels(self, batch: list[_Pending]) -> list[Completion]:
        places = [[-1] * len(p.target) for p in batch]
        targets = [p.target for p in batch]
        return _scored(
            batch, hf_batches.score(self.net, [p.prompt for p in batch], places, targets)
        )

    def _texts(self, batch: list[_Pending]) -> list[Completion]:
        _, budget, exact, stops = batch[0].kind
        rows = hf_batches.generate(
            self.net,
            [p.prompt for p in batch],
            budget=budget,
            exact=exact,
            stops=stops,
            decode=self._text_of,
            sampling=self.sampling,
            watched=[p.target for p in batch],
        )
        return [self._text(p, row) for p, row in zip(batch, rows, strict=True)]

    def _text(self, p: _Pending, row: Generated) -> Completion:
        """What follows a row's first end token or stop string is padding."""
        end = next((i for i, t in enumerate(row.tokens) if t in self.net.ends), None)
        tokens = row.tokens if end is None else row.tokens[: end + 1]
        text = self._text_of(p.prompt, row.tokens[:end])
        ends = [text.index(s) + len(s) for s in p.request.stop if s in text]
        if ends:
            text = text[: min(ends)]
            tokens = tokens[: self._count(p, tokens, lambda t: any(s in t for s in p.request.stop))]
        thoughts = text.count("</think>")
        return Completion(
            text=p.request.prefill + text,
            finish="length" if end is None and not ends else "stop",
            prompt_tokens=len(p.prompt),
            output_tokens=len(tokens),
            reasoning_tokens=self._count(p, tokens, lambda t: t.count("</think>") >= thoughts)
            if thoughts
            else 0,
            scores=row.watched[len(tokens) - 1] if p.target else (),
        )

    def _count(self, p: _Pending, tokens: Row, holds: Callable[[str], bool]) -> int:
        """How many tokens it takes until their text passes a test that later tokens cannot undo."""
        counts = range(1, len(tokens) + 1)
        at = bisect_left(counts, True, key=lambda n: holds(self._text_of(p.prompt, tokens[:n])))
        return min(at + 1, len(tokens))


def _scored(batch: list[_Pending], scores: Sequence[tuple[float, ...]]) -> list[Completion]:
    return [
        Completion(finish="scored", prompt_tokens=p.length, scores=row)
        for p, row in zip(batch, scores, strict=True)
    ]


def _timed(completion: Completion, queued: float, share: float) -> Completion:
    """The batch's time in equal shares; text counts as decode, scoring as prefill."""
    if completion.output_tokens:
        return replace(completion, queued=queued, decode=share)
    return replace(completion, queued=queued, prefill=share)


def _too_long(p: _Pending) -> Completion:
    return Completion(finish="too_long", prompt_tokens=len(p.prompt))


def _sampling(spec: ModelSpec) -> dict[str, float]:
    """Every setting that decides a token, spelt out for the fingerprint."""
    known = {*NEUTRAL, "seed", "min_p"}
    if unknown := sorted(set(spec.sampling) - known):
        raise RegistryError(
            f"model {spec.name}: unknown sampling key {unknown[0]!r}", known=known, given=unknown[0]
        )
    seed = {"seed": DEFAULT_SEED} if spec.sampling.get("temperature") else {}
    return {**NEUTRAL, **seed, **spec.sampling}


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
