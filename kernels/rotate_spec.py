"""Head norms, rotary embeddings and KV writes of a step's projected rows."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple, Protocol

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from quire.kernels.choice.problem import Float64Array, Problem, ints, normal, to_float64, waiting
from quire.kernels.choice.spec import (
    ANYWHERE,
    GPUS,
    Default,
    Group,
    Kind,
    Settings,
    Spec,
    Variant,
    round_up,
)
from quire.kernels.fused_ops_spec import rms_normed
from quire.kernels.kv_write import Slots, scatter
from quire.kernels.page_arrays import PageArrays
from quire.kernels.rotate import HeadNorms, ProjectedRows, Rotary, rotate_and_write

_EPS = 1e-5
_BASE = 10000.0  # of rotary frequencies
_FACTOR = 1.34375  # of YaRN for contexts 32 times as long, in bfloat16
# Angles beyond are not exact enough in float32 to tell a wrong result from a rounded one.
_MAX_POSITION = 64


class RotateVariant(Enum):
    FUSED = "fused"
    SEPARATE = "separate"


class RotateShape(NamedTuple):
    rows: int
    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    block_size: int
    norms: bool = False  # of each head of queries and keys
    traditional: bool = False  # pairs are neighbours
    keep_rows: bool = False  # new keys and values are returned too
    gated: bool = False  # as in ProjectedRows
    scaled: bool = False  # what is turned is multiplied before

    def bucket(self) -> RotateShape:
        return RotateShape(round_up(self.rows), *self[1:])


class RotatedHeads(Protocol):
    @property
    def rows(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def rotary_dim(self) -> int: ...
    @property
    def norms(self) -> bool: ...
    @property
    def traditional(self) -> bool: ...
    @property
    def gated(self) -> bool: ...
    @property
    def scaled(self) -> bool: ...


class RandomRows:
    """Random rows of queries, keys and values, as in :class:`ProjectedRows`, and what turns them to
    their positions."""

    def __init__(
        self,
        shape: RotatedHeads,
        positions: npt.NDArray[np.integer],
        dtype: mx.Dtype,
        key: mx.array,
    ) -> None:
        self.shape = shape
        random = mx.random.split(key, 3)
        num_heads = (2 if shape.gated else 1) * shape.heads + 2 * shape.kv_heads
        self.qkv = normal((shape.rows, num_heads * shape.head_dim), dtype, random[0])
        self.weights = [normal((shape.head_dim,), dtype, key) for key in random[1:]]
        self._positions = positions
        self.positions = ints(positions)
        steps = np.arange(0, shape.rotary_dim, 2) / shape.rotary_dim
        frequencies = mx.array((_BASE**-steps).astype(np.float32))
        self._periods = 1 / frequencies
        mx.eval(self.positions, frequencies, self._periods)
        self._factor = _FACTOR if shape.scaled else 1.0
        self.rotary = Rotary(frequencies, shape.rotary_dim, shape.traditional, self._factor)
        self.norms = HeadNorms(self.weights[0], self.weights[1], _EPS) if shape.norms else None

    def waiting(self, result: Sequence[mx.array]) -> RandomRows:
        """The same rows once ``result`` is there."""
        other = copy.copy(self)
        other.qkv = waiting(self.qkv, result)
        return other

    def _places(self) -> list[slice]:
        """Of the heads of queries, keys and values."""
        step = 2 if self.shape.gated else 1
        keys = step * self.shape.heads
        values = keys + self.shape.kv_heads
        return [slice(0, keys, step), slice(keys, values), slice(values, None)]

    def by_mlx(self) -> list[mx.array]:
        """Queries, keys and values, (rows, heads, 1, dim) each."""
        shape = self.shape
        rows = self.qkv.reshape(shape.rows, -1, 1, shape.head_dim)
        parts = [rows[:, places] for places in self._places()]
        if shape.norms:
            for i, weight in enumerate(self.weights):
                parts[i] = mx.fast.rms_norm(parts[i], weight, _EPS)
        dims = shape.rotary_dim
        for i in range(2):
            turned, kept = mx.split(parts[i], [dims], axis=-1)
            parts[i] = mx.fast.rope(
                mx.concatenate([turned * self._factor, kept], axis=-1),
                dims,
                traditional=shape.traditional,
                base=None,
                scale=1.0,
                offset=self.positions,
                freqs=self._periods,
            )
        return parts

    def in_float64(self) -> list[Float64Array]:
        """Queries, keys and values, (rows, heads, dim) each."""
        shape = self.shape
        rows = to_float64([self.qkv])[0].reshape(shape.rows, -1, shape.head_dim)
        parts = [rows[:, places] for places in self._places()]
        frequencies = to_float64([self.rotary.inverse_frequencies])[0]
        angles = self._positions[:, None, None] * frequencies
        for i, weight in enumerate(to_float64(self.weights)):
            scaled = rms_normed(parts[i], weight, _EPS) if shape.norms else parts[i].copy()
            scaled[..., : shape.rotary_dim] *= self._factor
            parts[i] = _rotated(scaled, angles, shape.traditional)
        return parts


def _rotated(x: Float64Array, angles: Float64Array, traditional: bool) -> Float64Array:
    """(T, heads, dim) ``x`` with its first values turned by (T, 1, pairs) ``angles``."""
    half = angles.shape[-1]
    places = np.arange(2 * half)
    first, second = (places[::2], places[1::2]) if traditional else (places[:half], places[half:])
    turned = x.copy()
    turned[..., first] = x[..., first] * np.cos(angles) - x[..., second] * np.sin(angles)
    turned[..., second] = x[..., first] * np.sin(angles) + x[..., second] * np.cos(angles)
    return turned


class RotateProblem(Problem):
    """The result is the queries, both page arrays, and the new keys and values if kept."""

    def __init__(self, shape: RotateShape, dtype: mx.Dtype, seed: int, ragged: bool) -> None:
        self.shape = shape
        rng = np.random.default_rng(seed)
        random = mx.random.split(mx.random.key(seed), 3)
        positions = rng.integers(0, _MAX_POSITION, shape.rows)
        self.rows = RandomRows(shape, positions, dtype, random[0])
        num_blocks = 2 + -(-2 * shape.rows // shape.block_size)
        size = num_blocks, shape.kv_heads, shape.block_size, shape.head_dim

        def fresh_pages() -> list[mx.array]:
            return [normal(size, dtype, key) for key in random[1:]]

        # Each variant writes to pages of its own, whose results stay for the next call.
        self.fresh_pages = fresh_pages
        self.fused, self.separate = fresh_pages(), fresh_pages()
        # Block 0 is nobody's.
        free = np.arange(shape.block_size, num_blocks * shape.block_size)
        self.mapping = rng.permutation(free)[: shape.rows].astype(np.int32)
        self.slots = Slots(ints(self.mapping), shape.block_size)
        self.fence = mx.zeros((1,), mx.int32)
        mx.eval(self.slots.mapping, self.fence)
        self.num_bytes = 2 * self.rows.qkv.nbytes

    def expected(self) -> list[Float64Array]:
        parts, pages = self.rows.in_float64(), to_float64(self.fresh_pages())
        blocks, offsets = np.divmod(self.mapping, self.shape.block_size)
        for array, new in zip(pages, parts[1:], strict=True):
            array[blocks, :, offsets] = new
        kept = [new[:, :, None] for new in parts[1:]] if self.shape.keep_rows else []
        return [parts[0][:, :, None], *pages, *kept]

    def chained(self, result: Sequence[mx.array]) -> RotateProblem:
        other = copy.copy(self)
        other.rows = self.rows.waiting(result)
        return other


def _fused(problem: RotateProblem, settings: Settings) -> list[mx.array]:
    given = problem.rows
    queries, pages = rotate_and_write(
        ProjectedRows(given.qkv, given.positions, problem.slots.mapping, gated=problem.shape.gated),
        PageArrays(problem.fused[0], problem.fused[1], problem.fence),
        given.rotary,
        given.norms,
        keep_rows=problem.shape.keep_rows,
    )
    kept = [rows for rows in (pages.new_keys, pages.new_values) if rows is not None]
    return [queries, *mx.depends(problem.fused, [pages.needed_fence()]), *kept]


def _separate(problem: RotateProblem, settings: Settings) -> list[mx.array]:
    queries, *new = problem.rows.by_mlx()
    for pages, rows in zip(problem.separate, new, strict=True):
        scatter(pages, rows, problem.slots)
    return [queries, *problem.separate, *(new if problem.shape.keep_rows else ())]


_COMMON = RotateShape(8, 32, 8, 128, 128, 16)

ROTATE_AND_WRITE = Spec(
    name="rotate_and_write",
    shape=RotateShape,
    variants={
        RotateVariant.FUSED: Variant(_fused),
        RotateVariant.SEPARATE: Variant(_separate, Kind.STEPS, ANYWHERE),
    },
    reference=RotateVariant.SEPARATE,
    defaults=(Default(RotateVariant.FUSED, GPUS),),
    problem=RotateProblem,
    checked=(
        RotateShape(5, 8, 2, 128, 128, 16, norms=True, keep_rows=True),
        RotateShape(3, 4, 4, 64, 64, 8),
        RotateShape(9, 6, 3, 80, 32, 32, traditional=True, keep_rows=True),
        RotateShape(2, 2, 1, 256, 256, 16, norms=True, traditional=True),
        RotateShape(3, 4, 2, 256, 64, 16, norms=True, keep_rows=True, gated=True),
        RotateShape(3, 8, 1, 64, 64, 16, scaled=True),
    ),
    surveyed={"with norms": _COMMON._replace(norms=True), "without norms": _COMMON},
    group=Group.BLOCKS,
)
