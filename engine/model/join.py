"""Linears of the same input, joined into one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np


def join_alike(linears: Sequence[Any]) -> list[Any]:
    """One linear if they can be joined, else the same ones."""
    return [join(linears)] if can_join(linears) else list(linears)


def can_join(linears: Sequence[Any]) -> bool:
    first = linears[0]
    if any(type(linear) is not type(first) or set(linear) != set(first) for linear in linears):
        return False
    if any(getattr(linear, "global_scale", None) is not None for linear in linears):
        return False
    return all(_packing(linear) == _packing(first) for linear in linears)


def join(linears: Sequence[Any], axis: int = 0) -> Any:
    """One linear with the outputs of all, which their arrays have along ``axis``; these become
    views of its arrays."""
    joined: Any = nn.Module.__new__(type(linears[0]))
    nn.Module.__init__(joined)
    for name, value in _packing(linears[0]).items():
        setattr(joined, name, value)
    if hasattr(linears[0], "global_scale"):
        joined.global_scale = None
    for name in linears[0]:
        whole = mx.concatenate([linear[name] for linear in linears], axis)
        mx.eval(whole)
        joined[name] = whole
        ends = np.cumsum([linear[name].shape[axis] for linear in linears])
        for linear, part in zip(linears, mx.split(whole, ends[:-1].tolist(), axis), strict=True):
            linear[name] = part
            mx.eval(part)
    return joined


def _packing(linear: Any) -> dict[str, Any]:
    """How its weights are quantised, if they are."""
    names = ("bits", "group_size", "mode")
    return {name: getattr(linear, name) for name in names if hasattr(linear, name)}
