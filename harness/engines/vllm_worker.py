"""What runs in the process of one loaded base: vLLM's engine, its adapters and their probe.

Tokens come in and tokens go out, over one pipe. It must not know texts, requests or who asks.
Anything that goes wrong ends the process; the last lines of its log say why.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, islice
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, NamedTuple, NoReturn

from harness.engines.hf_local import SIZES

BASE = ""  # the route of calls without an adapter; an adapter's route is its folder
PROBED_TOKENS = 16
# What rounding may do to a log-probability when a call shares its batch with others.
SLACK = {"float32": 0.02, "float16": 0.1, "bfloat16": 0.3}


class Load(NamedTuple):
    """Arguments of vLLM's EngineArgs, the folders of adapters, and some of the prompts to come."""

    engine: Mapping[str, Any]
    adapters: Sequence[str]
    probes: Sequence[Sequence[int]]


class Ask(NamedTuple):
    """One prompt by its route, with settings of vLLM's SamplingParams."""

    name: str
    route: str
    row: Sequence[int]
    settings: Mapping[str, Any]


class Answer(NamedTuple):
    """The new tokens; `ended` if the last one is an end token.

    watched  log-probabilities: at every new token those of the `logprob_token_ids` asked for, or
             one row of those of the prompt's own tokens without the first (`prompt_logprobs`)
    counts   the Completion's cached_tokens, queued, prefill and decode
    """

    name: str
    tokens: Sequence[int]
    ended: bool
    watched: Sequence[Sequence[float]]
    counts: Mapping[str, Any]


@dataclass
class _Flying:
    """An admitted prompt and its share of the engine's time so far."""

    ask: Ask
    seconds: float = 0.0


Step = tuple[int, Mapping[int, float]]  # a chosen token, and the log-probabilities of the best two


class Served:
    """One loaded base and the prompts on it."""

    def __init__(self, load: Load) -> None:
        from vllm import EngineArgs, LLMEngine
        from vllm.lora.request import LoRARequest
        from vllm.usage.usage_lib import UsageContext

        args = load.engine
        # LLM_CLASS: the token budgets that vLLM takes for throughput.
        self.llm = LLMEngine.from_engine_args(EngineArgs(**args), UsageContext.LLM_CLASS)
        self.slots = args["max_num_seqs"]
        self.limit = self.llm.vllm_config.model_config.max_model_len
        self.loras = {path: LoRARequest(path, i, path) for i, path in enumerate(load.adapters, 1)}
        self.flying: dict[str, _Flying] = {}  # in order of admission
        self.waiting: dict[str, list[Ask]] = {}
        self.route = BASE  # the only one in flight while they may not be mixed
        self.unmixed = self._probe(load.probes, SLACK[args["dtype"]]) if self.loras else ""

    @property
    def facts(self) -> dict[str, Any]:
        import torch
        import vllm

        config = self.llm.vllm_config
        layers = config.compilation_config.static_forward_context.values()
        backends = {x.attn_backend.get_name() for x in layers if hasattr(x, "attn_backend")}
        sizes = config.model_config.hf_text_config.to_dict()
        served = f"one at a time, because {self.unmixed}" if self.unmixed else "mixed"
        return {
            "vllm": vllm.__version__, "torch": torch.__version__,
            "attention": " ".join(sorted(backends)) or None,
            "max_num_seqs": self.slots, "max_model_len": self.limit,
            "prefix_caching": config.cache_config.enable_prefix_caching,
            "tensor_parallel": config.parallel_config.tensor_parallel_size,
            "config": {key: sizes[key] for key in SIZES if key in sizes},
            "enable_lora": bool(self.loras), "adapters": served if self.loras else None,
        }  # fmt: skip

    def take(self, ask: Ask) -> None:
        self.waiting.setdefault(ask.route, []).append(ask)

    def step(self) -> list[Answer]:
        """Admit what may run, and run one step of the engine."""
        for ask in self._admitted():
            self.flying[ask.name] = _Flying(ask)
            self._request(*ask)
        started = time.monotonic()
        outputs = self.llm.step()
        running = list(islice(self.flying.values(), self.slots))
        for flying in running:
            flying.seconds += (time.monotonic() - started) / len(running)
        return [self._answer(output) for output in outputs]

    def _admitted(self) -> list[Ask]:
        """All that wait; of one route only, drained before the next, if routes may not be mixed."""
        routes = list(self.waiting)
        if self.unmixed:
            if not self.flying and self.route not in routes:
                self.route = routes[0]
            routes = [route for route in routes if route == self.route]
        return [ask for route in routes for ask in self.waiting.pop(route)]

    def _request(
        self, name: str, route: str, row: Sequence[int], settings: Mapping[str, Any]
    ) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(output_kind=RequestOutputKind.FINAL_ONLY, **settings)
        prompt = {"type": "token", "prompt_token_ids": list(row)}
        lora = None if route == BASE else self.loras[route]
        self.llm.add_request(name, prompt, params, lora_request=lora)

    def _answer(self, output: Any) -> Answer:
        flying, times = self.flying.pop(output.request_id), output.metrics
        [written], wanted = output.outputs, flying.ask.settings.get("logprob_token_ids")
        if written.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"vLLM finished a call with {written.finish_reason!r}")
        watched = [[step[t].logprob for t in wanted] for step in written.logprobs] if wanted else []
        if output.prompt_logprobs:
            steps = zip(output.prompt_logprobs[1:], flying.ask.row[1:], strict=True)
            watched = [[step[t].logprob for step, t in steps]]
        prefill = times.first_token_ts - times.scheduled_ts
        decode = times.last_token_ts - times.first_token_ts
        share = flying.seconds / ((prefill + decode) or 1.0)
        counts = {
            "cached_tokens": output.num_cached_tokens or 0,
            "queued": times.scheduled_ts - times.queued_ts,
            "prefill": prefill * share,
            "decode": decode * share,
        }
        ended = written.finish_reason == "stop" and not isinstance(written.stop_reason, str)
        return Answer(output.request_id, tuple(written.token_ids), ended, watched, counts)

    def _probe(self, prompts: Sequence[Sequence[int]], slack: float) -> str:
        """Why routes may not share a batch; empty if they answer alike alone and mixed."""
        rows, routes = [row[: self.limit - PROBED_TOKENS] for row in prompts], [BASE, *self.loras]
        alone = {route: self._probed([(route, row) for row in rows]) for route in routes}
        mixed = self._probed([(route, row) for row in rows for route in routes])
        for one, other in combinations(routes, 2):
            if all(_agree(a, b, slack) for a, b in zip(alone[one], alone[other])):
                return "the probe could not tell two of them apart"
        for i, route in enumerate(routes):
            if not all(_agree(a, b, slack) for a, b in zip(alone[route], mixed[i :: len(routes)])):
                which = "the base" if route == BASE else "an adapter"
                return f"{which} answered the probe differently in a mixed batch"
        return ""

    def _probed(self, asks: Sequence[tuple[str, Sequence[int]]]) -> list[list[Step]]:
        """Every step of every answer; the second half joins while the first is on its way."""
        self.llm.reset_prefix_cache()
        settings = {"temperature": 0.0, "max_tokens": PROBED_TOKENS, "logprobs": 2}
        outputs: list[Any] = []
        for i, (route, row) in enumerate(asks):
            outputs += self.llm.step() if i == len(asks) // 2 else []
            self._request(str(i), route, row, settings)
        while self.llm.has_unfinished_requests():
            outputs += self.llm.step()
        self.llm.reset_prefix_cache()
        return [_steps(o.outputs[0]) for o in sorted(outputs, key=lambda o: int(o.request_id))]


