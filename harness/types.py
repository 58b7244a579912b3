"""The frozen values that flow through the harness, the Engine protocol and the error tree.

This module knows no file format, no model and no measure; everything else imports it.

    HarnessError                exit code
      UsageError                2   an impossible combination of flags
      RegistryError             2   a name, key or value in a registry or on the command line
      MissingPackageError       3   an optional package, with the line that installs it
      MissingResourceError      4   a file, index, model or server that is not there
      DataError                 5   a run, qrels, query, corpus or request file
      EngineError               6   the inference engine failed
      Interrupted               7   stopped half way; everything paid for is in the cache
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal
from typing import Protocol as Interface

DEFAULT_SEED = 929  # the seed of llm-rankers; every other one shows in the cell's name


def digest(value: Any) -> str:
    """SHA-256 (hex) over canonical JSON: sorted keys, no spaces, non-ASCII kept."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class HarnessError(Exception):
    """Anything the command line turns into one line and an exit code."""

    exit_code = 1

    def __reduce__(self) -> tuple[Any, ...]:
        """Errors cross processes as their class and message, whatever their __init__ takes."""
        return _error, (type(self), str(self))


def _error(kind: type[HarnessError], message: str) -> HarnessError:
    error = kind.__new__(kind)
    error.args = (message,)
    return error


class UsageError(HarnessError):
    """Flags that cannot be combined."""

    exit_code = 2


class RegistryError(HarnessError):
    """An unknown or ill-typed name, key or value; carries the nearest match."""

    exit_code = 2

    def __init__(
        self, message: str, *, known: Iterable[str] = (), given: str = "", where: str = ""
    ) -> None:
        near = difflib.get_close_matches(given, list(known), n=3, cutoff=0.4) if given else []
        hint = f" (did you mean {', '.join(near)}?)" if near else ""
        super().__init__(f"{where}: {message}{hint}" if where else f"{message}{hint}")


class MissingPackageError(HarnessError):
    """A package that an extra provides; the message holds the exact install command."""

    exit_code = 3

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"the package {package!r} is not installed: pip install 'rerank-harness[{extra}]'"
        )


class MissingResourceError(HarnessError):
    """Something that should exist on disk or on the network and does not."""

    exit_code = 4


class DataError(HarnessError):
    """Invalid input data: which file, which line, what was expected."""

    exit_code = 5

    def __init__(self, message: str, *, path: Path | str = "", line: int | None = None) -> None:
        where = f"{path}:{line}: " if line is not None else f"{path}: " if path else ""
        super().__init__(where + message)


class EngineError(HarnessError):
    """The engine failed; what was answered before is in the cache."""

    exit_code = 6


class Interrupted(HarnessError):
    """The run was stopped before its end."""

    exit_code = 7


class Fault(StrEnum):
    """What a model's answer did wrong. A closed set: data, never an exception."""

    UNPARSABLE = "unparsable"  # no answer of the expected form
    CUT_OFF = "cut_off"  # the token limit came before the answer
    MISSING = "missing"  # a permutation left documents out
    DUPLICATE = "duplicate"  # a permutation named a document twice
    OUT_OF_RANGE = "out_of_range"  # a label that was not shown
    REFUSED = "refused"  # the server filtered the answer
    RETRIED = "retried"  # the question was put a second time
    SHORTENED = "shortened"  # the prompt did not fit and was asked again with fewer words
    TOO_LONG = "too_long"  # the prompt did not fit the model's context


class Packed:
    """Pickled as its fields' values: dataclasses with slots look every field up, at ten times the
    cost, and a cluster sends some thousands a second."""

    __slots__ = ()
    __match_args__: tuple[str, ...]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple([getattr(self, name) for name in self.__match_args__])


@dataclass(frozen=True, slots=True)
class Candidate(Packed):
    """One passage as the first stage returned it; `score` is the first stage's."""

    docid: str
    text: str
    title: str = ""
    score: float = 0.0


@dataclass(frozen=True, slots=True)
class Parsed(Packed):
    """One model answer, understood.

    order   positions of the shown documents, best first: a full permutation (listwise),
            the winner alone (label), or empty (pointwise).
    score   the relevance a pointwise answer gives, None when there is none.
    changed False when acting on the answer left the order as it was.
    """

    order: tuple[int, ...] = ()
    faults: tuple[Fault, ...] = ()
    score: float | None = None
    changed: bool = True


@dataclass(frozen=True, slots=True)
class Ranking(Packed):
    """A permutation of a query's candidates, with what was understood of every call behind it.

    parsed has one entry per request, in the order in which the method yielded the requests.
    """

    docids: tuple[str, ...]
    parsed: tuple[Parsed, ...] = ()

    @property
    def scores(self) -> tuple[float, ...]:
        """n, n-1, ..., 1: strictly decreasing, so that no tie rule can undo the order."""
        return tuple(float(n) for n in range(len(self.docids), 0, -1))


