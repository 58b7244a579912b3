"""transformers' continuous batching: a call joins the running batch as soon as another one ends.

Owns the manager that transformers runs in a thread. Only greedy answers without stop strings or
watched labels go this way; the rest is padded batches (hf_batches).
"""

from __future__ import annotations

import time
from typing import Any

from harness.engines.hf_batches import Net
from harness.engines.wording import Asked
from harness.types import EngineError


class Stream:
    """Calls in flight over one loaded model, each with its share of the time so far."""

    def __init__(self, net: Net) -> None:
        from transformers import GenerationConfig
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        # Flash attention's kernel would be fetched from a hub. The cache takes a GPU's free memory,
        # which on a CPU would be nearly all of the machine's.
        blocks = None if net.device == "cuda" else 64
        config = ContinuousBatchingConfig(auto_switch_to_flash=False, num_blocks=blocks)
        greedy = GenerationConfig(eos_token_id=list(net.ends) or -1, do_sample=False)
        self.manager = net.model.init_continuous_batching(greedy, config)
        self.manager.start()
        self.flying: dict[str, tuple[Asked, float]] = {}
        self.clock = time.perf_counter()

    def submit(self, p: Asked) -> None:
        self._share()
        self.flying[str(p.number)] = p, 0.0
        self.manager.add_request(list(p.row), request_id=str(p.number), max_new_tokens=p.budget)

    def poll(self) -> list[tuple[Asked, list[int], float]]:
        """At least one call with its generated tokens and seconds. Raises EngineError."""
        done: list[Any] = []
        while not done or not self.manager.output_router.output_queue.empty():
            result = self.manager.get_result(timeout=1.0)
            if result is None and not self.manager.is_running():
                raise EngineError("transformers' continuous batching stopped by itself")
            if result is not None and result.error:
                raise EngineError(f"transformers' continuous batching failed: {result.error}")
            done += [result] if result is not None else []
        self._share()
        ended = [(*self.flying.pop(r.request_id), list(r.generated_tokens)) for r in done]
        return [(p, tokens, seconds) for p, seconds, tokens in ended]

    def _share(self) -> None:
        """Divide the time since the last look among the calls that were in flight."""
        now = time.perf_counter()
        share = (now - self.clock) / max(len(self.flying), 1)
        self.flying = {name: (p, spent + share) for name, (p, spent) in self.flying.items()}
        self.clock = now

    def close(self) -> None:
        self.manager.stop(block=True, hard_stop=True)
