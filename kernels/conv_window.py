"""Short causal convolutions, one channel at a time, over rows of many sequences.

A sequence's state is its last K - 1 rows: the tail.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from quire.kernels.gpu_kernel import GpuKernel, float_bits
from quire.kernels.segments import Rows, Segments, update_states

_THREADS = 128
_TILE = 8  # rows

_kernel = GpuKernel(
    "conv_window",
    inputs=("x", "weight", "bias", "pool", "starts", "sources", "targets", "fence"),
    outputs=("y", "new_fence"),
    headers=("states", "convolution"),
)


class QueryKeyHeads(NamedTuple):
    """The channels of a convolution are queries, keys and values of heads, in this order, and those
    of queries and keys are normed by their length, as mlx-lm's `normalize_qk` does.

    Attributes:
        heads: of queries, and of keys.
        dim: of each.
        eps: added to the square of the length.
    """

    heads: int
    dim: int
    eps: float = 1e-6

    @property
    def channels(self) -> int:
        return self.heads * self.dim

    @property
    def rms_eps(self) -> float:
        """Added to the mean of the squares."""
        return self.eps / self.dim

    @property
    def scales(self) -> tuple[float, float]:
        """Of queries and keys that have been normed to a mean square of 1."""
        return 1 / self.dim, self.dim**-0.5

    def parts(self, y: mx.array, num_rows: int) -> tuple[mx.array, mx.array, mx.array]:
        """Queries and keys (T, heads, dim), and values (T, n), of all of them in one."""
        size = num_rows * self.channels
        q, k, v = mx.split(y, [size, 2 * size])
        heads = num_rows, self.heads, self.dim
        return q.reshape(heads), k.reshape(heads), v.reshape(num_rows, -1)


class Convolution(NamedTuple):
    """A layer's own part.

    Attributes:
        weight: (channels, K) or (channels, K, 1) as :class:`mlx.nn.Conv1d` has it, in the dtype of
            the rows; the last of the K weighs the row itself.
        bias: (channels,) or None
        silu: whether the result is x * sigmoid(x) of the sum.
        heads: what the channels are, if that is known.
    """

    weight: mx.array
    bias: mx.array | None = None
    silu: bool = True
    heads: QueryKeyHeads | None = None


def conv_window(
    x: mx.array, conv: Convolution, pool: mx.array, segments: Segments, fence: mx.array
) -> tuple[mx.array, mx.array]:
    """All rows of a step by one kernel, which reads and writes the tails where they are.

    What was said of order in :func:`quire.kernels.delta_rule.delta_rule` holds here.

    Args:
        x: (T, channels)
        pool: (slots, K - 1, channels) in the dtype of x, the oldest row first.
        fence: an output of the step before, or of whoever used the pool last.

    Returns:
        (T, channels) in the dtype of x, rounded to it after the sum, the bias, the sigmoid and the
        product, as MLX's operations do; or with ``conv.heads`` (T * channels,), of which
        :meth:`QueryKeyHeads.parts` are the parts. And the fence of this write, (1,) int32.
    """
    num_rows, channels = x.shape
    dtype = x.dtype
    assert pool.dtype == dtype, "states of another type"
    packs = channels * dtype.size // 16
    tiles = -(-num_rows // _TILE)
    heads = conv.heads
    query_scale, key_scale = (0.0, 0.0) if heads is None else heads.scales
    y, new_fence = _kernel(
        [
            x,
            conv.weight.astype(dtype),
            None if conv.bias is None else conv.bias.astype(dtype),
            pool,
            segments.starts,
            segments.sources,
            segments.targets,
            fence,
        ],
        template={
            "T": dtype,
            "K": pool.shape[1] + 1,
            "CHANNELS": channels,
            "HAS_BIAS": conv.bias is not None,
            "SILU": conv.silu,
            "TILE": _TILE,
            "THREADS": _THREADS,
            "KEY_PACKS": 0 if heads is None else heads.channels * dtype.size // 16,
            "HEAD_LANES": 1 if heads is None else heads.dim * dtype.size // 16,
            "EPS": float_bits(0.0 if heads is None else heads.rms_eps),
            "QUERY_SCALE": float_bits(query_scale),
            "KEY_SCALE": float_bits(key_scale),
        },
        groups=(-(-packs // _THREADS), segments.sources.shape[0] + tiles, 1),
        threads=_THREADS,
        output_shapes=[(num_rows, channels) if heads is None else (num_rows * channels,), (1,)],
        output_dtypes=[dtype, mx.int32],
    )
    return y, new_fence


def conv_window_steps(
    x: mx.array, conv: Convolution, pool: mx.array, segments: Segments
) -> mx.array:
    """The same by MLX's operations, on any device; ``pool`` holds the new tails afterwards.

    MLX writes in place if nothing else refers to the array of ``pool``, and copies all of it
    otherwise: callers keep no second reference.
    """
    weight = conv.weight.reshape(x.shape[1], -1)

    def one_row(rows: Rows, tails: mx.array) -> tuple[mx.array, mx.array]:
        window = mx.concatenate([tails, rows[0][:, None]], axis=1)
        return _convolve(window, weight, conv)[:, 0], window[:, 1:]

    def many_rows(rows: Rows, tail: mx.array) -> tuple[mx.array, mx.array]:
        window = mx.concatenate([tail, rows[0]])
        return _convolve(window, weight, conv), window[-tail.shape[0] :]

    y = update_states(pool, segments, [x], one_row, many_rows)
    return y if conv.heads is None else _normed(y, conv.heads)


def _normed(y: mx.array, heads: QueryKeyHeads) -> mx.array:
    """(T, channels) to (T * channels,)"""
    q, k, v = mx.split(y, [heads.channels, 2 * heads.channels], axis=1)
    parts = []
    for part, scale in zip((q, k), heads.scales, strict=True):
        by_head = part.reshape(-1, heads.heads, heads.dim)
        parts.append((scale * mx.fast.rms_norm(by_head, None, heads.rms_eps)).flatten())
    return mx.concatenate([*parts, v.flatten()])


def _convolve(window: mx.array, weight: mx.array, conv: Convolution) -> mx.array:
    """(..., K - 1 + n, channels) to (..., n, channels)"""
    terms, dtype = weight.shape[1], window.dtype
    count = window.shape[-2] - terms + 1
    y = mx.zeros((), mx.float32)
    for i in range(terms):
        rows = window[..., i : i + count, :].astype(mx.float32)
        y = y + rows * weight[:, i].astype(mx.float32)
    y = y.astype(dtype)
    if conv.bias is not None:
        y = y + conv.bias.astype(dtype)
    return y * mx.sigmoid(y) if conv.silu else y