@dataclass(frozen=True, slots=True)
class Query(Packed):
    """A query and its candidates in first-stage order.

    `judgements` (docid -> grade) is filled for the oracle alone; a model's method never sees it.
    """

    qid: str
    text: str
    candidates: tuple[Candidate, ...] = ()
    dataset: str = ""
    judgements: Mapping[str, int] = field(default_factory=dict)

    def ranking(self, order: Sequence[int], parsed: Sequence[Parsed] = ()) -> Ranking:
        """Turn positions into docids; raises ValueError unless `order` is a permutation."""
        if sorted(order) != list(range(len(self.candidates))):
            raise ValueError(f"query {self.qid}: the order is not a permutation of its candidates")
        return Ranking(tuple([self.candidates[i].docid for i in order]), tuple(parsed))


@dataclass(frozen=True, slots=True)
class Message(Packed):
    """One chat turn."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Request(Packed):
    """ONE engine call. Equal requests are the same call; no query id is inside.

    messages | text   a chat for the model's own template, or raw text without any template
    prefill           text the answer must start with, after the generation prompt
    bos               the tokenizer's BOS goes in front of the rendered chat
    max_tokens        most tokens to generate; 0 for a scoring request
    exact_length_of   generate exactly as many tokens as this text has (RankZephyr)
    stop              strings that end the generation
    labels            log-probabilities of each label's first token, at the next position
                      (max_tokens 0) or at the last generated one
    continuation      log-probability of every token of this text after the prompt
    shown             docids in the order shown; for the trace only, not part of the identity
    """

    messages: tuple[Message, ...] = ()
    text: str | None = None
    prefill: str = ""
    bos: bool = False
    max_tokens: int = 0
    exact_length_of: str = ""
    stop: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    continuation: str | None = None
    shown: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True, slots=True)
class Completion(Packed):
    """What the engine answered. Times are seconds, counts are the engine's own tokens."""

    text: str = ""
    finish: Literal["stop", "length", "scored", "filtered", "too_long"] = "stop"
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0
    scores: tuple[float, ...] = ()  # log-probabilities of labels, or of the continuation's tokens
    queued: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0

    @property
    def seconds(self) -> float:
        """The call's own share of engine time: a batch's time is divided among its calls."""
        return self.prefill + self.decode


@dataclass(frozen=True, slots=True)
class Serving:
    """How the command line wants an engine served, apart from what the model's row says.

    deterministic   answers may not depend on what else is in the batch
    base_url        http: the endpoint, without credentials      served_model   its model's name
    tokenizer       http: a folder or hub id whose tokens clip passages
    connections     http: most calls in flight; 0 leaves it to the engine
    """

    prefix_caching: bool = True
    deterministic: bool = False
    base_url: str = ""
    served_model: str = ""
    tokenizer: str = ""
    connections: int = 0


Flow = Generator[list[Request], list[Completion], Ranking]


class Engine(Interface):
    """Anything that answers requests. Answers may come back in any order and in any lumps.

    fingerprint  everything that decides an answer apart from the request: part of every cache key
    capacity     how many calls it likes to have in flight
    group        engines of one non-empty group stand on the same loaded weights: calls to several
                 of them may be in flight together, and `poll` of any answers for all, so the
                 numbers must be distinct across the group
    facts        what else should be recorded once it has run (versions, limits, how adapters were
                 served); decides no answer
    """

    fingerprint: Mapping[str, Any]
    capacity: int
    group: str
    facts: Mapping[str, Any]

    def submit(self, number: int, request: Request) -> None: ...

    def poll(self) -> list[tuple[int, Completion]]:
        """Block until at least one submitted call is answered. Raises EngineError."""

    def clip(self, text: str, tokens: int) -> str:
        """The first `tokens` tokens of the text in the model's own tokens, as text again."""

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Call(Packed):
    """One answered call of one query: the line of the trace."""

    round: int
    key: str
    request: Request
    completion: Completion
    parsed: Parsed
    from_cache: bool


