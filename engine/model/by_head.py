"""Attention that is written anew for a file of mlx-lm: around it the projections stay the same."""

from __future__ import annotations

from typing import Any

import mlx.core as mx


def split_heads(layer: Any, x: mx.array) -> list[mx.array]:
    """Queries, keys and values of (rows, tokens, hidden), each (rows, heads, tokens, head_dim)."""
    rows, tokens, _ = x.shape
    return [
        project(x).reshape(rows, tokens, -1, layer.head_dim).swapaxes(1, 2)
        for project in (layer.q_proj, layer.k_proj, layer.v_proj)
    ]


def join_heads(layer: Any, output: mx.array) -> mx.array:
    """(rows, heads, tokens, head_dim) of attention to (rows, tokens, hidden)."""
    rows, _, tokens, _ = output.shape
    joined: mx.array = layer.o_proj(output.swapaxes(1, 2).reshape(rows, tokens, -1))
    return joined
