"""Rotary embeddings of flattened rows on the CPU, in a few passes.

MLX's CPU backend composes them from some twenty small operations, and computes the sines of a
position again for every layer, queries and keys apart. Operations, not arithmetic, are what a small
decode step spends its time on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NotRequired, TypedDict, Unpack

import mlx.core as mx

_rope: Callable[..., mx.array] = mx.fast.rope

Tables = tuple[mx.array, mx.array]


class _Others(TypedDict):
    """The arguments of ``mx.fast.rope`` that say what turns by how much."""

    base: float | None
    scale: float
    freqs: NotRequired[mx.array | None]
    stream: NotRequired[Any]


class RowRope:
    """Stands in for ``mx.fast.rope``; takes over where each row has a position of its own.

    The tables of one step are kept until rows with other positions come.
    """

    def __init__(self) -> None:
        self._positions: mx.array | None = None
        self._tables: dict[tuple[object, ...], tuple[Tables, mx.array | None]] = {}

    def __call__(
        self,
        a: mx.array,
        dims: int,
        *,
        traditional: bool,
        offset: int | mx.array,
        **others: Unpack[_Others],
    ) -> mx.array:
        is_row = a.ndim == 4 and a.shape[2] == 1 and a.dtype == mx.float32
        if not is_row or not isinstance(offset, mx.array) or offset.shape != (a.shape[0],):
            return _rope(a, dims, traditional=traditional, offset=offset, **others)
        cos, sin = self._tables_for(
            offset, dims, others["base"], others["scale"], others.get("freqs")
        )
        half = dims // 2
        if traditional:
            pairs = a[..., :dims].reshape(*a.shape[:3], half, 2)
            turned = mx.stack([*_turn(pairs[..., 0], pairs[..., 1], cos, sin)], axis=-1)
            parts = [turned.reshape(*a.shape[:3], dims)]
        else:
            parts = list(_turn(a[..., :half], a[..., half:dims], cos, sin))
        if dims < a.shape[3]:
            parts.append(a[..., dims:])
        return mx.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]

    def _tables_for(
        self,
        positions: mx.array,
        dims: int,
        base: float | None,
        scale: float,
        freqs: mx.array | None,
    ) -> Tables:
        if positions is not self._positions:
            self._positions = positions
            self._tables = {}
        # Frequencies go by their id, which stays theirs as long as the entry holds them.
        key = (dims, base, scale, None if freqs is None else id(freqs))
        if key not in self._tables:
            if freqs is None:
                assert base is not None
                steps = mx.arange(0, -(dims // 2), -1, dtype=mx.float32)
                inverse = mx.exp(steps * (math.log(base) / (dims // 2)))
            else:
                inverse = 1.0 / freqs.astype(mx.float32)
            angles = (positions.astype(mx.float32) * scale)[:, None, None, None] * inverse
            self._tables[key] = (mx.cos(angles), mx.sin(angles)), freqs
        return self._tables[key][0]


@partial(mx.compile, shapeless=True)
def _turn(first: mx.array, second: mx.array, cos: mx.array, sin: mx.array) -> Tables:
    return first * cos - second * sin, first * sin + second * cos
