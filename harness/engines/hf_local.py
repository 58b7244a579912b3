"""transformers on a CPU or a GPU: `poll` runs one length-sorted, left-padded batch.

On a GPU plain greedy answers take transformers' continuous batching instead (hf_stream). Owns
which calls share a batch. It must not know methods or parsing.
"""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import Future
from dataclasses import replace
from functools import cached_property
from typing import Any

from harness.engines import hf_batches, weights
from harness.engines.hf_batches import Net, Row, Scores
from harness.engines.hf_stream import Stream
from harness.engines.wording import Asked, Wording
from harness.types import Completion, EngineError, ModelSpec, RegistryError, Request, Serving

SIZES = (  # of a configuration: what a call's arithmetic is counted with
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "hidden_act",
    "num_key_value_heads", "head_dim", "vocab_size", "num_experts", "num_local_experts",
)  # fmt: skip
SCORED_ON_CPU = 2048  # padded tokens: a wider forward pass only leaves the processor's caches


class HfEngine(Wording):
    """One model (and adapter) in this process.

    batch_tokens bounds a batch's padded prompt tokens; batch_size its sequences. On a GPU an
    out-of-memory batch is halved and the smaller size remembered.
    continuous allows continuous batching: on a GPU, where nothing must be deterministic.
    """

    def __init__(self, spec: ModelSpec, *, serving: Serving) -> None:
        weights.require("torch", "transformers", *(["peft"] if spec.adapter else []))
        super().__init__(spec)
        if spec.quantization:
            raise RegistryError(f"model {spec.name}: the hf engine does not quantise weights")
        self.device, self.dtype = weights.device_and_dtype(
            "float32" if serving.deterministic else spec.dtype
        )
        self.batch_size = 16
        self.batch_tokens = 65536 if self.device == "cuda" else 16384
        self.capacity = 4 * self.batch_size
        self.group, self.facts = "", dict[str, Any]()
        self.fingerprint = self.identity("hf", self.dtype)
        self._submitted: deque[Future[Asked]] = deque()
        self._pending: list[Asked] = []
        self.continuous = self.device == "cuda" and not serving.deterministic
        self._stream: Stream | None = None

    def submit(self, number: int, request: Request) -> None:
        self._submitted.append(self.tokenised(number, request))

    def _take(self, p: Asked) -> None:
        """Let a call join the continuous batch, or wait for a padded one."""
        if not self._streams(p):
            self._pending.append(p)
            return
        self._stream = self._stream or Stream(self.net)
        self._stream.submit(p)

    def poll(self) -> list[tuple[int, Completion]]:
        """Run the next batch: of the oldest call's kind, the longest prompts first."""
        while self._submitted:  # all of them: what shares a batch may not depend on the clock
            self._take(self._submitted.popleft().result())
        if self._stream and self._stream.flying:
            ended = [(p, self._text(p, row, ()), spent) for p, row, spent in self._stream.poll()]
            return [(p.number, replace(text, decode=spent)) for p, text, spent in ended]
        self._end_stream()  # it keeps the GPU's memory
        if not self._pending:
            raise EngineError("poll without a submitted call")
        batch = [p for p in self._pending if len(p.row) + p.budget > self.context]
        answers = [Completion(finish="too_long", prompt_tokens=len(p.row)) for p in batch]
        while not answers:
            batch = self._next_batch()
            answers = self._answer(batch)
        self._pending = [p for p in self._pending if p not in batch]
        return [(p.number, answer) for p, answer in zip(batch, answers, strict=True)]

    def close(self) -> None:
        """Drop what waits. The weights stay for this process's next engine of the same model."""
        super().close()
        self._submitted.clear()
        self._pending.clear()
        self._end_stream()
        self.__dict__.pop("net", None)

    @cached_property
    def net(self) -> Net:
        """The weights, loaded before the first batch."""
        what = (self.base, self.adapter, self.spec.adapter_mode, self.device, self.dtype)
        started = time.perf_counter()
        model = weights.load_model(*what)
        self.facts["load_seconds"] = round(time.perf_counter() - started, 3)
        config = model.config.get_text_config().to_dict()
        self.facts["config"] = {key: config[key] for key in SIZES if key in config}
        self.facts["attention"] = model.config.get_text_config()._attn_implementation
        self.facts["batching"] = "continuous" if self.continuous else "padded"
        own, pad = model.generation_config.eos_token_id, self.tokenizer.pad_token_id or 0
        ends = {*(own if isinstance(own, list) else [own]), self.tokenizer.eos_token_id} - {None}
        return Net(model, self.device, pad, tuple(ends), self.sampling, self._text_of)

    @property
    def context(self) -> int:
        """Most tokens of a prompt and its answer."""
        config = self.net.model.config.get_text_config()
        return int(self.spec.context or config.max_position_embeddings)

    def _streams(self, p: Asked) -> bool:
        """May this call join the continuous batch? It decodes greedily up to an end token."""
        if not self.continuous or not p.budget or hf_batches.warpers(self.sampling):
            return False
        plain = not (p.request.stop or p.target or p.request.exact_length_of)
        return plain and len(p.row) + p.budget <= self.context

    def _end_stream(self) -> None:
        if self._stream:
            self._stream.close()
        self._stream = None

    def _next_batch(self) -> list[Asked]:
        same = [p for p in self._pending if _kind(p) == _kind(self._pending[0])]
        same.sort(key=lambda p: (-len(p.row), p.number))
        wide = same[0].budget or self.device != "cpu"
        tokens = self.batch_tokens if wide else min(self.batch_tokens, SCORED_ON_CPU)
        return same[: max(1, min(self.batch_size, tokens // len(same[0].row)))]

    def _answer(self, batch: list[Asked]) -> list[Completion]:
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

    def _scored(self, batch: list[Asked]) -> list[Completion]:
        rows, targets = [p.row for p in batch], [p.target for p in batch]
        found = hf_batches.score(self.net, rows, [_places(p) for p in batch], targets)
        return [
            Completion(finish="scored", prompt_tokens=len(row), scores=tuple(scores))
            for row, scores in zip(rows, found)
        ]

    def _texts(self, batch: list[Asked]) -> list[Completion]:
        budget, exact, stops, _ = _kind(batch[0])
        rows, watched = [p.row for p in batch], [p.target for p in batch]
        found = hf_batches.generate(self.net, rows, watched, budget, exact, stops)
        return [self._text(p, *answer) for p, answer in zip(batch, found)]

    def _text(self, p: Asked, tokens: list[int], watched: tuple[Scores, ...]) -> Completion:
        """What follows a row's first end token is padding."""
        end = next((i for i, t in enumerate(tokens) if t in self.net.ends), None)
        return self._completed(p, tokens, end, watched)


def _kind(p: Asked) -> tuple[Any, ...]:
    """Requests of one kind may share a batch."""
    exact, stops = bool(p.request.exact_length_of), p.request.stop
    return (p.budget, exact, stops, len(p.target)) if p.budget else ()


def _places(p: Asked) -> Row:
    """Where the row predicts each target; -1 is after its last token."""
    count = len(p.target)
    return [-1] * count if p.request.continuation is None else range(-1 - count, -1)
