"""The decodes of a step in the order of their rows, and which of them begin alike."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from quire.engine.step_batch import Chunk
from quire.kernels.ragged import DecodeGroup, SharedRun

Int32Array = npt.NDArray[np.int32]

# Contexts behind a window begin at multiples of so many tokens: their lengths recur as whole ones'.
_WINDOW_STEP = 256
# A decode group is cut where padding its rows to one length would cost more than this.
_MAX_PADDING = 1.5
_MIN_PADDING_BLOCKS = 4
# Blocks saved from being read again that make up for the extra operations of a shared part.
_MIN_SHARED_BLOCKS = 16


class Reach(NamedTuple):
    """How far back rows see in layers that do not see all.

    Attributes:
        size: tokens of a window or of a chunk.
        chunked: whether rows see the tokens of their own chunk, instead of the last ones.
    """

    size: int
    chunked: bool = False

    def skipped_blocks(self, position: int, block_size: int) -> int:
        """How many blocks in front of what the row at ``position`` sees are left out."""
        if self.chunked:
            return position // self.size * self.size // block_size
        step = max(1, _WINDOW_STEP // block_size)
        return max(0, position - self.size + 1) // block_size // step * step

    def blocks(self, chunk: Chunk) -> array[int]:
        """Those that hold the keys of such layers; they may be the same as those of others."""
        return chunk.block_ids if chunk.window_block_ids is None else chunk.window_block_ids

    def pieces(self, chunk: Chunk) -> Iterator[range]:
        """The positions of a chunk of a prompt, as far as they see the same beginning."""
        start, end = chunk.start, chunk.context_length
        while self.chunked and start // self.size < (end - 1) // self.size:
            yield range(start, start := (start // self.size + 1) * self.size)
        yield range(start, end)


@dataclass(frozen=True)
class DecodeRows:
    """Sequences of which one token is computed, a row each.

    Attributes:
        order: (B,) which decode of the batch each row is.
        positions: (B,) int32
        num_blocks: (B,) int32, that hold a row's context.
        tables: (B, max_blocks) int32, padded with the scratch block.
        clusters: (B,) int32, a number for all rows that begin with the same blocks and are to read
            them together; 0: a row by itself.
    """

    order: npt.NDArray[np.intp]
    positions: Int32Array
    num_blocks: Int32Array
    tables: Int32Array
    clusters: Int32Array

    def __len__(self) -> int:
        return len(self.positions)

    @classmethod
    def of(cls, chunks: list[Chunk], block_size: int, reach: Reach | None = None) -> DecodeRows:
        """In the order of ``chunks``, without clusters.

        Args:
            reach: of layers that do not see all: positions and tables begin behind the blocks that
                are out of reach.
        """
        count = len(chunks)
        positions = np.array([chunk.start for chunk in chunks], np.int32)
        skipped = [0] * count
        if reach is not None:
            skipped = [reach.skipped_blocks(chunk.start, block_size) for chunk in chunks]
            positions -= np.array(skipped, np.int32) * block_size
        num_blocks = positions // block_size + 1
        width = int(num_blocks.max(initial=1))
        tables = np.zeros((count, width), np.int32)
        # Copies between buffers take a third of the time of assignments to rows of the array.
        flat = tables.reshape(-1).data
        for row, n in enumerate(num_blocks.tolist()):
            blocks = chunks[row].block_ids if reach is None else reach.blocks(chunks[row])
            if len(blocks) != n:
                blocks = blocks[skipped[row] : skipped[row] + n]
            flat[row * width : row * width + n] = blocks
        return cls(np.arange(count), positions, num_blocks, tables, np.zeros(count, np.int32))

    def clustered(self) -> DecodeRows:
        """Those that begin alike side by side, as far as that saves enough."""
        clusters = _clusters(self.tables, self.num_blocks)
        if not clusters.any():
            return self
        found = DecodeRows(self.order, self.positions, self.num_blocks, self.tables, clusters)
        return found.taken(np.argsort(clusters, kind="stable"))

    def by_length(self) -> DecodeRows:
        """Those of a cluster side by side, and among others those of like lengths."""
        return self.taken(np.lexsort((self.num_blocks, self.clusters)))

    def taken(self, rows: npt.NDArray[np.intp]) -> DecodeRows:
        return DecodeRows(
            self.order[rows],
            self.positions[rows],
            self.num_blocks[rows],
            self.tables[rows],
            self.clusters[rows],
        )

    def runs(self, block_size: int) -> list[SharedRun]:
        """The clusters, whose rows lie side by side."""
        return [SharedRun(first, n, block_size * blocks) for first, n, blocks in self._shared]

    @cached_property
    def _shared(self) -> list[tuple[int, int, int]]:
        """Of each cluster the first row, the number of rows and the blocks that they share."""
        if not self.clusters.any():
            return []
        starts = np.flatnonzero(np.diff(self.clusters, prepend=-1))
        found = []
        for first, end in pairwise([*starts.tolist(), len(self)]):
            if self.clusters[first]:
                blocks = _num_shared(self.tables[first:end], self.num_blocks[first:end])
                found.append((first, end - first, blocks))
        return found

    def groups(self, most_blocks: int | None = None) -> list[DecodeGroup]:
        """Rows side by side that attention in MLX operations can treat alike.

        Args:
            most_blocks: that are read of a row, from behind; None: all.
        """
        groups = []
        read = self.num_blocks if most_blocks is None else np.minimum(self.num_blocks, most_blocks)
        for first, end in pairwise(_cuts(read, self.clusters)):
            padded = self.tables[first:end, : self.num_blocks[first:end].max()]
            shared = _num_shared(padded, self.num_blocks[first:end]) if self.clusters[first] else 0
            groups.append(DecodeGroup(first, self.positions[first:end] + 1, padded, shared))
        return groups


def _clusters(tables: Int32Array, num_blocks: Int32Array) -> Int32Array:
    """A number for all rows that begin with the same blocks, 0 for those that share too few."""
    clusters = np.zeros(len(tables), np.int32)
    heads = tables[:, 0].tolist()
    if len(set(heads)) == len(heads):
        return clusters
    for rows, num_shared in _alike(tables, num_blocks, np.arange(len(tables)), 0):
        if num_shared * (len(rows) - 1) >= _MIN_SHARED_BLOCKS:
            clusters[rows] = rows[0] + 1
    return clusters


def _alike(
    tables: Int32Array, num_blocks: Int32Array, rows: npt.NDArray[np.intp], column: int
) -> list[tuple[npt.NDArray[np.intp], int]]:
    """Sets of those ``rows`` that agree up to ``column`` and the number of blocks each shares.

    A set is cut into smaller ones that share more if that saves more blocks from being read again.
    Sets too small to save enough are left out.
    """
    found: list[tuple[npt.NDArray[np.intp], int]] = []
    rows = rows[num_blocks[rows] - 1 > column]  # a row's last block is its own
    if len(rows) < 2:
        return found
    rows = rows[np.argsort(tables[rows, column], kind="stable")]
    starts = np.flatnonzero(np.diff(tables[rows, column], prepend=-1))
    sizes = np.diff(starts, append=len(rows))
    longest = np.maximum.reduceat(num_blocks[rows], starts)
    for i in np.flatnonzero((sizes - 1) * (longest - 1) >= _MIN_SHARED_BLOCKS):
        alike = rows[starts[i] : starts[i] + sizes[i]]
        num_shared = _num_shared(tables[alike], num_blocks[alike])
        whole = (len(alike) - 1) * num_shared
        smaller: list[tuple[npt.NDArray[np.intp], int]] = []
        most = (len(alike) - 2) * (longest[i] - 1)  # that smaller ones can save
        if most > whole:
            smaller = _alike(tables, num_blocks, alike, num_shared)
        saved = sum((len(each) - 1) * shared for each, shared in smaller)
        found += smaller if saved > whole else [(alike, num_shared)]
    return found


def _num_shared(tables: Int32Array, num_blocks: Int32Array) -> int:
    """Leading blocks that all rows have in common; each row's last block is its own."""
    most = int(num_blocks.min()) - 1
    differs = (tables[1:, :most] != tables[0, :most]).any(axis=0)
    first = int(differs.argmax()) if most else 0
    return first if most and differs[first] else most


def _cuts(num_blocks: Int32Array, clusters: Int32Array) -> list[int]:
    """Bounds of the groups: one cluster each, and no row much longer than its shortest."""
    cuts = [0]
    for row in range(1, len(num_blocks)):
        shortest = int(num_blocks[cuts[-1]])
        limit = max(shortest * _MAX_PADDING, shortest + _MIN_PADDING_BLOCKS)
        if clusters[row] != clusters[cuts[-1]] or num_blocks[row] > limit:
            cuts.append(row)
    return [*cuts, len(num_blocks)]
