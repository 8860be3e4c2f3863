"""Mamba-2's recurrence by MLX's operations: rows of many sequences, or many rows of one."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from quire.kernels.segments import cut_into_chunks

_CHUNK = 32  # rows


class SsmRows(NamedTuple):
    """What a Mamba-2 layer computed of a step's rows.

    Attributes:
        x: (T, heads, head_dim)
        b, c: (T, groups, state_dim) in the dtype of x, what the state takes in and gives; a group
            serves heads / groups heads that lie together.
        dt: (T, heads) float32, the step after softplus and limits.
    """

    x: mx.array
    b: mx.array
    c: mx.array
    dt: mx.array


class SsmLayer(NamedTuple):
    """A layer's own part, of each head.

    Attributes:
        a_log: (heads,), the logarithm of how fast the state fades.
        d: (heads,), how much of a row goes around the state.
    """

    a_log: mx.array
    d: mx.array


def one_row(rows: SsmRows, layer: SsmLayer, states: mx.array) -> tuple[mx.array, mx.array]:
    """A row of each of T sequences.

    Args:
        states: (T, heads, head_dim, state_dim) float32

    Returns:
        y (T, heads, head_dim) in the dtype of x, and the new states.
    """
    y, states = _one_row(*rows, *layer, states)
    return y, states


@mx.compile
def _one_row(
    x: mx.array,
    b: mx.array,
    c: mx.array,
    dt: mx.array,
    a_log: mx.array,
    d: mx.array,
    states: mx.array,
) -> tuple[mx.array, mx.array]:
    b, c = (_per_head(each, x.shape[1]) for each in (b, c))
    decay = mx.exp(-mx.exp(a_log.astype(mx.float32)) * dt)
    states = states * decay[..., None, None] + (x * dt[..., None])[..., None] * b[:, :, None]
    y = (states * c[:, :, None]).sum(axis=-1) + x * d[:, None]
    return y.astype(x.dtype), states


def many_rows(rows: SsmRows, layer: SsmLayer, state: mx.array) -> tuple[mx.array, mx.array]:
    """T rows of one sequence and its state (heads, head_dim, state_dim), otherwise as
    :func:`one_row`.

    In chunks, of which all but the way from state to state is made of matrix products for all
    chunks at once (Dao and Gu, 2024, https://arxiv.org/abs/2405.21060).
    """
    length, heads, _ = rows.x.shape
    x, b, c = (cut_into_chunks(each, _CHUNK) for each in (rows.x, rows.b, rows.c))
    steps = cut_into_chunks(
        rows.dt[..., None], _CHUNK
    )  # 0 for padding, which leaves the state as it is
    logs = mx.cumsum(-mx.exp(layer.a_log.astype(mx.float32))[:, None, None, None] * steps, axis=2)
    decay = mx.exp(mx.minimum(logs - logs.swapaxes(-1, -2), 0.0))  # between rows
    taken = x * steps
    seen = mx.tril(_per_head(c @ b.swapaxes(-1, -2), heads, axis=0) * decay)
    y = seen @ taken
    b, c = (_per_head(each, heads, axis=0) for each in (b, c))
    gained = (taken * mx.exp(logs[:, :, -1:] - logs)).swapaxes(-1, -2) @ b
    decayed = mx.exp(logs)
    before = []
    for i in range(x.shape[1]):
        before.append(state)
        state = state * decayed[:, i, -1:] + gained[:, i]
    y = y + decayed * (c @ mx.stack(before, axis=1).swapaxes(-1, -2))
    y = y + x * layer.d.astype(mx.float32)[:, None, None, None]
    y = y.reshape(heads, -1, y.shape[-1])[:, :length]
    return y.swapaxes(0, 1).astype(rows.x.dtype), state


def _per_head(array: mx.array, heads: int, axis: int = 1) -> mx.array:
    share = heads // array.shape[axis]
    return mx.repeat(array, share, axis=axis) if share > 1 else array
