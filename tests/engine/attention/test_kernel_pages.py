"""How kernels are told of a step's rows."""

from __future__ import annotations

from array import array

import mlx.core as mx
import numpy as np
import pytest

from quire.engine.attention.kernel_pages import KernelPages
from quire.engine.messages import SamplingParams
from quire.engine.step.transfer import HostTree
from quire.engine.step_batch import Chunk, StepBatch
from quire.kernels.choice.selection import Selector, selecting
from quire.kernels.heads import Heads

BLOCK = 16
HEADS = Heads(32, 8, 128, 128, None, False, mx.bfloat16)


def chunk(start: int, num_tokens: int, first_block: int, shared: int = 0) -> Chunk:
    num_blocks = (start + num_tokens - 1) // BLOCK + 1
    blocks = [*range(1, shared + 1), *range(first_block, first_block + num_blocks - shared)]
    return Chunk(
        None, 0, start, num_tokens, [5] * num_tokens, -1, array("i", blocks), True,
        SamplingParams(), 0, 0, [],
    )  # type: ignore[arg-type]  # fmt: skip


def batch(decodes: list[int], prompts: list[int], shared: int = 0) -> StepBatch:
    """Decodes after so many tokens, and new prompts of so many."""
    chunks = [chunk(n, 1, 1000 * (i + 1), shared) for i, n in enumerate(decodes)]
    chunks += [chunk(0, n, 500_000 + 1000 * i) for i, n in enumerate(prompts)]
    return StepBatch(0, chunks, len(decodes))


def test_on_cuda_decodes_of_short_contexts_are_chunks_beside_prompts() -> None:
    backend = KernelPages([HEADS], BLOCK)
    with selecting(Selector("cuda", None)):
        rows = backend.lay_out(batch([100, 200, 300], [40]))
        assert rows.decodes_as_chunks
        assert rows.num_decode_rows == 3
        plan = backend.plan(rows)[HEADS]
    assert plan.decodes is None
    assert plan.prompts is not None
    assert plan.prompts.tiled is not None
    assert plan.prompts.tiled.num_rows == len(rows) == 48


@pytest.mark.parametrize(("count", "together"), [(2, False), (128, True)])
def test_what_is_shared_is_read_together_only_where_that_pays(count: int, together: bool) -> None:
    backend = KernelPages([HEADS], BLOCK)
    with selecting(Selector("cuda", None)):
        rows = backend.lay_out(batch([1700] * count, [], shared=100))
        plan = backend.plan(rows)[HEADS]
    assert rows.full.decodes.clusters.any() == together
    assert plan.decodes is not None
    assert (plan.decodes.shared_items is not None) == together


def test_a_load_of_mixed_lengths_meets_few_forms() -> None:
    """A graph is compiled for each form, so that a server must not meet new ones for ever."""
    backend = KernelPages([HEADS], BLOCK)
    rng = np.random.default_rng(0)
    forms, num_steps = set(), 600
    with selecting(Selector("cuda", None)):
        for _ in range(num_steps):
            contexts = rng.integers(100, 1000, rng.integers(49, 65)).tolist()
            prompts = [int(rng.integers(100, 400))] if rng.random() < 0.3 else []
            rows = backend.lay_out(batch(contexts, prompts))
            forms.add(HostTree.of(backend.plan(rows)).form)
    assert len(forms) < num_steps / 8
