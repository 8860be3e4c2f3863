"""Llama 4 over pages: its file computes masks and temperatures for one sequence at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx_lm.models import llama4

from quire.engine.attention.backend import Query
from quire.engine.model.by_head import join_heads, split_heads
from quire.engine.model.seam import PagedLayer
from quire.kernels.heads import Scoring

_run_layers: Callable[..., mx.array] = llama4.LlamaModel.__call__
_attention: Callable[..., mx.array] = llama4.Attention.__call__


def _run(model: Any, inputs: mx.array, cache: Any = None) -> mx.array:
    """Embedding, layers and norm; (rows, tokens) ids to (rows, tokens, hidden)."""
    if cache is None or type(cache[0]) is not PagedLayer:
        return _run_layers(model, inputs, cache)
    hidden = model.embed_tokens(inputs)
    for layer, pages in zip(model.layers, cache, strict=True):
        hidden = layer(hidden, None, pages)
    normed: mx.array = model.norm(hidden)
    return normed


def _attend(layer: Any, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
    """Attention of a layer; (rows, 1, hidden) to the same."""
    if type(cache) is not PagedLayer:
        return _attention(layer, x, mask, cache)
    queries, keys, values = split_heads(layer, x)
    if layer.use_rope:
        queries, keys = (layer.rope(part, offset=cache.offset) for part in (queries, keys))
    elif layer.attn_temperature_tuning:
        queries = (queries * _temperatures(layer, cache.offset)).astype(queries.dtype)
    if layer.use_qk_norm:
        queries, keys = (mx.fast.rms_norm(part, None, 1e-6) for part in (queries, keys))
    handles = cache.update_and_fetch(keys, values)
    output = cache.attend(Query(queries, Scoring(layer.scale)), *handles)
    return join_heads(layer, output)


def _temperatures(layer: Any, positions: mx.array) -> mx.array:
    """(T,) int positions to (T, 1, 1, 1) float32 factors of queries in layers without rotation."""
    steps = mx.floor((positions + 1) / layer.floor_scale)
    factors = mx.log(steps + 1.0) * layer.attn_scale + 1.0
    by_row: mx.array = factors[:, None, None, None]
    return by_row


def install() -> None:
    """Replace the forward passes of mlx-lm's file; calls without pages give what they gave.
    Idempotent."""
    llama4.LlamaModel.__call__ = _run
    llama4.Attention.__call__ = _attend
