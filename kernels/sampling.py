"""Drawing one token per row by temperature, top-k, top-p and min-p, without sorting the vocabulary.

The kernels `source/sample_*.h` find the limits of the filters ten bits at a time. Rows are cut into
stretches, so that one row keeps a whole device busy.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from quire.kernels.choice.selection import select
from quire.kernels.choice.shapes import SampleShape
from quire.kernels.draws import MAX_VOCAB, Draws
from quire.kernels.gpu_kernel import GpuKernel, TemplateValue
from quire.kernels.sampling_reference import sample_reference
from quire.kernels.upload import upload

_THREADS = 512
# Threadgroups of one launch that rows are cut into, as far as 32 lanes can add up their stretches.
_WANTED_STRETCHES = 512
_MAX_STRETCHES = 32
_LEVELS = 3  # launches that find one limit
_BUCKETS = 1024

_HEADERS = ("counters", "sampling")
_PEAKS = GpuKernel(
    "sample_peaks", ("logits", "parameters"), ("peaks", "places", "state"), headers=_HEADERS
)
_STEP = GpuKernel(
    "sample_step",
    ("logits", "parameters", "peaks", "state", "counts", "kept"),
    ("next_state", "next_counts", "next_kept"),
    headers=_HEADERS,
)
_DRAW = GpuKernel(
    "sample_draw",
    ("logits", "parameters", "peaks", "places", "state", "kept"),
    ("tokens",),
    headers=_HEADERS,
)


def sample_tokens(logits: mx.array, draws: Draws) -> mx.array:
    """Draw one token per row.

    Args:
        logits: (R, vocab) float32, float16 or bfloat16; -inf is never drawn beside a finite logit.
        draws: the parameters of the R rows.

    Returns:
        (R,) int32 token ids.

    Raises:
        ValueError: the vocabulary has a million tokens or more.
    """
    rows, vocab = logits.shape
    if vocab >= MAX_VOCAB:
        raise ValueError(f"cannot sample from {vocab} tokens, {MAX_VOCAB} is too many")
    filtered = bool(((draws.top_k > 0) | (draws.top_p < 1) | (draws.min_p > 0)).any())
    choice = select("sample", SampleShape(rows, vocab, filtered), logits.dtype)
    # Metal passes arrays of fewer than 8 elements in another address space.
    if choice.variant == "kernel" and logits.size >= 8:
        return sample_on_gpu(logits, draws)
    return sample_reference(logits, draws)


def sample_on_gpu(logits: mx.array, draws: Draws) -> mx.array:
    """:func:`sample_tokens` as three to nine launches; ``logits`` has at least 8 elements."""
    rows, vocab = logits.shape
    stretches = max(1, min(_MAX_STRETCHES, _WANTED_STRETCHES // rows))
    table = np.zeros((rows, 8), np.float32)
    table[:, :5] = draws.table()
    table[:, 5] = stretches
    parameters = upload([table.view(np.int32)])[0].view(mx.float32)
    width = 16 // logits.itemsize
    while vocab % width:
        width //= 2
    template: dict[str, TemplateValue] = {
        "T": logits.dtype,
        "VOCAB": vocab,
        "WIDTH": width,
        "THREADS": _THREADS,
    }
    peaks, places, state = _PEAKS(
        [logits, parameters],
        template=template,
        groups=(stretches, rows, 1),
        threads=_THREADS,
        output_shapes=[(rows, stretches), (rows, stretches), (rows, 8)],
        output_dtypes=[mx.float32, mx.uint32, mx.uint32],
    )
    counts = kept = state  # the first step reads neither
    for _ in range(_num_steps(draws, vocab)):
        state, counts, kept = _STEP(
            [logits, parameters, peaks, state, counts, kept],
            template=template,
            groups=(stretches, rows, 1),
            threads=_THREADS,
            output_shapes=[(rows, 8), (rows, stretches, _BUCKETS, 2), (rows, stretches, 2)],
            output_dtypes=[mx.uint32] * 3,
        )
    (tokens,) = _DRAW(
        [logits, parameters, peaks, places, state, kept],
        template=template,
        groups=(rows, 1, 1),
        threads=_THREADS,
        output_shapes=[(rows,)],
        output_dtypes=[mx.int32],
    )
    return tokens


def _num_steps(draws: Draws, vocab: int) -> int:
    """As many as the row needs that has most limits to find; the last adds up what is kept."""
    chosen = ~draws.greedy
    by_rank = (draws.top_k > 0) & (draws.top_k < vocab) & chosen
    by_mass = (draws.top_p < 1) & chosen
    return 1 + _LEVELS * int((by_rank.astype(int) + by_mass.astype(int)).max())
