"""vLLM in a process of its own: one loaded base at a time, with any number of adapters on it.

Owns that process, from its start to its end, and which engines share it. It must not know methods,
parsing, or how vLLM is driven (vllm_worker).
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import cached_property
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

from harness.engines import weights
from harness.engines.vllm_worker import BASE, Answer, Ask, Load
from harness.engines.wording import Asked, Row, Wording
from harness.types import (
    Completion,
    EngineError,
    HarnessError,
    MissingPackageError,
    ModelSpec,
    Request,
    Serving,
    digest,
)

WORKER = (
    "import sys; sys.path.insert(0, sys.argv[2]);"
    " from harness.engines import vllm_worker as w; w.main(int(sys.argv[1]))"
)
ROOT = Path(__file__).parents[2]


class VllmEngine(Wording):
    """One model (and adapter): a view of the process that has its base loaded."""

    silence = 600.0  # seconds without a sign of life after which the process is killed

    def __init__(self, spec: ModelSpec, *, serving: Serving) -> None:
        if importlib.util.find_spec("vllm") is None:
            raise MissingPackageError("vllm", "vllm")
        weights.require(*(["peft"] if spec.adapter else []))
        super().__init__(spec)
        self.device, best = weights.device_and_dtype("auto")
        # vLLM's batch-invariant kernels need the same generation of GPUs as bf16 does.
        self.invariant = serving.deterministic and (self.device, best) == ("cuda", "bfloat16")
        exact = serving.deterministic and not self.invariant
        self.dtype = "float32" if exact else best if spec.dtype == "auto" else spec.dtype
        self.serving = serving
        self.slots = 256 if self.device == "cuda" else 64  # sequences that vLLM computes at a time
        self.capacity = self.slots * 3 // 2
        self.merged = self.adapter is not None and spec.adapter_mode == "merged"
        loaded = {
            "quantization": spec.quantization,
            "tensor_parallel": spec.tensor_parallel,
            "deterministic": serving.deterministic,
        }
        self.fingerprint = {**self.identity("vllm", self.dtype), **loaded}
        merged = self.adapter.identity if self.adapter and self.merged else None
        own = [self.base.identity, merged, self.dtype, spec.context, serving.prefix_caching]
        self.group = digest([*own, loaded])
        self._process = _processes.setdefault(self.group, _Process())
        self._process.views.add(self)

    @property
    def facts(self) -> Mapping[str, Any]:
        """What the process says of itself; empty while it has not loaded the base."""
        return self._process.facts | ({"adapters": "merged"} if self.merged else {})

    def submit(self, number: int, request: Request) -> None:
        self._process.views.add(self)
        self._process.queued.append(_Call(self, self.tokenised(number, request)))

    def poll(self) -> list[tuple[int, Completion]]:
        """Answers of every engine of the group. Starts the process if there is none."""
        done = self._process.poll(self.silence)
        return [(call.asked.number, call.view.completion(call)) for call in done]

    def close(self) -> None:
        """Drop what waits. The process stays for the next engine of the same base."""
        super().close()
        self._process.forget(self)

    @cached_property
    def unmerged(self) -> dict[str, int]:
        """Folder and rank of the adapter, if it is served unmerged."""
        if self.adapter is None or self.merged:
            return {}
        folder = weights.fitting_adapter(self.base, self.adapter)
        config = json.loads(Path(folder, "adapter_config.json").read_text(encoding="utf-8"))
        return {folder: max([config["r"], *(config.get("rank_pattern") or {}).values()])}

    def load(self, adapters: Mapping[str, int], probes: Sequence[Row]) -> Load:
        """What the process is to load for a group of which this is one."""
        base, model, engine = self.base, self.base.path, dict[str, Any]()
        if self.adapter and self.merged:
            model = weights.merged_folder(base, self.adapter, self.dtype)
        if adapters:
            rank = max(8, 1 << (max(adapters.values()) - 1).bit_length())  # vLLM knows these
            engine = {"enable_lora": True, "max_loras": len(adapters), "max_lora_rank": rank}
        engine |= {
            "model": model, "revision": base.revision,
            "tokenizer": base.path, "tokenizer_revision": base.revision,
            "dtype": self.dtype, "quantization": self.spec.quantization or None,
            "max_model_len": self.spec.context, "max_num_seqs": self.slots, "max_logprobs": 128,
            "tensor_parallel_size": self.spec.tensor_parallel,
            "enable_prefix_caching": self.serving.prefix_caching,
            "enforce_eager": self.device == "cpu", "disable_log_stats": False,
        }  # fmt: skip
        return Load(engine, list(adapters), probes)

    @property
    def environment(self) -> dict[str, str]:
        """The variables that vLLM's process needs."""
        return {
            "VLLM_CPU_KVCACHE_SPACE": "2",
            **os.environ,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process holds all
            "VLLM_NO_USAGE_STATS": "1",
            **({"VLLM_BATCH_INVARIANT": "1"} if self.invariant else {}),
            **({"TORCHDYNAMO_DISABLE": "1"} if self.device == "cpu" else {}),  # compiles for long
        }

    def asks(self, p: Asked) -> list[Ask]:
        """The prompts of one call. An engine with adapters can die of `prompt_logprobs`, so there
        a continuation is one prompt a token."""
        route = next(iter(self.unmerged), BASE)
        watch = {"logprob_token_ids": list(p.target)} if p.target else {}
        plain = {"temperature": 0.0, "max_tokens": 1, "detokenize": False}
        first = len(p.row) - len(p.target)
        if p.budget:
            parts = [(p.row, self._writing(p) | watch)]
        elif not p.request.continuation:
            parts = [(p.row, plain | watch)]
        elif not self._process.adapters:
            parts = [(p.row, plain | {"prompt_logprobs": 0})]
        else:
            alone = [plain | {"logprob_token_ids": [token]} for token in p.target]
            parts = [(p.row[: first + i], settings) for i, settings in enumerate(alone)]
        return [Ask(f"{p.number}/{i}", route, *part) for i, part in enumerate(parts)]

    def _writing(self, p: Asked) -> dict[str, Any]:
        settings = {**self.sampling, "max_tokens": p.budget, "stop": list(p.request.stop)}
        if "seed" in settings:  # a row's draws depend on that row alone
            settings["seed"] = int(digest([settings["seed"], list(p.row)])[:15], 16)
        if p.request.exact_length_of:
            settings["min_tokens"] = p.budget
        return settings | {"detokenize": bool(p.request.stop)}

    def completion(self, call: _Call) -> Completion:
        """The answers to a call's prompts as one; none if the call did not fit."""
        p, answers = call.asked, [answer for _, answer in sorted(call.answers.items())]
        if not answers:
            return Completion(finish="too_long", prompt_tokens=len(p.row))
        counts = {**answers[0].counts, "prefill": math.fsum(a.counts["prefill"] for a in answers)}
        if p.budget:
            [a] = answers
            end = len(a.tokens) - 1 if a.ended else None
            return replace(self._completed(p, a.tokens, end, a.watched), **counts)
        scores = [score for a in answers for row in a.watched for score in row]
        scored = tuple(scores[len(scores) - len(p.target) :])
        return Completion(finish="scored", prompt_tokens=len(p.row), scores=scored, **counts)


