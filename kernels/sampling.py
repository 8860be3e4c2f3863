"""Drawing one token per row by temperature, top-k, top-p and min-p, without sorting the vocabulary.

The kernels `source/sample_*.h` find the limits of the filters ten bits at a time. Rows are cut into
stretches, so that one row keeps a whole device busy.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from quire.kernels.draws import Draws
from quire.kernels.gpu_kernel import GpuKernel, TemplateValue

Float32Array = npt.NDArray[np.float32]

_THREADS = 512
# Threadgroups of one launch that rows are cut into, as far as 32 lanes can add up their stretches.
_WANTED_STRETCHES = 512
_MAX_STRETCHES = 32
_LEVELS = 3  # launches that find one limit
_BUCKETS = 1024
# Kept, by rows and steps: batches grow and shrink.
_MAX_GRAPHS = 1024

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


def take_likeliest_on_gpu(logits: mx.array) -> mx.array:
    """:func:`quire.kernels.sample_tokens.take_likeliest` as two launches; ``logits`` has
    at least 8 elements."""
    return _compiled_likeliest(logits.shape[0], logits.shape[1], logits.dtype)(logits)


def sample_on_gpu(logits: mx.array, draws: Draws) -> mx.array:
    """What :func:`quire.kernels.sampling_reference.sample_reference` draws, by three to nine
    launches; ``logits`` has at least 8 elements."""
    table = kernel_table(draws, logits.shape[0])
    return draw_by_table(logits, mx.array(table), num_steps(table, logits.shape[1]))


def kernel_table(draws: Draws, num_rows: int) -> Float32Array:
    """(num_rows, 8) float32, what the kernels read of ``draws``; rows behind these are greedy."""
    table = np.zeros((num_rows, 8), np.float32)
    table[: len(draws.uniform), :5] = draws.table()
    table[:, 5] = _num_stretches(num_rows)
    return table


def draw_by_table(logits: mx.array, table: mx.array, steps: int) -> mx.array:
    """Draw one token per row, (R,) int32.

    Args:
        logits: (R, vocab)
        table, steps: of :func:`kernel_table` and :func:`num_steps`.
    """
    rows, vocab = logits.shape
    return _compiled(rows, vocab, logits.dtype, steps)(logits, table)


@lru_cache(_MAX_GRAPHS)
def _compiled(
    rows: int, vocab: int, dtype: mx.Dtype, steps: int
) -> Callable[[mx.array, mx.array], mx.array]:
    """:func:`_launch` for logits of this shape: to replay its graph takes the host half as long."""
    compiled: Callable[[mx.array, mx.array], mx.array] = mx.compile(partial(_launch, steps=steps))
    return compiled


@lru_cache(_MAX_GRAPHS)
def _compiled_likeliest(rows: int, vocab: int, dtype: mx.Dtype) -> Callable[[mx.array], mx.array]:
    """Draws without a temperature: of the parameters only the number of stretches is read."""
    stretches = _num_stretches(rows)
    table = np.zeros((rows, 8), np.float32)
    table[:, 5] = stretches
    parameters = mx.array(table)
    kept = mx.zeros((rows, stretches, 2), mx.uint32)
    mx.eval(parameters, kept)

    def launch(logits: mx.array) -> mx.array:
        peaks, places, state = _find_peaks(logits, parameters)
        return _draw(logits, parameters, peaks, places, state, kept)

    compiled: Callable[[mx.array], mx.array] = mx.compile(launch)
    return compiled


def _launch(logits: mx.array, parameters: mx.array, *, steps: int) -> mx.array:
    """The tokens; ``parameters`` are (R, 8) float32."""
    rows = logits.shape[0]
    stretches = _num_stretches(rows)
    peaks, places, state = _find_peaks(logits, parameters)
    counts = kept = state  # the first step reads neither
    for _ in range(steps):
        state, counts, kept = _STEP(
            [logits, parameters, peaks, state, counts, kept],
            template=_template(logits),
            groups=(stretches, rows, 1),
            threads=_THREADS,
            output_shapes=[(rows, 8), (rows, stretches, _BUCKETS, 2), (rows, stretches, 2)],
            output_dtypes=[mx.uint32] * 3,
        )
    return _draw(logits, parameters, peaks, places, state, kept)


def _find_peaks(logits: mx.array, parameters: mx.array) -> list[mx.array]:
    rows = logits.shape[0]
    stretches = _num_stretches(rows)
    return _PEAKS(
        [logits, parameters],
        template=_template(logits),
        groups=(stretches, rows, 1),
        threads=_THREADS,
        output_shapes=[(rows, stretches), (rows, stretches), (rows, 8)],
        output_dtypes=[mx.float32, mx.uint32, mx.uint32],
    )


def _draw(logits: mx.array, *inputs: mx.array) -> mx.array:
    rows = logits.shape[0]
    (tokens,) = _DRAW(
        [logits, *inputs],
        template=_template(logits),
        groups=(rows, 1, 1),
        threads=_THREADS,
        output_shapes=[(rows,)],
        output_dtypes=[mx.int32],
    )
    return tokens


def _template(logits: mx.array) -> dict[str, TemplateValue]:
    vocab = logits.shape[1]
    width = 16 // logits.itemsize
    while vocab % width:
        width //= 2
    return {"T": logits.dtype, "VOCAB": vocab, "WIDTH": width, "THREADS": _THREADS}


def _num_stretches(rows: int) -> int:
    return max(1, min(_MAX_STRETCHES, _WANTED_STRETCHES // rows))


def num_steps(table: Float32Array, vocab: int) -> int:
    """Launches that look for limits: as many as the row needs that has most of them to find; the
    last one adds up what is kept."""
    scale, top_k, top_p = table[:, :3].T
    drawn = scale > 0
    by_rank = drawn & (top_k > 0) & (top_k < vocab)
    by_mass = drawn & (top_p < 1)
    return 1 + _LEVELS * int((by_rank.view(np.int8) + by_mass.view(np.int8)).max())
