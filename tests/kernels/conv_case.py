"""Convolutions over segments, small enough to simulate, and what MLX's own layer makes of them."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.gated_delta import normalize_qk
from recurrent_case import Layout, check_states

from quire.kernels.conv_window import Convolution, QueryKeyHeads, conv_window


@dataclass(frozen=True)
class ConvCase:
    layout: Layout
    width: int = 4
    dtype: mx.Dtype = mx.float32
    bias: bool = True
    silu: bool = True
    channels: int = 24
    heads: tuple[int, int] | None = None  # how many, and their dimensions

    def problem(self) -> tuple[mx.array, Convolution, mx.array]:
        """Rows, the layer's part, and a pool full of tails."""
        rng = np.random.default_rng(self.width + sum(self.layout.lengths))

        def normal(*shape: int) -> mx.array:
            return mx.array(rng.normal(size=shape)).astype(self.dtype)

        channels = self.channels
        bias = normal(channels) if self.bias else None
        heads = QueryKeyHeads(*self.heads) if self.heads else None
        conv = Convolution(normal(channels, self.width, 1), bias, self.silu, heads)
        x = normal(self.layout.num_rows, channels)
        pool = normal(self.layout.num_slots, self.width - 1, channels)
        mx.eval(x, pool, conv.weight, bias)
        return x, conv, pool

    def expected(
        self, x: mx.array, conv: Convolution, pool: mx.array
    ) -> tuple[mx.array, dict[int, mx.array]]:
        """By MLX's own layer, sequence by sequence, and the tails by target."""
        channels = self.channels
        layer = nn.Conv1d(channels, channels, self.width, groups=channels, bias=self.bias)
        layer.weight = conv.weight
        if conv.bias is not None:
            layer.bias = conv.bias
        ys, tails, tail, start = [], {}, None, 0
        layout, targets = self.layout, self.layout.slots()[1]
        for index, length in enumerate(layout.lengths):
            window = mx.concatenate([layout.state(pool, tail, index), x[start : start + length]])
            if length:
                y = layer(window[None])[0]
                ys.append(nn.silu(y) if self.silu else y)
            tails[targets[index]] = tail = window[-(self.width - 1) :]
            start += length
        y = mx.concatenate([*ys, mx.zeros((layout.padding, channels), x.dtype)])
        if (heads := conv.heads) is not None:
            q, k, v = mx.split(y, [heads.channels, 2 * heads.channels], axis=1)
            q, k = (each.reshape(-1, heads.heads, heads.dim) for each in (q, k))
            normed = normalize_qk(q, k, inv_scale=heads.dim**-0.5, eps=1e-6)
            y = mx.concatenate([each.flatten() for each in (*normed, v)])
        mx.eval(y, tails)  # before a kernel writes over what these are made of
        return y, tails

    def run(self) -> tuple[mx.array, mx.array, mx.array]:
        """What the kernel makes of :meth:`problem`: y, its fence and the pool."""
        x, conv, pool = self.problem()
        y, fence = conv_window(x, conv, pool, self.layout.segments(), mx.array([1]))
        return y, fence, pool

    def check(self) -> None:
        x, conv, before = self.problem()
        y, tails = self.expected(x, conv, before)
        found, fence, pool = self.run()
        assert fence.tolist() == [1]
        check_rows(found, y)
        check_states(pool, before, tails, atol=0.0)


def check_rows(found: mx.array, wanted: mx.array) -> None:
    assert found.dtype == wanted.dtype
    np.testing.assert_allclose(
        found.astype(mx.float32),
        wanted.astype(mx.float32),
        rtol=2 * mx.finfo(wanted.dtype).eps,
        atol=1e-6 if wanted.dtype == mx.float32 else 1e-4,
    )
