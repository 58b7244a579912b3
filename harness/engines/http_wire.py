"""A request as the body of an OpenAI-compatible call, and the server's JSON as a completion.

Owns the two wire formats (/chat/completions, /completions), whose tokens count, and what servers
differ in. It must not know connections, methods or parsing.

Label scores are the server's own log-probabilities, never made up. With a tokenizer the labels are
asked for by token id; without one they are looked up by their text among the `TOP` likeliest
tokens. Where one is not reported, a scoring call ends with an EngineError, and a generated answer
has no scores, which every method reads as "no verdict".
"""

from __future__ import annotations

import email.utils
import json
import math
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from uuid import uuid4

from harness.engines import weights
from harness.engines.wording import NEUTRAL, Asked, Wording
from harness.types import (
    DEFAULT_SEED,
    Completion,
    EngineError,
    MissingResourceError,
    ModelSpec,
    Request,
    Serving,
    UsageError,
)

TOP = 20  # most alternatives that OpenAI's and vLLM's servers report for a token by default

# A server that does not know one of these is asked without it; so is neutral sampling.
OPTIONAL = {
    "logprob_token_ids", "return_tokens_as_token_ids", "return_token_ids", "cache_salt",
    "include_stop_str_in_output",
}  # fmt: skip

_TOO_LONG = re.compile(
    r"context.?(length|window|size)|(prompt|input) (is too long|token count)", re.IGNORECASE
)
_FINISH: Mapping[Any, Any] = {"length": "length", "content_filter": "filtered"}


class Wire(Wording):
    """What a server calls `model`: the weights of the spec's row, or those of its adapter.

    The fingerprint holds the server's name for the model and what the row says it is; the address
    is a fact, so that a server that moved finds its answers.
    """

    def __init__(self, spec: ModelSpec, serving: Serving) -> None:
        self.serving, self.model = serving, _served(spec, serving)
        shown = Path(self.model).name if self.model.startswith(("/", "~", ".")) else self.model
        super().__init__(replace(spec, base=spec.base or shown))
        given = weights.locate(serving.tokenizer, "main") if serving.tokenizer else None
        self.tokens = given or (self.base if spec.base else None)
        self.at_hand = given is not None or "repo" not in self.base.identity  # without the hub
        self.fingerprint = self.identity("http", "the server's") | {
            "served_model": shown,
            "tokenizer": given and given.identity,
        }

    @cached_property
    def tokenizer(self) -> Any:
        """The model's own or none at all: cut by words, a passage would be another prompt."""
        try:
            weights.require("torch", "transformers")
            if self.tokens is None:
                raise MissingResourceError("the model's row names no weights")
            return weights.load_tokenizer(self.tokens)
        except MissingResourceError as error:
            problem = "lengths are in the model's tokens: say whose with --tokenizer FOLDER or id"
            raise MissingResourceError(f"{problem} ({error})") from error

    def post(self, number: int, request: Request) -> Post:
        """Everything that decides a token is stated: servers have defaults of their own."""
        asked = self._asked(number, request)
        if asked is None and (request.continuation is not None or request.exact_length_of):
            raise MissingResourceError(
                "scoring a text, or an answer of a given length, takes the model's own tokens:"
                " over http say whose with --tokenizer"
            )
        body: dict[str, Any] = {"model": self.model}
        body |= {} if self.serving.prefix_caching else {"cache_salt": uuid4().hex}
        if asked and request.continuation is not None:
            # Ids: as text, the prompt's last word and the continuation's first may become one.
            body |= {"prompt": list(asked.row), "echo": True, "logprobs": 0, "max_tokens": 0}
            return Post(self, request, asked, body | {"return_token_ids": True})
        most = asked.budget if asked else request.max_tokens
        body |= {"seed": DEFAULT_SEED, **self.sampling, "max_tokens": most or 1}
        body |= self._prompt(request)
        if request.labels:
            chat = "messages" in body
            body |= {"logprobs": True, "top_logprobs": TOP} if chat else {"logprobs": TOP}
        if request.labels and asked:
            body |= {"logprob_token_ids": [*asked.target], "return_tokens_as_token_ids": True}
        if request.stop:
            body |= {"stop": list(request.stop), "include_stop_str_in_output": True}
        if request.exact_length_of:
            body["min_tokens"] = most
        return Post(self, request, asked, body)

    def _asked(self, number: int, request: Request) -> Asked | None:
        """The call in tokens; of a chat without its prompt, whose template is the server's."""
        chat = request.text is None and request.continuation is None
        plain = replace(request, messages=(), text="-") if chat else request
        return self.asked(number, plain) if self.at_hand else None

    def _prompt(self, request: Request) -> dict[str, Any]:
        if request.text is not None:
            return {"prompt": request.text + request.prefill}
        turns = [{"role": m.role, "content": m.content} for m in request.messages]
        out: dict[str, Any] = {"messages": turns}
        if request.prefill:  # echo: a server that goes on from it begins its answer with it
            turns.append({"role": "assistant", "content": request.prefill})
            out |= {"continue_final_message": True, "add_generation_prompt": False, "echo": True}
        if request.bos:
            out["add_special_tokens"] = True
        template = dict(self.spec.template)
        return out | ({"chat_template_kwargs": template} if template else {})

    def count(self, text: str) -> int:
        """Tokens of a text; 0 when no tokenizer is at hand."""
        return len(self.tokenizer.tokenize(text)) if self.at_hand else 0


