"""Where mlx-lm's recurrent layers are reached: functions that its files look up at each call.

Each wrapper passes calls without a :class:`StateHandle` on unchanged. Most families need no more
than the four functions here; what a few need in addition is in
:mod:`quire.engine.recurrent.families`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

import mlx.core as mx
import mlx_lm.models.gated_delta as gated_delta
import mlx_lm.models.ssm as ssm

from quire.engine.recurrent.families import adapt_families
from quire.engine.recurrent.layer import StateHandle, Stored, scan, windows

_concatenate: Callable[..., mx.array] = mx.concatenate


@cache
def install() -> None:
    """Wrap the functions, once."""
    mx.concatenate = _join_window  # type: ignore[assignment]
    gated_delta.gated_delta_ops = _delta_rule(gated_delta.gated_delta_ops)
    gated_delta.gated_delta_kernel = _delta_rule(gated_delta.gated_delta_kernel)
    ssm.ssm_update_kernel = _ssm_step(ssm.ssm_update_kernel, ssm.ssm_attn)
    ssm.ssm_attn = _ssm(ssm.ssm_attn)
    for name in ("bailing_moe_linear", "bailing_hybrid"):
        module = importlib.import_module(f"mlx_lm.models.{name}")
        module.recurrent_gla = _linear_attention(module.recurrent_gla)  # type: ignore[attr-defined]
    adapt_families()


def _join_window(arrays: Any, axis: int = 0, **options: Any) -> mx.array:
    """`mx.concatenate`; in front of a convolution, the rows it looks at."""
    if not arrays or type(arrays[0]) is not StateHandle:
        return _concatenate(arrays, axis, **options)
    handle, rows = arrays
    kept = handle.layer.shapes[handle.index].shape[0]
    found = windows(handle, rows, kept)
    return found.reshape(rows.shape[0], kept + 1, *rows.shape[2:])


def _delta_rule(original: Callable[..., Any]) -> Callable[..., Any]:
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
        return scan(lambda rows, states: original(*rows, states), state, [q, k, v, g, beta])

    return update


def _ssm(original: Callable[..., Any]) -> Callable[..., Any]:
    def attend(*args: Any, **options: Any) -> tuple[mx.array, mx.array | Stored]:
        """args: x, A_log, B, C, D, dt, dt_bias, state and whatever else"""
        state = args[7] if len(args) > 7 else None
        if type(state) is not StateHandle:
            result: tuple[mx.array, mx.array] = original(*args, **options)
            return result
        x, A_log, B, C, D, dt, dt_bias = args[:7]

        def recurrence(rows: list[mx.array], states: mx.array) -> tuple[mx.array, mx.array]:
            x, B, C, dt = rows
            found: tuple[mx.array, mx.array] = original(
                x, A_log, B, C, D, dt, dt_bias, states, *args[8:], **options
            )
            return found

        return scan(recurrence, state, [x, B, C, dt])

    return attend


def _ssm_step(original: Callable[..., Any], several: Callable[..., Any]) -> Callable[..., Any]:
    """For a kernel that takes one row of each sequence, beside a function that takes any number."""

    def choose(x: mx.array, *args: Any) -> Any:
        return (original if x.shape[1] == 1 else several)(x, *args)

    return _ssm(choose)


def _linear_attention(original: Callable[..., Any]) -> Callable[..., Any]:
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
