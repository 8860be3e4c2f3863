"""What attention of one layer is beside its pages: the same in all steps."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx


class Heads(NamedTuple):
    """Layers that are equal in these share the plan of a step."""

    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None  # tokens a row sees of its context, itself included; None: all
    sinks: bool
    dtype: mx.Dtype  # of the pages
    softcap: bool = False
    extra_dim: int = 0  # of keys beside those whose pages hold the values too (MLA)
    chunked: bool = False  # contexts begin with a row's own chunk of its sequence

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.heads // self.kv_heads


class Scoring(NamedTuple):
    """How products of queries and keys become weights.

    Attributes:
        scale: of the products.
        window: each row sees the last ``window`` tokens, itself included; None: all.
        sinks: (heads,) logits that take part in the softmax but have no value.
        softcap: scores become softcap * tanh(score / softcap); None: they stay.
    """

    scale: float
    window: int | None = None
    sinks: mx.array | None = None
    softcap: float | None = None
