"""How the prompt chunks of a step are brought to attention.

A kernel takes chunks of any lengths from the pages. Long ones are faster with MLX's fused
attention, to which chunks come in one of two ways. One call for each chunk needs no padding. On
CUDA, though, MLX prepares a plan of some 60 ms for every new pair of lengths, and many short chunks
are many small launches: there chunks of similar lengths are padded to a few sizes and go together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from quire.kernels.heads import Heads
from quire.kernels.padding import CONSTANT_SIZE, round_up_to_power_of_two
from quire.kernels.paged_prompt import TiledChunks, plan_tiles
from quire.kernels.ragged import PromptChunk
from quire.kernels.tree import Array

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


class _PaddedSize(NamedTuple):
    """What chunks of one batch are padded to."""

    rows: int
    keys: int
    is_fresh: bool  # nothing precedes the rows

    @property
    def is_small(self) -> bool:
        return self.rows * self.keys <= _SMALL

    def joined(self, other: _PaddedSize) -> _PaddedSize:
        """The least size of both."""
        rows, keys = max(self.rows, other.rows), max(self.keys, other.keys)
        return _PaddedSize(rows, keys, self.is_fresh)


_Groups = dict[_PaddedSize, list[PromptChunk]]


class PromptVariant(Enum):
    """How a chunk is computed."""

    PAGED_KERNEL = "paged_kernel"
    SDPA_PADDED = "sdpa_padded"  # MLX's fused attention, chunks of similar lengths together
    SDPA_PER_CHUNK = "sdpa_per_chunk"  # the same once for each chunk, unpadded
    SDPA_PIECES = "sdpa_pieces"  # MLX's attention of latent chunks, some rows at a time
    GATHER_SDPA = "gather_sdpa"  # the same over pages that MLX writes
    SDPA_TILED = "sdpa_tiled"  # by tiles of rows, in MLX's operations


def plan_prompts(
    chunks: Sequence[PromptChunk],
    heads: Heads,
    block_size: int,
    variant_of: Callable[[PromptChunk], PromptVariant],
    *,
    num_before: int = 0,
    num_padding_rows: int = 0,
) -> PromptPlan:
    """The plan of consecutive ``chunks``, on the host.

    Args:
        variant_of: how a chunk is to be computed: by the kernel, padded with others, or else on
            its own. Long ones whose lengths recur anyway are not padded all the same.
        num_before: rows of the step in front of the chunks, whose attention is computed elsewhere.
        num_padding_rows: behind the chunks; their results mean nothing.
    """
    tiled, alone, padded = _sort(chunks, heads, block_size, variant_of)
    if len(tiled) == len(chunks):
        whole = plan_tiles(tiled, heads, num_padding_rows)
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
    batches = []
    for size, members in padded:
        batches.append(_pad_chunks(members, size, heads, block_size))
        for i, chunk in enumerate(members):
            place(chunk, done + i * size.rows)
        done += size.rows * round_up_to_power_of_two(len(members), 1)
    for chunk in alone:
        place(chunk, done)
        done += chunk.num_rows
    # Even then those in front are joined to them in one launch.
    in_order = not num_before and done == len(order) and bool((np.diff(order) == 1).all())
    return PromptPlan(
        plan_tiles(tiled, heads) if tiled else None, batches, alone, None if in_order else order
    )


def _sort(
    chunks: Sequence[PromptChunk],
    heads: Heads,
    block_size: int,
    variant_of: Callable[[PromptChunk], PromptVariant],
) -> tuple[list[PromptChunk], list[PromptChunk], list[tuple[_PaddedSize, list[PromptChunk]]]]:
    """Chunks for the kernel, chunks that go alone, and the batches of padded chunks."""
    tiled, alone = [], []
    padded: dict[bool, _Groups] = {True: {}, False: {}}  # by whether nothing precedes the chunks
    for chunk in chunks:
        variant = variant_of(chunk)
        rows = round_up_to_power_of_two(chunk.num_rows, _MIN_ROWS)
        is_fresh = chunk.start == 0 and (heads.window is None or heads.window >= rows)
        fills = is_fresh and chunk.num_rows == rows  # so that nothing is padded
        if variant is PromptVariant.PAGED_KERNEL:
            tiled.append(chunk)
        elif variant is not PromptVariant.SDPA_PADDED or (
            is_aligned(chunk.start, chunk.num_rows) and not fills
        ):
            alone.append(_with_enough_blocks(chunk, heads.window, block_size))
        else:
            keys = rows
            if not is_fresh:
                first = chunk.first_block(chunk.start, heads.window, block_size)
                keys = round_up_to_power_of_two(
                    chunk.context_length - first * block_size, _MIN_KEYS
                )
            size = _PaddedSize(rows, keys, is_fresh)
            padded[is_fresh].setdefault(size, []).append(chunk)
    batches = [batch for groups in padded.values() for batch in _merge_small(groups).items()]
    return tiled, alone, batches


def _with_enough_blocks(chunk: PromptChunk, window: int | None, block_size: int) -> PromptChunk:
    first = chunk.first_block(chunk.start, window, block_size)
    missing = max(0, first + CONSTANT_SIZE - len(chunk.block_ids))
    return replace(chunk, block_ids=np.pad(chunk.block_ids, (0, missing))) if missing else chunk


def _pad_chunks(
    chunks: list[PromptChunk], size: _PaddedSize, heads: Heads, block_size: int
) -> PaddedChunks:
    count = round_up_to_power_of_two(len(chunks), 1)
    rows = np.zeros((count, size.rows), np.int32)
    width = max(-(-size.keys // block_size), -(-CONSTANT_SIZE // count))
    block_ids = np.zeros((count, width), np.int32)
    starts = np.zeros(count, np.int32)  # position of the first row
    firsts = np.zeros(count, np.int32)  # position of the first key
    for i, chunk in enumerate(chunks):
        last = chunk.first_row + chunk.num_rows - 1
        rows[i] = np.minimum(np.arange(chunk.first_row, chunk.first_row + size.rows), last)
        first = chunk.first_block(chunk.start, heads.window, block_size)
        block_ids[i, : len(chunk.block_ids) - first] = chunk.block_ids[first:]
        starts[i], firsts[i] = chunk.start, first * block_size
    flat = rows.reshape(-1)
    in_order = bool((np.diff(flat) == 1).all())
    return PaddedChunks(
        count,
        size.rows,
        None if in_order else flat,
        int(flat[0]) if in_order else 0,
        block_ids,
        None if size.is_fresh else starts.reshape(-1, 1, 1, 1),
        None if size.is_fresh else firsts.reshape(-1, 1, 1, 1),
        block_ids.shape[1] * block_size,
        heads.window,
        # Otherwise MLX's attention would make the same mask in every layer.
        not size.is_fresh or _lacks_fused_attention(heads.dtype),
    )


def _lacks_fused_attention(dtype: mx.Dtype) -> bool:
    """Whether MLX makes attention of other operations: of float32 everywhere but on Metal."""
    return dtype == mx.float32 and not mx.metal.is_available()


def _merge_small(groups: _Groups) -> _Groups:
    """Join the groups of small sizes as far as the joint size is small too."""
    merged: _Groups = {}
    small: _PaddedSize | None = None
    for size, members in sorted(groups.items()):
        joint = size if small is None else size.joined(small)
        if small is not None and joint.is_small:
            members = merged.pop(small) + members
            size = joint
        merged.setdefault(size, []).extend(members)
        if size.is_small:
            small = size
    return merged


def is_aligned(start: int, num_rows: int) -> bool:
    """Whether a chunk goes alone and unpadded because its lengths recur anyway."""
    aligned = start % _ALIGNED == 0 and num_rows % _ALIGNED == 0
    return aligned and num_rows >= _MIN_ALONE
