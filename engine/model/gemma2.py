"""Gemma 2 over pages: for its soft-cap, its file computes the softmax of attention itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx_lm.models import gemma2

from quire.engine.attention.backend import Query
from quire.engine.model.seam import PagedLayer
from quire.kernels.heads import Scoring

_attention: Callable[..., mx.array] = gemma2.Attention.__call__


def _attend(layer: Any, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
    """Attention of a layer of Gemma 2; (rows, tokens, hidden) to the same."""
    if type(cache) is not PagedLayer:
        return _attention(layer, x, mask, cache)
    rows, tokens, _ = x.shape

    def by_head(projected: mx.array) -> mx.array:
        return projected.reshape(rows, tokens, -1, layer.head_dim).swapaxes(1, 2)

    queries, keys, values = (
        by_head(project(x)) for project in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    queries, keys = (layer.rope(part, offset=cache.offset) for part in (queries, keys))
    handles = cache.update_and_fetch(keys, values)
    scoring = Scoring(layer.scale, softcap=layer.attn_logit_softcapping)
    output = cache.attend(Query(queries, scoring), *handles)
    projected: mx.array = layer.o_proj(output.swapaxes(1, 2).reshape(rows, tokens, -1))
    return projected


def install() -> None:
    """Calls without pages are unchanged. Idempotent."""
    gemma2.Attention.__call__ = _attend
