"""Probes of a decode step between a block's projections."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import mlx.core as mx
import numpy as np

from quire.kernels.choice.shapes import DecodeShape, RotatingDecodeShape
from quire.kernels.decode_plan import default_settings, plan_on_device
from quire.kernels.kv_write import Slots, scatter
from quire.kernels.paged_attention import paged_attention
from quire.kernels.paged_decode import rotate_and_decode
from quire.kernels.probes.attention import Pages
from quire.kernels.probes.block import (
    EPS,
    inverse_frequencies,
    rotate_by_mlx,
    rotate_in_float64,
)
from quire.kernels.probes.probe import Float64Array, Probe, ints, normal, to_float64
from quire.kernels.ragged import DecodeGroup, RaggedBatch
from quire.kernels.rotate import HeadNorms, Rotary


def rotating_decode_probe(
    shape: RotatingDecodeShape, dtype: mx.Dtype, seed: int, *, ragged: bool
) -> Probe:
    """The result is attention and both page arrays, with the newest token of each row."""
    lengths = [shape.context] * shape.rows
    if ragged:
        lengths = np.linspace(1, shape.context, shape.rows).astype(int).tolist()
    heads, kv_heads, dim = shape.heads, shape.kv_heads, shape.head_dim
    decodes = DecodeShape(
        shape.rows, shape.context, heads, kv_heads, dim, dim, shape.block_size, shape.window
    )
    before = Pages(decodes, lengths, dtype, seed)
    random = mx.random.split(mx.random.key(seed + 1), 3)
    qkv = normal((shape.rows, (heads + 2 * kv_heads) * dim), dtype, random[0])
    weights = [normal((dim,), dtype, key) for key in random[1:]]
    positions = np.array(lengths, np.int32) - 1
    blocks = before.tables[np.arange(shape.rows), positions // shape.block_size]
    mapping = blocks * shape.block_size + positions % shape.block_size
    inverse = inverse_frequencies(shape.rotary_dim)
    position_array, tables, periods = ints(positions), ints(before.tables), 1 / inverse
    slots = Slots(ints(mapping), shape.block_size, mx.zeros((1,), mx.int32))
    # Each variant writes to pages of its own, whose results stay for the next call.
    joined_pages, own_pages = ([mx.array(p) for p in (before.keys, before.values)] for _ in "ab")
    mx.eval(position_array, tables, periods, slots.mapping, slots.after, joined_pages, own_pages)
    rotary = Rotary(inverse, shape.rotary_dim, shape.traditional)
    norms = HeadNorms(weights[0], weights[1], EPS) if shape.norms else None
    context_lengths = positions + 1
    settings = default_settings(context_lengths, before.window, kv_heads, heads // kv_heads)
    plan = plan_on_device(context_lengths, before.window, settings)
    batch = RaggedBatch([DecodeGroup(0, context_lengths, before.tables)], [])

    def joined(settings: Mapping[str, int]) -> list[mx.array]:
        output = rotate_and_decode(
            qkv,
            joined_pages[0],
            joined_pages[1],
            tables,
            plan,
            position_array,
            slots,
            rotary,
            norms,
            scale=before.scale,
        )
        return [output, *mx.depends(joined_pages, [output])]

    def apart(settings: Mapping[str, int]) -> list[mx.array]:
        queries, *new = rotate_by_mlx(qkv, weights, position_array, periods, shape)
        for pages, rows in zip(own_pages, new, strict=True):
            scatter(pages, rows, slots)
        keys, values = own_pages
        output = paged_attention(
            queries, keys, values, batch, scale=before.scale, window=before.window
        )
        return [output, *own_pages]

    def expected() -> list[Float64Array]:
        queries, *new = rotate_in_float64(qkv, weights, positions, inverse, shape)
        pages = to_float64([before.keys, before.values])
        for array, rows in zip(pages, new, strict=True):
            array[blocks, :, positions % shape.block_size] = rows
        after = copy.copy(before)
        after.queries = mx.array(queries[:, :, None].astype(np.float32))
        after.keys, after.values = (mx.array(array.astype(np.float32)) for array in pages)
        attended = [
            after.attention(i, range(i, i + 1), range(n - 1, n)) for i, n in enumerate(lengths)
        ]
        return [np.concatenate(attended), *pages]

    return Probe({"joined": joined, "apart": apart}, expected, before.num_bytes + qkv.nbytes)
