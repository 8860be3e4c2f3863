"""Attention of prompt chunks that reads KV pages where they lie, on Metal and CUDA.

Chunks of any lengths go together, without padding and without a copy of their contexts: each is
cut into tiles of a few tokens. Where these are too few to fill the device, contexts are cut too,
and the parts merged by a second kernel (flash decoding: Dao et al., 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from quire.kernels.gpu_kernel import GpuKernel, TemplateValue, float_bits
from quire.kernels.heads import Heads, Scoring
from quire.kernels.padding import round_up_to_power_of_two
from quire.kernels.page_arrays import PageArrays
from quire.kernels.paged_decode import Partials, merge_items
from quire.kernels.ragged import PromptChunk
from quire.kernels.tree import Array, to_device

Int32Array = npt.NDArray[np.int32]

_SIMDGROUPS = 4
_ROWS = 16 * _SIMDGROUPS  # tokens times query heads of a key head, in one threadgroup
_MAX_GROUP = 16
_MAX_WHOLE = 256  # dimensions of values
_KEYS = 32  # in threadgroup memory at a time; half as many where they are too large
_ITEM = 8  # integers
# Contexts are cut if there are fewer threadgroups than this, into parts of no fewer tokens.
_WANTED_THREADGROUPS = 256
_MIN_PART = 512
_MAX_PARTS = 32
# Padding that costs nothing, so that sizes recur.
_LEAST_ITEMS, _LEAST_CHUNKS, _LEAST_WIDTH = 32, 8, 16

_prompt = GpuKernel(
    "paged_prompt",
    inputs=(
        *("queries", "key_pages", "value_pages"),
        *("block_tables", "items", "sinks", "fence"),
    ),
    outputs=("output", "stats"),
    headers=("fragments", "attention_fragments"),
)


@dataclass(frozen=True)
class TiledChunks:
    """Chunks cut into work items of the kernel; a node of a :mod:`quire.kernels.tree`.

    Attributes:
        num_rows: of all the chunks, and of rows behind them that mean nothing.
        items: (N, 8) int32: first row in the step, tokens, position of the first one, row of
            ``block_tables``, first key and end, first result, distance of the tokens' results.
        block_tables: (chunks, max_blocks) int32
        first_items: (num_rows + 1,) int32, where each row's partial results begin; None if there
            are only whole ones.
        num_results: of the items, one or more for each row.
    """

    num_rows: int
    items: Array
    block_tables: Array
    first_items: Array | None
    num_results: int


def plan_tiles(
    chunks: Sequence[PromptChunk], heads: Heads, num_padding_rows: int = 0
) -> TiledChunks:
    """Cut ``chunks`` into work items, on the host; the arrays have sizes that recur.

    Args:
        num_padding_rows: behind the last chunk; their results are zeros.
    """
    rows, done = [], 0
    for index, chunk in enumerate(chunks):
        rows.append((chunk.first_row, chunk.num_rows, chunk.start, index, done))
        done += chunk.num_rows
    if num_padding_rows:
        # Before any key: such rows see nothing.
        last = chunks[-1].first_row + chunks[-1].num_rows
        rows.append((last, num_padding_rows, -num_padding_rows, 0, done))
        done += num_padding_rows
    items = tile_rows(np.array(rows, np.int32), heads.group)
    if heads.window is not None:
        items[:, 4] = np.maximum(items[:, 2] - heads.window + 1, 0)
    items[:, 5] = items[:, 2] + items[:, 1]
    items, first_items, num_results = _cut_contexts(items, done, heads.kv_heads)
    width = round_up_to_power_of_two(max(len(chunk.block_ids) for chunk in chunks), _LEAST_WIDTH)
    block_tables = np.zeros((round_up_to_power_of_two(len(chunks), _LEAST_CHUNKS), width), np.int32)
    for row, chunk in enumerate(chunks):
        block_tables[row, : len(chunk.block_ids)] = chunk.block_ids
    if first_items is not None:
        num_results = round_up_to_power_of_two(num_results)
    padded = np.zeros((round_up_to_power_of_two(len(items), _LEAST_ITEMS), _ITEM), np.int32)
    padded[: len(items)] = items
    return TiledChunks(done, padded, block_tables, first_items, num_results)


def tile_chunks(
    chunks: Sequence[PromptChunk], heads: Heads, num_padding_rows: int = 0
) -> TiledChunks:
    """What :func:`plan_tiles` says, uploaded."""
    return to_device(plan_tiles(chunks, heads, num_padding_rows))


def paged_prompt(
    queries: mx.array,
    pages: PageArrays,
    chunks: TiledChunks,
    scoring: Scoring,
) -> mx.array:
    """Causal attention of the chunks' rows over their sequences' pages.

    Args:
        queries: (T, heads, 1, key_dim), all rows of the step, in the dtype of the pages.
        scoring: with the window that ``chunks`` were cut for.

    Returns:
        (chunks.num_rows, heads, 1, value_dim) in the dtype of ``queries``.
    """
    items = TileItems(chunks.items, chunks.num_results, is_whole=chunks.first_items is None)
    output, stats = attend_tiles(queries, pages, chunks.block_tables, items, scoring)
    if chunks.first_items is None:
        return output
    return merge_items(Partials(output, stats), chunks.first_items, scoring.sinks, queries.dtype)


class TileItems(NamedTuple):
    """Work items, each some rows over a stretch of the keys.

    Attributes:
        array: (N, 8) int32, as in :class:`TiledChunks`.
        num_results: of all items.
        is_whole: each result is of all keys that its row sees.
    """

    array: mx.array
    num_results: int
    is_whole: bool


def attend_tiles(
    queries: mx.array,
    pages: PageArrays,
    block_tables: mx.array,
    items: TileItems,
    scoring: Scoring,
) -> tuple[mx.array, mx.array]:
    """Attention of work items; what is not said here is as in :func:`paged_prompt`.

    Returns:
        (num_results, heads, 1, value_dim) in the dtype of ``queries`` and nothing if the items are
        whole, else the two arrays of :class:`Partials`.
    """
    heads, key_dim = queries.shape[1], queries.shape[3]
    kv_heads, block_size = pages.keys.shape[1:3]
    value_dim = pages.values.shape[3]
    num_results, is_whole = items.num_results, items.is_whole
    group = _group(heads // kv_heads)
    slices, width = _slices(value_dim)
    template: dict[str, TemplateValue] = {
        "T": queries.dtype,
        "OUT": queries.dtype if is_whole else mx.float32,
        "DK": key_dim,
        "DV": value_dim,
        "KV_HEADS": kv_heads,
        "HEADS_PER_KV": heads // kv_heads,
        "GROUP": group,
        "BLOCK_SIZE": block_size,
        **_threadgroup(key_dim, width),
        "WINDOW": scoring.window or 0,
        "DIRECT": is_whole,
        "HAS_SINKS": scoring.sinks is not None,
        "SCALE": float_bits(scoring.scale),
    }
    output, stats = _prompt(
        [
            queries,
            pages.keys,
            pages.values,
            block_tables,
            items.array,
            scoring.sinks,
            pages.needed_fence(),
        ],
        template=template,
        groups=(items.array.shape[0], kv_heads, -(-(heads // kv_heads) // group) * slices),
        threads=32 * _SIMDGROUPS,
        output_shapes=[
            (num_results, heads, 1, value_dim),
            (1,) if is_whole else (num_results, heads, 2),
        ],
        output_dtypes=[queries.dtype if is_whole else mx.float32, mx.float32],
    )
    return output, stats


def _slices(value_dim: int) -> tuple[int, int]:
    """Among how many threadgroups values are shared out, and how many dimensions each sums: all,
    if a lane has registers for that."""
    if value_dim <= _MAX_WHOLE:
        return 1, value_dim
    slices = -(-value_dim // (_MAX_WHOLE // 2 if mx.metal.is_available() else _MAX_WHOLE))
    return slices, -(-value_dim // slices // 8) * 8


def _threadgroup(key_dim: int, width: int) -> dict[str, TemplateValue]:
    """What the kernel's text is told of a threadgroup."""
    stages = _num_stages(key_dim, width)
    num_keys = _KEYS if _fits(_KEYS, stages, key_dim, width) else _KEYS // 2
    return {"SLICE": width, "SIMDGROUPS": _SIMDGROUPS, "KEYS": num_keys, "STAGES": stages}


