"""Rows of token ids through a transformers model, many at a time: scores and generated tokens.

Owns padding and sampling: a row's answer depends on that row alone, never on its neighbours. It
must not know requests, prompts or where a model comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.types import digest

Row = Sequence[int]
Decode = Callable[[Row, Row], str]  # (the tokens before, the tokens) -> the text of the latter


@dataclass(frozen=True)
class Net:
    """A loaded model, where it runs, what fills short rows and which tokens end a text."""

    model: Any
    device: str
    pad: int
    ends: tuple[int, ...]


@dataclass(frozen=True)
class Generated:
    """tokens may hold an end token and padding behind it; watched has one entry per step: the
    log-probabilities of the row's watched tokens, before any sampling setting."""

    tokens: list[int]
    watched: list[tuple[float, ...]]


def padded(net: Net, rows: Sequence[Row]) -> dict[str, Any]:
    """Left-padded ids and mask, both (rows, longest row)."""
    import torch

    width = max(map(len, rows))
    ids = torch.full((len(rows), width), net.pad, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.tensor(row, dtype=torch.long)
        mask[i, width - len(row) :] = 1
    return {"input_ids": ids.to(net.device), "attention_mask": mask.to(net.device)}


def score(
    net: Net, rows: Sequence[Row], places: Sequence[Row], targets: Sequence[Row]
) -> list[tuple[float, ...]]:
    """Log-probability of every target at its place, one tuple per row.

    A place counts from the row's end: -1 predicts the token that would come next.
    """
    import torch

    keep = max((-at for row in places for at in row), default=1)
    inputs = padded(net, rows)
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    out = net.model(**inputs, position_ids=positions, logits_to_keep=keep, use_cache=False)
    scores = []
    for logits, at, wanted in zip(out.logits, places, targets):
        # One row at a time: float32 copies of a whole batch over a big vocabulary fill a GPU.
        logp = torch.log_softmax(logits.float(), dim=-1)
        scores.append(tuple(logp[list(at), list(wanted)].tolist()))
    return scores


def generate(
    net: Net,
    rows: Sequence[Row],
    *,
    budget: int,
    exact: bool,
    stops: Sequence[str],
    decode: Decode,
    sampling: Mapping[str, float],
    watched: Sequence[Row],
) -> list[Generated]:
    """At most (exact: just) `budget` new tokens for every row; nothing else decides them."""
    from transformers import GenerationConfig

    inputs = padded(net, rows)
    width = inputs["input_ids"].shape[1]
    config = GenerationConfig(
        do_sample=False,  # _Chooser samples: its draws do not depend on the rest of the batch
        max_new_tokens=budget,
        min_new_tokens=budget if exact else None,
        eos_token_id=list(net.ends) or None,
        pad_token_id=net.pad,
    )
    chooser = _Chooser(net, rows, sampling, watched)
    out = net.model.generate(
        **inputs,
        generation_config=config,
        logits_processor=[chooser],
        stopping_criteria=[_Stop(stops, width, decode)] if stops else [],
    )
    return [
        Generated(tokens, seen) for tokens, seen in zip(out[:, width:].tolist(), chooser.seen())
    ]


class _Chooser:
    """A logits processor after which the best-scored token is the row's choice.

    Watches the model's own log-probabilities first, then applies the sampling settings. Sampling
    adds Gumbel noise (whose maximum is a draw from the softmax) from one generator per row.
    """

    def __init__(
        self, net: Net, rows: Sequence[Row], sampling: Mapping[str, float], watched: Sequence[Row]
    ) -> None:
        import torch

        most = max(map(len, watched), default=0)
        self.counts = [len(row) for row in watched]
        self.watched = torch.tensor(
            [[*row, *[0] * (most - len(row))] for row in watched], device=net.device
        )
        self.steps: list[Any] = []
        self.lengths = [len(row) for row in rows]
        self.width = max(self.lengths)
        self.penalty = sampling["repetition_penalty"]
        self.warpers = _warpers(sampling) if sampling["temperature"] else []
        self.draws = []
        if sampling["temperature"]:
            seeds = [int(digest([sampling["seed"], list(row)])[:15], 16) for row in rows]
            self.draws = [torch.Generator(net.device).manual_seed(seed) for seed in seeds]

    def __call__(self, ids: Any, scores: Any) -> Any:
        import torch

        if self.watched.numel():
            self.steps.append(torch.log_softmax(scores, dim=-1).gather(1, self.watched))
        if self.penalty != 1:
            scores = self._penalised(ids, scores)
        for warper in self.warpers:
            scores = warper(ids, scores)
        if self.draws:
            blank = torch.empty_like(scores[0])
            noise = [blank.clone().exponential_(generator=draw) for draw in self.draws]
            scores = scores - torch.stack(noise).log()
        return scores

    def _penalised(self, ids: Any, scores: Any) -> Any:
        """transformers' own penalty would also count the padding as seen."""
        import torch

        scores = scores.clone()
        for i, length in enumerate(self.lengths):
            seen = ids[i, self.width - length :].unique()
            old = scores[i, seen]
            scores[i, seen] = torch.where(old < 0, old * self.penalty, old / self.penalty)
        return scores

    def seen(self) -> list[list[tuple[float, ...]]]:
        """Per row and step, the watched log-probabilities."""
        import torch

        if not self.steps:
            return [[] for _ in self.lengths]
        by_row = torch.stack(self.steps, dim=1).tolist()
        return [[tuple(step[:n]) for step in row] for row, n in zip(by_row, self.counts)]


def _warpers(sampling: Mapping[str, float]) -> list[Any]:
    """The usual order: temperature, then the cuts; a neutral setting is left out."""
    from transformers import (
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    out = [TemperatureLogitsWarper(float(sampling["temperature"]))]
    if sampling["top_k"] > 0:
        out.append(TopKLogitsWarper(int(sampling["top_k"])))
    if sampling["top_p"] < 1:
        out.append(TopPLogitsWarper(float(sampling["top_p"])))
    if sampling.get("min_p"):
        out.append(MinPLogitsWarper(float(sampling["min_p"])))
    return out


class _Stop:
    """A stopping criterion over generated text alone: a prompt that holds a stop string, or the
    first half of one, does not end the answer."""

    def __init__(self, stops: Sequence[str], width: int, decode: Decode) -> None:
        self.stops, self.width, self.decode = stops, width, decode
        # A token is one byte or more, so a stop that just ended lies within so many tokens.
        self.reach = max(len(stop.encode()) for stop in stops) + 1

    def __call__(self, ids: Any, scores: Any, **_: Any) -> Any:
        import torch

        done = [self._ended(row) for row in ids.tolist()]
        return torch.tensor(done, device=ids.device)

    def _ended(self, row: list[int]) -> bool:
        start = max(self.width, len(row) - self.reach)
        text = self.decode(row[:start], row[start:])
        return any(stop in text for stop in self.stops)
