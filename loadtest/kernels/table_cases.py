"""Attention of whole prompts with as many key heads as query heads, in both array layouts.

The sizes attention libraries for MLX print tables of: 8 heads of 64, float32, causal, sequences
from 128 to 2,048 in batches of 1, 2 and 4.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Literal

import mlx.core as mx
import numpy as np

from quire.kernels.choice.problem import Float64Array, Problem, to_float64
from quire.kernels.heads import Heads
from quire.kernels.page_arrays import PageArrays
from quire.kernels.ragged import PromptChunk
from quire.loadtest.kernels.cases import Case, Profile
from quire.loadtest.kernels.prompt_step import PromptStep

_sdpa = mx.fast.scaled_dot_product_attention

_HEADS, _DIM = 8, 64
_BLOCK_SIZE = 16
_SCALE = _DIM**-0.5
_SIZES = {
    "gpu": [(batch, length) for batch in (1, 2, 4) for length in (128, 512, 1024, 2048)],
    "cpu": [(batch, length) for batch in (1, 2) for length in (128, 512)],
}

Layout = Literal["BHSD", "BSHD"]
_LAYOUTS: tuple[Layout, ...] = ("BHSD", "BSHD")


def attention_cases(profile: Profile) -> Iterator[Case]:
    """(batch, heads, sequence, dim), then (batch, sequence, heads, dim)."""
    sizes = _SIZES["gpu" if profile.gpu else "cpu"]
    for layout in _LAYOUTS:
        for batch, length in sizes[:1] if profile.quick else sizes:
            yield _case(layout, batch, length, profile.gpu)


class _Inputs(Problem):
    """The same random arrays in one layout, and as the rows and pages of Quire's own attention."""

    def __init__(self, layout: Layout, batch: int, length: int, gpu: bool, seed: int) -> None:
        shape = (batch, _HEADS, length, _DIM)
        self.layout = layout
        self.num_bytes = 4 * batch * _HEADS * length * _DIM * mx.float32.size
        self.flops = 4 * batch * _HEADS * _DIM * length * (length + 1) // 2
        bhsd = [mx.random.normal(shape, key=mx.random.key(4 * seed + i)) for i in range(3)]
        by_token = [mx.contiguous(array.swapaxes(1, 2)) for array in bhsd]
        self.arrays = bhsd if layout == "BHSD" else by_token
        hidden = np.triu(np.full((length, length), -1e30, np.float32), 1)
        self.bias = mx.array(hidden)
        mx.eval(self.arrays, self.bias)
        blocks = length // _BLOCK_SIZE
        keys, values = (
            mx.contiguous(array.reshape(-1, _BLOCK_SIZE, _HEADS, _DIM).swapaxes(1, 2))
            for array in by_token[1:]
        )
        mx.eval(keys, values)
        self.pages = keys, values
        # Keys and values as the step has them beside their pages.
        self.rows = [array.reshape(-1, _HEADS, 1, _DIM) for array in by_token[1:]]
        mx.eval(self.rows)
        self.fence = mx.zeros((1,), mx.int32) if gpu else None
        tables = np.arange(batch * blocks, dtype=np.int32).reshape(batch, blocks)
        chunks = [
            PromptChunk(row * length, length, length, table) for row, table in enumerate(tables)
        ]
        heads = Heads(_HEADS, _HEADS, _DIM, _DIM, None, False, mx.float32)
        self.step = PromptStep(chunks, heads, _BLOCK_SIZE, gpu=gpu)

    def expected(self) -> list[Float64Array]:
        return to_float64([_naive(self.layout, self)])

    def chained(self, result: Sequence[mx.array]) -> _Inputs:
        """The same keys and values with the result of another call as queries."""
        other = copy.copy(self)
        other.arrays = [result[0], *self.arrays[1:]]
        return other


def _quire(layout: Layout, x: _Inputs) -> mx.array:
    """All sequences in one ragged step, their rows one after the other, as the engine has them.

    With heads first, which it never has them, that takes copies. On GPUs, where whole prompts in
    float32 are MLX's to attend to anyway, its own function is better then.
    """
    if layout == "BHSD" and x.fence is not None:
        return _mlx(layout, x)
    rows = x.rows
    by_token = x.arrays
    if layout == "BHSD":
        by_token = [array.swapaxes(1, 2) for array in x.arrays]
        rows = [array.reshape(-1, _HEADS, 1, _DIM) for array in by_token[1:]]
    queries = by_token[0].reshape(-1, _HEADS, 1, _DIM)
    arrays = PageArrays(*x.pages, x.fence, *rows)
    output = x.step.attend(queries, arrays, _SCALE).reshape(by_token[0].shape)
    return mx.contiguous(output.swapaxes(1, 2)) if layout == "BHSD" else output


def _mlx(layout: Layout, x: _Inputs) -> mx.array:
    if layout == "BHSD":
        queries, keys, values = x.arrays
        return _sdpa(queries, keys, values, scale=_SCALE, mask="causal")
    queries, keys, values = (array.swapaxes(1, 2) for array in x.arrays)
    output = _sdpa(queries, keys, values, scale=_SCALE, mask="causal")
    # In the layout asked for, which the projection behind it needs.
    return mx.contiguous(output.swapaxes(1, 2))


def _naive(layout: Layout, x: _Inputs) -> mx.array:
    """With the whole matrix of scores in memory."""
    by_token = layout == "BSHD"
    queries, keys, values = (a.swapaxes(1, 2) if by_token else a for a in x.arrays)
    scores = (queries * _SCALE) @ keys.swapaxes(2, 3) + x.bias
    output = mx.softmax(scores, axis=-1) @ values
    return mx.contiguous(output.swapaxes(1, 2)) if by_token else output


def _case(layout: Layout, batch: int, length: int, gpu: bool) -> Case:
    return Case(
        operation="attention_table",
        name=f"{layout} {batch} x {length}",
        labels={"sequence": length, "batch": batch, "layout": layout},
        inputs=partial(_Inputs, layout, batch, length, gpu),
        variants={
            "sdpa": lambda x: [_mlx(layout, x)],
            "naive": lambda x: [_naive(layout, x)],
            "quire": lambda x: [_quire(layout, x)],
        },
        baselines=("sdpa", "naive"),
    )
