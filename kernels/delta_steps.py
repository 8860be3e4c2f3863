"""The gated delta rule by MLX's operations: rows of many sequences, or many rows of one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from quire.kernels.segments import cut_into_chunks

_CHUNK = 16  # rows
_LEAST_GATE = 1e-37  # its logarithm is finite


class Gates(NamedTuple):
    """What a layer makes gates and factors of, beside its rows' own: (value_heads,) each."""

    a_log: mx.array
    dt_bias: mx.array


class DeltaRows(NamedTuple):
    """What a recurrent layer computed of a step's rows.

    Attributes:
        q, k: (T, key_heads, key_dim); a key head serves value_heads / key_heads value heads that
            lie together.
        v: (T, value_heads, value_dim) in the dtype of q.
        g: (T, value_heads), or (T, value_heads, key_dim), float32 from 0 to 1: what is left of the
            state.
        beta: (T, value_heads)
        gates: where there are any, g and beta, (T, value_heads) in the dtype of q, are what these
            make gates and factors of.
    """

    q: mx.array
    k: mx.array
    v: mx.array
    g: mx.array
    beta: mx.array
    gates: Gates | None = None

    @classmethod
    def of(cls, arrays: Iterable[mx.array], gates: Gates | None = None) -> DeltaRows:
        """q, k, v, g and beta"""
        q, k, v, g, beta = arrays
        return cls(q, k, v, g, beta, gates)

    def gated(self) -> DeltaRows:
        """With gates and factors computed, as mlx-lm does it."""
        if self.gates is None:
            return self
        g, beta = _gated(self.g, self.beta, *self.gates)
        return self._replace(g=g, beta=beta, gates=None)


@mx.compile
def _gated(
    a: mx.array, b: mx.array, a_log: mx.array, dt_bias: mx.array
) -> tuple[mx.array, mx.array]:
    rate = mx.exp(a_log.astype(mx.float32))
    return mx.exp(-rate * nn.softplus(a + dt_bias)), mx.sigmoid(b)


def one_row(rows: DeltaRows, states: mx.array) -> tuple[mx.array, mx.array]:
    """A row of each of T sequences, with as many key heads as value heads.

    Args:
        states: (T, value_heads, value_dim, key_dim) float32

    Returns:
        y (T, value_heads, value_dim) in the dtype of q, and the new states.
    """
    y, states = _one_row(*rows[:5], states)
    return y, states


@mx.compile
def _one_row(
    q: mx.array, k: mx.array, v: mx.array, g: mx.array, beta: mx.array, states: mx.array
) -> tuple[mx.array, mx.array]:
    states = states * (g[..., None, None] if g.ndim == 2 else g[..., None, :])
    delta = (v - (states * k[..., None, :]).sum(axis=-1)) * beta[..., None]
    states = states + k[..., None, :] * delta[..., None]
    return (states * q[..., None, :]).sum(axis=-1).astype(q.dtype), states


def many_rows(rows: DeltaRows, state: mx.array) -> tuple[mx.array, mx.array]:
    """T rows of one sequence and its state (value_heads, value_dim, key_dim), otherwise as
    :func:`one_row`."""
    if rows.g.ndim == 2 and rows.q.shape[0] >= _CHUNK:
        return _in_chunks(rows, state)
    return row_by_row(rows, state)


def row_by_row(rows: DeltaRows, state: mx.array) -> tuple[mx.array, mx.array]:
    """What :func:`many_rows` computes, as its definition says."""
    states, ys = state[None], []
    for t in range(rows.q.shape[0]):
        y, states = one_row(DeltaRows.of(x[t : t + 1] for x in rows[:5]), states)
        ys.append(y)
    return mx.concatenate(ys), states[0]


def _in_chunks(rows: DeltaRows, state: mx.array) -> tuple[mx.array, mx.array]:
    """The same, 2 to 4 times as fast as row by row where a chunk's rows are many.

    All that does not depend on the state is made of matrix products for all chunks at once: a
    chunk's corrections are the solution of a triangular system (the WY form of Yang et al., 2024,
    https://arxiv.org/abs/2412.06464).
    """
    length, dtype = rows.q.shape[0], rows.q.dtype
    # Padding leaves the state as it is.
    arrays = rows.q, rows.k, rows.v, rows.beta[..., None]
    q, k, v, beta = (cut_into_chunks(each, _CHUNK) for each in arrays)
    logs = mx.log(mx.maximum(rows.g[..., None].astype(mx.float32), _LEAST_GATE))
    logs = mx.cumsum(cut_into_chunks(logs, _CHUNK), axis=2)
    decayed = mx.exp(logs)  # what is left of the state before the chunk
    decay = mx.exp(mx.minimum(logs - logs.swapaxes(-1, -2), 0.0))  # between rows
    transposed = k.swapaxes(-1, -2)
    seen = mx.tril((q @ transposed) * decay)
    inverse = inverse_of_unit_lower(mx.tril((k @ transposed) * decay, -1) * beta)
    from_values = inverse @ (v * beta)
    from_state = inverse @ (k * (beta * decayed))
    queries = q * decayed
    keys = k * mx.exp(logs[:, :, -1:] - logs)
    left = decayed[:, :, -1:]
    ys = []
    for i in range(q.shape[1]):
        before = state.swapaxes(-1, -2)
        deltas = from_values[:, i] - from_state[:, i] @ before
        ys.append(queries[:, i] @ before + seen[:, i] @ deltas)
        state = state * left[:, i] + deltas.swapaxes(-1, -2) @ keys[:, i]
    y = mx.concatenate(ys, axis=1)[:, :length]
    return y.swapaxes(0, 1).astype(dtype), state


def inverse_of_unit_lower(lower: mx.array) -> mx.array:
    """The inverse of the unit matrix plus ``lower``.

    From blocks to blocks of twice their size: as stable as to solve row by row, and products only.

    Args:
        lower: (..., n, n), n a power of two; what is on or above the diagonal must be zero.
    """
    n, front = lower.shape[-1], lower.shape[:-2]
    inverse = mx.ones((*front, n, 1, 1), lower.dtype)  # of the blocks on the diagonal
    size = 1
    while size < n:
        blocks = lower.reshape(*front, n // (2 * size), 2 * size, n // (2 * size), 2 * size)
        corner = mx.diagonal(blocks[..., size:, :, :size], axis1=-4, axis2=-2)
        corner = mx.moveaxis(corner, -1, -3)
        first, second = inverse[..., ::2, :, :], inverse[..., 1::2, :, :]
        corner = -(second @ corner @ first)
        above = mx.concatenate([first, mx.zeros_like(first)], axis=-1)
        inverse = mx.concatenate([above, mx.concatenate([corner, second], axis=-1)], axis=-2)
        size *= 2
    return inverse.reshape(lower.shape)