@dataclass(frozen=True)
class Post:
    """A request as it is sent, and how its answer is read."""

    wire: Wire
    request: Request
    asked: Asked | None
    body: Mapping[str, Any]

    def without(self, refused: set[str]) -> dict[str, Any]:
        """The body for a server that does not know some of its keys."""
        body = {key: value for key, value in self.body.items() if key not in refused}
        if "max_tokens" in refused:  # its newer name
            body["max_completion_tokens"] = self.body["max_tokens"]
        return body

    def refused(self, trouble: Trouble) -> set[str]:
        """What the server does not know, says so, and can do without."""
        named = {key for key in self.body if key in trouble.said and trouble.status in (400, 422)}
        idle = {**NEUTRAL, "min_p": 0.0, "temperature": None}
        idle |= {} if self.body.get("temperature") else {"seed": self.body.get("seed")}
        neutral = {key for key in named if self.body[key] == idle.get(key)}
        renamed = {"max_tokens"} if "max_completion_tokens" in trouble.said else set()
        return named & (OPTIONAL | neutral | renamed)

    def too_long(self, trouble: Trouble) -> Completion | None:
        """The answer to a prompt that the server has no room for, if that is the trouble."""
        if trouble.status not in (400, 413, 422) or not _TOO_LONG.search(trouble.said):
            return None
        counts = [int(n) for n in re.findall(r"(\d+) (?:input |prompt )?tokens", trouble.said)]
        counted = self._prompt_tokens() or max(counts, default=0)
        return Completion(finish="too_long", prompt_tokens=counted)

    def completion(self, answer: Mapping[str, Any]) -> Completion:
        """The answer without its times. Tokens are counted by the server, else by the tokenizer."""
        try:
            return self._read(answer["choices"][0], answer.get("usage") or {})
        except (KeyError, TypeError, IndexError, AttributeError):
            raise Trouble("the server's JSON holds no answer") from None

    def _read(self, choice: Mapping[str, Any], usage: Mapping[str, Any]) -> Completion:
        wire, request = self.wire, self.request
        prompt = usage.get("prompt_tokens") or self._prompt_tokens()
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        counted = Completion(finish="scored", prompt_tokens=prompt, cached_tokens=cached)
        writes = bool(request.max_tokens or request.exact_length_of)
        if prompt + writes * self.body["max_tokens"] > (wire.spec.context or math.inf):
            return replace(counted, finish="too_long")  # as an engine that holds the weights says
        if self.asked and request.continuation is not None:
            return replace(counted, scores=self._forced(self.asked, choice.get("logprobs")))
        text, scores = self._text(choice), self._labels(choice)
        if not writes:
            return replace(counted, scores=scores)
        thought, tag, _ = text.rpartition("</think>")
        details = usage.get("completion_tokens_details") or {}
        refused = choice.get("message", {}).get("refusal") and not text
        return replace(
            counted,
            text=text,
            finish="filtered" if refused else _FINISH.get(choice.get("finish_reason"), "stop"),
            output_tokens=usage.get("completion_tokens") or wire.count(text),
            reasoning_tokens=details.get("reasoning_tokens") or wire.count(thought + tag),
            scores=scores,
        )

    def _text(self, choice: Mapping[str, Any]) -> str:
        """The whole answer: a thought that came in a field of its own, the prefill, the text."""
        if "prompt" in self.body:
            text = self.request.prefill + str(choice["text"])
        else:
            message = choice["message"]
            text = str(message.get("content") or "")
            if not text.startswith(self.request.prefill):
                raise EngineError(
                    "the server does not go on from a given beginning of an answer"
                    " (continue_final_message, echo), which this prompt needs"
                )
            if thought := message.get("reasoning_content") or message.get("reasoning"):
                ended = text or choice.get("finish_reason") != "length"
                text = f"<think>{thought}{'</think>' if ended else ''}{text}"
        stop = choice.get("stop_reason")  # vLLM's; where the server left it out of the text
        return text + str(stop) if stop in self.request.stop and not text.endswith(stop) else text

    def _labels(self, choice: Mapping[str, Any]) -> tuple[float, ...]:
        """Log-probability of every label where the last token was chosen."""
        labels, found = self.request.labels, choice.get("logprobs") or {}
        if not labels:
            return ()
        if "prompt" in self.body:
            last = (found.get("top_logprobs") or [{}])[-1]
            listed = list(last.items())
        else:
            last = (found.get("content") or [{}])[-1]
            listed = [(t["token"], t["logprob"]) for t in last.get("top_logprobs", ())]
        names = [{label} for label in labels]
        if self.asked:
            decode = self.wire.tokenizer.decode
            names = [{f"token_id:{i}", decode([i])} for i in self.asked.target]
        scores = [[float(score) for token, score in listed if token in own] for own in names]
        unread = [label for label, own in zip(labels, scores) if len(own) != 1]
        if unread and not self.request.max_tokens:
            raise EngineError(
                f"label {unread[0]!r} is not among the {len(listed)} tokens whose probability the"
                " server reports. vLLM's server reports every label when --tokenizer is given"
            )
        return () if unread else tuple(own[0] for own in scores)

    def _forced(self, asked: Asked, found: Mapping[str, Any] | None) -> tuple[float, ...]:
        scores = (found or {}).get("token_logprobs", ())
        if len(scores) < len(asked.row):
            raise EngineError(
                "the server does not score a given text (echo and logprobs of /completions):"
                " this method needs vLLM's server, --engine hf or --engine vllm"
            )
        return tuple(map(float, scores[len(asked.row) - len(asked.target) : len(asked.row)]))

    def _prompt_tokens(self) -> int:
        """As the tokenizer counts them; 0 without one, or without a chat template of its own."""
        if self.asked and "prompt" in self.body:
            return len(self.asked.row)
        with suppress(EngineError):
            return self.wire.count(self.wire.rendered(self.request)) if self.asked else 0
        return 0


