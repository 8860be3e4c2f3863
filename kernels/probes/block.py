"""Probes of what stands between the matrix products of a block."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from quire.kernels.block_ops import add_rms_norm, swiglu_joined
from quire.kernels.choice.shapes import GateShape, NormShape, RotateShape, RotatingDecodeShape
from quire.kernels.kv_write import Slots, scatter
from quire.kernels.probes.probe import Float64Array, Probe, ints, normal, to_float64
from quire.kernels.rotate import HeadNorms, Rotary, rotate_and_write

EPS = 1e-5
_BASE = 10000.0  # of rotary frequencies
# Angles beyond are not exact enough in float32 to tell a wrong result from a rounded one.
_MAX_POSITION = 64


def norm_probe(shape: NormShape, dtype: mx.Dtype, seed: int) -> Probe:
    keys = mx.random.split(mx.random.key(seed), 3)
    x, delta = (normal(shape, dtype, key) for key in keys[:2])
    weight = normal((shape.dim,), dtype, keys[2])

    def fused(settings: Mapping[str, int]) -> list[mx.array]:
        return list(add_rms_norm(x, delta, weight, EPS))

    def separate(settings: Mapping[str, int]) -> list[mx.array]:
        total = x + delta
        return [total, mx.fast.rms_norm(total, weight, EPS)]

    def expected() -> list[Float64Array]:
        a, b, scale = to_float64([x, delta, weight])
        return [a + b, _normed(a + b, scale)]

    return Probe({"fused": fused, "separate": separate}, expected, num_bytes=4 * x.nbytes)


def gate_probe(shape: GateShape, dtype: mx.Dtype, seed: int) -> Probe:
    both = normal((shape.rows, 2 * shape.dim), dtype, mx.random.key(seed)) * 4
    mx.eval(both)

    def fused(settings: Mapping[str, int]) -> list[mx.array]:
        return [swiglu_joined(both)]

    def separate(settings: Mapping[str, int]) -> list[mx.array]:
        gate, up = mx.split(both, 2, axis=-1)
        return [gate * mx.sigmoid(gate) * up]

    def expected() -> list[Float64Array]:
        gate, up = np.split(to_float64([both])[0], 2, axis=-1)
        return [gate / (1 + np.exp(-gate)) * up]

    return Probe({"fused": fused, "separate": separate}, expected, num_bytes=3 * both.nbytes // 2)


def rotate_probe(shape: RotateShape, dtype: mx.Dtype, seed: int) -> Probe:
    """The result is the queries, both page arrays, and the new keys and values if kept."""
    rng = np.random.default_rng(seed)
    keys = mx.random.split(mx.random.key(seed), 6)
    heads, kv_heads, dim, block_size = shape.heads, shape.kv_heads, shape.head_dim, shape.block_size
    qkv = normal((shape.rows, (heads + 2 * kv_heads) * dim), dtype, keys[0])
    weights = [normal((dim,), dtype, key) for key in keys[1:3]]
    num_blocks = 2 + -(-2 * shape.rows // block_size)
    page_shape = num_blocks, kv_heads, block_size, dim

    def fresh_pages() -> list[mx.array]:
        return [normal(page_shape, dtype, key) for key in keys[3:5]]

    # Block 0 is nobody's.
    free = np.arange(block_size, num_blocks * block_size)
    mapping = rng.permutation(free)[: shape.rows].astype(np.int32)
    positions = rng.integers(0, _MAX_POSITION, shape.rows)
    inverse = inverse_frequencies(shape.rotary_dim)
    position_array, periods = ints(positions), 1 / inverse
    slots = Slots(ints(mapping), block_size, mx.zeros((1,), mx.int32))
    mx.eval(position_array, inverse, periods, slots.mapping, slots.after)
    rotary = Rotary(inverse, shape.rotary_dim, shape.traditional)
    norms = HeadNorms(weights[0], weights[1], EPS) if shape.norms else None
    # Each variant writes to pages of its own, whose results stay for the next call.
    fused_pages, separate_pages = fresh_pages(), fresh_pages()

    def fused(settings: Mapping[str, int]) -> list[mx.array]:
        rows = rotate_and_write(
            qkv,
            fused_pages[0],
            fused_pages[1],
            position_array,
            slots,
            rotary,
            norms,
            keep_rows=shape.keep_rows,
        )
        kept = [] if rows.keys is None or rows.values is None else [rows.keys, rows.values]
        return [rows.queries, *mx.depends(fused_pages, [rows.written]), *kept]

    def separate(settings: Mapping[str, int]) -> list[mx.array]:
        parts = rotate_by_mlx(qkv, weights, position_array, periods, shape)
        for pages, new in zip(separate_pages, parts[1:], strict=True):
            scatter(pages, new, slots)
        return [parts[0], *separate_pages, *(parts[1:] if shape.keep_rows else ())]

    def expected() -> list[Float64Array]:
        parts = rotate_in_float64(qkv, weights, positions, inverse, shape)
        pages = to_float64(fresh_pages())
        for array, new in zip(pages, parts[1:], strict=True):
            array[mapping // block_size, :, mapping % block_size] = new
        kept = [new[:, :, None] for new in parts[1:]] if shape.keep_rows else []
        return [parts[0][:, :, None], *pages, *kept]

    return Probe({"fused": fused, "separate": separate}, expected, num_bytes=2 * qkv.nbytes)


def rotate_by_mlx(
    qkv: mx.array,
    weights: list[mx.array],
    positions: mx.array,
    periods: mx.array,
    shape: RotateShape | RotatingDecodeShape,
) -> list[mx.array]:
    """Queries, keys and values, (rows, heads, 1, dim) each."""
    split = [shape.heads, shape.heads + shape.kv_heads]
    parts = list(mx.split(qkv.reshape(shape.rows, -1, 1, shape.head_dim), split, axis=1))
    if shape.norms:
        for i, weight in enumerate(weights):
            parts[i] = mx.fast.rms_norm(parts[i], weight, EPS)
    for i in range(2):
        parts[i] = mx.fast.rope(
            parts[i],
            shape.rotary_dim,
            traditional=shape.traditional,
            base=None,
            scale=1.0,
            offset=positions,
            freqs=periods,
        )
    return parts


def rotate_in_float64(
    qkv: mx.array,
    weights: list[mx.array],
    positions: npt.NDArray[np.integer],
    inverse: mx.array,
    shape: RotateShape | RotatingDecodeShape,
) -> list[Float64Array]:
    """Queries, keys and values, (rows, heads, dim) each."""
    rows = to_float64([qkv])[0].reshape(shape.rows, -1, shape.head_dim)
    parts = np.split(rows, [shape.heads, shape.heads + shape.kv_heads], axis=1)
    angles = positions[:, None, None] * to_float64([inverse])[0]
    for i, weight in enumerate(to_float64(weights)):
        scaled = _normed(parts[i], weight) if shape.norms else parts[i]
        parts[i] = _rotated(scaled, angles, shape.traditional)
    return parts


def inverse_frequencies(rotary_dim: int) -> mx.array:
    """(rotary_dim / 2,) float32, radians per position."""
    steps = np.arange(0, rotary_dim, 2) / rotary_dim
    return mx.array((_BASE**-steps).astype(np.float32))


def _normed(x: Float64Array, weight: Float64Array) -> Float64Array:
    normed: Float64Array = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + EPS) * weight
    return normed


def _rotated(x: Float64Array, angles: Float64Array, traditional: bool) -> Float64Array:
    """(T, heads, dim) ``x`` with its first values turned by (T, 1, pairs) ``angles``."""
    half = angles.shape[-1]
    places = np.arange(2 * half)
    first, second = (places[::2], places[1::2]) if traditional else (places[:half], places[half:])
    turned = x.copy()
    turned[..., first] = x[..., first] * np.cos(angles) - x[..., second] * np.sin(angles)
    turned[..., second] = x[..., first] * np.sin(angles) + x[..., second] * np.cos(angles)
    return turned
