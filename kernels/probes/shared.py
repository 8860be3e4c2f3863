"""Probes of decodes whose contexts begin with the same blocks."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from quire.kernels.choice.shapes import DecodeShape, SharedShape
from quire.kernels.decode_plan import DecodePlan, default_settings, plan_on_device
from quire.kernels.paged_attention import paged_attention
from quire.kernels.paged_decode import paged_decode
from quire.kernels.probes.attention import Pages
from quire.kernels.probes.probe import Float64Array, Probe, ints
from quire.kernels.ragged import DecodeGroup, RaggedBatch, SharedRun
from quire.kernels.shared_context import attend_shared, plan_shared


def shared_probe(shape: SharedShape, dtype: mx.Dtype, seed: int, *, ragged: bool) -> Probe:
    """The whole blocks of ``context``, at least one, and behind them ``own`` tokens of each row,
    or ``ragged``: of all lengths up to it."""
    num_blocks = max(1, shape.context // shape.block_size)
    own = np.full(shape.rows, shape.own)
    if ragged:
        own = np.linspace(1, shape.own, shape.rows).astype(int)
    lengths = (num_blocks * shape.block_size + own).astype(np.int32)
    decodes = DecodeShape(shape.rows, int(lengths.max()), *shape[3:8], sinks=shape.sinks)
    pages = Pages(decodes, lengths.tolist(), dtype, seed, num_blocks)
    tables = ints(pages.tables)
    written = mx.zeros((1,), mx.int32)
    mx.eval(tables, written)
    run = SharedRun(0, shape.rows, num_blocks * shape.block_size)
    # A step has one plan for all of its layers: it is not part of what is timed.
    plans = {"together": _plan(shape, lengths, [run]), "each": _plan(shape, lengths, [])}

    def decode(plan: DecodePlan) -> list[mx.array]:
        decoding = pages.queries, pages.keys, pages.values, tables, plan
        shared = attend_shared(*decoding, scale=pages.scale, written=written)
        return [
            paged_decode(
                *decoding, scale=pages.scale, written=written, sinks=pages.sinks, shared=shared
            )
        ]

    batch = RaggedBatch([DecodeGroup(0, lengths, pages.tables, num_blocks)], [])

    def reference(settings: Mapping[str, int]) -> list[mx.array]:
        return [
            paged_attention(
                pages.queries,
                pages.keys,
                pages.values,
                batch,
                scale=pages.scale,
                sinks=pages.sinks,
            )
        ]

    variants = {
        "together": lambda settings: decode(plans["together"]),
        "each": lambda settings: decode(plans["each"]),
        "reference": reference,
    }

    def expected() -> list[Float64Array]:
        rows = [
            pages.attention(i, range(i, i + 1), range(n - 1, n))
            for i, n in enumerate(lengths.tolist())
        ]
        return [np.concatenate(rows)]

    return Probe(variants, expected, pages.num_bytes)


def _plan(shape: SharedShape, lengths: npt.NDArray[np.int32], runs: list[SharedRun]) -> DecodePlan:
    """As the engine plans a step: what a row reads by itself decides the settings."""
    shared, own = None, lengths
    if runs:
        shared = plan_shared(runs, shape.rows, shape.heads, shape.kv_heads)
        own = lengths - shared.num_tokens
    settings = default_settings(own, None, shape.kv_heads, shape.group)
    return plan_on_device(lengths, None, settings, shared)