def _num_stages(key_dim: int, width: int) -> int:
    """Threadgroup memory is for keys in use, and if there is enough of it, for those to come."""
    return 1 if mx.metal.is_available() or not _fits(_KEYS // 2, 2, key_dim, width) else 2


def _fits(num_keys: int, stages: int, key_dim: int, value_dim: int) -> bool:
    """Whether keys and values fit threadgroup memory: 32 KiB on Metal, 48 on CUDA."""
    of_key = 64 * (-(-key_dim // 32) | 1)
    of_value = 16 * (-(-value_dim // 16) * 2 | 1)
    return stages * num_keys * (of_key + of_value) <= (32 << 10) + (16 << 10) * (stages - 1)


def _group(heads_per_kv: int) -> int:
    """Query heads of a threadgroup: all that share a key head, unless they are too many."""
    return -(-heads_per_kv // -(-heads_per_kv // _MAX_GROUP))


def tile_rows(chunks: Int32Array, heads_per_kv: int) -> Int32Array:
    """Work items of chunks, without their keys: (N, 8), see :class:`TiledChunks`.

    Args:
        chunks: (n, 5) int32: first row in the step, rows, position of the first one, row of the
            block tables, first result.
    """
    first_row, num_rows, start, table, first_result = chunks.T
    tokens = _ROWS // _group(heads_per_kv)
    counts = -(-num_rows // tokens)
    of = np.repeat(np.arange(len(chunks)), counts)
    offsets = (np.arange(len(of)) - np.repeat(np.cumsum(counts) - counts, counts)) * tokens
    items = np.zeros((len(of), _ITEM), np.int32)
    items[:, 0] = first_row[of] + offsets
    items[:, 1] = np.minimum(tokens, num_rows[of] - offsets)
    items[:, 2] = start[of] + offsets
    items[:, 3] = table[of]
    items[:, 6] = first_result[of] + offsets
    items[:, 7] = 1
    return items


def _cut_contexts(
    items: Int32Array, num_rows: int, kv_heads: int
) -> tuple[Int32Array, Int32Array | None, int]:
    """Cut the keys of ``items`` into parts if that fills the device better.

    Returns the items, where each row's results begin (None: row i has result i), and their number.
    """
    keys = items[:, 5] - items[:, 4]
    room = _WANTED_THREADGROUPS // (len(items) * kv_heads)
    part = max(_MIN_PART, -(-int(keys.max()) // max(1, min(room, _MAX_PARTS))))
    counts = np.maximum(-(-keys // part), 1)
    if room < 2 or counts.max() == 1:
        return items, None, num_rows
    sizes = np.repeat(counts, items[:, 1])  # of each row: items are in the order of rows
    first_items = np.zeros(num_rows + 1, np.int32)
    np.cumsum(sizes, out=first_items[1:])
    cut = np.repeat(items, counts, axis=0)
    order = np.arange(len(cut)) - np.repeat(np.cumsum(counts) - counts, counts)
    cut[:, 4] += (order * part).astype(np.int32)
    cut[:, 5] = np.minimum(cut[:, 4] + part, cut[:, 5])
    cut[:, 6] = first_items[cut[:, 6]] + order
    cut[:, 7] = np.repeat(counts, counts)
    return cut, first_items, int(first_items[-1])
