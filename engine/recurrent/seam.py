"""Where mlx-lm's recurrent layers are reached: functions that its files look up at each call.

Each wrapper passes calls without a :class:`StateHandle` on unchanged. Most families need no more
than these functions; what a few need in addition is in :mod:`quire.engine.recurrent.families`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

import mlx.core as mx
import mlx_lm.models.gated_delta as gated_delta
import mlx_lm.models.ssm as ssm

from quire.engine.recurrent.convolution import DELTA_NETS, by_head, join_window
from quire.engine.recurrent.families import adapt_families
from quire.engine.recurrent.layer import STORED, StateHandle, Stored
from quire.engine.recurrent.scan import scan
from quire.kernels.delta_steps import DeltaRows, Gates
from quire.kernels.recurrent import apply_delta_rule, apply_ssm
from quire.kernels.ssm_steps import SsmLayer, SsmRows

Function = Callable[..., Any]
# Of `gated_delta_update`: gates, or factors, are computed otherwise.
_OTHER_GATES = ("lower_bound", "allow_neg_eigval")
_concatenate: Callable[..., mx.array] = mx.concatenate


@cache
def install() -> None:
    """Wrap the functions, once."""
    mx.concatenate = _join  # type: ignore[assignment]
    gated_delta.gated_delta_ops = _delta_rule(gated_delta.gated_delta_ops)
    gated_delta.gated_delta_kernel = _delta_rule(gated_delta.gated_delta_kernel)
    ssm.ssm_update_kernel = _ssm(ssm.ssm_update_kernel)
    ssm.ssm_attn = _ssm(ssm.ssm_attn)
    for name in ("bailing_moe_linear", "bailing_hybrid"):
        module = importlib.import_module(f"mlx_lm.models.{name}")
        module.recurrent_gla = _linear_attention(module.recurrent_gla)  # type: ignore[attr-defined]
    for name in DELTA_NETS:
        module = importlib.import_module(f"mlx_lm.models.{name}")
        module.gated_delta_update = _delta_net(module.gated_delta_update)  # type: ignore[attr-defined]
    adapt_families()


def _join(arrays: Any, axis: int = 0, **options: Any) -> mx.array:
    """`mx.concatenate`; in front of a convolution, the rows it looks at."""
    if not arrays or type(arrays[0]) is not StateHandle:
        return _concatenate(arrays, axis, **options)
    return join_window(*arrays)


def _delta_rule(original: Function) -> Function:
    def update(
        q: mx.array,
        k: mx.array,
        v: mx.array,
        g: mx.array,
        beta: mx.array,
        state: Any = None,
        mask: mx.array | None = None,
    ) -> tuple[mx.array, mx.array | Stored]:
        if type(state) is not StateHandle:
            result: tuple[mx.array, mx.array] = original(q, k, v, g, beta, state, mask)
            return result
        rows = DeltaRows.of(x[:, 0] for x in (q, k, v, g, beta))
        y = state.computed(apply_delta_rule(rows, state.pool, state.segments, state.fence))
        return y[:, None], STORED

    return update


def _delta_net(original: Function) -> Function:
    """Gates and factors too are computed with the rule."""

    def update(
        q: mx.array, k: mx.array, v: mx.array, *args: Any, **options: Any
    ) -> tuple[mx.array, mx.array | Stored]:
        """args: a, b, A_log, dt_bias, state and whatever else"""
        a, b, a_log, dt_bias, state = args[:5]
        if type(state) is StateHandle:
            q, k, v = by_head(q, k, v)
        if type(state) is not StateHandle or any(options.get(name) for name in _OTHER_GATES):
            result: tuple[mx.array, mx.array] = original(q, k, v, *args, **options)
            return result
        rows = DeltaRows.of((x[:, 0] for x in (q, k, v, a, b)), Gates(a_log, dt_bias))
        y = state.computed(apply_delta_rule(rows, state.pool, state.segments, state.fence))
        return y[:, None], STORED

    return update


def _ssm(original: Function) -> Function:
    def update(*args: Any, **options: Any) -> tuple[mx.array, mx.array | Stored]:
        """args: x, A_log, B, C, D, dt, dt_bias, state, the limits of a step and whatever else"""
        state = args[7] if len(args) > 7 else None
        if type(state) is not StateHandle:
            result: tuple[mx.array, mx.array] = original(*args, **options)
            return result
        x, A_log, B, C, D, dt, dt_bias = args[:7]
        steps = ssm.compute_dt(dt, dt_bias, args[8])
        rows = SsmRows(*(each[:, 0] for each in (x, B, C, steps)))
        layer = SsmLayer(A_log, D)
        y = state.computed(apply_ssm(rows, layer, state.pool, state.segments, state.fence))
        return y[:, None], STORED

    return update


def _linear_attention(original: Function) -> Function:
    def attend(
        q: mx.array, k: mx.array, v: mx.array, *args: Any, h: Any = None, **options: Any
    ) -> tuple[mx.array, mx.array | Stored]:
        """q, k, v: (T, heads, 1, dim)"""
        if type(h) is not StateHandle:
            result: tuple[mx.array, mx.array] = original(q, k, v, *args, h=h, **options)
            return result

        def recurrence(rows: list[mx.array], states: mx.array) -> tuple[mx.array, mx.array]:
            by_head = [x.swapaxes(1, 2) for x in rows]
            outputs, behind = original(*by_head, *args, h=states, **options)
            return outputs.swapaxes(1, 2), behind

        outputs, stored = scan(recurrence, h, [x.swapaxes(1, 2) for x in (q, k, v)])
        return outputs.swapaxes(1, 2), stored

    return attend