@dataclass(frozen=True, slots=True)
class Outcome(Packed):
    """A finished query: its ranking and every call behind it.

    rounds    the serial depth
    seconds   wall clock from the query's admission to its ranking
    """

    qid: str
    ranking: Ranking
    calls: tuple[Call, ...] = ()
    rounds: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Method:
    """A reranking method: its generator function and what it needs.

    answers names the kinds of prompt it can read; empty for the baselines, which ask nothing.
    """

    flow: Callable[..., Flow]
    answers: tuple[str, ...] = ()
    needs_judgements: bool = False


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One row of the model registry (registry/models/*.toml).

    parameters   in billions          limits   override the prompt's, same keys
    trained_on   collections whose queries the model saw; marks in-domain columns
    """

    name: str
    method: str
    prompt: str = ""
    base: str = ""
    revision: str = "main"
    adapter: str = ""
    adapter_revision: str = "main"
    adapter_mode: Literal["unmerged", "merged"] = "unmerged"
    options: Mapping[str, Any] = field(default_factory=dict)
    sampling: Mapping[str, Any] = field(default_factory=dict)
    template: Mapping[str, Any] = field(default_factory=dict)  # chat-template arguments
    limits: Mapping[str, Any] = field(default_factory=dict)
    engine: str = ""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    quantization: str = ""
    tensor_parallel: int = 1
    context: int | None = None
    raw_special_tokens: bool = False
    parameters: float | None = None
    license: str = ""
    trained_on: tuple[str, ...] = ()
    paper: str = ""
    source: str = ""
    differs: str = ""
    note: str = ""
    overrides: tuple[tuple[str, str], ...] = ()  # what the command line changed; in the folder name


@dataclass(frozen=True, slots=True)
class DatasetSpec:
    """One row of the dataset registry, or a path on the command line.

    family     dl | beir | bright | other: selects the length limits of a protocol
    source     where queries, documents and judgements come from
    location   folder or request file; irds, index, topics: ids in ir_datasets and pyserini
    short      column head in tables, as in the papers       grades   qrels levels, e.g. "0-3"
    queries, documents   counts as published; None when not known
    titles     documents have a title beside their text
    excludes   some queries have documents that must leave the candidates before reranking
    judged_by  the file of judgements that was given in place of the collection's own
    show_text  the collection's licence allows its passages to be republished in a page
    """

    name: str
    source: Literal["folder", "requests", "irds", "pyserini"]
    location: str = ""
    qrels: str = ""
    irds: str = ""
    index: str = ""
    topics: str = ""
    aliases: tuple[str, ...] = ()
    family: Literal["dl", "beir", "bright", "other"] = "other"
    suite: str = ""
    short: str = ""
    description: str = ""
    license: str = ""
    depth: int = 100
    first_stage: str = "bm25"
    measures: tuple[str, ...] = ("nDCG@10", "nDCG@5", "nDCG@1", "RR@10", "AP", "R@100", "Judged@10")
    queries: int | None = None
    documents: int | None = None
    grades: str = ""
    titles: bool = False
    excludes: bool = False
    judged_by: str = ""
    show_text: bool = False
    paper: str = ""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Protocol:
    """How a cell is run: part of its identity.

    deterministic   answers may not depend on what else is in the batch
    replicate       number of a repeated run, which asks everything anew
    strict_cache    versions, GPU and concurrency are part of every call's identity
    """

    kind: Literal["quality", "latency"] = "quality"
    concurrency: int | None = None
    prefix_caching: bool = True
    seed: int = DEFAULT_SEED
    deterministic: bool = False
    replicate: int = 0
    strict_cache: bool = False

    @property
    def stated(self) -> dict[str, Any]:
        """As a table; what was added to the format later shows only where it is used."""
        later = ("deterministic", "replicate", "strict_cache")
        return {k: v for k, v in asdict(self).items() if v or k not in later}


@dataclass(frozen=True, slots=True)
class Cell:
    """Model x dataset x first stage x protocol: one folder of results.

    Whatever the command line changed shows in a name as `+key=value`, so that two plans with
    the same results folder live side by side.
    """

    model: ModelSpec
    dataset: DatasetSpec
    first_stage: str
    depth: int
    limit: int | None
    protocol: Protocol

    @property
    def model_name(self) -> str:
        changed = dict(self.model.overrides)
        if self.protocol.kind != "quality":
            changed["protocol"] = self.protocol.kind
        if self.protocol.seed != DEFAULT_SEED:
            changed["seed"] = str(self.protocol.seed)
        if self.protocol.replicate:
            changed["replicate"] = str(self.protocol.replicate)
        name = self.model.name + "".join(f"+{k}={v}" for k, v in changed.items())
        return name + ("+deterministic" if self.protocol.deterministic else "")

    @property
    def dataset_name(self) -> str:
        judged = f"+qrels={self.dataset.judged_by}" if self.dataset.judged_by else ""
        limit = f"+limit={self.limit}" if self.limit is not None else ""
        return self.dataset.name + judged + limit

    @property
    def first_stage_name(self) -> str:
        return self.first_stage + (
            f"+depth={self.depth}" if self.depth != self.dataset.depth else ""
        )

    @property
    def folder(self) -> Path:
        """dataset / first stage / model, each made safe as one path component."""
        parts = (self.dataset_name, self.first_stage_name, self.model_name)
        return Path(*(component(part) for part in parts))

    def __str__(self) -> str:
        return f"{self.dataset_name} / {self.first_stage_name} / {self.model_name}"


def component(name: str) -> str:
    """Any text as the name of one file; a long one (file systems take 255 bytes) ends in a hash."""
    safe = "".join(c if c.isalnum() or c in "-_.+=@," else "_" for c in name).lstrip(".") or "_"
    if len(safe.encode()) <= 200:
        return safe
    return f"{safe.encode()[:180].decode(errors='ignore')}-{digest(name)[:12]}"


@dataclass(frozen=True, slots=True)
class CellResult:
    """A finished cell as the reports see it: the content of result.json plus the per-query rows."""

    record: Mapping[str, Any]
    per_query: tuple[Mapping[str, Any], ...]
    folder: Path

    @property
    def model(self) -> str:
        return str(self.record["model"]["label"])

    @property
    def dataset(self) -> str:
        return str(self.record["dataset"]["label"])

    @property
    def first_stage(self) -> str:
        return str(self.record["first_stage"]["name"])

    @property
    def measures(self) -> Mapping[str, float]:
        return dict(self.record["measures"])