def _steps(written: Any) -> list[Step]:
    tables = [{t: entry.logprob for t, entry in step.items()} for step in written.logprobs]
    return list(zip(written.token_ids, tables, strict=True))


def _agree(one: Iterable[Step], other: Iterable[Step], slack: float) -> bool:
    """Are these the same answers, as far as rounding tells? After a near tie nothing compares."""
    for (a, table), (b, others) in zip(one, other):
        if any(abs(table[t] - others[t]) > slack for t in table.keys() & others.keys()):
            return False
        if a != b:
            return b in table and table[a] - table[b] <= slack
    return True


def main(descriptor: int) -> None:
    """Load what the first message says, then answer asks until the other side is gone.

    Sends the facts once loaded, then lists of answers; an empty one is a sign of life.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the harness, which ends this
    sys.excepthook = _die
    link, inbox = Connection(descriptor), SimpleQueue[Any]()
    threading.Thread(target=_listen, args=(link, inbox), daemon=True).start()
    load, started = inbox.get(), time.monotonic()
    served, told = Served(load), 0.0
    link.send(served.facts | {"load_seconds": round(time.monotonic() - started, 3)})
    while True:
        while not (served.flying or served.waiting) or not inbox.empty():
            served.take(inbox.get())
        answers = served.step()
        if answers or time.monotonic() - told > 1:
            link.send(answers)
            told = time.monotonic()


def _listen(link: Connection, inbox: SimpleQueue[Any]) -> None:
    """Always ready to read, so that neither side waits for the other to write."""
    try:
        while True:
            inbox.put(link.recv())
    except (EOFError, OSError):
        os.killpg(0, signal.SIGKILL)  # the harness is gone: so are this and vLLM's own workers


def _die(*problem: Any) -> NoReturn:
    """The traceback is the last thing in the log; vLLM's own farewells can hang."""
    traceback.print_exception(*problem)
    sys.stderr.flush()
    os._exit(1)
