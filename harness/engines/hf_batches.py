"""Rows of token ids through a transformers model, many at a time: scores and generated tokens.

Owns padding and sampling: a row's answer depends on that row alone, never on its neighbours. It
must not know requests, prompts or where a model comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from harness.types import digest

Row = Sequence[int]
Rows = Sequence[Row]
Scores = list[float]


@dataclass(frozen=True)
class Net:
    """A loaded model and everything but the prompt that decides its answers."""

    model: Any
    device: str
    pad: int  # fills short rows
    ends: tuple[int, ...]
    sampling: Mapping[str, float]
    decode: Callable[[Row, Row], str]  # (tokens before, tokens) -> the text of the latter


def padded(net: Net, rows: Sequence[Row]) -> dict[str, Any]:
    """Left-padded ids and mask, both (rows, longest row)."""
    import torch

    left = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True, padding_side="left")
    ids = [torch.tensor(row, device=net.device) for row in rows]
    mask = left([torch.ones_like(row) for row in ids])
    return {"input_ids": left(ids, padding_value=net.pad), "attention_mask": mask}


def score(net: Net, rows: Rows, places: Rows, targets: Rows) -> list[Scores]:
    """Log-probability of every target at its place, one list per row.

    A place counts from the row's end: -1 predicts the token that would come next.
    """
    keep = max((-at for row in places for at in row), default=1)
    inputs = padded(net, rows)
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    out = net.model(**inputs, position_ids=positions, logits_to_keep=keep, use_cache=False)
    scores = []
    for logits, at, wanted in zip(out.logits, places, targets):
        # One row at a time: float32 copies of a whole batch over a big vocabulary fill a GPU.
        logp = logits.float().log_softmax(-1)
        scores.append(logp[list(at), list(wanted)].tolist())
    return scores


def generate(
    net: Net, rows: Rows, watched: Rows, budget: int, exact: bool, stops: Sequence[str]
) -> list[tuple[list[int], tuple[Scores, ...]]]:
    """Add at most (exact: just) `budget` tokens to every row.

    Returns per row the new tokens, maybe with an end token and padding behind it, and for each of
    them the log-probabilities of the row's watched tokens; every row watches equally many.
    """
    width = max(map(len, rows))
    chooser = _Chooser(net, rows, watched)
    out = net.model.generate(
        **padded(net, rows),
        do_sample=False,  # _Chooser samples: its draws do not depend on the rest of the batch
        max_new_tokens=budget,
        min_new_tokens=budget if exact else None,
        eos_token_id=list(net.ends) or None,
        pad_token_id=net.pad,
        logits_processor=[chooser],
        stopping_criteria=[_stopper(net, width, stops)] if stops else [],
    )
    return list(zip(out[:, width:].tolist(), zip(*(step.tolist() for step in chooser.seen))))


class _Chooser:
    """A logits processor after which the best-scored token is the row's choice.

    Watches the model's own log-probabilities first, then applies the sampling settings. Sampling
    adds Gumbel noise (whose maximum is a draw from the softmax) from one generator per row.
    """

    def __init__(self, net: Net, rows: Rows, watched: Rows) -> None:
        import torch

        self.watched = torch.tensor(watched, dtype=torch.long, device=net.device)  # (rows, tokens)
        self.seen: list[Any] = []  # one tensor like `watched` per step
        self.starts = [max(map(len, rows)) - len(row) for row in rows]
        self.warpers = warpers(net.sampling)
        self.draws = []
        if net.sampling["temperature"]:
            seeds = [int(digest([net.sampling["seed"], list(row)])[:15], 16) for row in rows]
            self.draws = [torch.Generator(net.device).manual_seed(seed) for seed in seeds]

    def __call__(self, ids: Any, scores: Any) -> Any:
        """ids (rows, tokens so far), scores (rows, vocabulary)."""
        import torch

        self.seen.append(scores.log_softmax(-1).gather(1, self.watched))
        if not self.warpers:
            return scores
        return torch.cat([self._sampled(i, ids[[i]], scores[[i]]) for i in range(len(ids))])

    def _sampled(self, i: int, ids: Any, scores: Any) -> Any:
        """Row i alone, without its padding, which a penalty would count as seen."""
        scores = self.warpers(ids[:, self.starts[i] :], scores)
        if not self.draws:
            return scores
        return scores - scores.new_empty(scores.shape).exponential_(generator=self.draws[i]).log()


def warpers(sampling: Mapping[str, float]) -> Any:
    """transformers' own, in its own order; a neutral setting is left out."""
    import transformers as hf

    s, chosen = sampling, []
    if s["repetition_penalty"] != 1:
        chosen += [hf.RepetitionPenaltyLogitsProcessor(float(s["repetition_penalty"]))]
    if s["temperature"]:
        chosen += [hf.TemperatureLogitsWarper(float(s["temperature"]))]
        chosen += [hf.TopKLogitsWarper(int(s["top_k"]))] if s["top_k"] > 0 else []
        chosen += [hf.TopPLogitsWarper(float(s["top_p"]))] if s["top_p"] < 1 else []
        chosen += [hf.MinPLogitsWarper(float(s["min_p"]))] if s.get("min_p") else []
    return hf.LogitsProcessorList(chosen)


def _stopper(net: Net, width: int, stops: Sequence[str]) -> Callable[..., Any]:
    """A stopping criterion over generated text alone: a prompt that holds a stop string, or the
    first half of one, does not end the answer."""
    # A token is one byte or more, so a stop that just ended lies within so many tokens.
    reach = max(len(stop.encode()) for stop in stops) + 1

    def ended(row: list[int]) -> bool:
        start = max(width, len(row) - reach)
        text = net.decode(row[:start], row[start:])
        return any(stop in text for stop in stops)

    return lambda ids, *_, **__: ids.new_tensor([ended(row) for row in ids.tolist()], dtype=bool)
