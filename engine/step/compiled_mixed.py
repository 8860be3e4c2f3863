"""Steps with prompts whose sizes have come before, as one graph.

Beside decodes a step has few prompt rows, and often as many as the step before, so that its
blocks alone are not all that recurs.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from quire.engine.model.paged_model import PagedModel
from quire.engine.model.seam import StepRows
from quire.engine.step.compiled_blocks import CompiledBlocks, RowsForm, flatten, unflatten
from quire.engine.step.recurring import Recurring
from quire.kernels.buckets import bucket


class CompiledMixed:
    """Runs a model that has fused blocks."""

    def __init__(self, model: PagedModel, blocks: CompiledBlocks) -> None:
        self._run = Recurring(partial(_run, model, blocks))

    def __call__(self, token_ids: mx.array, rows: StepRows, wanted_rows: mx.array) -> mx.array:
        """(R, vocab) logits of the wanted rows.

        Args:
            token_ids: (T,) int32
            rows: every prompt has its plan, as for :meth:`CompiledBlocks.for_step`.
            wanted_rows: (R,) int32
        """
        arrays, form = flatten(rows)
        shapes = tuple(array.shape for array in (token_ids, wanted_rows, *arrays))
        return self._run((shapes, form), token_ids, arrays, wanted_rows, tuple(form))


def pad_wanted(rows: list[int]) -> np.ndarray[Any, np.dtype[np.int32]]:
    """``rows`` and more of the last one, so that their number recurs."""
    return np.array(rows + rows[-1:] * (bucket(len(rows)) - len(rows)), np.int32)


def _run(
    model: PagedModel,
    blocks: CompiledBlocks,
    token_ids: mx.array,
    arrays: list[mx.array],
    wanted_rows: mx.array,
    form: tuple[Any, ...],
) -> mx.array:
    context = model.context
    context.positions, context.slots, context.batch = unflatten(arrays, RowsForm(*form))
    context.wanted_rows = wanted_rows
    context.run_block = blocks.for_step(context.rows)
    return model(token_ids)