@dataclass
class _Call:
    """A call on its way; `answers` by the number of its prompt."""

    view: VllmEngine
    tokens: Future[Asked]
    parts: int = 0
    answers: dict[int, Answer] = field(default_factory=dict)

    @property
    def asked(self) -> Asked:
        """Its tokens, waited for."""
        return self.tokens.result()


class _Process:
    """The calls of one group of engines, and the process that answers them while there is one."""

    def __init__(self) -> None:
        self.views: weakref.WeakSet[VllmEngine] = weakref.WeakSet()
        self.queued: list[_Call] = []
        self.sent: dict[str, _Call] = {}
        self.child: subprocess.Popen[bytes] | None = None
        self.adapters: Mapping[str, int] = {}  # folder -> rank, of those it serves
        self.facts: dict[str, Any] = {}  # empty until it has loaded
        self.failed = False

    def poll(self, silence: float) -> list[_Call]:
        """Block for answers. If the process dies or keeps silent, its calls are dropped."""
        if not self.queued and not self.sent:
            raise EngineError("poll without a submitted call")
        try:
            done = self._dispatch(silence)
            while not done:
                done = self._collect(self._receive(silence))
        except HarnessError:
            self.stop()
            self.queued, self.failed = [], True
            raise
        return done

    def forget(self, view: VllmEngine) -> None:
        """Drop the calls of a view; what is in flight for it ends with the process."""
        self.views.discard(view)
        self.failed = self.failed and bool(self.views)
        if any(call.view is view for call in self.sent.values()):
            self.stop()
        self.queued = [call for call in self.queued if call.view is not view]

    def stop(self) -> None:
        """End the process; what it had not answered waits again."""
        if self.child is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.child.pid, signal.SIGKILL)  # with vLLM's own workers
            self.child.wait()
            self.link.close()
            self.log.close()
        self.child, self.facts, self.adapters = None, {}, {}
        unanswered = {id(call): _Call(call.view, call.tokens) for call in self.sent.values()}
        self.queued, self.sent = [*unanswered.values(), *self.queued], {}

    def _dispatch(self, silence: float) -> list[_Call]:
        """Send what waits, to a process with every adapter that is wanted; the calls that are
        too long are done.

        All open views' adapters are loaded at once; after a failure only those that are asked, so
        that one bad adapter does not stop the others.
        """
        views = {call.view for call in self.queued} if self.failed else self.views
        wanted = {folder: rank for view in views for folder, rank in view.unmerged.items()}
        if self.queued and (self.child is None or wanted.keys() - self.adapters.keys()):
            if self.sent:
                return []  # a new load waits until nothing is in flight
            self._start(wanted)
        while not self.facts:
            self._receive(silence)
        limit, long = self.facts["max_model_len"], []
        for call in self.queued:
            if len(call.asked.row) + max(call.asked.budget, 1) > limit:
                long.append(call)
                continue
            asks = call.view.asks(call.asked)
            call.parts = len(asks)
            for ask in asks:
                self.sent[ask.name] = call
                self._send(ask)
        self.queued = []
        return long

    def _collect(self, answers: Sequence[Answer]) -> list[_Call]:
        """The calls that these answers complete."""
        done = []
        for answer in answers:
            call = self.sent.pop(answer.name)
            call.answers[int(answer.name.partition("/")[2])] = answer
            done += [call] if len(call.answers) == call.parts else []
        return done

    def _start(self, adapters: Mapping[str, int]) -> None:
        """A new process, after every engine of this one has let go of its base."""
        _stop_all()
        weights.release()
        view, self.adapters = self.queued[0].view, adapters
        probes = list(dict.fromkeys(call.asked.row for call in self.queued))[:3]
        self.link, theirs = Pipe()
        self.log = tempfile.TemporaryFile(prefix="rerank-harness-")  # noqa: SIM115
        self.child = subprocess.Popen(
            [sys.executable, "-P", "-c", WORKER, str(theirs.fileno()), str(ROOT)],
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
            env=view.environment,
        )
        theirs.close()
        self._send(view.load(adapters, probes))

    def _send(self, message: Any) -> None:
        with contextlib.suppress(OSError):  # it is dead, as the next reading finds out
            self.link.send(message)

    def _receive(self, silence: float) -> Sequence[Answer]:
        """The next answers; none when a load ends, or as a sign of life."""
        assert self.child is not None
        heard, written = time.monotonic(), 0
        try:
            while not self.link.poll(min(1.0, silence)):
                size = os.fstat(self.log.fileno()).st_size
                if not self.facts and size != written:  # its log shows that it loads
                    heard, written = time.monotonic(), size
                if self.child.poll() is not None and not self.link.poll():
                    raise EOFError  # vLLM's own workers may still hold the other end
                if time.monotonic() - heard > silence:
                    problem = f"vLLM was killed after {silence:g} s of silence"
                    raise EngineError(problem + self._last_words())
            message = self.link.recv()
        except (EOFError, OSError):
            code = self.child.wait()
            how = (
                f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
            )
            raise EngineError(f"vLLM's process {how}{self._last_words()}") from None
        if isinstance(message, dict):
            self.facts, message = message, []
        return list[Answer](message)

    def _last_words(self) -> str:
        """The end of the log, on one line."""
        size = os.fstat(self.log.fileno()).st_size
        text = os.pread(self.log.fileno(), 4000, max(0, size - 4000)).decode(errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return f"; its log ends: {' | '.join(lines[-4:])[-500:]}" if lines else ""


_processes: dict[str, _Process] = {}  # by group; one of them at most has a child


@atexit.register
def _stop_all() -> None:
    for process in _processes.values():
        process.stop()


weights.LETTING_GO.append(_stop_all)
