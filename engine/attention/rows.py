"""Which row of a flattened step is which token, as host arrays."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from quire.engine.attention.decode_rows import DecodeRows, Reach
from quire.engine.step_batch import Chunk, StepBatch
from quire.kernels.heads import Heads
from quire.kernels.ragged import PromptChunk

Int32Array = npt.NDArray[np.int32]


@dataclass
class Contexts:
    """What rows attend to in layers whose keys and values lie in the same blocks.

    Of layers with sliding windows that have blocks of their own positions are counted from some
    block in front of what a row sees, in ``decodes`` and ``prompts``: their tables begin there. Of
    layers with chunks they begin with the chunk itself, and whoever attends need not know.

    Attributes:
        slot_mapping: (T,) int32, of all rows.
        decodes: in the order of their rows.
        prompts: the prompt chunks as attention sees them.
    """

    slot_mapping: Int32Array
    decodes: DecodeRows
    prompts: list[PromptChunk]

    @cached_property
    def chunks(self) -> list[PromptChunk]:
        """All rows but padding as chunks, if decodes are not padded."""
        decodes = self.decodes
        singles = [
            PromptChunk(row, 1, int(decodes.positions[row]) + 1, decodes.tables[row, :n])
            for row, n in enumerate(decodes.num_blocks.tolist())
        ]
        return singles + self.prompts

    def place_decodes(self, block_size: int) -> None:
        """Let decodes write to the last of their blocks."""
        decodes, count = self.decodes, len(self.decodes)
        last_blocks = decodes.tables[np.arange(count), decodes.num_blocks - 1]
        self.slot_mapping[:count] = last_blocks * block_size + decodes.positions % block_size

    def place_prompt(
        self, row: int, piece: range, blocks: array[int], skipped: int, block_size: int
    ) -> None:
        """Let the rows from ``row`` on, at positions ``piece``, write and attend to ``blocks``, of
        which so many are ``skipped``."""
        start, end = (p - skipped * block_size for p in (piece.start, piece.stop))
        num_blocks = -(-end // block_size)
        found = np.frombuffer(blocks, np.int32, num_blocks, offset=4 * skipped).copy()
        positions = np.arange(start, end, dtype=np.int32)
        slots = found[positions // block_size] * block_size + positions % block_size
        self.slot_mapping[row : row + len(piece)] = slots
        self.prompts.append(PromptChunk(row, len(piece), end, found))


class Rows:
    """Decodes first, then prompt chunks.

    Padding rows stand behind the decodes and behind the prompts: they are tokens of the scratch
    block, and nobody reads them.

    Attributes:
        positions, token_ids: (T,) int32
        token_places: (T,) int32, where each row's token stands in token_ids followed by the samples
            of the step before.
        state_moves: of the batch, in the order of their rows.
        full: what rows attend to in layers without windows and chunks.
        windowed: what they do in layers with them; None: the same.
        num_decodes: rows of one token each.
        num_decode_rows: decodes and the rows that pad them.
        decodes_as_chunks: whether attention takes them as prompt chunks of one row.
        num_padding_rows: behind the prompt chunks.
        last_rows: the row of the last token of each chunk, in the batch's order.
        logits_rows: the row of the last token of each chunk that samples, in the batch's order, and
            behind them the rows whose next tokens are scored.
    """

    def __init__(
        self,
        batch: StepBatch,
        decodes: DecodeRows,
        block_size: int,
        *,
        num_decode_rows: int | None = None,
        num_rows: int | None = None,
        decodes_as_chunks: bool = False,
        reach: Reach | None = None,
    ) -> None:
        """
        Args:
            num_decode_rows, num_rows: padding included; None: there is none.
            reach: of rows in layers with blocks of their own; None: there are none.
        """
        count = batch.num_decodes
        self.decodes_as_chunks = decodes_as_chunks
        self.num_decodes = count
        self.num_decode_rows = count if num_decode_rows is None else num_decode_rows
        size = batch.num_tokens if num_rows is None else num_rows
        self.positions = np.zeros(size, np.int32)
        self.token_ids = np.zeros(size, np.int32)
        self.token_places = np.arange(size, dtype=np.int32)
        self.state_moves = batch.state_moves
        order = decodes.order.tolist() if count else []
        chunks = batch.chunks
        if order != list(range(count)):
            chunks = [chunks[i] for i in order] + chunks[count:]
        placed = self._place(chunks, decodes)
        self.full = Contexts(np.zeros(size, np.int32), decodes, [])
        self._fill(self.full, chunks, block_size, None)
        self.windowed: Contexts | None = None
        if reach is not None and _differ(chunks, reach):
            seen = DecodeRows.of(chunks[:count], block_size, reach)
            self.windowed = Contexts(np.zeros(size, np.int32), seen, [])
            self._fill(self.windowed, chunks, block_size, reach)
        if count and (moves := batch.state_moves):
            self.state_moves = [*(moves[i] for i in order), *moves[count:]]
        self.last_rows = [0] * count + placed[count:]
        for decode_row, i in enumerate(order):
            self.last_rows[i] = decode_row
        self.num_padding_rows = size - self.num_decode_rows - batch.num_tokens + count
        self.logits_rows = [
            last for chunk, last in zip(batch.chunks, self.last_rows, strict=True) if chunk.samples
        ]
        if batch.scored:
            for chunk, last in zip(batch.chunks, self.last_rows, strict=True):
                first = last - chunk.num_tokens + 1
                self.logits_rows += range(first, first + len(chunk.scored_token_ids))

    def __len__(self) -> int:
        return len(self.positions)

    def contexts(self, heads: Heads) -> Contexts:
        """What rows attend to in such layers."""
        sees_all = heads.window is None and not heads.chunked
        return self.full if sees_all or self.windowed is None else self.windowed

    def _place(self, chunks: list[Chunk], decodes: DecodeRows) -> list[int]:
        """Fill in tokens and positions; the last row of each chunk."""
        count = len(decodes)
        self.positions[:count] = decodes.positions
        sources = np.array([chunk.source_row for chunk in chunks[:count]], np.int32)
        known = sources < 0
        np.copyto(self.token_places[:count], sources + len(self), where=~known)
        if known.any():
            self.token_ids[:count] = [
                chunk.token_ids[0] if chunk.token_ids else 0 for chunk in chunks[:count]
            ]
        last_rows, row = list(range(count)), self.num_decode_rows
        for chunk in chunks[count:]:
            end = row + chunk.num_tokens
            self.positions[row:end] = np.arange(chunk.start, chunk.context_length, dtype=np.int32)
            self.token_ids[row:end] = chunk.token_ids
            row = end
            last_rows.append(row - 1)
        return last_rows

    def _fill(
        self,
        contexts: Contexts,
        chunks: list[Chunk],
        block_size: int,
        reach: Reach | None,
    ) -> None:
        count = len(contexts.decodes)
        if count:
            contexts.place_decodes(block_size)
        row = self.num_decode_rows
        for chunk in chunks[count:]:
            if reach is None:
                piece = range(chunk.start, chunk.context_length)
                contexts.place_prompt(row, piece, chunk.block_ids, 0, block_size)
            else:
                for piece in reach.pieces(chunk):
                    skipped = reach.skipped_blocks(piece.start, block_size)
                    first = row + piece.start - chunk.start
                    contexts.place_prompt(first, piece, reach.blocks(chunk), skipped, block_size)
            row += chunk.num_tokens


def _differ(chunks: list[Chunk], reach: Reach) -> bool:
    """Whether layers with that reach attend to other contexts than those that see all."""
    return bool(chunks) and (reach.chunked or chunks[0].window_block_ids is not None)


@dataclass(frozen=True)
class PaddedSizes:
    """The numbers of rows that steps are padded to, in ascending order.

    Attributes:
        decodes: of steps of decodes only.
        mixed: of steps with prompt chunks.
    """

    decodes: list[int]
    mixed: list[int]


def round_rows(count: int) -> int:
    """``count`` rounded up to a multiple of 16 up to 128 rows, of 32 up to 512, of 64 beyond.

    Each size is another graph, so that they are few; but padding costs time where rows are many.
    """
    step = 16 if count <= 128 else 32 if count <= 512 else 64
    return -(-count // step) * step
