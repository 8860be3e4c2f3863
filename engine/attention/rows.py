"""Which row of a flattened step is which token, as host arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from quire.engine.attention.decode_rows import DecodeRows
from quire.engine.step_batch import Chunk, StepBatch
from quire.kernels.ragged import PromptChunk

Int32Array = npt.NDArray[np.int32]


class Rows:
    """Decodes first, then prompt chunks.

    Padding rows stand behind the decodes and behind the prompts: they are tokens of the scratch
    block, and nobody reads them.

    Attributes:
        positions, slot_mapping, token_ids: (T,) int32
        token_places: (T,) int32, where each row's token stands in token_ids followed by the samples
            of the step before.
        state_moves: of the batch, in the order of their rows.
        decodes: in the order of their rows.
        num_decode_rows: decodes and the rows that pad them.
        decodes_as_chunks: whether attention takes them as prompt chunks of one row.
        prompts: the prompt chunks as attention sees them.
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
    ) -> None:
        """``num_decode_rows`` and ``num_rows`` count padding; None: there is none."""
        count = batch.num_decodes
        self.decodes = decodes
        self.decodes_as_chunks = decodes_as_chunks
        self.num_decode_rows = count if num_decode_rows is None else num_decode_rows
        size = batch.num_tokens if num_rows is None else num_rows
        self.positions = np.zeros(size, np.int32)
        self.slot_mapping = np.zeros(size, np.int32)
        self.token_ids = np.zeros(size, np.int32)
        self.token_places = np.arange(size, dtype=np.int32)
        self.prompts: list[PromptChunk] = []
        self.state_moves = batch.state_moves
        chunks = batch.chunks[:count]
        last_rows: list[int] = []
        if count:
            order = decodes.order.tolist()
            self._place_decodes([chunks[i] for i in order], block_size)
            if moves := batch.state_moves:
                self.state_moves = [*(moves[i] for i in order), *moves[count:]]
            last_rows = [0] * count
            for decode_row, i in enumerate(order):
                last_rows[i] = decode_row
        row = self.num_decode_rows
        for chunk in batch.chunks[count:]:
            self._place_prompt(chunk, row, block_size)
            row += chunk.num_tokens
            last_rows.append(row - 1)
        self.num_padding_rows = size - row
        self.last_rows = last_rows
        self.logits_rows = [
            last for chunk, last in zip(batch.chunks, last_rows, strict=True) if chunk.samples
        ]
        if batch.scored:
            for chunk, last in zip(batch.chunks, last_rows, strict=True):
                first = last - chunk.num_tokens + 1
                self.logits_rows += range(first, first + len(chunk.scored_token_ids))

    def __len__(self) -> int:
        return len(self.positions)

    def with_decodes_as_chunks(self) -> list[PromptChunk]:
        """All rows but padding as chunks; decodes are not padded."""
        decodes = self.decodes
        singles = [
            PromptChunk(row, 1, int(decodes.positions[row]) + 1, decodes.tables[row, :n])
            for row, n in enumerate(decodes.num_blocks.tolist())
        ]
        return singles + self.prompts

    def _place_decodes(self, chunks: list[Chunk], block_size: int) -> None:
        decodes, count = self.decodes, len(chunks)
        self.positions[:count] = decodes.positions
        self.token_ids[:count] = [chunk.token_ids[0] if chunk.token_ids else 0 for chunk in chunks]
        for row, chunk in enumerate(chunks):
            if chunk.source_row >= 0:
                self.token_places[row] = len(self) + chunk.source_row
        last_blocks = decodes.tables[np.arange(count), decodes.num_blocks - 1]
        self.slot_mapping[:count] = last_blocks * block_size + decodes.positions % block_size

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
    """To few sizes where rows hardly cost, and to close ones where they do."""
    step = 16 if count <= 128 else 32 if count <= 512 else 64
    return -(-count // step) * step
