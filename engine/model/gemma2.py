"""Gemma 2 over pages: for its soft-cap, its file computes the softmax of attention itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx_lm.models import gemma2

from quire.engine.attention.backend import Query
from quire.engine.model.by_head import join_heads, split_heads
from quire.engine.model.seam import PagedLayer
from quire.kernels.heads import Scoring

_attention: Callable[..., mx.array] = gemma2.Attention.__call__


def _attend(layer: Any, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
    """Attention of a layer of Gemma 2; (rows, tokens, hidden) to the same."""
    if type(cache) is not PagedLayer:
        return _attention(layer, x, mask, cache)
    queries, keys, values = split_heads(layer, x)
    queries, keys = (layer.rope(part, offset=cache.offset) for part in (queries, keys))
    handles = cache.update_and_fetch(keys, values)
    scoring = Scoring(layer.scale, softcap=layer.attn_logit_softcapping)
    output = cache.attend(Query(queries, scoring), *handles)
    return join_heads(layer, output)


def install() -> None:
    """Replace attention in mlx-lm's file; calls without pages give what they gave. Idempotent."""
    gemma2.Attention.__call__ = _attend
