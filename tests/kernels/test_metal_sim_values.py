"""The Metal simulator's values: simdgroup operations, 16-bit floats, atomics, matrices."""

from __future__ import annotations

from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from metal_sim.source import MetalKernel, run_source

SIMD = """
const uint i = thread_position_in_grid.x;
const float v = x[i];
const int n = int(i % 5);
y[i] = metal::simd_sum(v);
y[64 + i] = metal::simd_max(v);
y[128 + i] = metal::simd_min(v);
y[192 + i] = metal::simd_shuffle(v, ushort((i * 7) % 32));
y[256 + i] = metal::simd_shuffle_xor(v, ushort(5));
y[320 + i] = metal::simd_shuffle_down(v, ushort(3));
y[384 + i] = metal::simd_shuffle_up(v, ushort(3));
y[448 + i] = metal::simd_broadcast(v, ushort(9));
z[i] = uint(metal::simd_prefix_inclusive_sum(n));
z[64 + i] = uint(metal::simd_prefix_exclusive_sum(n));
z[128 + i] = uint(metal::simd_any(v > limits[0]));
z[192 + i] = uint(metal::simd_all(v > limits[1]));
z[256 + i] = uint(uint64_t(metal::simd_ballot(v > 0.0f)));
z[320 + i] = metal::simd_or(1u << (i % 7));
"""


