"""Floating-point operations of an engine call, from the shape of a dense decoder.

Owns the exact formula and the published estimator beside it. It must not know engines or cells: a
shape comes from a model's configuration, or from registry/shapes.toml for models known by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from harness.specs import data_root, read_toml


@dataclass(frozen=True)
class Shape:
    """A decoder of gated MLPs (three matrices) and grouped attention heads.

    inner    width of the MLP        groups   key/value heads        width   of one head
    """

    layers: int
    hidden: int
    inner: int
    heads: int
    groups: int
    width: int
    vocabulary: int

    @property
    def weights(self) -> int:
        """Parameters of the layers' matrices: queries, keys, values, outputs; gate, up, down."""
        attention = 2 * self.width * (self.heads + self.groups)
        return self.layers * self.hidden * (attention + 3 * self.inner)

    @property
    def head(self) -> int:
        """Parameters of the matrix that predicts a token."""
        return self.hidden * self.vocabulary


def shape(config: Mapping[str, Any] | None) -> Shape | None:
    """The shape in a config.json; None without one, for experts and for plain MLPs."""
    c = config or {}
    if (
        any("experts" in name and n for name, n in c.items())
        or c.get("hidden_act", "silu") != "silu"
    ):
        return None
    try:
        layers, hidden, inner = c["num_hidden_layers"], c["hidden_size"], c["intermediate_size"]
        heads, vocabulary = c["num_attention_heads"], c["vocab_size"]
    except KeyError:
        return None
    groups, width = c.get("num_key_value_heads") or heads, c.get("head_dim") or hidden // heads
    return Shape(layers, hidden, inner, heads, groups, width, vocabulary)


@cache
def known() -> dict[str, Shape]:
    """Shapes of the registry's models, by their hub id."""
    tables = read_toml(data_root() / "registry" / "shapes.toml").values()
    shapes = ((table["bases"], shape(table)) for table in tables)
    return {base: found for bases, found in shapes if found for base in bases}


def of_call(of: Shape, prompt: float, output: float, *, cached: int = 0, scored: int = 1) -> float:
    """Exact count for one call; a multiplication with its addition is two operations.

    prompt, output   tokens; the last one generated is never read again
    cached           prompt tokens whose keys were there already: only attended to
    scored           positions whose next token is predicted when nothing is generated
    An adapter that was not merged is left out (rank 16: under 1 %), and so is padding.
    """
    read = prompt + max(output - 1, 0)
    attended = (read * (read + 1) - cached * (cached + 1)) / 2
    attention = 4 * of.layers * of.heads * of.width * attended
    return 2 * of.weights * (read - cached) + attention + 2 * of.head * max(output, scored)


def published(of: Shape, prompt: float, output: float) -> float:
    """The estimator of E2R-FLOPs (arXiv 2507.06223): two MLP matrices, no output head, and the
    attention divided by the number of heads that share a key; for comparison with its figures."""
    ratio = of.heads / of.groups
    weights = 2 * of.hidden * of.layers * ((1 + 1 / ratio) * of.hidden + of.inner)
    per_pair = 4 * of.layers * of.hidden / ratio
    pairs = prompt**2 + output * prompt + output * (output - 1) / 2
    return 2 * weights * (prompt + output) + per_pair * pairs
