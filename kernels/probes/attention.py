"""Probes of attention over pages: decodes and prompt chunks."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import mlx.core as mx
import numpy as np

from quire.kernels.choice.shapes import DecodeShape, MixedShape, PromptShape
from quire.kernels.decode_plan import (
    DecodePlan,
    DecodeSettings,
    default_settings,
    plan_on_device,
)
from quire.kernels.page_arrays import PageArrays
from quire.kernels.paged_attention import paged_attention, prompt_sdpa, prompt_tiles
from quire.kernels.paged_decode import paged_decode
from quire.kernels.probes.probe import Float64Array, Probe, ints, normal, to_float64
from quire.kernels.prompt_attention import plan_prompts, prompt_attention
from quire.kernels.ragged import DecodeGroup, PromptChunk, PromptPlan, RaggedBatch

_SOFTCAP = 30.0


class Pages:
    """Random keys and values of several sequences, blocks in random order.

    The first ``num_shared_blocks`` are the same for all sequences. There are ``num_rows`` queries,
    or as many as the shape has rows.
    """

    def __init__(
        self,
        shape: DecodeShape | PromptShape | MixedShape,
        lengths: list[int],
        dtype: mx.Dtype,
        seed: int,
        num_shared_blocks: int = 0,
        num_rows: int | None = None,
    ) -> None:
        self.shape, self.lengths = shape, lengths
        rng = np.random.default_rng(seed)
        keys = mx.random.split(mx.random.key(seed), 4)
        width = max(1, -(-max(lengths) // shape.block_size))
        num_blocks = 1 + num_shared_blocks + (width - num_shared_blocks) * len(lengths)
        pages = num_blocks, shape.kv_heads, shape.block_size
        self.keys = normal((*pages, shape.key_dim), dtype, keys[0])
        self.values = normal((*pages, shape.value_dim), dtype, keys[1])
        self.queries = normal(
            (num_rows or shape.rows, shape.heads, 1, shape.key_dim), dtype, keys[2]
        )
        # Block 0 is nobody's.
        blocks = 1 + rng.permutation(num_blocks - 1)
        shared, own = blocks[:num_shared_blocks], blocks[num_shared_blocks:]
        self.tables = np.empty((len(lengths), width), np.int32)
        self.tables[:, :num_shared_blocks] = shared
        self.tables[:, num_shared_blocks:] = own.reshape(len(lengths), -1)
        self.scale = shape.key_dim**-0.5
        self.sinks = normal((shape.heads,), dtype, keys[3]) if shape.sinks else None
        self.softcap = _SOFTCAP if shape.softcap else None
        longest = max(lengths)
        self.window = max(1, longest // 2) if shape.window else None
        visible = sum(min(n, self.window or n) for n in lengths)
        visible -= num_shared_blocks * shape.block_size * (len(lengths) - 1)
        per_token = shape.kv_heads * (shape.key_dim + shape.value_dim) * dtype.size
        self.num_bytes = visible * per_token + 2 * self.queries.nbytes

    def context(self, sequence: int) -> tuple[Float64Array, Float64Array]:
        """A sequence's keys and values, (kv_heads, length, dim)."""
        found = []
        for pages in to_float64([self.keys, self.values]):
            blocks = pages[self.tables[sequence]].swapaxes(0, 1)
            flat = blocks.reshape(blocks.shape[0], -1, blocks.shape[-1])
            found.append(flat[:, : self.lengths[sequence]])
        return found[0], found[1]

    def attention(self, sequence: int, rows: range, positions: range) -> Float64Array:
        """Attention of some query rows at their positions, (rows, heads, 1, value_dim)."""
        keys, values = self.context(sequence)
        (queries,) = to_float64([self.queries[rows.start : rows.stop]])
        shape = self.shape
        grouped = queries.reshape(len(rows), shape.kv_heads, -1, shape.key_dim)
        scores = np.einsum("rkgd,knd->rkgn", grouped, keys) * self.scale
        if self.softcap is not None:
            scores = self.softcap * np.tanh(scores / self.softcap)
        at, key_positions = np.array(positions)[:, None], np.arange(keys.shape[1])[None]
        visible = key_positions <= at
        if self.window is not None:
            visible &= key_positions > at - self.window
        scores = np.where(visible[:, None, None, :], scores, -np.inf)
        if self.sinks is not None:
            sinks = to_float64([self.sinks])[0].reshape(1, shape.kv_heads, -1, 1)
            scores = np.concatenate(
                [scores, np.broadcast_to(sinks, (*scores.shape[:3], 1))], axis=3
            )
        weights = np.exp(scores - scores.max(axis=3, keepdims=True))
        weights = (weights / weights.sum(axis=3, keepdims=True))[..., : keys.shape[1]]
        output = np.einsum("rkgn,knd->rkgd", weights, values)
        shaped: Float64Array = output.reshape(len(rows), shape.heads, 1, -1)
        return shaped


