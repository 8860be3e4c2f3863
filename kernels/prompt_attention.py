"""Attention of a step's prompt chunks over pages that kernels have written.

A kernel takes chunks of any lengths from the pages. Long ones are faster with MLX's fused
attention, to which chunks come in one of two ways. One call for each chunk needs no padding. On
CUDA, though, MLX prepares a plan of some 60 ms for every new pair of lengths, and many short chunks
are many small launches: there chunks of similar lengths are padded to a few sizes and go together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from quire.kernels.kv_write import gather_context
from quire.kernels.padding import capacity
from quire.kernels.page_arrays import PageArrays
from quire.kernels.paged_attention import prompt_sdpa
from quire.kernels.paged_prompt import TiledChunks, paged_prompt, plan_tiles
from quire.kernels.ragged import PromptChunk
from quire.kernels.rows import join_rows, take_rows
from quire.kernels.tree import Array

if TYPE_CHECKING:
    from quire.kernels.prompt_attention_spec import PromptShape

Int32Array = npt.NDArray[np.int32]

_sdpa: Callable[..., mx.array] = mx.fast.scaled_dot_product_attention

_MIN_ROWS, _MIN_KEYS = 16, 128
# Long chunks that begin and end at multiples of this go alone and unpadded: their lengths recur.
_ALIGNED = 256
_MIN_ALONE = 1024  # rows
# Below this many scores a head, padding costs less than another batch would.
_SMALL = 1 << 18


@dataclass(frozen=True)
class PaddedChunks:
    """Chunks of similar lengths as one batch; a node of a :mod:`quire.kernels.tree`.

    Attributes:
        count: B, chunks in the batch, padding included.
        num_rows: n, rows of each chunk, padding included.
        rows: (B * n,) int32, the row of the step that each query is; None if they lie in order.
        first_row: of the first chunk, where they lie in order.
        block_ids: (B, blocks) int32, padded with the scratch block.
        starts: (B, 1, 1, 1) int32, position of each chunk's first row; None if nothing precedes the
            chunks.
        first_keys: (B, 1, 1, 1) int32, position of each chunk's first key; None likewise.
        num_keys: of each chunk, padding included.
        window: tokens a row sees, itself included; None: all.
        is_masked: whether attention needs ``visible``. Else each query sees the keys up to its own
            place, as MLX's attention can tell by itself.
        visible: (B or 1, 1, n, keys) bool, which keys a query sees; made on the device.
    """

    count: int
    num_rows: int
    rows: Array | None
    first_row: int
    block_ids: Array
    starts: Array | None
    first_keys: Array | None
    num_keys: int
    window: int | None
    is_masked: bool
    visible: mx.array | None = None

    @property
    def is_fresh(self) -> bool:
        """Whether nothing precedes the chunks."""
        return self.starts is None

    def on_device(self) -> PaddedChunks:
        """With the mask, which all layers share."""
        if not self.is_masked or self.visible is not None:
            return self
        if self.starts is None or self.first_keys is None:
            places = mx.arange(self.num_rows)
            return replace(self, visible=(places <= places[:, None])[None, None])
        queries = self.starts + mx.arange(self.num_rows).reshape(1, 1, -1, 1)
        keys = self.first_keys + mx.arange(self.num_keys).reshape(1, 1, 1, -1)
        visible = keys <= queries
        if self.window is not None:
            visible = visible & (keys > queries - self.window)
        return replace(self, visible=visible)


@dataclass(frozen=True)
class PromptPlan:
    """How the chunks of a step are brought to attention; a node of a :mod:`quire.kernels.tree`.

    Attributes:
        tiled: chunks that the kernel takes; their results come first.
        padded: batches of padded chunks.
        alone: chunks that go one by one; their results follow those of ``padded``.
        order: (rows,) int32, where the rows of the step are in the results of the rows in front,
            followed by those above; None if in order and there are none in front.
    """

    tiled: TiledChunks | None
    padded: list[PaddedChunks]
    alone: list[PromptChunk]
    order: Array | None

    @property
    def needs_new_rows(self) -> bool:
        """Whether new keys and values are read as rows and not from their pages."""
        fresh = any(chunks.is_fresh for chunks in self.padded)
        return fresh or any(chunk.start == 0 for chunk in self.alone)


_Groups = dict[tuple[int, int], list[PromptChunk]]  # by rows and keys, both padded


class PromptVariant(Enum):
    """How a chunk is computed."""

    PAGED_KERNEL = "paged_kernel"
    SDPA_PADDED = "sdpa_padded"  # MLX's fused attention, chunks of similar lengths together
    SDPA_PER_CHUNK = "sdpa_per_chunk"  # the same once for each chunk, unpadded
    GATHER_SDPA = "gather_sdpa"  # the same over pages that MLX writes
    SDPA_TILED = "sdpa_tiled"  # by tiles of rows, in MLX's operations


def plan_prompts(
    chunks: Sequence[PromptChunk],
    window: int | None,
    layer: PromptShape,
    variant_of: Callable[[PromptChunk], PromptVariant],
    *,
    dtype: mx.Dtype,
    num_before: int = 0,
    num_padding_rows: int = 0,
) -> PromptPlan:
    """The plan of consecutive ``chunks``, on the host.

    Args:
        layer: what the chunks have in common; its rows and context do not matter.
        variant_of: how a chunk is to be computed: by the kernel, padded with others, or else on
            its own. Long ones whose lengths recur anyway are not padded all the same.
        dtype: of queries, keys and values.
        num_before: rows of the step in front of the chunks, whose attention is computed elsewhere.
        num_padding_rows: behind the chunks; their results mean nothing.
    """
    fresh: _Groups = {}
    others: _Groups = {}
    tiled = []
    alone = []
    for chunk in chunks:
        variant = variant_of(chunk)
        rows = capacity(chunk.num_rows, _MIN_ROWS)
        is_fresh = chunk.start == 0 and (window is None or window >= rows)
        fills = is_fresh and chunk.num_rows == rows  # so that nothing is padded
        if variant is PromptVariant.PAGED_KERNEL:
            tiled.append(chunk)
        elif variant is not PromptVariant.SDPA_PADDED or (
            is_aligned(chunk.start, chunk.num_rows) and not fills
        ):
            alone.append(chunk)
        elif is_fresh:
            fresh.setdefault((rows, rows), []).append(chunk)
        else:
            first = chunk.first_block(chunk.start, window, layer.block_size)
            keys = capacity(chunk.context_length - first * layer.block_size, _MIN_KEYS)
            others.setdefault((rows, keys), []).append(chunk)
    if len(tiled) == len(chunks):
        whole = plan_tiles(tiled, window, layer.heads, layer.kv_heads, num_padding_rows)
        as_they_are = np.arange(num_before + whole.num_rows, dtype=np.int32)
        return PromptPlan(whole, [], [], as_they_are if num_before else None)
    first_row = chunks[0].first_row
    order = np.zeros(
        num_before + sum(chunk.num_rows for chunk in chunks) + num_padding_rows, np.int32
    )
    order[:num_before] = np.arange(num_before)
    done = num_before

    def place(chunk: PromptChunk, at: int) -> None:
        start = num_before + chunk.first_row - first_row
        order[start : start + chunk.num_rows] = np.arange(at, at + chunk.num_rows)

    for chunk in tiled:
        place(chunk, done)
        done += chunk.num_rows
    padded = []
    for is_fresh, (rows, keys), members in (
        *((True, *group) for group in _merge_small(fresh).items()),
        *((False, *group) for group in _merge_small(others).items()),
    ):
        padded.append(_pad_chunks(members, rows, keys, window, layer.block_size, is_fresh, dtype))
        for i, chunk in enumerate(members):
            place(chunk, done + i * rows)
        done += rows * capacity(len(members), 1)
    for chunk in alone:
        place(chunk, done)
        done += chunk.num_rows
    # Even then those in front are joined to them in one launch.
    in_order = not num_before and done == len(order) and bool((np.diff(order) == 1).all())
    return PromptPlan(
        plan_tiles(tiled, window, layer.heads, layer.kv_heads) if tiled else None,
        padded,
        alone,
        None if in_order else order,
    )


def prompt_attention(
    queries: mx.array,
    pages: PageArrays,
    plan: PromptPlan,
    *,
    scale: float,
    window: int | None,
    sinks: mx.array | None,
    before: mx.array | None = None,
) -> mx.array:
    """Causal attention of all prompt rows of a step over their own sequences.

    Args:
        queries: (T, heads, 1, key_dim), all rows of the step.
        pages: written in place.
        window: the one ``plan`` was made for.
        sinks: (heads,) logits that take part in the softmax but have no value.
        before: (num_before, heads, 1, value_dim), results of the rows in front, if there are any.

    Returns:
        (rows, heads, 1, value_dim), those in front and the prompt rows in the order of the step.
    """
    outputs = []
    if plan.tiled is not None:
        assert pages.written is not None
        tiled = paged_prompt(
            queries,
            pages.keys,
            pages.values,
            plan.tiled,
            scale=scale,
            written=pages.written,
            sinks=sinks,
        )
        outputs.append(tiled)
    outputs += [_attend_padded(queries, pages, chunks, scale, sinks) for chunks in plan.padded]
    block_size = pages.keys.shape[2]
    for chunk in plan.alone:
        rows = slice(chunk.first_row, chunk.first_row + chunk.num_rows)
        if chunk.start == 0 and pages.new_keys is not None and pages.new_values is not None:
            # All it can see was computed in this very step.
            first = 0
            keys = pages.new_keys[rows].transpose(2, 1, 0, 3)
            values = pages.new_values[rows].transpose(2, 1, 0, 3)
        else:
            first = chunk.first_block(chunk.start, window, block_size)
            keys, values = _gather(pages, chunk.blocks_from(first)[None])
        outputs += prompt_sdpa(
            queries[rows], keys, values, chunk, first * block_size, scale, window, sinks
        )
    output = outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)
    if plan.order is None:
        assert before is None, "a plan made without the rows in front"
        return output
    if before is None:
        return take_rows([output], plan.order)[0]
    return join_rows(before, output, plan.order)


def _attend_padded(
    queries: mx.array,
    pages: PageArrays,
    chunks: PaddedChunks,
    scale: float,
    sinks: mx.array | None,
) -> mx.array:
    if chunks.is_fresh and pages.new_keys is not None and pages.new_values is not None:
        queries, keys, values = _batch([queries, pages.new_keys, pages.new_values], chunks)
    else:
        (queries,) = _batch([queries], chunks)
        keys, values = _gather(pages, chunks.block_ids)
    if chunks.is_fresh:
        # Whole blocks may hold more than the rows; causal attention aligns both at the end.
        keys, values = keys[:, :, : chunks.num_rows], values[:, :, : chunks.num_rows]
    output = _sdpa(
        queries,
        keys,
        values,
        scale=scale,
        mask="causal" if chunks.visible is None else chunks.visible,
        sinks=sinks,
    )
    rows = chunks.count * chunks.num_rows
    return output.transpose(0, 2, 1, 3).reshape(rows, queries.shape[1], 1, -1)


def _gather(pages: PageArrays, blocks: mx.array) -> tuple[mx.array, mx.array]:
    assert pages.written is not None, "pages that MLX writes need no kernel to be read"
    return gather_context(pages.keys, pages.values, blocks, pages.written)


def _batch(arrays: list[mx.array], chunks: PaddedChunks) -> list[mx.array]:
    """Rows (T, heads, 1, dim) of the step -> (B, heads, n, dim)."""
    if chunks.rows is None:
        last = chunks.first_row + chunks.count * chunks.num_rows
        rows = [
            array if last - chunks.first_row == len(array) else array[chunks.first_row : last]
            for array in arrays
        ]
    else:
        rows = take_rows(arrays, chunks.rows)
    shape = chunks.count, chunks.num_rows
    return [x.reshape(*shape, x.shape[1], x.shape[3]).transpose(0, 2, 1, 3) for x in rows]


def _pad_chunks(
    chunks: list[PromptChunk],
    num_rows: int,
    num_keys: int,
    window: int | None,
    block_size: int,
    is_fresh: bool,
    dtype: mx.Dtype,
) -> PaddedChunks:
    count = capacity(len(chunks), 1)
    rows = np.zeros((count, num_rows), np.int32)
    block_ids = np.zeros((count, -(-num_keys // block_size)), np.int32)
    starts = np.zeros(count, np.int32)  # position of the first row
    firsts = np.zeros(count, np.int32)  # position of the first key
    for i, chunk in enumerate(chunks):
        last = chunk.first_row + chunk.num_rows - 1
        rows[i] = np.minimum(np.arange(chunk.first_row, chunk.first_row + num_rows), last)
        first = chunk.first_block(chunk.start, window, block_size)
        block_ids[i, : len(chunk.block_ids) - first] = chunk.block_ids[first:]
        starts[i], firsts[i] = chunk.start, first * block_size
    flat = rows.reshape(-1)
    in_order = bool((np.diff(flat) == 1).all())
    return PaddedChunks(
        count,
        num_rows,
        None if in_order else flat,
        int(flat[0]) if in_order else 0,
        block_ids,
        None if is_fresh else starts.reshape(-1, 1, 1, 1),
        None if is_fresh else firsts.reshape(-1, 1, 1, 1),
        block_ids.shape[1] * block_size,
        window,
        # Otherwise MLX's attention would make the same mask in every layer.
        not is_fresh or _lacks_fused_attention(dtype),
    )


def _lacks_fused_attention(dtype: mx.Dtype) -> bool:
    """Whether MLX makes attention of other operations: of float32 everywhere but on Metal."""
    return dtype == mx.float32 and not mx.metal.is_available()


def _merge_small(groups: _Groups) -> _Groups:
    """Join the groups of small sizes as far as the joint size is small too."""
    merged: _Groups = {}
    small: tuple[int, int] | None = None
    for size, members in sorted(groups.items()):
        joint = size if small is None else (max(size[0], small[0]), max(size[1], small[1]))
        if small is not None and joint[0] * joint[1] <= _SMALL:
            members = merged.pop(small) + members
            size = joint
        merged.setdefault(size, []).extend(members)
        if size[0] * size[1] <= _SMALL:
            small = size
    return merged


def is_aligned(start: int, num_rows: int) -> bool:
    """Whether a chunk goes alone and unpadded because its lengths recur anyway."""
    aligned = start % _ALIGNED == 0 and num_rows % _ALIGNED == 0
    return aligned and num_rows >= _MIN_ALONE