def test_simdgroup_operations() -> None:
    x = np.random.default_rng(4).normal(size=64).astype(np.float32)
    v, lane = x.reshape(2, 32), np.arange(32)
    # One of the two simdgroups has a value above the first, one has all above the second.
    limits = np.array([v.max(1).mean(), v.min(1).mean()], np.float32)
    y, z = run_source(
        MetalKernel(SIMD, ["x", "limits"], ["y", "z"]),
        [x, limits],
        [((8, 2, 32), mx.float32), ((6, 2, 32), mx.uint32)],
    )
    none = np.full((2, 3), np.nan)

    def everywhere(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return np.repeat(values[:, None], 32, axis=1)

    np.testing.assert_allclose(np.array(y[0]), everywhere(v.astype(float).sum(1)), rtol=1e-5)
    expected = [
        everywhere(v.max(1)),
        everywhere(v.min(1)),
        v[:, lane * 7 % 32],
        v[:, lane ^ 5],
        np.concatenate([v[:, 3:], none], axis=1),
        np.concatenate([none, v[:, :-3]], axis=1),
        everywhere(v[:, 9]),
    ]
    np.testing.assert_array_equal(np.array(y[1:]), np.stack(expected).astype(np.float32))
    n = (np.arange(64) % 5).reshape(2, 32)
    integers = [
        n.cumsum(1),
        n.cumsum(1) - n,
        everywhere((v > limits[0]).any(1)),
        everywhere((v > limits[1]).all(1)),
        everywhere(((v > 0) << lane).sum(1)),
        np.full((2, 32), 127),
    ]
    np.testing.assert_array_equal(np.array(z), np.stack(integers))


CONVERT = """
const uint i = thread_position_in_grid.x;
to_half[i] = half(x[i]);
to_bfloat[i] = bfloat16_t(x[i]);
from_half[i] = float(as_type<half>(ushort(i)));
from_bfloat[i] = float(as_type<bfloat>(ushort(i)));
const half h = as_type<half>(ushort(i)), other = as_type<half>(ushort(i * 40503u));
sums[i] = h + other;
products[i] = h * other;
"""


def test_16_bit_floats_round_as_in_mlx() -> None:
    rng = np.random.default_rng(0)
    n = 1 << 16  # as many as there are patterns of 16 bits
    bits = rng.integers(0, 1 << 32, n, dtype=np.uint32)
    bits[: n // 2] = rng.normal(size=n // 2).astype(np.float32).view(np.uint32)
    # Values halfway between two halves or bfloats, and the edges of half's range.
    bits[: n // 8] = (bits[: n // 8] & 0xFFFFE000) | 0x1000
    bits[n // 8 : n // 4] = (bits[n // 8 : n // 4] & 0xFFFF0000) | 0x8000
    edges = [65504, 65519.99, 65520, 2**-14, 2**-24, 2**-25, 2**-25 * 1.001, 3e-6, 0.0]
    bits[: len(edges)] = np.array(edges, np.float32).view(np.uint32)
    x = bits.view(np.float32)
    halves, bfloats = ((n,), mx.float16), ((n,), mx.bfloat16)
    singles = ((n,), mx.float32)
    names = ["to_half", "to_bfloat", "from_half", "from_bfloat", "sums", "products"]
    to_half, to_bfloat, from_half, from_bfloat, sums, products = run_source(
        MetalKernel(CONVERT, ["x"], names),
        [x],
        [halves, bfloats, singles, singles, halves, halves],
        (n // 256, 1, 1),
        256,
    )
    patterns = np.arange(n, dtype=np.uint16)
    same = partial(np.testing.assert_array_equal, strict=True)
    with np.errstate(all="ignore"):
        same(np.array(to_half), np.array(mx.array(x).astype(mx.float16)))
        expected = mx.array(x).astype(mx.bfloat16)
        same(np.array(to_bfloat.astype(mx.float32)), np.array(expected.astype(mx.float32)))
        h, other = patterns.view(np.float16), (patterns * np.uint16(40503)).view(np.float16)
        same(np.array(from_half), h.astype(np.float32))
        widened = mx.array(patterns).view(mx.bfloat16).astype(mx.float32)
        same(np.array(from_bfloat), np.array(widened))
        same(np.array(sums), h + other)
        same(np.array(products), h * other)


COUNT = """
threadgroup metal::atomic_uint counts[4];
const uint i = thread_index_in_threadgroup;
const metal::mem_flags flags = metal::mem_flags::mem_threadgroup;
if (i < 4) metal::atomic_store_explicit(&counts[i], 0u, metal::memory_order_relaxed);
metal::threadgroup_barrier(flags);
metal::atomic_fetch_add_explicit(&counts[i % 3], i, metal::memory_order_relaxed);
metal::threadgroup_barrier(flags);
if (i < 4) y[i] = metal::atomic_load_explicit(&counts[i], metal::memory_order_relaxed);
"""


def test_atomics_in_threadgroup_memory() -> None:
    (y,) = run_source(MetalKernel(COUNT, [], ["y"]), [], [((4,), mx.uint32)])
    np.testing.assert_array_equal(np.array(y), [sum(range(r, 64, 3)) for r in range(3)] + [0])


MATRICES = """
const uint lane = thread_index_in_simdgroup;
const uint row = lane / 16 * 4 + lane / 2 % 4;
const uint column = lane / 8 % 2 * 4 + lane % 2 * 2;
metal::simdgroup_matrix<float, 8, 8> a, b, c;
for (uint i = 0; i < 2; ++i) {
  const uint at = row * 8 + column + i;
  a.thread_elements()[i] = x[at];
  b.thread_elements()[i] = x[64 + at];
  c.thread_elements()[i] = x[128 + at];
}
metal::simdgroup_multiply_accumulate(c, a, b, c);
for (uint i = 0; i < 2; ++i) y[row * 8 + column + i] = c.thread_elements()[i];
"""


def test_simdgroup_matrices() -> None:
    x = np.random.default_rng(0).normal(size=(3, 8, 8)).astype(np.float32)
    header = "#include <metal_simdgroup_matrix>\n"
    (y,) = run_source(
        MetalKernel(MATRICES, ["x"], ["y"], header), [x], [((8, 8), mx.float32)], threads=32
    )
    np.testing.assert_allclose(np.array(y), x[0] @ x[1] + x[2], rtol=1e-5, atol=1e-6)
