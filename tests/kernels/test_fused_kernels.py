"""Norms, rotary embeddings and page writes in one kernel, by their exact Metal text."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import pytest
from decode_case import BF16, F16, F32, LIMITS, Float64Array, to_float64
from metal_sim import KernelFault, compiled_ahead, simulated_kernels

from quire.kernels.fused_ops import add_rms_norm
from quire.kernels.page_arrays import PageArrays
from quire.kernels.rotate import HeadNorms, ProjectedRows, Rotary, rotate_and_write

EPS = 1e-3


def normal(shape: tuple[int, ...], dtype: mx.Dtype, seed: int) -> mx.array:
    array = mx.array(np.random.default_rng(seed).normal(size=shape)).astype(dtype)
    mx.eval(array)
    return array


def assert_near(array: mx.array, expected: Float64Array, dtype: mx.Dtype) -> None:
    """Within the dtype's limit of the row's largest value."""
    largest = np.abs(expected).max(axis=-1, keepdims=True)
    wrong = ~(np.abs(to_float64(array) - expected) <= LIMITS[dtype] * largest)
    assert not wrong.any(), f"{wrong.sum()} of {wrong.size} values are wrong"


@dataclass(frozen=True)
class RotateCase:
    dtype: mx.Dtype
    head_dim: int
    rotary_dims: int
    traditional: bool
    norms: bool
    keep_rows: bool
    heads: int = 4
    kv_heads: int = 2
    rows: int = 5
    block_size: int = 8

    def inputs(self) -> tuple[mx.array, mx.array, mx.array, mx.array]:
        """Rows of queries, keys and values, the two page arrays, and one norm per head kind."""
        heads = self.heads + 2 * self.kv_heads
        pages = 3, self.kv_heads, self.block_size, self.head_dim
        return (
            normal((self.rows, heads * self.head_dim), self.dtype, 0),
            normal(pages, self.dtype, 1),
            normal(pages, self.dtype, 2),
            normal((2, self.head_dim), self.dtype, 3),
        )

    @property
    def frequencies(self) -> Float64Array:
        return 10000.0 ** -(np.arange(0, self.rotary_dims, 2) / self.rotary_dims)

    @property
    def positions(self) -> list[int]:
        return [0, 7, 300, 7, 31][: self.rows]

    @property
    def slots(self) -> list[int]:
        return [3, 23, 8, 0, 15][: self.rows]

    def run(self) -> tuple[mx.array, PageArrays]:
        qkv, key_pages, value_pages, weights = self.inputs()
        norms = HeadNorms(weights[0], weights[1], EPS) if self.norms else None
        return rotate_and_write(
            ProjectedRows(qkv, mx.array(self.positions), mx.array(self.slots)),
            PageArrays(key_pages, value_pages, mx.array([1])),
            Rotary(
                mx.array(self.frequencies.astype(np.float32)), self.rotary_dims, self.traditional
            ),
            norms,
            keep_rows=self.keep_rows,
        )

    def expected(self) -> tuple[Float64Array, Float64Array, Float64Array]:
        """Queries, keys and values, (rows, heads, head_dim) each."""
        qkv, _, _, weights = self.inputs()
        x = to_float64(qkv).reshape(self.rows, -1, self.head_dim)
        queries, keys, values = np.split(x, [self.heads, self.heads + self.kv_heads], axis=1)
        weight = to_float64(weights)
        angles = np.array(self.positions)[:, None, None] * self.frequencies
        return self._turn(queries, weight[0], angles), self._turn(keys, weight[1], angles), values

    def _turn(self, x: Float64Array, weight: Float64Array, angles: Float64Array) -> Float64Array:
        if self.norms:
            x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + EPS) * weight
        turned, half = x.copy(), self.rotary_dims // 2
        places = np.arange(self.rotary_dims)
        first, second = (
            (places[::2], places[1::2]) if self.traditional else (places[:half], places[half:])
        )
        turned[..., first] = x[..., first] * np.cos(angles) - x[..., second] * np.sin(angles)
        turned[..., second] = x[..., first] * np.sin(angles) + x[..., second] * np.cos(angles)
        return turned

    def check(self) -> None:
        rotated, pages = self.run()
        queries, keys, values = self.expected()
        assert_near(rotated[:, :, 0], queries, self.dtype)
        for array, before, new in zip(pages[:2], self.inputs()[1:3], (keys, values), strict=True):
            expected = to_float64(before)
            for row, slot in enumerate(self.slots):
                expected[slot // self.block_size, :, slot % self.block_size] = new[row]
            assert_near(array, expected, self.dtype)
            untouched = expected == to_float64(before)
            assert (to_float64(array) == to_float64(before))[untouched].all()
        for kept, wanted in ((pages.new_keys, keys), (pages.new_values, values)):
            assert (kept is not None) == self.keep_rows
            if kept is not None:
                assert_near(kept[:, :, 0], wanted, self.dtype)


# A norm rounds its weight's product before the rotation, which the limits leave room for.
ROTATIONS = [
    RotateCase(F32, 64, 64, False, True, True),
    RotateCase(F32, 80, 32, True, False, False),
    RotateCase(F16, 128, 128, True, True, False),
    RotateCase(F16, 96, 96, False, False, True),
    RotateCase(BF16, 128, 64, False, True, True, heads=6, kv_heads=3),
    RotateCase(BF16, 256, 256, False, True, False, heads=1, kv_heads=1, rows=2),
]
# dtype, rows and values a row; the last takes all simdgroups, in several rounds.
NORMS = [(F32, 3, 64), (F16, 2, 1032), (BF16, 1, 128), (F32, 2, 8192)]


def add_norm(dtype: mx.Dtype, rows: int, dim: int) -> tuple[mx.array, mx.array]:
    x, delta = (normal((rows, dim), dtype, seed) for seed in (0, 1))
    return add_rms_norm(x, delta, normal((dim,), dtype, 2), EPS)


def check_add_norm(dtype: mx.Dtype, rows: int, dim: int) -> None:
    total, normed = add_norm(dtype, rows, dim)
    x, delta = (normal((rows, dim), dtype, seed) for seed in (0, 1))
    np.testing.assert_array_equal(to_float64(total), to_float64(x + delta))
    expected = to_float64(x + delta)
    expected /= np.sqrt((expected**2).mean(axis=-1, keepdims=True) + EPS)
    assert_near(normed, expected * to_float64(normal((dim,), dtype, 2)), dtype)


def without_barrier(text: str) -> str:
    return text.replace("BARRIER();", ";")


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    with compiled_ahead():
        for case in ROTATIONS:
            case.run()
        for shape in NORMS:
            add_norm(*shape)


@pytest.mark.parametrize("case", ROTATIONS, ids=repr)
def test_rotate_and_write(case: RotateCase) -> None:
    with simulated_kernels():
        case.check()


@pytest.mark.parametrize(("dtype", "rows", "dim"), NORMS)
def test_add_norm(dtype: mx.Dtype, rows: int, dim: int) -> None:
    with simulated_kernels():
        check_add_norm(dtype, rows, dim)


def test_mutants_are_caught() -> None:
    with (
        pytest.raises(KernelFault, match="order of the threads matters"),
        simulated_kernels({"add_rms_norm": without_barrier}),
    ):
        check_add_norm(*NORMS[3])
    for old, new in [
        ("first * sine + second", "first * sine - second"),
        ("is_query ? query_norm : key_norm", "query_norm"),
        ("const int slot = slot_mapping[row];", "const int slot = slot_mapping[0];"),
        ("head - HEADS_Q - HEADS_KV : head - HEADS_Q;", "0 : head - HEADS_Q;"),
    ]:

        def mutate(text: str, old: str = old, new: str = new) -> str:
            return text.replace(old, new)

        with (
            pytest.raises((AssertionError, KernelFault)),
            simulated_kernels({"rotate_and_write": mutate}),
        ):
            ROTATIONS[0].check()
