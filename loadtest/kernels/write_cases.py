"""KV writes: the keys and values of all rows of a step into their slots."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial

import mlx.core as mx
import numpy as np

from quire.kernels.kv_write import Slots, scatter, write_in_place
from quire.loadtest.kernels.case import Case, Profile
from quire.loadtest.kernels.paged_inputs import BLOCK_SIZE, Heads

# Blocks of the pool: more than a cache holds, so that the slots are not all in it.
_BLOCKS = {"gpu": 2048, "cpu": 256}


def write_cases(profile: Profile) -> Iterator[Case]:
    """A decode step's rows and a prompt's."""
    for rows in (64,) if profile.quick else (64, 2048):
        yield _case(profile, rows)


class _Inputs:
    """Pages, new rows, and where they go.

    The scatter replaces the arrays of its own pool, the kernel writes in place into another.
    """

    def __init__(self, heads: Heads, dtype: mx.Dtype, rows: int, blocks: int, seed: int) -> None:
        shape = (blocks, heads.keys, BLOCK_SIZE, heads.dim)
        self.scattered = mx.zeros(shape, dtype), mx.zeros(shape, dtype)
        self.in_place = mx.zeros(shape, dtype), mx.zeros(shape, dtype)
        keys, values = mx.random.split(mx.random.key(seed))
        row_shape = (rows, heads.keys, 1, heads.dim)
        self.keys = mx.random.normal(row_shape, dtype, key=keys)
        self.values = mx.random.normal(row_shape, dtype, key=values)
        order = np.random.default_rng(seed).permutation(blocks * BLOCK_SIZE)[:rows]
        mapping = mx.array(order.astype(np.int32))
        self.slots = Slots(mapping, BLOCK_SIZE, after=mx.zeros((1,), mx.int32))


def _scatter(x: _Inputs) -> tuple[mx.array, mx.array]:
    scatter(x.scattered[0], x.keys, x.slots)
    scatter(x.scattered[1], x.values, x.slots)
    return x.scattered


def _kernel(x: _Inputs) -> tuple[mx.array, ...]:
    written = write_in_place(*x.in_place, x.keys, x.values, x.slots).token
    return (*x.in_place, written)


def _chain(inputs: _Inputs, result: tuple[mx.array, ...]) -> _Inputs:
    """The same rows and slots: the kernel waits for the token, the scatter for the pages.

    They stay the very objects that the scatter replaced. Had the result arrays of its own, MLX
    would copy the whole pool at each write.
    """
    chained = copy.copy(inputs)
    keys, values, *written = result
    if written:
        chained.slots = copy.copy(inputs.slots)
        (chained.slots.after,) = written
    else:
        chained.scattered = keys, values
    return chained


def _case(profile: Profile, rows: int) -> Case:
    heads = Heads(profile.gpu)
    dtype = profile.dtype
    blocks = _BLOCKS["gpu" if profile.gpu else "cpu"]
    return Case(
        operation="kv_write",
        name=f"{rows} rows",
        labels={"rows": rows},
        inputs=partial(_Inputs, heads, dtype, rows, blocks),
        variants={"scatter": _scatter, **({"kernel": _kernel} if profile.gpu else {})},
        chain=_chain,
        baselines=("scatter",),
        # Rows read, slots written.
        bytes_moved=2 * heads.kv_bytes(rows, dtype),
        tolerance=0.0,
        memory=4 * heads.kv_bytes(blocks * BLOCK_SIZE, dtype),
    )
