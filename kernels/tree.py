"""One tree of named arrays: on the host while a step is planned, on the device while it runs.

A tree is made of dataclasses, tuples, lists and dicts. Arrays are its leaves; everything else
(ints, flags, keys, classes) is static and decides which graph the arrays fit. To give a step one
more input is to give a dataclass one more field.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, NamedTuple, TypeVar, cast

import mlx.core as mx
import numpy as np
import numpy.typing as npt

Tree = TypeVar("Tree")
Int32Array = npt.NDArray[np.int32]
HostArray = npt.NDArray[np.int32] | npt.NDArray[np.float32]
Array = Any  # numpy on the host, mx.array on the device


class _Leaf(NamedTuple):
    place: int  # among the arrays


class _Node(NamedTuple):
    kind: type
    names: tuple[Any, ...]  # of fields, or keys
    children: tuple[Any, ...]


class Span(NamedTuple):
    """Where an array lies among others of 32 bits, all in a row."""

    offset: int
    shape: tuple[int, ...]
    is_float: bool


def split(tree: Any) -> tuple[list[Array], Any]:
    """The arrays of ``tree``, each once even if it stands in several places, and all else of it.

    The second part is hashable and is equal for trees that differ in nothing but their arrays.
    """
    arrays: list[Array] = []
    places: dict[int, _Leaf] = {}

    def visit(node: Any) -> Any:
        kind = type(node)
        if kind is np.ndarray or kind is mx.array:
            leaf = places.get(id(node))
            if leaf is None:
                leaf = places[id(node)] = _Leaf(len(arrays))
                arrays.append(node)
            return leaf
        if kind is tuple or kind is list:
            return _Node(kind, (), tuple(map(visit, node)))
        if kind is dict:
            return _Node(kind, tuple(node), tuple(map(visit, node.values())))
        if (names := _field_names(cast(Any, kind))) is not None:
            return _Node(kind, names, tuple([visit(getattr(node, name)) for name in names]))
        return node

    return arrays, visit(tree)


def join(arrays: Sequence[Array], static: Any) -> Any:
    """The inverse of :func:`split`.

    A class that has a method `on_device` gives what it returns in place of an instance made of
    device arrays: what is cheaper to compute there than to upload.
    """
    kind = type(static)
    if kind is _Leaf:
        return arrays[static.place]
    if kind is not _Node:
        return static
    children = [join(arrays, child) for child in static.children]
    if static.kind is tuple or static.kind is list:
        return static.kind(children)
    if static.kind is dict:
        return dict(zip(static.names, children, strict=True))
    made = static.kind(**dict(zip(static.names, children, strict=True)))
    complete = getattr(made, "on_device", None)
    return made if complete is None else complete()


def spans(arrays: Sequence[HostArray]) -> tuple[Span, ...]:
    """Where each array lies once all are in a row."""
    found, offset = [], 0
    for array in arrays:
        found.append(Span(offset, array.shape, array.dtype == np.float32))
        offset += array.size
    return tuple(found)


def unpack(packed: mx.array, parts: Sequence[Span]) -> list[mx.array]:
    """The arrays that lie in a row in ``packed``, (n,) int32."""
    found = []
    for offset, shape, is_float in parts:
        size = 1
        for length in shape:
            size *= length
        part = packed[offset : offset + size]
        if is_float:
            part = part.view(mx.float32)
        found.append(part if len(shape) == 1 else part.reshape(shape))
    return found


def to_device(tree: Tree) -> Tree:
    """``tree`` with an array of MLX for each of its arrays, one by one."""
    arrays, static = split(tree)
    joined: Tree = join([mx.array(array) for array in arrays], static)
    return joined


@cache
def _field_names(kind: Any) -> tuple[str, ...] | None:
    if not is_dataclass(kind):
        return None
    return tuple(field.name for field in fields(kind) if field.init)
