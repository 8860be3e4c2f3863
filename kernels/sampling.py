"""Drawing one token per row by temperature, top-k, top-p and min-p, without sorting the vocabulary.

A token's weight is its probability relative to the likeliest one: 2**-y, where y is
(highest logit - logit) * log2(e) / temperature. In descending order of weight each filter keeps a
prefix, so it is a limit on y. All decisions are made on integers: y in steps of 2**-24 is the *key*
that limits are set on, and weights are multiples of 2**-40, so that sums do not depend on the order
of their terms. A row draws the same token alone and in any batch, and never one a filter excludes.

The kernels `source/sample_*.h` do the same on a GPU: rows are cut into stretches, so that one row
keeps a whole device busy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from quire.kernels.choice.selection import select
from quire.kernels.choice.shapes import SampleShape
from quire.kernels.exponential import LOG2_E
from quire.kernels.gpu_kernel import GpuKernel, TemplateValue
from quire.kernels.upload import upload

# Below this, dividing by the temperature overflows float32 and only the best token has any weight.
MIN_TEMPERATURE = 1e-5
# Then 2**20 weights of up to 2**40 add up, and can be multiplied by a fraction, in 64 bits.
MAX_VOCAB = 1 << 20
# From y = 64 on a token has no weight.
_MAX_Y = 64.0
_NEVER = 1 << 30
# Least-squares fit of 2**-f over Chebyshev nodes of [0, 1], constant term first: 2e-9 relative.
_COEFFICIENTS = (
    0.9999999981040864,
    -0.6931470101900395,
    0.24022393909837672,
    -0.05548930914203722,
    0.009576802341940156,
    -0.0012728723503744313,
    0.00010845304579503207,
)
# What a CPU's caches hold: logits that are worked on at a time.
_PIECE = 1 << 18
# Up to here sorting is cheaper than halving.
_SORTED = 1024
_BLOCK = 64

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


@dataclass(frozen=True, slots=True)
class Draws:
    """How each of R rows draws: arrays of length R, on the host.

    The filters apply after the temperature, in the order top-k, top-p, min-p. Tokens as likely as
    the last one that a filter keeps stay too (that is, of the same y to 2**-24), and the likeliest
    token always stays. Weights below 2**-40 count as none.
    """

    temperature: npt.NDArray[np.float64]  # 0 takes the likeliest token, the first of equals
    top_k: npt.NDArray[np.int64]  # 0 keeps all; 1 takes the likeliest token, the first of equals
    top_p: npt.NDArray[np.float64]  # of the probability that top-k has left; 1 keeps all
    min_p: npt.NDArray[np.float64]  # of the likeliest token's probability; 0 keeps all
    uniform: npt.NDArray[np.float32]  # in [0, 1), multiples of 2**-24: the random numbers

    @property
    def greedy(self) -> npt.NDArray[np.bool_]:
        greedy: npt.NDArray[np.bool_] = (self.temperature < MIN_TEMPERATURE) | (self.top_k == 1)
        return greedy

    def table(self) -> npt.NDArray[np.float32]:
        """(R, 5): log2(e) / temperature (0: greedy), top_k, top_p, -log2(min_p), uniform."""
        table = np.empty((len(self.uniform), 5), np.float32)
        table[:, 0] = ~self.greedy * LOG2_E / np.maximum(self.temperature, MIN_TEMPERATURE)
        table[:, 1] = np.minimum(self.top_k, MAX_VOCAB)
        table[:, 2] = self.top_p
        table[:, 3] = -np.log2(np.maximum(self.min_p, 2.0**-_MAX_Y))
        table[:, 4] = self.uniform
        return table


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


def sample_reference(logits: mx.array, draws: Draws) -> mx.array:
    """:func:`sample_tokens` in MLX operations: what a CPU runs, and what the kernel is held to."""
    table = draws.table()
    places: dict[_Kind, list[int]] = {}
    for row, kind in enumerate(_kinds(draws, logits.shape[-1])):
        places.setdefault(kind, []).append(row)
    rows_at_once = max(1, _PIECE // logits.shape[-1])
    drawn: list[mx.array] = []
    order: list[int] = []
    for kind, rows in places.items():
        for first in range(0, len(rows), rows_at_once):
            piece = rows[first : first + rows_at_once]
            if piece[-1] - piece[0] == len(piece) - 1:
                part = logits[piece[0] : piece[-1] + 1]  # a view, unlike logits[piece]
            else:
                part = logits[mx.array(piece)]
            if drawn:
                # Piece by piece: MLX would work on all of them in turns.
                part = mx.depends(part, drawn[-1])
            drawn.append(_draw(part, kind, table[piece]))
            order += piece
    tokens = mx.concatenate(drawn)
    return tokens if len(places) == 1 else tokens[mx.array(np.argsort(order))]


class _Kind(NamedTuple):
    """Rows that take the same operations."""

    greedy: bool
    top_k: int  # 0 where it excludes nothing
    by_top_p: bool
    by_min_p: bool


def _kinds(draws: Draws, vocab: int) -> Iterator[_Kind]:
    chosen = ~draws.greedy
    top_k = np.where(draws.top_k < vocab, draws.top_k, 0) * chosen
    columns = draws.greedy, top_k, (draws.top_p < 1) & chosen, (draws.min_p > 0) & chosen
    return map(_Kind, *(column.tolist() for column in columns))


def _draw(logits: mx.array, kind: _Kind, table: npt.NDArray[np.float32]) -> mx.array:
    if kind.greedy:
        return mx.argmax(logits, axis=-1).astype(mx.int32)
    logits = logits.astype(mx.float32)
    keys = _keys(logits, logits.max(axis=-1, keepdims=True), mx.array(table[:, 0:1]))
    weights = _weights(keys)
    best = keys
    if kind.top_k:
        best = _lowest(keys, kind.top_k)
        weights = _up_to(best[:, -1:], keys, weights)
    if kind.by_top_p:
        # A token stays if what comes before it is less than top-p of what top-k has left.
        mass = _share(weights.sum(axis=-1, keepdims=True), table[:, 2:3])
        weights = _up_to(_first_beyond(best, mx.maximum(mass, 1) - 1), keys, weights)
    if kind.by_min_p:
        limit = (table[:, 3:4].astype(np.float64) * 2**24).astype(np.int32)
        weights = _up_to(mx.array(limit), keys, weights)
    # Invert the cumulative distribution, in the order of the vocabulary.
    cumulative = mx.cumsum(weights, axis=-1)
    token = (cumulative <= _share(cumulative[:, -1:], table[:, 4:5])).sum(axis=-1)
    # Only logits that are not numbers lead beyond the end.
    return mx.minimum(token, logits.shape[-1] - 1).astype(mx.int32)


def _lowest(keys: mx.array, count: int) -> mx.array:
    """(R, count) the lowest of (R, n) ``keys``, the highest of them last."""
    rows, n = keys.shape
    if count * _BLOCK * 4 <= n:
        # They lie in the blocks with the lowest minima, which are few.
        keys = _padded(keys, _BLOCK).reshape(rows, -1, _BLOCK)
        blocks = mx.argpartition(keys.min(axis=-1), count - 1, axis=-1)[:, :count]
        keys = mx.take_along_axis(keys, blocks[:, :, None], axis=1).reshape(rows, -1)
    return mx.partition(keys, count - 1, axis=-1)[:, :count]


def _first_beyond(keys: mx.array, goal: mx.array) -> mx.array:
    """(R, 1) the lowest of (R, n) ``keys`` up to which the weights add up to more than ``goal``.

    Each round splits the keys at their median and goes on with the half in which that happens: as
    in quickselect the work is that of a few passes, but here the shapes depend on no data. If the
    weights do not suffice it is the highest key.
    """
    rounds = max(0, (keys.shape[-1] - 1) // _SORTED).bit_length()
    keys = _padded(keys, 1 << rounds)
    rows = mx.arange(keys.shape[0])[:, None]
    for _ in range(rounds):
        half = keys.shape[-1] // 2
        keys = mx.partition(keys, half - 1, axis=-1)
        mass = _weights(keys[:, :half]).sum(axis=-1, keepdims=True)
        upper = mass <= goal
        goal = goal - mass * upper
        keys = keys.reshape(-1, half)[(rows * 2 + upper).reshape(-1)]
    keys = mx.sort(keys, axis=-1)
    place = (mx.cumsum(_weights(keys), axis=-1) <= goal).sum(axis=-1, keepdims=True)
    return mx.take_along_axis(keys, mx.minimum(place, keys.shape[-1] - 1), axis=-1)


def _padded(keys: mx.array, multiple: int) -> mx.array:
    missing = -keys.shape[-1] % multiple
    return mx.pad(keys, [(0, 0), (0, missing)], constant_values=_NEVER) if missing else keys


@partial(mx.compile, shapeless=True)
def _keys(logits: mx.array, peak: mx.array, scale: mx.array) -> mx.array:
    return (mx.minimum((peak - logits) * scale, _MAX_Y) * 2.0**24).astype(mx.int32)


@partial(mx.compile, shapeless=True)
def _weights(keys: mx.array) -> mx.array:
    """int64 2 ** (40 - key / 2**24), rounded down; 2 ** the fraction is a multiple of 2**-24."""
    fraction = mx.bitwise_and(keys, 2**24 - 1).astype(mx.float32) * 2.0**-24
    power = mx.array(_COEFFICIENTS[-1])
    for coefficient in _COEFFICIENTS[-2::-1]:
        power = power * fraction + coefficient
    mantissa = mx.left_shift((power * 2.0**24).astype(mx.int64), 16)
    # At most 63: the weight is 0 from 41 on.
    return mx.right_shift(mantissa, mx.minimum(mx.right_shift(keys, 24), 63).astype(mx.int64))


def _up_to(limit: mx.array, keys: mx.array, weights: mx.array) -> mx.array:
    return weights * (keys <= limit)


def _share(total: mx.array, part: npt.NDArray[np.float32]) -> mx.array:
    """total * part, rounded down, without a product of more than 62 bits."""
    numerator = mx.array((np.minimum(part, 1).astype(np.float64) * 2**31).astype(np.int64))
    low = mx.bitwise_and(total, 2**31 - 1)
    return mx.right_shift(total, 31) * numerator + mx.right_shift(low * numerator, 31)
