"""Logits of tokens that a bitmask forbids."""

from __future__ import annotations

import mlx.core as mx

_WORD_BITS = 32


def apply_bitmask(logits: mx.array, bitmask: mx.array) -> mx.array:
    """The logits, with -inf for every token that is not allowed.

    Args:
        logits: (R, vocab) float32, float16 or bfloat16
        bitmask: (R, ceil(vocab / 32)) int32 or uint32; bit ``t % 32`` of word ``t // 32`` is set
            where token ``t`` is allowed. Bits beyond the vocabulary mean nothing.

    Returns:
        (R, vocab) of the logits' dtype.

    Raises:
        ValueError: the shapes do not fit.
    """
    rows, vocab = logits.shape
    words = -(-vocab // _WORD_BITS)
    if bitmask.shape != (rows, words):
        raise ValueError(
            f"logits {logits.shape} need a bitmask of {(rows, words)}, not of {bitmask.shape}"
        )
    bits = (bitmask[..., None] >> mx.arange(_WORD_BITS, dtype=bitmask.dtype)) & 1
    allowed = bits.reshape(rows, words * _WORD_BITS)[:, :vocab].astype(mx.bool_)
    return mx.where(allowed, logits, mx.array(-mx.inf, logits.dtype))
