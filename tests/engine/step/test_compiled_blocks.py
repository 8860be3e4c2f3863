"""What a compiled block is given says all about a step's rows."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from quire.engine.model.seam import StepRows
from quire.engine.step.compiled_blocks import flatten, unflatten
from quire.kernels.decode_plan import DecodePlan, DecodeSettings
from quire.kernels.kv_write import Slots
from quire.kernels.prompt_attention import plan_prompts
from quire.kernels.prompt_attention_spec import PromptShape, PromptVariant
from quire.kernels.ragged import DecodeRows, PromptChunk, RaggedBatch

BLOCK = 8


def ints(*shape: int) -> mx.array:
    return mx.zeros(shape, mx.int32)


LAYER = PromptShape(1, 1, 4, 2, 64, 64, BLOCK)


@pytest.mark.parametrize("num_decodes", [0, 3])
@pytest.mark.parametrize("variant", [PromptVariant.PAGED_KERNEL, PromptVariant.SDPA_PADDED])
@pytest.mark.parametrize("windows", [[None], [None, 20]])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", [[(0, 30), (16, 9)], [(0, 1024)], [(0, 1024), (0, 5)]], ids=str)
def test_rows_survive_being_taken_apart(
    num_decodes: int,
    variant: PromptVariant,
    dtype: mx.Dtype,
    windows: list[int | None],
    lengths: list[tuple[int, int]],
) -> None:
    decodes = None
    if num_decodes:
        plans = {
            window: DecodePlan(ints(5, 3), ints(4) if window else None, DecodeSettings(2 + i, 8))
            for i, window in enumerate(windows)
        }
        decodes = DecodeRows(ints(num_decodes, 16), plans)
    chunks, row = [], num_decodes
    for start, count in lengths:
        blocks = np.arange(-(-(start + count) // BLOCK), dtype=np.int32)
        chunks.append(PromptChunk(row, count, start + count, blocks))
        row += count
    batch = RaggedBatch([], chunks, decodes, num_after=2)
    for window in windows:
        plan = plan_prompts(
            chunks,
            window,
            LAYER,
            lambda _: variant,
            dtype=dtype,
            num_before=num_decodes,
            num_after=2,
        )
        batch.prompt_plans[window] = plan
    rows = StepRows(ints(row + 2), Slots(ints(row + 2), BLOCK, ints(1)), batch)

    arrays, form = flatten(rows)
    again = unflatten(list(arrays), form)
    assert again.batch.needs_new_rows == batch.needs_new_rows
    assert again.batch.num_decodes == num_decodes
    assert list(again.batch.prompt_plans) == windows
    for window in windows:
        ours, theirs = again.batch.prompt_plans[window], batch.prompt_plans[window]
        assert ours.tiled == theirs.tiled
        assert ours.padded == theirs.padded
        assert ours.order is theirs.order
        assert [c.num_rows for c in ours.alone] == [c.num_rows for c in theirs.alone]
        if decodes is not None and again.batch.decodes is not None:
            mine = again.batch.decodes.plans[window]
            assert mine.items is decodes.plans[window].items
            assert mine.first_items is decodes.plans[window].first_items
            assert mine.settings[:2] == decodes.plans[window].settings[:2]
    arrays_again, form_again = flatten(again)
    assert form_again == form
    assert len(arrays_again) == len(arrays)
    assert all(a is b for a, b in zip(arrays, arrays_again, strict=True))
