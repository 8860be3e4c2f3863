"""Probes of the attention of a step that decodes and computes prompts."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate, pairwise

import mlx.core as mx
import numpy as np

from quire.kernels.choice.shapes import MixedShape, PromptShape
from quire.kernels.decode_plan import default_settings, plan_on_device
from quire.kernels.page_arrays import PageArrays
from quire.kernels.paged_attention import paged_attention
from quire.kernels.paged_decode import paged_decode
from quire.kernels.paged_prompt import paged_prompt, tile_chunks
from quire.kernels.probes.attention import Pages
from quire.kernels.probes.probe import Float64Array, Probe, ints
from quire.kernels.prompt_attention import plan_prompts, prompt_attention
from quire.kernels.ragged import DecodeGroup, PromptChunk, RaggedBatch

_PROMPTS = 85, 40  # rows


def mixed_probe(shape: MixedShape, dtype: mx.Dtype, seed: int, *, ragged: bool) -> Probe:
    """Decodes see ``context`` tokens, or ``ragged``: of all lengths up to it."""
    lengths = [shape.context] * shape.rows
    if ragged:
        lengths = np.linspace(1, shape.context, shape.rows).astype(int).tolist()
    pages = Pages(shape, [*lengths, *_PROMPTS], dtype, seed, num_rows=shape.rows + sum(_PROMPTS))
    firsts = list(accumulate([1] * shape.rows + list(_PROMPTS), initial=0))
    chunks = [
        PromptChunk(first, end - first, n, table[: -(-n // shape.block_size)])
        for (first, end), n, table in zip(
            pairwise(firsts), pages.lengths, pages.tables, strict=True
        )
    ]
    prompts = chunks[shape.rows :]
    contexts = np.array(lengths, np.int32)
    written, tables = mx.zeros((1,), mx.int32), ints(pages.tables[: shape.rows])
    mx.eval(written, tables)
    scale, window, sinks = pages.scale, pages.window, pages.sinks
    tiles = tile_chunks(chunks, window, shape.heads, shape.kv_heads)

    def together(settings: Mapping[str, int]) -> list[mx.array]:
        output = paged_prompt(
            pages.queries, pages.keys, pages.values, tiles,
            scale=scale, written=written, sinks=sinks,
        )  # fmt: skip
        return [output]

    group = DecodeGroup(0, contexts, pages.tables[: shape.rows])
    batch = RaggedBatch([group], prompts)
    plan = plan_on_device(
        contexts, window, default_settings(contexts, window, shape.kv_heads, shape.group)
    )
    layer = PromptShape(1, 1, *shape[2:7], window=shape.window, sinks=shape.sinks)
    variant = "alone" if dtype == mx.float32 else "pages"
    others = plan_prompts(
        prompts, window, layer, lambda _: variant, dtype=dtype, num_before=shape.rows
    )

    def apart(settings: Mapping[str, int]) -> list[mx.array]:
        if mx.default_device() == mx.cpu:
            arrays = pages.queries, pages.keys, pages.values
            output = paged_attention(*arrays, batch, scale=scale, window=window, sinks=sinks)
            return [output]
        decoded = paged_decode(
            pages.queries[: shape.rows], pages.keys, pages.values, tables, plan,
            scale=scale, written=written, sinks=sinks,
        )  # fmt: skip
        in_place = PageArrays(pages.keys, pages.values, written, None, None)
        output = prompt_attention(
            pages.queries, in_place, others,
            scale=scale, window=window, sinks=sinks, before=decoded,
        )  # fmt: skip
        return [output]

    def expected() -> list[Float64Array]:
        rows = [range(first, end) for first, end in pairwise(firsts)]
        positions = [range(chunk.start, chunk.context_length) for chunk in chunks]
        parts = map(pages.attention, range(len(chunks)), rows, positions)
        return [np.concatenate(list(parts))]

    return Probe({"together": together, "apart": apart}, expected, pages.num_bytes)
