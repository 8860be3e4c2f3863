"""Which rows of a flattened step belong together, and the index arrays their layers share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from quire.kernels.decode_plan import DecodePlan

# Added to the scores of keys that a row must not see. Finite, so that a row that sees nothing at
# all gives a finite result instead of NaN.
HIDDEN = -1e30


@dataclass
class DecodeGroup:
    """Rows with one query each and contexts of similar length.

    The rows may have their first blocks in common; those are read once for all of them.
    """

    first_row: int
    context_lengths: npt.NDArray[np.int32]  # (B,), the row's own token included
    block_tables: npt.NDArray[np.int32]  # (B, max_blocks), padded with the scratch block
    num_shared_blocks: int = 0  # leading columns of block_tables, full and equal in all rows
    _views: dict[int | None, tuple[mx.array, mx.array]] = field(default_factory=dict)
    _shared: mx.array | None = None

    @property
    def num_rows(self) -> int:
        return len(self.context_lengths)

    def view(self, window: int | None, block_size: int) -> tuple[mx.array, mx.array]:
        """Block tables (B, n) and score biases (B, n, 1, 1, block_size), cut to the window.

        Without a window they leave out the shared blocks. Made once per step and window; all layers
        share them.
        """
        if window not in self._views:
            self._views[window] = self._make_view(window, block_size)
        return self._views[window]

    def shared_blocks(self, window: int | None) -> mx.array | None:
        """Ids of the blocks that every row sees whole, unless a window hides part of them."""
        if window is not None or not self.num_shared_blocks:
            return None
        if self._shared is None:
            self._shared = mx.array(self.block_tables[0, : self.num_shared_blocks])
        return self._shared

    def _make_view(self, window: int | None, block_size: int) -> tuple[mx.array, mx.array]:
        lengths = self.context_lengths[:, None]
        tables = self.block_tables
        if window is None:
            columns = np.arange(self.num_shared_blocks, tables.shape[1], dtype=np.int32)[None]
            tables = tables[:, self.num_shared_blocks :]
        else:
            # W keys touch at most this many blocks, wherever they start.
            touched = min(tables.shape[1], -(-(window - 1) // block_size) + 1)
            first = np.maximum(lengths - window, 0) // block_size
            columns = np.minimum(first + np.arange(touched, dtype=np.int32), tables.shape[1] - 1)
            tables = np.take_along_axis(tables, columns, axis=1)
            # Clamped columns repeat the last block; positions below keep them from counting twice.
            columns = first + np.arange(touched, dtype=np.int32)
        positions = columns[:, :, None] * block_size + np.arange(block_size, dtype=np.int32)
        visible = positions < lengths[:, :, None]
        if window is not None:
            visible &= positions >= lengths[:, :, None] - window
        bias = np.where(visible, np.float32(0), np.float32(HIDDEN))
        return mx.array(tables), mx.array(bias[:, :, None, None, :])


class SharedRun(NamedTuple):
    """Rows side by side whose contexts begin with the same blocks."""

    first_row: int
    num_rows: int
    num_tokens: int  # that they share, of whole blocks; each row has more


@dataclass
class PromptChunk:
    """Consecutive rows of one sequence, each attending to itself and everything before it."""

    first_row: int
    num_rows: int
    context_length: int  # of the last row, itself included
    block_ids: npt.NDArray[np.int32]  # covers the context
    _tables: dict[int, mx.array] = field(default_factory=dict)
    _biases: dict[tuple[int, int, int, int | None], mx.array] = field(default_factory=dict)

    @property
    def start(self) -> int:
        """Position of the first row."""
        return self.context_length - self.num_rows

    def first_block(self, position: int, window: int | None, block_size: int) -> int:
        """The first block that the row at ``position`` can see."""
        return 0 if window is None else max(0, position - window + 1) // block_size

    def blocks_from(self, first: int) -> mx.array:
        """Block ids from the ``first`` on as an array, made once per step."""
        if first not in self._tables:
            self._tables[first] = mx.array(self.block_ids[first:])
        return self._tables[first]

    def bias(self, rows: range, keys: range, window: int | None) -> mx.array:
        """(rows, keys) score biases for query positions ``rows`` and key positions ``keys``."""
        key = (rows.start, keys.start, keys.stop, window)
        if key not in self._biases:
            queries = np.arange(rows.start, rows.stop, dtype=np.int32)[:, None]
            positions = np.arange(keys.start, keys.stop, dtype=np.int32)[None]
            visible = positions <= queries
            if window is not None:
                visible &= positions > queries - window
            self._biases[key] = mx.array(np.where(visible, np.float32(0), np.float32(HIDDEN)))
        return self._biases[key]


@dataclass(frozen=True)
class TiledChunks:
    """Chunks cut into work items of the kernel; index arrays that all layers of a window share.

    Attributes:
        num_rows: of all the chunks, and of rows behind them that mean nothing.
        items: (N, 8) int32: first row in the step, tokens, position of the first one, row of
            ``block_tables``, first key and end, first result, distance of the tokens' results.
        block_tables: (chunks, max_blocks) int32
        first_items: (num_rows + 1,) int32, where each row's partial results begin; None if there
            are only whole ones.
        num_results: of the items, one or more for each row.
        window: tokens a row sees, itself included; None: all.
    """

    num_rows: int
    items: mx.array
    block_tables: mx.array
    first_items: mx.array | None
    num_results: int
    window: int | None


@dataclass(frozen=True)
class PaddedChunks:
    """Chunks of similar lengths as one batch; index arrays that all layers share.

    Attributes:
        count: B, chunks in the batch, padding included.
        rows: (B * n,) int32, the row of the step that each query is; None if they lie in order.
        first_row: of the first chunk.
        block_ids: (B, blocks) int32, padded with the scratch block.
        is_fresh: nothing precedes the chunks.
        visible: (B or 1, 1, n, keys) bool; None if each query sees the keys up to its own place, as
            MLX's attention can tell by itself.
    """

    count: int
    num_rows: int  # n, rows of each chunk, padding included
    rows: mx.array | None
    first_row: int
    block_ids: mx.array
    is_fresh: bool
    visible: mx.array | None


@dataclass(frozen=True)
class PromptPlan:
    """How the chunks of a step are brought to attention, for one window.

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
    order: mx.array | None

    @property
    def needs_new_rows(self) -> bool:
        """Whether new keys and values are read as rows and not from their pages."""
        fresh = any(chunks.is_fresh for chunks in self.padded)
        return fresh or any(chunk.start == 0 for chunk in self.alone)


@dataclass
class DecodeRows:
    """The step's first rows, one query each, as the decode kernel takes them."""

    block_tables: mx.array  # (B, max_blocks) int32
    plans: dict[int | None, DecodePlan]  # by window

    @property
    def num_rows(self) -> int:
        return int(self.block_tables.shape[0])


@dataclass
class RaggedBatch:
    """Which rows of a flattened step belong together; shared by all layers of the step.

    Decodes come first: as groups for attention in MLX operations, or as ``decodes`` for the kernel.

    Attributes:
        num_after: rows behind the chunks that mean nothing.
        prompt_plans: by window; made when they are first needed.
        needs_new_rows: whether attention may read new keys and values as rows, which it does for
            chunks that see nothing older.
    """

    groups: list[DecodeGroup]
    chunks: list[PromptChunk]
    decodes: DecodeRows | None = None
    num_after: int = 0
    prompt_plans: dict[int | None, PromptPlan] = field(default_factory=dict)
    needs_new_rows: bool = False

    def __post_init__(self) -> None:
        self.needs_new_rows |= any(chunk.start == 0 for chunk in self.chunks)

    @property
    def num_decodes(self) -> int:
        """Rows that the decode kernel takes."""
        return 0 if self.decodes is None else self.decodes.num_rows
