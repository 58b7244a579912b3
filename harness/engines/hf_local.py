"""transformers on a CPU or a GPU: `poll` runs one length-sorted, left-padded batch.

Owns the way from a request to token ids and back. It must not know methods or parsing.
"""

from __future__ import annotations

import os
import time
from bisect import bisect_left
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from typing import Any

import jinja2

from harness.engines import hf_batches, weights
from harness.engines.hf_batches import Net, Row, Scores
from harness.types import DEFAULT_SEED, Completion, EngineError, ModelSpec, RegistryError, Request

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads make later forks warn

NEUTRAL = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}
_CONTEXT_TOKENS = 6  # decoded in front of an answer, so that its first space is not lost

SCORED_ON_CPU = 2048  # padded tokens: a wider forward pass only leaves the processor's caches


@dataclass(frozen=True)
class _Pending:
    number: int
    request: Request
    row: tuple[int, ...]  # what the model reads: the prompt, and a continuation to score
    target: tuple[int, ...]  # the continuation's tokens, or the first token of every label
    places: Row  # where the row predicts each target; -1 is after its last token
    budget: int  # most tokens to generate, 0 to score
    arrived: float

    @property
    def kind(self) -> tuple[Any, ...]:
        """Requests of one kind may share a batch."""
        exact, stops = bool(self.request.exact_length_of), self.request.stop
        return (self.budget, exact, stops, len(self.target)) if self.budget else ()


class HfEngine:
    """One model (and adapter) in this process.

    batch_tokens bounds a batch's padded prompt tokens; batch_size its sequences. On a GPU an
    out-of-memory batch is halved and the smaller size remembered.
    """

    def __init__(self, spec: ModelSpec) -> None:
        weights.require("torch", "transformers", *(["peft"] if spec.adapter else []))
        if not spec.base:
            raise RegistryError(f"model {spec.name} names no weights; it needs --engine http")
        if spec.quantization:
            raise RegistryError(f"model {spec.name}: the hf engine does not quantise weights")
        locate = weights.locate
        self.spec = spec
        self.base = locate(spec.base, spec.revision)
        self.adapter = locate(spec.adapter, spec.adapter_revision) if spec.adapter else None
        self.device, self.dtype = weights.device_and_dtype(spec.dtype)
        self.batch_size = 16
        self.batch_tokens = 65536 if self.device == "cuda" else 16384
        self.capacity = 4 * self.batch_size
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
        self._pending: list[_Pending] = []
        self.clip = lru_cache(maxsize=1 << 18)(self._clip)

    def submit(self, number: int, request: Request) -> None:
        """Queue a call; the prompt is rendered and tokenised here, once."""
        row = self._ids(self.rendered(request), special=request.text is not None)
        if not row:
            raise EngineError("an empty prompt has no next token")
        if request.continuation is None:
            target = self._label_tokens(request.labels)
            places: Row = [-1] * len(target)
        else:
            target = self._ids(request.continuation)
            row, places = row + target, range(-1 - len(target), -1)
        budget = len(self._ids(request.exact_length_of)) or request.max_tokens
        now = time.perf_counter()
        self._pending.append(_Pending(number, request, row, target, places, budget, now))

    def poll(self) -> list[tuple[int, Completion]]:
        """Run the next batch: of the oldest call's kind, the longest prompts first."""
        if not self._pending:
            raise EngineError("poll without a submitted call")
        batch = [p for p in self._pending if len(p.row) + p.budget > self.context]
        answers = [Completion(finish="too_long", prompt_tokens=len(p.row)) for p in batch]
        while not answers:
            batch = self._next_batch()
            answers = self._answer(batch)
        self._pending = [p for p in self._pending if p not in batch]
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

    @cached_property
    def net(self) -> Net:
        """The weights, loaded before the first batch."""
        what = (self.base, self.adapter, self.spec.adapter_mode, self.device, self.dtype)
        model = weights.load_model(*what)
        own, pad = model.generation_config.eos_token_id, self.tokenizer.pad_token_id or 0
        ends = {*(own if isinstance(own, list) else [own]), self.tokenizer.eos_token_id} - {None}
        return Net(model, self.device, pad, tuple(ends), self.sampling, self._text_of)

    @property
    def context(self) -> int:
        """Most tokens of a prompt and its answer."""
        config = self.net.model.config.get_text_config()
        return int(self.spec.context or config.max_position_embeddings)

    def _next_batch(self) -> list[_Pending]:
        same = [p for p in self._pending if p.kind == self._pending[0].kind]
        same.sort(key=lambda p: (-len(p.row), p.number))
        wide = same[0].budget or self.device != "cpu"
        tokens = self.batch_tokens if wide else min(self.batch_tokens, SCORED_ON_CPU)
        return same[: max(1, min(self.batch_size, tokens // len(same[0].row)))]

    def _answer(self, batch: list[_Pending]) -> list[Completion]:
        """Answers in equal shares of the batch's time; none if it is too big for the GPU."""
        import torch

        started, texts = time.perf_counter(), batch[0].budget > 0
        try:
            with torch.inference_mode():
                answers = self._texts(batch) if texts else self._scored(batch)
        except (RuntimeError, ValueError, IndexError) as error:
            if len(batch) == 1 or not isinstance(error, torch.OutOfMemoryError):
                problem = (
                    f"{len(batch)} prompts of up to {len(batch[0].row)} tokens failed: {error}"
                )
                raise EngineError(problem) from error
            self.batch_size, answers = len(batch) // 2, []
        share = (time.perf_counter() - started) / len(batch)
        spent: dict[str, Any] = {"decode" if texts else "prefill": share}
        return [replace(c, queued=started - p.arrived, **spent) for p, c in zip(batch, answers)]

    def _scored(self, batch: list[_Pending]) -> list[Completion]:
        rows, targets = [p.row for p in batch], [p.target for p in batch]
        found = hf_batches.score(self.net, rows, [p.places for p in batch], targets)
        return [
            Completion(finish="scored", prompt_tokens=len(row), scores=tuple(scores))
            for row, scores in zip(rows, found)
        ]

    def _texts(self, batch: list[_Pending]) -> list[Completion]:
        budget, exact, stops, _ = batch[0].kind
        rows, watched = [p.row for p in batch], [p.target for p in batch]
        found = hf_batches.generate(self.net, rows, watched, budget, exact, stops)
        return [self._text(p, *row) for p, row in zip(batch, found)]

    def _text(self, p: _Pending, tokens: list[int], watched: tuple[Scores, ...]) -> Completion:
        """What follows a row's first end token or stop string is padding."""
        end = next((i for i, t in enumerate(tokens) if t in self.net.ends), None)
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
            scores=tuple(watched[len(tokens) - 1]),
        )

    def _count(self, p: _Pending, tokens: Row, text: str) -> int:
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
