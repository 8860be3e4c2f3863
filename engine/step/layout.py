"""Which row of the flattened step is which token, as host arrays."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt

from quire.engine.step_batch import Chunk, StepBatch
from quire.kernels.buckets import bucket
from quire.kernels.ragged import DecodeGroup, PromptChunk, SharedRun

Int32Array = npt.NDArray[np.int32]

# A decode group is cut where padding its rows to one length would cost more than this.
_MAX_PADDING = 1.5
_MIN_PADDING_BLOCKS = 4
# Blocks saved from being read again that make up for the extra operations of a shared part.
_MIN_SHARED_BLOCKS = 16


class Layout:
    """Decodes first, then prompt chunks.

    Padded, decodes and all rows are rounded up to sizes that recur: further rows are tokens of the
    scratch block, and nobody reads them.

    Attributes:
        positions, slot_mapping, token_ids: (T,) int32
        source_rows: (T,) int32, rows of the previous step's samples, -1 where token_ids holds
        decode_tables: (num_decodes, max_blocks) int32, padded with the scratch block
        padded: whether decodes and all rows are rounded up
        num_after: rows behind the prompt chunks
        groups: decodes that attention can treat alike, side by side; empty if not asked for
        shared_runs: otherwise, if asked for, the decodes whose contexts begin alike, side by side
        prompts: the prompt chunks as attention sees them
        tiled: whether decodes are among ``prompts``, as chunks of one row, and only all rows are
            rounded up
        sampled: the chunks that sample, in order of their rows
        sampled_rows: the row of each one's last token
    """

    def __init__(
        self,
        batch: StepBatch,
        block_size: int,
        *,
        group_decodes: bool = True,
        share_decodes: bool = True,
        padded: bool = False,
        tiled: bool = False,
    ) -> None:
        """``tiled`` decodes need no groups, and if some of them share they are not."""
        decodes = _Decodes(batch.chunks[: batch.num_decodes], block_size)
        if batch.num_decodes:
            decodes.sort(by_length=group_decodes, share=share_decodes)
        self.padded = padded
        self.tiled = tiled and not decodes.clusters.any()
        num_decodes, num_rows = batch.num_decodes, batch.num_tokens
        if padded and num_decodes and not self.tiled:
            num_decodes = bucket(num_decodes)
        if padded:
            num_rows = round_rows(num_rows + num_decodes - batch.num_decodes)
        self.positions = np.zeros(num_rows, np.int32)
        self.slot_mapping = np.zeros(num_rows, np.int32)
        self.token_ids = np.zeros(num_rows, np.int32)
        self.source_rows = np.full(num_rows, -1, np.int32)
        self.decode_tables = np.zeros((0, 1), np.int32)
        self.groups: list[DecodeGroup] = []
        self.shared_runs: list[SharedRun] = []
        self.prompts: list[PromptChunk] = []
        self.sampled: list[Chunk] = []
        self.sampled_rows: list[int] = []
        if batch.num_decodes:
            self._place_decodes(decodes, block_size, group_decodes)
            if extra := num_decodes - batch.num_decodes:
                self.decode_tables = np.pad(self.decode_tables, ((0, extra), (0, 0)))
        row = num_decodes
        for chunk in batch.chunks[batch.num_decodes :]:
            self._place_prompt(chunk, row, block_size)
            row += chunk.num_tokens
        self.num_after = num_rows - row

    @property
    def num_decodes(self) -> int:
        return len(self.decode_tables)

    def _place_decodes(self, decodes: _Decodes, block_size: int, group: bool) -> None:
        chunks, positions, clusters = decodes.chunks, decodes.positions, decodes.clusters
        tables, num_blocks = decodes.tables, decodes.num_blocks
        count = len(chunks)
        if self.tiled:
            for row, n in enumerate(num_blocks.tolist()):
                self.prompts.append(PromptChunk(row, 1, int(positions[row]) + 1, tables[row, :n]))
        else:
            self.decode_tables = tables
        self.positions[:count] = positions
        self.token_ids[:count] = [chunk.token_ids[0] if chunk.token_ids else 0 for chunk in chunks]
        self.source_rows[:count] = [chunk.source_row for chunk in chunks]
        last_blocks = tables[np.arange(count), num_blocks - 1]
        self.slot_mapping[:count] = last_blocks * block_size + positions % block_size
        for row, chunk in enumerate(chunks):
            if chunk.samples:
                self.sampled.append(chunk)
                self.sampled_rows.append(row)
        if not group:
            for cluster in np.unique(clusters[clusters > 0]):
                rows = np.flatnonzero(clusters == cluster)
                num_tokens = block_size * _num_shared(tables[rows], num_blocks[rows])
                self.shared_runs.append(SharedRun(int(rows[0]), len(rows), num_tokens))
            return
        for first, end in pairwise(_cuts(num_blocks, clusters)):
            padded = tables[first:end, : num_blocks[end - 1]]
            shared = _num_shared(padded, num_blocks[first:end]) if clusters[first] else 0
            self.groups.append(DecodeGroup(first, positions[first:end] + 1, padded, shared))

    def _place_prompt(self, chunk: Chunk, row: int, block_size: int) -> None:
        end = row + chunk.num_tokens
        positions = np.arange(chunk.start, chunk.context_length, dtype=np.int32)
        num_blocks = -(-chunk.context_length // block_size)
        blocks = np.frombuffer(chunk.block_ids, np.int32, num_blocks).copy()
        self.positions[row:end] = positions
        self.token_ids[row:end] = chunk.token_ids
        offsets = positions % block_size
        self.slot_mapping[row:end] = blocks[positions // block_size] * block_size + offsets
        self.prompts.append(PromptChunk(row, chunk.num_tokens, chunk.context_length, blocks))
        if chunk.samples:
            self.sampled.append(chunk)
            self.sampled_rows.append(end - 1)


class _Decodes:
    """Decodes and their block tables.

    Attributes:
        positions: (B,) int32, of the rows
        num_blocks: (B,) int32, that hold a row's context
        tables: (B, max_blocks) int32, padded with the scratch block
        clusters: (B,) int32, a number for all rows that begin with the same blocks; 0: no others
    """

    def __init__(self, chunks: list[Chunk], block_size: int) -> None:
        count = len(chunks)
        self.chunks = chunks
        self.positions = np.array([chunk.start for chunk in chunks], np.int32)
        self.num_blocks = self.positions // block_size + 1
        self.clusters = np.zeros(count, np.int32)
        width = int(self.num_blocks.max(initial=1))
        self.tables = np.zeros((count, width), np.int32)
        # Copies between buffers take a third of the time of assignments to rows of the array.
        flat = self.tables.reshape(-1).data
        for row, n in enumerate(self.num_blocks.tolist()):
            flat[row * width : row * width + n] = chunks[row].block_ids[:n]

    def sort(self, *, by_length: bool, share: bool) -> None:
        """Put rows that begin alike side by side if they are to share, and those of like lengths
        ``by_length``."""
        if share:
            self.clusters = _clusters(self.tables, self.num_blocks)
        if not by_length and not (np.diff(self.clusters) < 0).any():
            return
        order = np.lexsort((self.num_blocks, self.clusters) if by_length else (self.clusters,))
        self.chunks = [self.chunks[i] for i in order]
        self.positions, self.num_blocks = self.positions[order], self.num_blocks[order]
        self.tables, self.clusters = self.tables[order], self.clusters[order]


def round_rows(count: int) -> int:
    """To few sizes where rows hardly cost, and to close ones where they do."""
    step = 16 if count <= 128 else 32 if count <= 512 else 64
    return -(-count // step) * step


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
    """
    rows = rows[num_blocks[rows] - 1 > column]  # a row's last block is its own
    values, counts = np.unique(tables[rows, column], return_counts=True)
    found: list[tuple[npt.NDArray[np.intp], int]] = []
    for value in values[counts > 1]:
        alike = rows[tables[rows, column] == value]
        num_shared = _num_shared(tables[alike], num_blocks[alike])
        smaller = _alike(tables, num_blocks, alike, num_shared)
        saved = sum((len(each) - 1) * shared for each, shared in smaller)
        found += smaller if saved > (len(alike) - 1) * num_shared else [(alike, num_shared)]
    return found


def _num_shared(tables: Int32Array, num_blocks: Int32Array) -> int:
    """Leading blocks that all rows have in common; each row's last block is its own."""
    most = int(num_blocks.min()) - 1
    differs = (tables[:, :most] != tables[0, :most]).any(axis=0)
    return int(differs.argmax()) if differs.any() else most


def _cuts(num_blocks: Int32Array, clusters: Int32Array) -> list[int]:
    """Bounds of the groups: one cluster each, and no row much longer than its shortest."""
    cuts = [0]
    for row in range(1, len(num_blocks)):
        shortest = int(num_blocks[cuts[-1]])
        limit = max(shortest * _MAX_PADDING, shortest + _MIN_PADDING_BLOCKS)
        if clusters[row] != clusters[cuts[-1]] or num_blocks[row] > limit:
            cuts.append(row)
    return [*cuts, len(num_blocks)]
