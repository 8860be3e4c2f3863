"""Turns a step batch into arrays, one forward pass and one array of sampled tokens."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from quire.engine.paged_model import PagedModel
from quire.engine.sampler import sample
from quire.engine.step_batch import Chunk, StepBatch
from quire.kernels.kv_write import Slots
from quire.kernels.ragged import DecodeGroup, PromptChunk, RaggedBatch

# A decode group is closed where padding the next row's neighbours would waste more than this.
_MAX_PADDING = 1.5
_MIN_PADDING_BLOCKS = 4


@dataclass(slots=True)
class Step:
    """A step whose graph is built; ``tokens`` may still be on the device, or not even begun."""

    batch: StepBatch
    tokens: mx.array  # (len(batch.sampled),) int32, or one meaningless token if that is 0
    launched: bool = False


class ModelRunner:
    def __init__(self, model: PagedModel) -> None:
        self._model = model
        self._context = model.context

    def build(self, batch: StepBatch, previous: Step | None) -> Step:
        """Build the graph of one step; nothing is computed yet.

        ``previous`` is the step before, whose samples are inputs of this one wherever a chunk names
        a source row; it need not have finished.
        """
        logits = self.forward(batch, previous)
        tokens = sample(logits, batch.sampled) if batch.sampled else mx.argmax(logits, axis=-1)
        return Step(batch, tokens)

    def forward(self, batch: StepBatch, previous: Step | None) -> mx.array:
        """(R, vocab) logits of each sampled chunk's last row, or of the step's last row if R is 0.

        Something must be asked of a step that only stores keys and values, or MLX would skip it.
        """
        layout = _Layout(batch, self._context.block_size)
        self._context.positions = mx.array(layout.positions)
        self._context.slots = Slots(mx.array(layout.slot_blocks), mx.array(layout.slot_offsets))
        self._context.batch = RaggedBatch(layout.groups, layout.prompts)
        wanted = layout.sampled_rows or [len(layout.positions) - 1]
        everything = len(wanted) == len(layout.positions)
        self._context.wanted_rows = None if everything else mx.array(wanted)
        return self._model(_input_tokens(batch, layout, previous))

    def launch(self, step: Step) -> None:
        """Hand the step to the device."""
        mx.async_eval(step.tokens)
        step.launched = True

    def collect(self, step: Step) -> list[int]:
        """Wait for the step and read its samples: the one host read of a step."""
        tokens: list[int] = step.tokens.tolist()  # type: ignore[assignment]
        return tokens[: len(step.batch.sampled)]


class _Layout:
    """Which row of the flattened step is which token, as host arrays.

    Attributes:
        positions, slot_blocks, slot_offsets, token_ids: (T,) int32
        source_rows: (T,) int32, rows of the previous step's samples, -1 where token_ids holds
        sampled_rows: row of each sampled chunk's last token
    """

    def __init__(self, batch: StepBatch, block_size: int) -> None:
        decodes = batch.chunks[: batch.num_decodes]
        prompts = batch.chunks[batch.num_decodes :]
        num_rows = batch.num_tokens
        self.positions = np.empty(num_rows, np.int32)
        self.slot_blocks = np.empty(num_rows, np.int32)
        self.token_ids = np.zeros(num_rows, np.int32)
        self.source_rows = np.full(num_rows, -1, np.int32)
        self.groups: list[DecodeGroup] = []
        self.prompts: list[PromptChunk] = []
        self.sampled_rows = [row for row, chunk in enumerate(decodes) if chunk.samples]
        if decodes:
            self._place_decodes(decodes, block_size)
        row = len(decodes)
        for chunk in prompts:
            self._place_prompt(chunk, row, block_size)
            row += chunk.num_tokens
            if chunk.samples:
                self.sampled_rows.append(row - 1)
        self.slot_offsets = self.positions % block_size

    def _place_decodes(self, decodes: list[Chunk], block_size: int) -> None:
        count = len(decodes)
        self.positions[:count] = [chunk.start for chunk in decodes]
        self.token_ids[:count] = [chunk.token_ids[0] if chunk.token_ids else 0 for chunk in decodes]
        self.source_rows[:count] = [chunk.source_row for chunk in decodes]
        num_blocks = self.positions[:count] // block_size + 1
        first = 0
        for group_end in _group_ends(num_blocks):
            tables = np.zeros((group_end - first, num_blocks[group_end - 1]), np.int32)
            for row, chunk in enumerate(decodes[first:group_end]):
                count = num_blocks[first + row]
                tables[row, :count] = np.frombuffer(chunk.block_ids, np.int32, count)
            lengths = self.positions[first:group_end] + 1
            self.slot_blocks[first:group_end] = tables[
                np.arange(group_end - first), num_blocks[first:group_end] - 1
            ]
            self.groups.append(DecodeGroup(first, lengths, tables))
            first = group_end

    def _place_prompt(self, chunk: Chunk, row: int, block_size: int) -> None:
        end = row + chunk.num_tokens
        positions = np.arange(chunk.start, chunk.context_length, dtype=np.int32)
        num_blocks = -(-chunk.context_length // block_size)
        blocks = np.frombuffer(chunk.block_ids, np.int32, num_blocks).copy()
        self.positions[row:end] = positions
        self.token_ids[row:end] = chunk.token_ids
        self.slot_blocks[row:end] = blocks[positions // block_size]
        self.prompts.append(PromptChunk(row, chunk.num_tokens, chunk.context_length, blocks))


def _group_ends(num_blocks: npt.NDArray[np.int32]) -> list[int]:
    """Cut rows, sorted by block count, where padding them to one length would cost too much."""
    ends = []
    smallest = int(num_blocks[0])
    for row, count in enumerate(num_blocks.tolist()):
        if count > max(smallest * _MAX_PADDING, smallest + _MIN_PADDING_BLOCKS):
            ends.append(row)
            smallest = count
    return [*ends, len(num_blocks)]


def _input_tokens(batch: StepBatch, layout: _Layout, previous: Step | None) -> mx.array:
    host = mx.array(layout.token_ids)
    pending = layout.source_rows >= 0
    if not pending.any():
        return host
    assert previous is not None, "a token is awaited from a step that does not exist"
    rows = mx.array(np.maximum(layout.source_rows, 0))
    device = previous.tokens[rows].astype(mx.int32)
    return device if pending.all() else mx.where(mx.array(pending), device, host)
