"""Functions and steps that are compiled once they have come often enough."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest

from quire.engine.model.paged_model import PagedModel
from quire.engine.model.seam import StepContext, StepRows
from quire.engine.step import recurring
from quire.engine.step.compiled_blocks import CompiledBlocks
from quire.engine.step.compiled_mixed import CompiledMixed, pad_wanted
from quire.engine.step.recurring import Recurring
from quire.kernels.decode_plan import DecodePlan, DecodeSettings
from quire.kernels.kv_write import Slots
from quire.kernels.prompt_attention import plan_prompts
from quire.kernels.prompt_attention_spec import PromptShape, PromptVariant
from quire.kernels.ragged import DecodeRows, PromptChunk, RaggedBatch

BLOCK = 8


class Runs:
    """Counts how often Python runs: a compiled function runs when it is traced only."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, x: mx.array, power: int) -> mx.array:
        self.count += 1
        return x**power


def test_a_form_is_traced_when_it_has_come_often_enough() -> None:
    runs = Runs()
    function = Recurring(runs, direct_runs=3)
    for k in range(10):
        assert function("square", mx.array([k]), 2).tolist() == [k * k]
    assert runs.count == 4
    # Another form has a count of its own.
    assert function("cube", mx.array([5]), 3).tolist() == [125]
    assert runs.count == 5


def test_graphs_of_too_many_forms_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recurring, "_MAX_FORMS", 4)
    runs = Runs()
    function = Recurring(runs, direct_runs=1)
    for _ in range(2):
        function(1, mx.array([1]), 1)
    assert runs.count == 2
    for power in range(2, 7):
        assert function(power, mx.array([2]), power).tolist() == [2**power]
    for _ in range(3):
        assert function(1, mx.array([1]), 1).tolist() == [1]
    assert runs.count == 2 + 5 + 2


class Model:
    """Mixes up everything that a step is given, as a model does."""

    def __init__(self) -> None:
        self.context = StepContext()
        self.count = 0

    def __call__(self, token_ids: mx.array) -> mx.array:
        self.count += 1
        context = self.context
        decodes, plan = context.batch.decodes, context.batch.prompt_plans[None]
        assert plan.tiled is not None
        assert (decodes is None) == (plan.order is None)
        assert context.wanted_rows is not None
        assert context.run_block is not None
        arrays = [plan.tiled.items, plan.tiled.block_tables]
        if decodes is not None and plan.order is not None:
            arrays += [decodes.block_tables, *decodes.plans[None].arrays(), plan.order]
        mixed = token_ids + 3 * context.positions + 7 * context.slots.mapping
        for factor, array in enumerate(arrays, start=11):
            mixed = mixed + factor * array.sum()
        return mixed[context.wanted_rows]


def step(seed: int, *, together: bool) -> tuple[mx.array, StepRows, list[int]]:
    """Three decodes and a prompt of 20 tokens, of other numbers for every ``seed``.

    With ``together`` the decodes are chunks too.
    """
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> mx.array:
        return mx.array(rng.integers(0, 1000, shape).astype(np.int32))

    def blocks(count: int) -> npt.NDArray[np.int32]:
        return rng.integers(1, 90, count).astype(np.int32)

    decodes = DecodeRows(draw(3, 16), {None: DecodePlan(draw(3, 4), None, DecodeSettings(4, 8))})
    chunks = [PromptChunk(3, 20, 20 + BLOCK, blocks(4))]
    if together:
        lengths = rng.integers(2 * BLOCK + 1, 3 * BLOCK, 3)
        chunks[:0] = [PromptChunk(i, 1, int(n), blocks(3)) for i, n in enumerate(lengths)]
    batch = RaggedBatch([], chunks, None if together else decodes, num_after=9)
    layer = PromptShape(1, 1, 4, 2, 64, 64, BLOCK)
    batch.prompt_plans[None] = plan_prompts(
        chunks,
        None,
        layer,
        lambda _: PromptVariant.PAGED_KERNEL,
        dtype=mx.bfloat16,
        num_before=batch.num_decodes,
        num_after=9,
    )
    wanted = sorted(rng.choice(23, 4, replace=False).tolist())
    return draw(32), StepRows(draw(32), Slots(draw(32), BLOCK, mx.zeros((1,))), batch), wanted


@pytest.mark.parametrize("together", [False, True])
def test_compiled_steps_take_all_their_arrays_from_the_step(together: bool) -> None:
    model = Model()
    run = CompiledMixed(cast(PagedModel, model), CompiledBlocks())
    for seed in range(12):
        token_ids, rows, wanted = step(seed, together=together)
        expected = Model()
        expected.context.positions, expected.context.slots, expected.context.batch = rows
        expected.context.wanted_rows = mx.array(wanted)
        expected.context.run_block = cast(Any, SimpleNamespace())
        found = run(token_ids, rows, mx.array(pad_wanted(wanted)))
        assert found[: len(wanted)].tolist() == expected(token_ids).tolist()
    assert model.count < 12, "nothing was compiled"


def test_wanted_rows_come_in_few_numbers() -> None:
    assert pad_wanted([4]).tolist() == [4]
    assert pad_wanted(list(range(9))).tolist() == [*range(9), 8]
    assert len({len(pad_wanted([0] * n)) for n in range(33, 65)}) == 4
