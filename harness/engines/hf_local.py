"""transformers on a CPU or a GPU: `poll` runs one length-sorted, left-padded batch.

It must not know methods or parsing. Generation is spelt out in full: nothing of a model's own
generation_config (repetition penalty, sampling) reaches an answer unless the spec names it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from harness.engines.weights import Located, locate, materialise
from harness.types import (
    Completion,
    EngineError,
    MissingPackageError,
    MissingResourceError,
    ModelSpec,
    RegistryError,
    Request,
)

GREEDY = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}


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
        r = self.request
        if r.continuation is not None:
            return ("continuation",)
        return ("labels",) if not r.max_tokens else ("text", self.budget, r.exact_length_of, r.stop)


class HfEngine:
    """One model (and adapter) in this process.

    batch_tokens bounds a batch's padded prompt tokens; batch_size its sequences. On a GPU an
    out-of-memory batch is halved and the smaller size remembered.
    """

    def __init__(
        self, spec: ModelSpec, *, batch_tokens: int | None = None, batch_size: int = 16
    ) -> None:
        if importlib.util.find_spec("torch") is None:
            raise MissingPackageError("torch", "hf")
        if importlib.util.find_spec("transformers") is None:
            raise MissingPackageError("transformers", "hf")
        if not spec.base:
            raise RegistryError(f"model {spec.name} names no weights; it needs --engine http")
        self.spec = spec
        self.base = locate(spec.base, spec.revision)
        self.adapter = locate(spec.adapter, spec.adapter_revision) if spec.adapter else None
        self.device, self.dtype = _device_and_dtype(spec.dtype)
        self.batch_size = batch_size
        self.batch_tokens = batch_tokens or (65536 if self.device == "cuda" else 4096)
        self.capacity = 4 * batch_size
        self.sampling = _sampling(spec)
        self.fingerprint = {
            "engine": "hf",
            "base": self.base.identity,
            "adapter": self.adapter.identity if self.adapter else None,
            "adapter_mode": spec.adapter_mode if self.adapter else None,
            "dtype": self.dtype,
            "quantization": spec.quantization,
            "sampling": self.sampling,
            "template": dict(spec.template),
        }
        self.load_seconds = 0.0
        self._pending: list[_Pending] = []
        self.clip = lru_cache(maxsize=1 << 18)(self._clip)

    # --- the protocol -------------------------------------------------------------------------

    def submit(self, number: int, request: Request) -> None:
        """Queue a call; the prompt is rendered and tokenised here, once."""
        text = self.rendered(request)
        prompt = self._ids(text, special=request.text is not None)
        if request.continuation is not None:
            target = self._ids(request.continuation, special=False)
        else:
            target = self._label_tokens(request.labels)
        exact = self._ids(request.exact_length_of, special=False) if request.exact_length_of else ()
        budget = len(exact) or request.max_tokens
        self._pending.append(_Pending(number, request, prompt, target, budget, time.perf_counter()))

    def poll(self) -> list[tuple[int, Completion]]:
        """Run the next batch: of the oldest call's kind, the longest prompts first."""
        if not self._pending:
            raise EngineError("poll without a submitted call")
        if unfit := [p for p in self._pending if not self._fits(p)]:
            self._pending = [p for p in self._pending if self._fits(p)]
            return [(p.number, _too_long(p)) for p in unfit]
        batch = self._next_batch()
        taken = {p.number for p in batch}
        self._pending = [p for p in self._pending if p.number not in taken]
        return self._answer(batch)

    def close(self) -> None:
        self._pending.clear()

    def _clip(self, text: str, tokens: int) -> str:
        """tokenize + convert_tokens_to_string, as every published runner cuts (PROTOCOLS 2.1.4)."""
        pieces = self.tokenizer.tokenize(text)
        if len(pieces) <= tokens:
            return text
        return str(self.tokenizer.convert_tokens_to_string(pieces[:tokens]))

    # --- prompts ------------------------------------------------------------------------------

    @cached_property
    def tokenizer(self) -> Any:
        return _load_tokenizer(self.spec.base, self.base)

    def rendered(self, request: Request) -> str:
        """The exact text that is tokenised: the model's own chat template, then the prefill."""
        if request.text is not None:
            return request.text + request.prefill
        turns = [{"role": m.role, "content": m.content} for m in request.messages]
        text = self.tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True, **self.spec.template
        )
        bos = (self.tokenizer.bos_token or "") if request.bos else ""
        return f"{bos}{text}{request.prefill}"

    def _ids(self, text: str, *, special: bool) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    def _label_tokens(self, labels: Sequence[str]) -> tuple[int, ...]:
        firsts = tuple(self._ids(label, special=False)[0] for label in labels)
        if len(set(firsts)) < len(firsts):
            raise EngineError(f"labels {labels} are not told apart by their first token")
        return firsts

    # --- batches ------------------------------------------------------------------------------

    @cached_property
    def model(self) -> Any:
        started = time.perf_counter()
        loaded = _load_model(
            self.spec.base, self.base, self.adapter, self.spec.adapter_mode, self.device, self.dtype
        )
        self.load_seconds = time.perf_counter() - started
        return loaded

    @property
    def context(self) -> int:
        return int(self.spec.context or self.model.config.max_position_embeddings)

    def _fits(self, p: _Pending) -> bool:
        more = len(p.target) if p.request.continuation is not None else p.budget
        return len(p.prompt) + more <= self.context

    def _next_batch(self) -> list[_Pending]:
        kind = self._pending[0].kind
        same = [p for p in self._pending if p.kind == kind]
        same.sort(key=lambda p: (-len(p.prompt) - len(p.target), p.number))
        width = len(same[0].prompt) + len(same[0].target)
        most = max(1, min(self.batch_size, self.batch_tokens // max(width, 1)))
        return same[:most]

    def _answer(self, batch: list[_Pending]) -> list[tuple[int, Completion]]:
        import torch

        run = {"continuation": self._continuations, "labels": self._labels, "text": self._texts}
        started = time.perf_counter()
        try:
            with torch.inference_mode():
                answers = run[batch[0].kind[0]](batch)
        except torch.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            if len(batch) == 1:
                raise EngineError(
                    f"out of memory on one prompt of {len(batch[0].prompt)}"
                ) from error
            self.batch_size = len(batch) // 2
            half = len(batch) // 2
            return self._answer(batch[:half]) + self._answer(batch[half:])
        except (RuntimeError, ValueError, IndexError) as error:
            raise EngineError(f"transformers failed on a batch of {len(batch)}: {error}") from error
        share = (time.perf_counter() - started) / len(batch)
        return [(p.number, _timed(c, started - p.arrived, share)) for p, c in zip(batch, answers)]

    def _padded(self, rows: Sequence[Sequence[int]]) -> dict[str, Any]:
        """Left-padded ids and mask, both (rows, longest row)."""
        import torch

        width = max(map(len, rows))
        pad = self.tokenizer.pad_token_id or 0
        ids = torch.full((len(rows), width), pad, dtype=torch.long)
        mask = torch.zeros((len(rows), width), dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, width - len(row) :] = torch.tensor(row, dtype=torch.long)
            mask[i, width - len(row) :] = 1
        return {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device)}

    def _log_probs(self, rows: Sequence[Sequence[int]], keep: int) -> Any:
        """Next-token log-probabilities at the last `keep` positions: (rows, keep, vocabulary)."""
        import torch

        inputs = self._padded(rows)
        places = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        out = self.model(**inputs, position_ids=places, logits_to_keep=keep, use_cache=False)
        return torch.log_softmax(out.logits.float(), dim=-1)

    def _continuations(self, batch: list[_Pending]) -> list[Completion]:
        longest = max(len(p.target) for p in batch)
        logp = self._log_probs([p.prompt + p.target for p in batch], longest + 1)
        out = []
        for i, p in enumerate(batch):
            # Position -1-n predicts the n-th token from the end.
            places = range(-1 - len(p.target), -1)
            scores = tuple(float(logp[i, at, t]) for at, t in zip(places, p.target, strict=True))
            tokens = len(p.prompt) + len(p.target)
            out.append(Completion(finish="scored", prompt_tokens=tokens, scores=scores))
        return out

    def _labels(self, batch: list[_Pending]) -> list[Completion]:
        logp = self._log_probs([p.prompt for p in batch], 1)
        return [
            Completion(
                finish="scored",
                prompt_tokens=len(p.prompt),
                scores=tuple(float(logp[i, -1, t]) for t in p.target),
            )
            for i, p in enumerate(batch)
        ]

    def _texts(self, batch: list[_Pending]) -> list[Completion]:
        from transformers import GenerationConfig

        first = batch[0]
        exact = first.budget if first.request.exact_length_of else None
        stops = list(first.request.stop) or None
        config = GenerationConfig(
            max_new_tokens=first.budget,
            min_new_tokens=exact,
            eos_token_id=self._ends,
            pad_token_id=self.tokenizer.pad_token_id or 0,
            stop_strings=stops,
            **_generation(self.sampling),
        )
        inputs = self._padded([p.prompt for p in batch])
        tokenizer = self.tokenizer if stops else None
        out = self.model.generate(**inputs, generation_config=config, tokenizer=tokenizer)
        width = inputs["input_ids"].shape[1]
        return [self._text(p, out[i, width:].tolist()) for i, p in enumerate(batch)]

    def _text(self, p: _Pending, tokens: list[int]) -> Completion:
        """A completion from one row: what follows its first end token is padding."""
        end = next((i for i, t in enumerate(tokens) if t in self._ends), None)
        kept = tokens if end is None else tokens[:end]
        text = self.tokenizer.decode(kept, skip_special_tokens=True)
        stopped = next((s for s in p.request.stop if s in text), None)
        if stopped:
            kept = self._cut_after(kept, stopped)
            text = self.tokenizer.decode(kept, skip_special_tokens=True)
        whole = p.request.prefill + text
        thought, closed, _ = text.rpartition("</think>")
        scores: tuple[float, ...] = ()
        if p.target:
            logp = self._log_probs([p.prompt + tuple(kept[:-1])], 1)
            scores = tuple(float(logp[0, -1, t]) for t in p.target)
        return Completion(
            text=whole,
            finish="length" if end is None and not stopped else "stop",
            prompt_tokens=len(p.prompt),
            output_tokens=len(kept) + (end is not None),
            reasoning_tokens=len(self._ids(thought + closed, special=False)) if closed else 0,
            scores=scores,
        )

    def _cut_after(self, tokens: list[int], stop: str) -> list[int]:
        """The shortest prefix whose text holds the stop string."""
        for n in range(1, len(tokens) + 1):
            if stop in self.tokenizer.decode(tokens[:n], skip_special_tokens=True):
                return tokens[:n]
        return tokens

    @cached_property
    def _ends(self) -> list[int]:
        own = getattr(self.model, "harness_eos", None)
        ids = [own] if isinstance(own, int) else list(own or [])
        return sorted(
            {
                *ids,
                *([self.tokenizer.eos_token_id] if self.tokenizer.eos_token_id is not None else []),
            }
        )


def _timed(completion: Completion, queued: float, share: float) -> Completion:
    """The batch's time in equal shares; text counts as decode, scoring as prefill."""
    from dataclasses import replace

    if completion.output_tokens:
        return replace(completion, queued=queued, decode=share)
    return replace(completion, queued=queued, prefill=share)


def _too_long(p: _Pending) -> Completion:
    return Completion(finish="too_long", prompt_tokens=len(p.prompt))


def _sampling(spec: ModelSpec) -> dict[str, float]:
    unknown = set(spec.sampling) - {*GREEDY, "seed", "min_p"}
    if unknown:
        raise RegistryError(
            f"model {spec.name}: unknown sampling key {min(unknown)!r}",
            known=GREEDY,
            given=min(unknown),
        )
    return {**GREEDY, **spec.sampling}


def _generation(sampling: dict[str, float]) -> dict[str, Any]:
    if not sampling["temperature"]:
        return {"do_sample": False, "repetition_penalty": sampling["repetition_penalty"]}
    known = {k: v for k, v in sampling.items() if k != "seed"}
    return {"do_sample": True, **known}


def _device_and_dtype(wanted: str) -> tuple[str, str]:
    """bf16 on a GPU and on processors that have it; float32 elsewhere."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted != "auto":
        return device, wanted
    fast = device == "cuda" or "avx512_bf16" in _cpu_flags()
    return device, "bfloat16" if fast else "float32"


def _cpu_flags() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        return next((line for line in file if line.startswith("flags")), "")
    return ""


@lru_cache(maxsize=4)
def _load_tokenizer(base: str, located: Located) -> Any:
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()

    path = materialise(base, located)
    try:
        return AutoTokenizer.from_pretrained(path, revision=located.revision or "main")
    except (OSError, ValueError) as error:
        raise MissingResourceError(
            f"cannot load the tokenizer of {base}: {_line(error)}"
        ) from error


@lru_cache(maxsize=1)
def _load_model(
    base: str, located: Located, adapter: Located | None, mode: str, device: str, dtype: str
) -> Any:
    """The weights, kept while the next engine of this process asks for the same ones."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    path = materialise(base, located)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, revision=located.revision or "main", dtype=getattr(torch, dtype)
        )
        if adapter is not None:
            if importlib.util.find_spec("peft") is None:
                raise MissingPackageError("peft", "hf")
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, adapter.path, revision=adapter.revision)
            model = model.merge_and_unload() if mode == "merged" else model
    except (OSError, ValueError) as error:
        raise MissingResourceError(f"cannot load {base}: {_line(error)}") from error
    model.harness_eos = model.generation_config.eos_token_id
    model.generation_config = GenerationConfig()  # its own defaults must not reach an answer
    return model.to(device).eval()


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
