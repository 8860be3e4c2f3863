"""Masked logits against numpy's own unpacking of bits."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from quire.kernels.bitmask import apply_bitmask


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize(("rows", "vocab"), [(1, 1), (1, 31), (3, 32), (2, 33), (5, 1026)])
@pytest.mark.parametrize("words_dtype", [np.int32, np.uint32])
def test_what_is_not_allowed_is_minus_infinity(
    rows: int, vocab: int, dtype: mx.Dtype, words_dtype: type[np.generic]
) -> None:
    rng = np.random.default_rng(rows * vocab)
    words = -(-vocab // 32)
    bitmask = rng.integers(0, 2**32, (rows, words), np.uint64).astype(np.uint32)
    bitmask[0] = 0xFFFFFFFF
    logits = mx.array(rng.standard_normal((rows, vocab)), dtype)
    allowed = np.unpackbits(bitmask.view(np.uint8), axis=1, bitorder="little")[:, :vocab]

    masked = apply_bitmask(logits, mx.array(bitmask.view(words_dtype)))

    assert masked.dtype == dtype
    expected = np.where(allowed, np.array(logits.astype(mx.float32)), -np.inf)
    np.testing.assert_array_equal(np.array(masked.astype(mx.float32)), expected)


def test_a_bitmask_of_another_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 33\) need a bitmask of \(2, 2\), not of \(2, 1\)"):
        apply_bitmask(mx.zeros((2, 33)), mx.zeros((2, 1), mx.int32))
