"""prompts/*.toml -> Prompt: the wire formats, their length limits, and rendering to a Request.

It must not know methods, engines or datasets. Texts are prepared once (title joined, cleaned,
clipped, special tokens neutralised) by `prepare`; `Prompt.render` then only fills in.

Templates are filled in one pass over the placeholders they declare, so a brace, a percent sign or
a `{query}` inside a passage is text and stays text.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, lru_cache, partial
from itertools import groupby
from operator import attrgetter
from typing import Annotated, Any, Literal

from annotated_types import Ge

from harness import parse
from harness.types import Candidate, Completion, DataError, Message, Parsed, Query, Request

Unit = Literal["tokens", "words", "characters"]
AtLeastOne = Annotated[int, Ge(1)]
Length = AtLeastOne | Mapping[str, AtLeastOne | None] | None
Step = Literal[
    "strip", "spaces", "newlines", "nfc", "ftfy", "ftfy-prompt", "brackets", "no-title-marks"
]

# Every token that a chat model of the registry reads as more than its characters.
SPECIAL = re.compile(
    r"<[|\uff5c][^<>|\uff5c\s]{1,40}[|\uff5c]>|</?s>|<(?:unk|pad|mask|bos|eos)>"
    r"|</?(?:think|answer|tool_call|tool_response)>|<(?:start|end)_of_turn>"
)
_PLACEHOLDER = re.compile(r"\{(query|docs|count|n|letter|text|title)\}")


@dataclass(frozen=True, slots=True)
class Turn:
    """A chat turn; with `each`, it is repeated (with its neighbours) for every passage."""

    role: Literal["system", "user", "assistant"]
    content: str
    each: bool = False


@dataclass(frozen=True, slots=True)
class Limits:
    """Lengths, each a number or a table by dataset family with `default`; None is no limit.

    query, passage   in `unit`: the model's own tokens, words or characters
    max_tokens       most generated tokens          context   the model's window in tokens
    shrink           a window that does not fit the context is asked again with fewer words
    """

    unit: Unit = "tokens"
    query: Length = None
    passage: Length = None
    max_tokens: int = 0
    context: int | None = None
    shrink: bool = False

    def of(self, what: Literal["query", "passage"], family: str) -> int | None:
        limit: Any = getattr(self, what)
        if isinstance(limit, Mapping):
            limit = limit.get(family, limit.get("default"))
        return None if limit is None else int(limit)


@dataclass(frozen=True)
class Prompt:
    """One wire format (prompts/NAME.toml).

    answer      permutation | label | yesno | likelihood | reasoning: how the answer is read
    style       the permutation parser, by repository name
    pattern     the regular expression of a label answer; empty: labels are scored, not generated
    label       the label of the n-th shown passage; passage: its line
    choices     the two labels of a yes/no answer, relevant first
    joined      how title and text become one passage when there is a title
    """

    name: str
    source: str
    answer: Literal["permutation", "label", "yesno", "likelihood", "reasoning"]
    messages: tuple[Turn, ...] = ()
    text: str = ""
    prefill: str = ""
    bos: bool = False
    passage: str = "[{n}] {text}"
    separator: str = "\n"
    label: str = "[{n}]"
    most: int | None = None
    pattern: str = ""
    style: str = "rank_llm"
    tagged: bool = False
    choices: tuple[str, ...] = ()
    continuation: str = ""
    exact_length: bool = False
    stop: tuple[str, ...] = ()
    joined: str = "{title} {text}"
    clean: tuple[Step, ...] = ()
    clean_query: tuple[Step, ...] = ()
    query_templates: Mapping[str, str] = field(default_factory=dict)
    limits: Limits = Limits()
    note: str = ""

    @property
    def wire_format(self) -> dict[str, Any]:
        """Everything that decides a request or its reading; names and remarks do not."""
        return {k: v for k, v in asdict(self).items() if k not in ("name", "source", "note")}

    def render(self, query: Query, shown: Sequence[Candidate]) -> Request:
        """Fill the template with prepared texts. Raises DataError beyond `most` passages."""
        if self.most is not None and len(shown) > self.most:
            raise DataError(
                f"prompt {self.name} has labels for {self.most} passages, {len(shown)} were shown"
            )
        values = {
            "query": query.text,
            "docs": _listed(self.passage, self.separator, shown),
            "count": str(len(shown)),
            "text": shown[0].text if shown else "",
        }
        messages: list[Message] = []
        for each, turns in self._runs:
            for own in _one_by_one(values, shown) if each else (values,):
                messages += [Message(turn.role, fill(turn.content, own)) for turn in turns]
        labels = _labels(self.label, len(shown))
        return Request(
            messages=tuple(messages),
            text=fill(self.text, values) if self.text else None,
            prefill=self.prefill,
            bos=self.bos,
            max_tokens=0 if self._scores_only else self.limits.max_tokens,
            exact_length_of=" > ".join(labels) if self.exact_length else "",
            stop=self.stop,
            labels=self._choices or (labels if self._ranks_labels else ()),
            continuation=fill(self.continuation, values) if self.continuation else None,
            shown=tuple([c.docid for c in shown]),
        )

    def parse(self, completion: Completion, count: int) -> Parsed:
        """Read an answer about `count` shown passages."""
        if fault := parse.blocked(completion):
            return parse.unread(count if self.answer == "permutation" else 0, fault)
        if self.answer == "permutation":
            if self.exact_length and completion.finish == "length":
                completion = replace(completion, finish="stop")  # its length was forced
            return parse.permutation(completion, count, style=self.style, tagged=self.tagged)
        if self.answer == "label":
            if self.pattern:
                return parse.label(completion, _labels(self.label, count), self.pattern)
            return parse.best_label(completion, count)
        if self.answer == "likelihood":
            return parse.likelihood(completion)
        verdict = completion.finish == "scored" or completion.text.endswith(self.stop)
        if self.answer == "reasoning" and not verdict:  # what was scored there is no score
            return parse.unanswered(completion)
        return parse.relevance(completion)

    def shortened(
        self, shown: Sequence[Candidate], completion: Completion
    ) -> list[Candidate] | None:
        """The passages with fewer words after a prompt that was too long; None to give up.

        rank_llm's rule: `words -= max(1, overflow // (window * 4))`, but never below one word,
        where the original goes on for ever. A label of the answer takes about five tokens.
        """
        if completion.finish != "too_long" or not self.limits.shrink or not self.limits.context:
            return None
        overflow = completion.prompt_tokens + 5 * len(shown) - self.limits.context
        longest = max(len(c.text.split()) for c in shown)
        words = longest - max(1, overflow // (len(shown) * 4))
        if words < 1:
            return None
        return [replace(c, text=" ".join(c.text.split()[:words])) for c in shown]

    @cached_property
    def _ranks_labels(self) -> bool:
        return self.answer == "label" and not self.pattern

    @cached_property
    def _scores_only(self) -> bool:
        return self.answer in ("likelihood", "yesno") or self._ranks_labels

    @cached_property
    def _choices(self) -> tuple[str, ...]:
        return self.choices if self.answer in ("yesno", "reasoning") else ()

    @cached_property
    def _runs(self) -> list[tuple[bool, list[Turn]]]:
        """The turns in order; a run of `each` turns is repeated as one group per passage."""
        return [(each, list(run)) for each, run in groupby(self.messages, attrgetter("each"))]


def _one_by_one(values: dict[str, str], shown: Sequence[Candidate]) -> Iterator[dict[str, str]]:
    for n, candidate in enumerate(shown, 1):
        yield values | _numbers(n) | {"text": candidate.text}


@lru_cache(maxsize=256)
def _numbers(n: int) -> dict[str, str]:
    return {"n": str(n), "letter": chr(64 + n) if n <= 26 else f"A{n}"}


@lru_cache(maxsize=1024)
def _labels(label: str, count: int) -> tuple[str, ...]:
    return tuple(fill(label, _numbers(n)) for n in range(1, count + 1))


def _listed(passage: str, separator: str, shown: Sequence[Candidate]) -> str:
    """One line a passage; what their numbers decide is filled in once for all prompts."""
    parts = _sheet(passage, separator, len(shown)).copy()
    texts, times = [c.text for c in shown], passage.count("{text}")
    parts[1::2] = texts if times == 1 else [text for text in texts for _ in range(times)]
    return "".join(parts)


@lru_cache(maxsize=1024)
def _sheet(passage: str, separator: str, count: int) -> list[str]:
    lines = separator.join(fill(passage, _numbers(n)) for n in range(1, count + 1))
    return re.split(r"(\{text\})", lines)


_split = lru_cache(maxsize=1024)(_PLACEHOLDER.split)  # text, name, text, name, ..., text


def fill(template: str, values: Mapping[str, str]) -> str:
    """Replace the known placeholders in one pass; what was filled in is not looked at again."""
    parts = _split(template)
    if len(parts) == 1:
        return template
    parts = parts.copy()  # the cached ones stay as they are
    parts[1::2] = [values.get(name, f"{{{name}}}") for name in parts[1::2]]
    return "".join(parts)


# --- preparing texts --------------------------------------------------------------------------


def prepare(
    query: Query,
    prompt: Prompt,
    limits: Limits,
    *,
    family: str,
    clip: Callable[[str, int], str],
    raw_special_tokens: bool,
    notes: Counter[str],
) -> Query:
    """Title joined, cleaned, clipped and neutralised copies of a query's texts.

    `clip` cuts in the model's tokens and should remember (a passage recurs in many queries).
    Counts what bit in `notes`: passages_clipped, queries_clipped, special_tokens, passages_empty.
    """

    def cut(text: str, what: Literal["query", "passage"]) -> str:
        limit = limits.of(what, family)
        if limit is None:
            return text
        text = " ".join(text.split()) if limits.unit == "words" else text
        short = shorten(text, limit, limits.unit, clip)
        notes[f"{'queries' if what == 'query' else 'passages'}_clipped"] += len(short) < len(text)
        return short

    def safe(text: str) -> str:
        if raw_special_tokens:
            return text
        text, count = SPECIAL.subn(lambda m: m.group(0)[0] + " " + m.group(0)[1:], text)
        notes["special_tokens"] += count
        return text

    # Brackets are rewritten after the cut in every published protocol that rewrites them.
    late: tuple[Step, ...] = ("brackets",) if "brackets" in prompt.clean else ()
    early = tuple(step for step in prompt.clean if step != "brackets")
    candidates = []
    for c in query.candidates:
        joined = fill(prompt.joined, {"title": c.title, "text": c.text}) if c.title else c.text
        text = apply(cut(safe(apply(joined, early)), "passage"), late)
        notes["passages_empty"] += not text.strip()
        candidates.append(replace(c, text=text))
    template = query_template(prompt, query.dataset)
    wrapped = fill(template, {"query": cut(safe(apply(query.text, prompt.clean_query)), "query")})
    return replace(query, text=wrapped, candidates=tuple(candidates))


def query_template(prompt: Prompt, dataset: str) -> str:
    """The wrapper for this dataset's queries; `bright/*` covers a collection, `*` all others."""
    for key in (dataset, f"{dataset.partition('/')[0]}/*", "*"):
        if key in prompt.query_templates:
            return prompt.query_templates[key]
    return "{query}"


