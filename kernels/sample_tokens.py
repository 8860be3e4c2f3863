"""Which variant draws one token per row of logits."""

from __future__ import annotations

import mlx.core as mx

from quire.kernels.choice.selection import select
from quire.kernels.draws import MAX_VOCAB, Draws
from quire.kernels.sampling import take_likeliest_on_gpu
from quire.kernels.sampling_spec import SAMPLE, SampleShape, SampleVariant


def samples_by_kernel(logits: mx.array, filtered: bool) -> bool:
    """Whether kernels draw from (R, vocab) ``logits``; if not, ``sample_reference`` does.

    Raises:
        ValueError: the vocabulary has a million tokens or more.
    """
    rows, vocab = logits.shape
    if vocab >= MAX_VOCAB:
        raise ValueError(f"cannot sample from {vocab} tokens, {MAX_VOCAB} is too many")
    choice = select(SAMPLE, SampleShape(rows, vocab, filtered), logits.dtype)
    # Metal passes arrays of fewer than 8 elements in another address space.
    return choice.variant is SampleVariant.KERNEL and logits.size >= 8


def is_filtered(draws: Draws) -> bool:
    """Whether any row has a filter."""
    return bool(((draws.top_k > 0) | (draws.top_p < 1) | (draws.min_p > 0)).any())


def take_likeliest(logits: mx.array) -> mx.array:
    """The likeliest token of each row, the first of equals, as (R,) int32.

    Args:
        logits: (R, vocab) float32, float16 or bfloat16
    """
    rows, vocab = logits.shape
    shape = SampleShape(rows, vocab, filtered=False, greedy=True)
    choice = select(SAMPLE, shape, logits.dtype)
    if choice.variant is SampleVariant.KERNEL and logits.size >= 8:
        return take_likeliest_on_gpu(logits)
    return mx.argmax(logits, axis=-1).astype(mx.int32)
