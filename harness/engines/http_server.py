"""Any OpenAI-compatible server: one model of it, a bounded number of calls in flight.

Owns connections, time limits and retries, on an event loop in a thread of its own. It must not
know methods or parsing. The key comes from $OPENAI_API_KEY and goes nowhere but into the request's
header: what a server says is shown without it.
"""

from __future__ import annotations

import asyncio
import difflib
import importlib.util
import os
import re
import time
from collections.abc import Awaitable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from functools import cache
from queue import SimpleQueue
from random import uniform
from threading import Thread
from typing import Any

from harness.engines import http_wire
from harness.engines.http_wire import Post, Trouble, Wire
from harness.types import (
    Completion,
    EngineError,
    MissingPackageError,
    ModelSpec,
    Request,
    Serving,
    UsageError,
)

FIRST_ANSWER = 6.0  # seconds for /models: with the start of Python, an error within ten
LONGEST_PAUSE = 60.0  # seconds between two tries, unless the server asks for more


class HttpEngine(Wire):
    """One model of a server; a bounded number of calls is in flight."""

    tries = 7  # of a call, until it is an error
    pause = 0.5  # seconds after the first try; they double, give or take a half
    limit = 600.0  # seconds for a try; all tries of a call, with their pauses, get twice that

    def __init__(self, spec: ModelSpec, *, serving: Serving) -> None:
        if importlib.util.find_spec("openai") is None:
            raise MissingPackageError("openai", "http")
        if serving.deterministic:
            raise UsageError("--deterministic is for the server to set, not for --engine http")
        self.url, self.key = _address(serving), _key()
        super().__init__(spec, serving)
        self.capacity = serving.connections or 32
        served = self.fingerprint["served_model"]
        self.group, self.facts = "", dict[str, Any](base_url=self.url, served_model=served)
        self._reset()

    def _reset(self) -> None:
        self._waiting: dict[Future[Completion], int] = {}
        self._done: SimpleQueue[Future[Completion]] = SimpleQueue()
        self._found: asyncio.Task[None] | None = None
        self._client: Any = None
        self._slots, self._refused = asyncio.Semaphore(self.capacity), set[str]()
        self._flying, self._spent, self._seen = 0, 0.0, 0.0

    def submit(self, number: int, request: Request) -> None:
        """Send a call, or have it wait for its turn; the first ones until the model is found."""
        if self.at_hand:
            _ = self.tokenizer  # loaded here: what loading prints is caught for the whole process
        work = self._answer(number, request, time.perf_counter())
        future = asyncio.run_coroutine_threadsafe(work, _loop())
        self._waiting[future] = number
        future.add_done_callback(self._done.put)

    def poll(self) -> list[tuple[int, Completion]]:
        """Every answer that has come, at least one; a failure is raised when none is left."""
        if not self._waiting:
            raise EngineError("poll without a submitted call")
        done = [self._done.get()]
        while not self._done.empty():
            done.append(self._done.get())
        ready = [future for future in done if not future.exception()] or done[:1]
        for future in done:
            if future not in ready:  # the next poll's, when what was answered is stored
                self._done.put(future)
        return [(self._waiting.pop(future), future.result()) for future in ready]

    def close(self) -> None:
        """Cancel what waits and what hangs."""
        for future in self._waiting:
            future.cancel()
        if self._client is not None:
            with suppress(TimeoutError):
                asyncio.run_coroutine_threadsafe(self._client.close(), _loop()).result(1)
        self._reset()

    async def _find(self) -> None:
        """Raise EngineError unless the server is there and lists the model. Asked once."""
        import openai

        self._client = openai.AsyncOpenAI(
            base_url=self.url,
            api_key=self.key or "none",
            max_retries=0,  # its own forget a Retry-After of more than a minute
            timeout=openai.Timeout(None, connect=FIRST_ANSWER),
        )
        try:
            answer = await self._json(self._client.models.with_raw_response.list(), FIRST_ANSWER)
            cards = {str(card["id"]): card for card in answer["data"]}
        except Trouble as trouble:
            raise EngineError(f"{self.url}/models: {trouble}") from None
        except (KeyError, TypeError):
            raise EngineError(f"{self.url}/models lists no models: is it the right URL?") from None
        if self.model not in cards:
            near = ", ".join(difflib.get_close_matches(self.model, cards, n=3, cutoff=0.0))
            raise EngineError(
                f"{self.url} serves no {self.model!r}, but {near or 'nothing at all'}"
            )
        card = cards[self.model]
        self.facts |= {key: card[key] for key in ("owned_by", "max_model_len") if card.get(key)}

    async def _answer(self, number: int, request: Request, arrived: float) -> Completion:
        """Put a call until it is answered; EngineError after the last try."""
        async with self._slots:
            post = self.post(number, request)
            self._found = self._found or asyncio.create_task(self._find())
            await self._found
            end = time.perf_counter() + 2 * self.limit
            tried = 0
            while True:
                tried += 1
                try:
                    return await self._timed(post, arrived)
                except Trouble as trouble:
                    pause = min(self.pause * 2 ** (tried - 1), LONGEST_PAUSE) * uniform(0.5, 1.5)
                    pause = max(pause, trouble.pause)
                    late = time.perf_counter() + pause > end
                    if trouble.final or late or tried == self.tries:
                        raise EngineError(f"{self.url}: {trouble} (try {tried})") from None
                await asyncio.sleep(pause)

    async def _timed(self, post: Post, arrived: float) -> Completion:
        """One try. Its time is divided among the calls in flight, as a batch's is."""
        started, before = time.perf_counter(), self._shared(1)
        try:
            completion = await self._try(post)
        finally:
            share = self._shared(-1) - before
        return replace(completion, queued=started - arrived, decode=share)

    def _shared(self, change: int) -> float:
        """Seconds that a call in flight since the start would have got; their number changes."""
        now = time.perf_counter()
        self._spent += (now - self._seen) / self._flying if self._flying else 0.0
        self._seen, self._flying = now, self._flying + change
        return self._spent

    async def _try(self, post: Post) -> Completion:
        sent = post.without(self._refused)
        what = {key: sent.pop(key) for key in ("model", "messages", "prompt") if key in sent}
        calls = self._client.chat.completions if "messages" in what else self._client.completions
        try:
            sending = calls.with_raw_response.create(**what, extra_body=sent)
            answer = await self._json(sending, self.limit)
            if not answer.get("usage"):
                self.facts["answers_without_usage"] = self.facts.get("answers_without_usage", 0) + 1
            return post.completion(answer)
        except Trouble as trouble:
            if (completion := post.too_long(trouble)) is not None:
                return completion
            # Compared with what was sent: another call may have learnt the same meanwhile.
            if not (refused := post.refused(trouble) & sent.keys()):
                raise
        self._refused |= refused  # never sent again
        self.facts["not_sent"] = sorted(self._refused)
        return await self._try(post)

    async def _json(self, sending: Awaitable[Any], limit: float) -> dict[str, Any]:
        """The object that a server answers with; Trouble for an error in whatever form."""
        import openai

        try:
            async with asyncio.timeout(limit):
                response = (await sending).http_response
        except TimeoutError:
            raise Trouble(f"no answer within {limit:g} s") from None
        except openai.APIStatusError as error:
            response = error.response
        except openai.APIConnectionError as error:
            raise Trouble(f"no connection: {error.__cause__ or error}", secret=self.key) from None
        return http_wire.read(response.text, response.status_code, response.headers, self.key)


@cache
def _loop() -> asyncio.AbstractEventLoop:
    """What all connections of this process run on, in a thread that ends with it."""
    loop = asyncio.new_event_loop()
    Thread(target=loop.run_forever, daemon=True).start()
    return loop


def _address(serving: Serving) -> str:
    """The base URL without a slash at its end. Never repeats one that may hold a secret."""
    if not re.fullmatch(r"https?://[^\s@?#/:]+(:\d+)?(/[^\s@?#]*)?", serving.base_url):
        raise UsageError(
            "--engine http needs a plain --base-url such as http://127.0.0.1:8000/v1, without user,"
            " password or query; the key comes from $OPENAI_API_KEY"
        )
    return serving.base_url.rstrip("/")


def _key() -> str:
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UsageError("$OPENAI_API_KEY holds characters that no key can have")
    return key
