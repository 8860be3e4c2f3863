"""Linears of the same input, joined into one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn


def join_alike(linears: Sequence[Any]) -> list[Any]:
    """One linear if they can be joined, else the same ones."""
    return [join(linears)] if can_join(linears) else list(linears)


def can_join(linears: Sequence[Any]) -> bool:
    first = linears[0]
    if any(type(linear) is not type(first) or set(linear) != set(first) for linear in linears):
        return False
    if isinstance(first, nn.QuantizedLinear):
        return all(
            (x.bits, x.group_size, x.mode) == (first.bits, first.group_size, first.mode)
            for x in linears
        )
    return True


def join(linears: Sequence[Any]) -> Any:
    """One linear with the outputs of all; their arrays become views of its arrays."""
    joined: Any = nn.Module.__new__(type(linears[0]))
    nn.Module.__init__(joined)
    for name in ("bits", "group_size", "mode"):
        if hasattr(linears[0], name):
            setattr(joined, name, getattr(linears[0], name))
    for name in linears[0]:
        whole = mx.concatenate([linear[name] for linear in linears])
        mx.eval(whole)
        joined[name] = whole
        ends = [0]
        for linear in linears:
            ends.append(ends[-1] + linear[name].shape[0])
            linear[name] = whole[ends[-2] : ends[-1]]
            mx.eval(linear[name])
    return joined