def shorten(text: str, limit: int, unit: Unit, clip: Callable[[str, int], str]) -> str:
    """At most `limit` units of the text. Words split on white space and join with one space."""
    if unit == "characters":
        return text[:limit]
    if unit == "words":
        return " ".join(text.split()[:limit])
    return clip(text, limit)


def apply(text: str, steps: Sequence[Step]) -> str:
    """Run the named cleaning steps in order."""
    for step in steps:
        text = _STEPS[step](text)
    return text


def _ftfy(text: str, **options: Any) -> str:
    import ftfy

    return str(ftfy.fix_text(text, **options))


_STEPS: dict[Step, Callable[[str], str]] = {
    "strip": str.strip,
    "spaces": lambda text: " ".join(text.split()),
    "newlines": lambda text: re.sub(r"[\n\t\r\f]", " ", text),
    "nfc": partial(unicodedata.normalize, "NFC"),
    "ftfy": _ftfy,
    # What ftfy does to a text inside a rendered prompt, where a `<` keeps HTML entities. The
    # originals repair the whole prompt; doing it to the texts gives the same bytes, and leaves no
    # repair behind the neutralising that could put a special token together again.
    "ftfy-prompt": partial(_ftfy, unescape_html=False),
    "brackets": lambda text: re.sub(r"\[(\d+)\]", r"(\1)", text),
    "no-title-marks": lambda text: text.replace("Title: Content: ", ""),
}
