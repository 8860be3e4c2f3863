"""The gated delta rule by MLX's operations: rows of many sequences, or many rows of one."""

from __future__ import annotations

import mlx.core as mx

_CHUNK = 16  # rows
_LEAST_GATE = 1e-37  # its logarithm is finite


@mx.compile
def one_row(
    q: mx.array, k: mx.array, v: mx.array, g: mx.array, beta: mx.array, states: mx.array
) -> tuple[mx.array, mx.array]:
    """A row of each of B sequences.

    Args:
        q, k: (B, heads, key_dim)
        v: (B, heads, value_dim)
        g: (B, heads) or (B, heads, key_dim)
        beta: (B, heads)
        states: (B, heads, value_dim, key_dim) float32

    Returns:
        y (B, heads, value_dim) in the dtype of q, and the new states.
    """
    states = states * (g[..., None, None] if g.ndim == 2 else g[..., None, :])
    delta = (v - (states * k[..., None, :]).sum(axis=-1)) * beta[..., None]
    states = states + k[..., None, :] * delta[..., None]
    return (states * q[..., None, :]).sum(axis=-1).astype(q.dtype), states


def many_rows(
    q: mx.array, k: mx.array, v: mx.array, g: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """T rows of one sequence; q, k, v, g and beta as in :func:`one_row` with T for B, and a state
    (heads, value_dim, key_dim)."""
    if g.ndim == 2 and q.shape[0] >= _CHUNK:
        return _in_chunks(q, k, v, g, beta, state)
    states, ys = state[None], []
    for t in range(q.shape[0]):
        row = slice(t, t + 1)
        y, states = one_row(q[row], k[row], v[row], g[row], beta[row], states)
        ys.append(y)
    return mx.concatenate(ys), states[0]


def _in_chunks(
    q: mx.array, k: mx.array, v: mx.array, g: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """The same, 2 to 4 times as fast as row by row where a chunk's rows are many.

    All that does not depend on the state is made of matrix products for all chunks at once: a
    chunk's corrections are the solution of a triangular system (the WY form of Yang et al., 2024,
    https://arxiv.org/abs/2412.06464).
    """
    length, dtype = q.shape[0], q.dtype
    # Padding leaves the state as it is.
    q, k, v = (_chunks(x) for x in (q, k, v))
    beta = _chunks(beta[..., None])
    logs = mx.log(mx.maximum(g[..., None].astype(mx.float32), _LEAST_GATE))
    logs = mx.cumsum(_chunks(logs), axis=2)
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


def _chunks(x: mx.array) -> mx.array:
    """(T, heads, n) as (heads, chunks, rows, n) float32, with zeros behind the last row."""
    x = mx.pad(x.astype(mx.float32), [(0, -x.shape[0] % _CHUNK), (0, 0), (0, 0)]).swapaxes(0, 1)
    return x.reshape(x.shape[0], -1, _CHUNK, x.shape[2])


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
