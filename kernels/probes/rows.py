"""Probes of KV writes, of gathered blocks and rows, and of sampling."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import mlx.core as mx
import numpy as np

from quire.kernels.choice.shapes import GatherShape, RowsShape, SampleShape, WriteShape
from quire.kernels.draws import Draws
from quire.kernels.kv_write import Slots, gather_context, scatter, write_in_place
from quire.kernels.probes.probe import Float64Array, Probe, ints, normal, to_float64
from quire.kernels.rows import join_rows, take_rows
from quire.kernels.sampling import sample_on_gpu, take_likeliest_on_gpu
from quire.kernels.sampling_reference import sample_reference
from quire.kernels.upload import begin_step


def write_probe(shape: WriteShape, dtype: mx.Dtype, seed: int) -> Probe:
    rng = np.random.default_rng(seed)
    num_blocks = 2 + -(-2 * shape.rows // shape.block_size)
    keys = mx.random.split(mx.random.key(seed), 4)
    dims = (shape.key_dim, shape.value_dim)
    size = shape.rows, shape.kv_heads, 1
    rows = [normal((*size, d), dtype, k) for d, k in zip(dims, keys[:2], strict=True)]

    def fresh_pages() -> list[mx.array]:
        sizes = num_blocks, shape.kv_heads, shape.block_size
        return [normal((*sizes, d), dtype, k) for d, k in zip(dims, keys[2:], strict=True)]

    # Block 0 is nobody's.
    free = np.arange(shape.block_size, num_blocks * shape.block_size)
    mapping = rng.permutation(free)[: shape.rows].astype(np.int32)
    # Each variant writes to pages of its own, whose results stay for the next call.
    in_place_pages, scatter_pages = fresh_pages(), fresh_pages()
    nothing_before = mx.zeros((1,), mx.int32)
    step = Slots(ints(mapping), shape.block_size, nothing_before)  # all layers share it
    mx.eval(nothing_before, step.mapping, step.indices(shape.kv_heads))

    def in_place(settings: Mapping[str, int]) -> list[mx.array]:
        pages, keep = in_place_pages, shape.keep_rows
        written = write_in_place(pages[0], pages[1], rows[0], rows[1], step, keep_rows=keep)
        kept = [] if written.keys is None or written.values is None else written[1:]
        return [*mx.depends(pages, [written.token]), *kept]

    def scattered(settings: Mapping[str, int]) -> list[mx.array]:
        for pages, new in zip(scatter_pages, rows, strict=True):
            scatter(pages, new, step)
        return [*scatter_pages, *(rows if shape.keep_rows else [])]

    def expected() -> list[Float64Array]:
        results = []
        for pages, new in zip(to_float64(fresh_pages()), to_float64(rows), strict=True):
            pages[mapping // shape.block_size, :, mapping % shape.block_size] = new[:, :, 0]
            results.append(pages)
        return results + (to_float64(rows) if shape.keep_rows else [])

    num_bytes = 2 * sum(new.nbytes for new in rows)
    return Probe({"in_place": in_place, "scatter": scattered}, expected, num_bytes)


def gather_probe(shape: GatherShape, dtype: mx.Dtype, seed: int) -> Probe:
    keys = mx.random.split(mx.random.key(seed), 2)
    num_blocks = 1 + shape.sequences * shape.blocks
    dims = shape.key_dim, shape.value_dim
    size = num_blocks, shape.kv_heads, shape.block_size
    pages = [normal((*size, dim), dtype, key) for dim, key in zip(dims, keys, strict=True)]
    order = 1 + np.random.default_rng(seed).permutation(num_blocks - 1)
    tables = order.reshape(shape.sequences, shape.blocks)
    block_ids, written = ints(tables), mx.zeros((1,), mx.int32)
    mx.eval(block_ids, written)

    def copied(settings: Mapping[str, int]) -> list[mx.array]:
        return list(gather_context(pages[0], pages[1], block_ids, written))

    def indexed(settings: Mapping[str, int]) -> list[mx.array]:
        gathered = [array[block_ids].swapaxes(1, 2) for array in pages]
        return [mx.contiguous(array.flatten(2, 3)) for array in gathered]

    def expected() -> list[Float64Array]:
        found = [array[tables].swapaxes(1, 2) for array in to_float64(pages)]
        return [array.reshape(*array.shape[:2], -1, array.shape[-1]) for array in found]

    num_bytes = 2 * sum(array.nbytes for array in pages)
    return Probe({"copy": copied, "index": indexed}, expected, num_bytes)


def rows_probe(shape: RowsShape, dtype: mx.Dtype, seed: int) -> Probe:
    """As attention uses them: three arrays of other widths, then one of them behind another."""
    keys = mx.random.split(mx.random.key(seed), 3)
    arrays = [
        normal((shape.rows, heads, 1, shape.dim), dtype, key)
        for heads, key in zip((4, 2, 2), keys, strict=True)
    ]
    rng = np.random.default_rng(seed)
    taken = ints(rng.integers(0, shape.rows, shape.rows + 3).astype(np.int32))
    joined = ints(rng.permutation(2 * shape.rows).astype(np.int32))
    mx.eval(taken, joined)

    def copied(settings: Mapping[str, int]) -> list[mx.array]:
        return [*take_rows(arrays, taken), join_rows(arrays[1], arrays[2], joined)]

    def indexed(settings: Mapping[str, int]) -> list[mx.array]:
        return [*(array[taken] for array in arrays), mx.concatenate(arrays[1:])[joined]]

    def expected() -> list[Float64Array]:
        a, b, c = to_float64(arrays)
        rows = np.array(taken)
        return [a[rows], b[rows], c[rows], np.concatenate([b, c])[np.array(joined)]]

    num_bytes = 2 * sum(array.nbytes for array in [*arrays, *arrays[1:]])
    return Probe({"copy": copied, "index": indexed}, expected, num_bytes)


def sample_probe(shape: SampleShape, dtype: mx.Dtype, seed: int) -> Probe:
    """Rows of logits with parameters of all kinds, if filtered, else with temperatures only.

    The difference is how far the random number lies outside the drawn token's stretch of the
    cumulative distribution; infinite if a filter excludes the token.
    """
    rng = np.random.default_rng(seed)
    logits = normal((shape.rows, shape.vocab), mx.float32, mx.random.key(seed)) * 3
    logits = logits.astype(dtype)
    mx.eval(logits)
    if shape.greedy:
        return _greedy_probe(logits)
    size = shape.rows
    draws = Draws(
        temperature=rng.choice([0.3, 0.7, 1.0, 1.5], size),
        top_k=rng.choice([0, 5, 40, shape.vocab], size) if shape.filtered else np.zeros(size, int),
        top_p=rng.choice([1.0, 0.95, 0.6], size) if shape.filtered else np.ones(size),
        min_p=rng.choice([0.0, 0.02], size) if shape.filtered else np.zeros(size),
        uniform=(rng.integers(0, 1 << 24, size) / (1 << 24)).astype(np.float32),
    )

    def distributions() -> list[Float64Array]:
        (rows,) = to_float64([logits])
        return [_kept_weights(row, draws, index) for index, row in enumerate(rows)]

    def expected() -> list[Float64Array]:
        tokens = []
        for weights, uniform in zip(distributions(), draws.uniform, strict=True):
            ends = np.cumsum(weights)
            tokens.append(float(np.searchsorted(ends, float(uniform) * ends[-1], "right")))
        return [np.array(tokens)]

    def difference(found: Sequence[Float64Array], wanted: Sequence[Float64Array]) -> float:
        worst = 0.0
        for weights, uniform, token in zip(
            distributions(), draws.uniform, found[0].astype(int), strict=True
        ):
            if not 0 <= token < shape.vocab or weights[token] == 0:
                return math.inf
            end = weights[: token + 1].sum() / weights.sum()
            start = end - weights[token] / weights.sum()
            worst = max(worst, start - float(uniform), float(uniform) - end)
        return worst

    def kernel(settings: Mapping[str, int]) -> list[mx.array]:
        begin_step()  # it uploads parameters, once a step
        return [sample_on_gpu(logits, draws)]

    variants = {
        "kernel": kernel,
        "bisect": lambda settings: [sample_reference(logits, draws)],
    }
    return Probe(variants, expected, logits.nbytes, difference)


def _greedy_probe(logits: mx.array) -> Probe:
    def expected() -> list[Float64Array]:
        return [rows.argmax(axis=-1).astype(np.float64) for rows in to_float64([logits])]

    variants = {
        "kernel": lambda settings: [take_likeliest_on_gpu(logits)],
        "bisect": lambda settings: [mx.argmax(logits, axis=-1)],
    }
    return Probe(variants, expected, logits.nbytes)


def _kept_weights(logits: Float64Array, draws: Draws, row: int) -> Float64Array:
    """Weights relative to the likeliest token, 0 for those a filter of ``row`` excludes."""
    distance = (logits.max() - logits) * (np.log2(np.e) / draws.temperature[row])
    weights: Float64Array = 2.0**-distance
    order = np.sort(distance)
    # Equals stay together: they count as one to the precision of float32.
    slack = 2.0**-20
    if rank := int(draws.top_k[row]):
        weights[distance > order[min(rank, len(order)) - 1] + slack] = 0
    if draws.top_p[row] < 1:
        before = np.cumsum(2.0**-order) - 2.0**-order
        before, order = before[: np.count_nonzero(weights)], order[: np.count_nonzero(weights)]
        last = np.flatnonzero(before < draws.top_p[row] * weights.sum())[-1]
        weights[distance > order[last] + slack] = 0
    if draws.min_p[row] > 0:
        weights[distance > -np.log2(draws.min_p[row]) + slack] = 0
    return weights