def decode_probe(shape: DecodeShape, dtype: mx.Dtype, seed: int, *, ragged: bool) -> Probe:
    """Contexts are ``context`` tokens long, or ``ragged``: of all lengths up to it."""
    lengths = [shape.context] * shape.rows
    if ragged:
        lengths = np.linspace(1, shape.context, shape.rows).astype(int).tolist()
    pages = Pages(shape, lengths, dtype, seed)
    context_lengths = np.array(lengths, np.int32)
    tables = ints(pages.tables)
    written = mx.zeros((1,), mx.int32)
    mx.eval(tables, written)
    plans: dict[DecodeSettings, DecodePlan] = {}
    default = default_settings(context_lengths, pages.window, shape.kv_heads, shape.group)

    def in_pages(settings: Mapping[str, int]) -> list[mx.array]:
        chosen = default._replace(**settings)
        # A step has one plan for all of its layers: it is not part of what is timed.
        if chosen not in plans:
            plans[chosen] = plan_on_device(context_lengths, pages.window, chosen)
        return [
            paged_decode(
                pages.queries,
                pages.keys,
                pages.values,
                tables,
                plans[chosen],
                scale=pages.scale,
                written=written,
                sinks=pages.sinks,
                softcap=pages.softcap,
            )
        ]

    batch = RaggedBatch([DecodeGroup(0, context_lengths, pages.tables)], [])

    def reference(settings: Mapping[str, int]) -> list[mx.array]:
        return [
            paged_attention(
                pages.queries,
                pages.keys,
                pages.values,
                batch,
                scale=pages.scale,
                window=pages.window,
                sinks=pages.sinks,
            )
        ]

    def expected() -> list[Float64Array]:
        rows = [pages.attention(i, range(i, i + 1), range(n - 1, n)) for i, n in enumerate(lengths)]
        return [np.concatenate(rows)]

    return Probe({"pages": in_pages, "reference": reference}, expected, pages.num_bytes)


def prompt_probe(shape: PromptShape, dtype: mx.Dtype, seed: int) -> Probe:
    pages = Pages(shape, [shape.context], dtype, seed)
    start = shape.context - shape.rows
    if shape.from_start != (start == 0):
        raise ValueError(f"{shape.rows} rows of {shape.context} tokens: from_start is wrong")
    written = mx.zeros((1,), mx.int32)
    new_keys, new_values = (_rows_of(pages, array) for array in (pages.keys, pages.values))
    mx.eval(written, new_keys, new_values)
    chunk = PromptChunk(0, shape.rows, shape.context, pages.tables[0])
    at_hand = (new_keys, new_values) if shape.from_start else (None, None)
    in_place = PageArrays(pages.keys, pages.values, written, *at_hand)

    plans: dict[str, PromptPlan] = {}  # one for all layers, as above

    def planned(variant: str) -> list[mx.array]:
        if variant not in plans:
            plans[variant] = plan_prompts(
                [chunk], pages.window, shape, lambda _: variant, dtype=dtype
            )
        return [
            prompt_attention(
                pages.queries,
                in_place,
                plans[variant],
                scale=pages.scale,
                window=pages.window,
                sinks=pages.sinks,
            )
        ]

    def over_context(attention: Callable[..., list[mx.array]]) -> list[mx.array]:
        first = chunk.first_block(chunk.start, pages.window, shape.block_size)
        blocks = chunk.blocks_from(first)
        keys, values = _joined(pages.keys[blocks]), _joined(pages.values[blocks])
        at = first * shape.block_size
        window, sinks = pages.window, pages.sinks
        parts = attention(pages.queries, keys, values, chunk, at, pages.scale, window, sinks)
        return [mx.concatenate(parts)]

    variants = {
        "pages": lambda settings: planned("pages"),
        "padded": lambda settings: planned("padded"),
        "alone": lambda settings: planned("alone"),
        "gather_sdpa": lambda settings: over_context(prompt_sdpa),
        "tiles": lambda settings: over_context(prompt_tiles),
    }

    def expected() -> list[Float64Array]:
        return [pages.attention(0, range(shape.rows), range(start, shape.context))]

    return Probe(variants, expected, pages.num_bytes)


def _rows_of(pages: Pages, array: mx.array) -> mx.array:
    """The context as the rows a step has just computed, (T, kv_heads, 1, dim)."""
    joined = _joined(array[ints(pages.tables[0])])
    return mx.contiguous(joined[:, :, : pages.lengths[0]].transpose(2, 1, 0, 3))


def _joined(blocks: mx.array) -> mx.array:
    count, kv_heads, block_size, dim = blocks.shape
    return blocks.swapaxes(0, 1).reshape(1, kv_heads, count * block_size, dim)