class Trouble(Exception):
    """A try that failed: what the server said, whether another may help, and when."""

    def __init__(self, said: str, *, secret: str = "", status: int = 0, after: str = "") -> None:
        whole = rf"(?<!\w){re.escape(secret)}(?!\w)" if secret else "$^"  # a key may be a word, too
        self.said = " ".join(re.sub(whole, "***", said).split()) or "no message"
        super().__init__((f"HTTP {status}: " if status else "") + self.said[:400])
        self.status, self.pause = status, _seconds(after)
        self.final = 400 <= status < 500 and status not in (408, 409, 429)


def read(text: str, status: int, headers: Mapping[str, str], secret: str) -> dict[str, Any]:
    """The JSON object of an answer. Trouble for an error, whatever its status and form."""
    answer: Any = text
    with suppress(ValueError):
        answer = json.loads(text)
    plain = isinstance(answer, dict) and not answer.get("error") and answer.get("object") != "error"
    if plain and status < 400:
        return dict(answer)
    error = (answer.get("error") or answer) if isinstance(answer, dict) else answer
    if isinstance(error, dict):
        code = error.get("code")
        status = code if status < 400 and isinstance(code, int) else status
        error = error.get("message") or error.get("detail") or error
    after = headers.get("retry-after", "")
    raise Trouble(str(error), secret=secret, status=status, after=after)


def _seconds(retry_after: str) -> float:
    """A Retry-After header, in either form, as seconds from now; 0 without one."""
    with suppress(ValueError):
        return max(0.0, float(retry_after or 0))
    with suppress(ValueError, TypeError):
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    return 0.0


def _served(spec: ModelSpec, serving: Serving) -> str:
    """The server's name for the model; an adapter is served under a name of its own."""
    name = serving.served_model or spec.adapter or spec.base
    if not name:
        raise UsageError(f"model {spec.name}: --engine http needs --served-model")
    if spec.adapter and name == spec.base:
        raise UsageError(f"--served-model {name} is {spec.name} without its adapter")
    return name
