"""Local OpenAI-compatible servers for tests: one that says what a test tells it to, and one that
answers for the tiny model as vLLM's server does."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Body = dict[str, Any]
MODELS = {"data": [{"id": "tiny", "owned_by": "test"}, {"id": "tinier"}]}


@dataclass
class Reply:
    """What goes over the wire. status 0 closes the connection without a word."""

    body: Any = None
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    after: float = 0.0


def said(text: str | None = "[2] > [1]", *, finish: str = "stop", **message: Any) -> Body:
    """A chat answer with its usage."""
    choice = {"message": {"role": "assistant", "content": text, **message}, "finish_reason": finish}
    usage = {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18}
    return {"model": "tiny", "choices": [choice], "usage": usage}


def failed(status: int, message: str = "no", **headers: str) -> Reply:
    return Reply({"error": {"message": message, "type": "test"}}, status, headers)


@dataclass
class Served:
    """A running server: its address and what it was asked."""

    url: str
    asked: list[tuple[str, Body]] = field(default_factory=list)
    headers: list[Mapping[str, str]] = field(default_factory=list)
    most: int = 0  # calls in flight at the same time

    @property
    def bodies(self) -> list[Body]:
        return [body for path, body in self.asked if path != "/v1/models"]


@contextmanager
def serving(
    answer: Callable[[str, Body], Reply | Body], models: Reply | Body = MODELS
) -> Iterator[Served]:
    """Serve /v1 on a free port of this machine; `answer` gets the path and the request's body."""
    flying, gate, over = 0, threading.Lock(), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.reply(models, {})

        def do_POST(self) -> None:
            nonlocal flying
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with gate:
                flying += 1
                served.most = max(served.most, flying)
            found = answer(self.path, body)
            self.reply(found, body)

        def reply(self, found: Reply | Body, body: Body) -> None:
            nonlocal flying
            with gate:
                served.asked.append((self.path, body))
                served.headers.append(dict(self.headers))
            reply = found if isinstance(found, Reply) else Reply(found)
            over.wait(reply.after)
            with gate:
                flying -= self.command == "POST"
            if reply.status == 0:
                self.close_connection = True
                return
            text = reply.body if isinstance(reply.body, str) else json.dumps(reply.body)
            self.send_response(reply.status)
            for name, value in {"Content-Type": "application/json", **reply.headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *args: Any) -> None:
            """Tests read what is printed."""

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            """A client that went away is what some tests are about."""

    server = Server(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    served = Served(f"http://127.0.0.1:{server.server_address[1]}/v1")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield served
    finally:
        over.set()
        server.shutdown()
        thread.join()
        server.server_close()


class TinyVllm:
    """Answers as vLLM's server would, computed by the transformers engine."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.lock = engine, threading.Lock()

    def __call__(self, path: str, body: Body) -> Reply | Body:
        with self.lock:
            try:
                return self.chat(body) if path.endswith("/chat/completions") else self.text(body)
            except TooLong as error:
                return failed(400, str(error))

    def chat(self, body: Body) -> Body:
        ids = self.engine.tokenizer.apply_chat_template(
            body["messages"],
            add_generation_prompt=body.get("add_generation_prompt", True),
            continue_final_message=body.get("continue_final_message", False),
            return_dict=False,
            **body.get("chat_template_kwargs", {}),
        )
        tokens, text, finish, watched = self.generated(body, ids)
        last = [{"token": t, "logprob": p} for t, p in watched.items()]
        echoed = body["messages"][-1]["content"] if body.get("echo") else ""
        choice = {"message": {"content": echoed + text}, "finish_reason": finish}
        choice["logprobs"] = {"content": [{"top_logprobs": last}]}
        return {"model": "tiny", "choices": [choice], "usage": usage(ids, tokens)}

    def text(self, body: Body) -> Body:
        prompt = body["prompt"]
        ids = prompt if isinstance(prompt, list) else self.engine.tokenizer(prompt)["input_ids"]
        if body.get("echo"):
            return {"choices": [{"text": "", "logprobs": self.echoed(ids)}], "usage": usage(ids)}
        tokens, text, finish, watched = self.generated(body, ids)
        choice = {"text": text, "finish_reason": finish, "logprobs": {"top_logprobs": [watched]}}
        return {"model": "tiny", "choices": [choice], "usage": usage(ids, tokens)}

    def echoed(self, ids: list[int]) -> Body:
        from harness.engines import hf_batches

        self.check(ids, 0)
        places = [list(range(-len(ids), -1))]
        with inference():
            [scores] = hf_batches.score(self.engine.net, [ids], places, [ids[1:]])
        return {"token_logprobs": [None, *scores]}

    def generated(self, body: Body, ids: list[int]) -> tuple[list[int], str, str, dict[str, float]]:
        """Tokens, their text, the finish and the watched tokens' log-probabilities at the last."""
        from harness.engines import hf_batches
        from harness.engines.wording import Asked
        from harness.types import Request

        self.check(ids, body["max_tokens"])
        sampling = {k: body[k] for k in ("temperature", "top_p", "top_k", "repetition_penalty")}
        net = replace(self.engine.net, sampling=sampling | {"seed": body.get("seed", 0)})
        watched = body.get("logprob_token_ids", [])
        stops, exact = tuple(body.get("stop", ())), bool(body.get("min_tokens"))
        with inference():
            [(tokens, seen)] = hf_batches.generate(
                net, [ids], [watched], body["max_tokens"], exact, stops
            )
        end = next((i for i, t in enumerate(tokens) if t in net.ends), None)
        asked = Asked(0, Request(stop=stops), tuple(ids), (), 0, 0.0)
        whole = self.engine._completed(asked, tokens, end, seen)
        names = (f"token_id:{i}" for i in watched)
        found = dict(zip(names, whole.scores))
        return tokens[: whole.output_tokens], whole.text, whole.finish, found

    def check(self, ids: list[int], budget: int) -> None:
        if len(ids) + budget > self.engine.context:
            raise TooLong(
                f"This model's maximum context length is {self.engine.context} tokens. However,"
                f" your prompt contains {len(ids)} input tokens. Please reduce the length."
            )


class TooLong(Exception):
    pass


def inference() -> Any:
    import torch

    return torch.inference_mode()


def usage(ids: list[int], tokens: list[int] | None = None) -> Body:
    return {"prompt_tokens": len(ids), "completion_tokens": len(tokens or ())}
