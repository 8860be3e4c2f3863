"""Recurrent families whose recurrence is a method, or which look back in a way of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import baichuan_m1, jamba, mamba, recurrent_gemma, rwkv7

from quire.engine.recurrent.layer import StateHandle, Stored
from quire.engine.recurrent.scan import previous_rows, scan

Method = Callable[..., Any]


def adapt_families() -> None:
    """Wrap the methods; each is to be wrapped once."""
    mamba.MambaBlock.ssm_step = _mamba(mamba.MambaBlock.ssm_step)
    jamba.JambaMambaMixer.ssm_step = _jamba(jamba.JambaMambaMixer.ssm_step)
    rwkv7.TokenShift.__call__ = _token_shift(rwkv7.TokenShift.__call__)
    rwkv7.Rwkv7TimeMixing._wkv7 = _rwkv7(rwkv7.Rwkv7TimeMixing._wkv7)
    recurrent_gemma.RGLRU.__call__ = _gated_unit(recurrent_gemma.RGLRU.__call__)
    attention = baichuan_m1.Attention
    attention._custom_convolution = _key_convolution(attention._custom_convolution)


def adapt_model(model: nn.Module) -> None:
    """Let kimi_k3's own step for decodes on Metal meet handles, which a compiled one cannot."""
    for module in model.modules():
        if hasattr(module, "_decode_core"):
            module._step = module._decode_core


def _mamba(original: Method) -> Method:
    def step(block: Any, x: mx.array, A: mx.array, state: Any = None) -> Any:
        """x: (T, channels)"""
        if type(state) is not StateHandle:
            return original(block, x, A, state)

        def recurrence(rows: list[mx.array], states: mx.array) -> tuple[mx.array, mx.array]:
            outputs = []
            for place in range(rows[0].shape[1]):
                output, states = original(block, rows[0][:, place], A, states)
                outputs.append(output)
            return mx.stack(outputs, axis=1), states

        outputs, stored = scan(recurrence, state, [x[:, None]])
        return outputs[:, 0], stored

    return step


def _jamba(original: Method) -> Method:
    def step(mixer: Any, x: mx.array, A: mx.array, state: Any = None) -> Any:
        if type(state) is not StateHandle:
            return original(mixer, x, A, state)
        return scan(lambda rows, states: original(mixer, *rows, A, states), state, [x])

    return step


def _token_shift(original: Method) -> Method:
    def shift(module: Any, x: mx.array, state: Any) -> mx.array:
        if type(state) is StateHandle:
            return previous_rows(state, x)
        shifted: mx.array = original(module, x, state)
        return shifted

    return shift


def _rwkv7(original: Method) -> Method:
    def update(mixer: Any, *args: Any) -> Any:
        *rows, state = args
        if type(state) is not StateHandle:
            return original(mixer, *args)
        return scan(lambda rows, states: original(mixer, *rows, states), state, rows)

    return update


def _gated_unit(original: Method) -> Method:
    """A sequence's first token is not scaled as the others are: what begins is computed as such."""

    def update(unit: Any, x: mx.array, cache: Any = None) -> tuple[mx.array, mx.array | Stored]:
        if type(cache) is not StateHandle:
            result: tuple[mx.array, mx.array] = original(unit, x, cache)
            return result

        def recurrence(rows: list[mx.array], states: mx.array) -> tuple[mx.array, mx.array]:
            x, positions = rows
            begins = positions[:, :1] == 0
            outputs, behind = original(unit, x, states)
            first_outputs, first_behind = original(unit, x, None)
            outputs = mx.where(begins[..., None], first_outputs, outputs)
            return outputs, mx.where(begins, first_behind, behind)

        return scan(recurrence, cache, [x, cache.positions[:, None]])

    return update


def _key_convolution(original: Method) -> Method:
    def convolve(attention: Any, u: mx.array, weights: mx.array, state: Any = None) -> mx.array:
        """u: (T, heads, 1, dim)"""
        if type(state) is StateHandle:
            state = previous_rows(state, u)
        convolved: mx.array = original(attention, u, weights, state)
        return convolved

    return convolve
