"""A tree of arrays comes back as it was, whatever it is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.kernels.tree import join, spans, split, to_device, unpack


@dataclass(frozen=True)
class Pair:
    left: Any
    right: Any


leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.lists(st.integers(-(2**31), 2**31 - 1), max_size=4).map(lambda x: np.array(x, np.int32)),
    st.integers(1, 3).map(lambda n: np.arange(2 * n, dtype=np.int32).reshape(2, n)),
    st.integers(0, 3).map(lambda n: np.linspace(0, 1, n, dtype=np.float32)),
)
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.dictionaries(st.sampled_from(["a", "b", 3]), inner, max_size=3),
        st.builds(Pair, inner, inner),
    ),
    max_leaves=12,
)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray):
        found = np.array(b)
        return a.dtype == found.dtype and a.shape == found.shape and bool((a == found).all())
    if isinstance(a, Pair):
        return type(b) is Pair and same(a.left, b.left) and same(a.right, b.right)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    return type(a) is type(b) and a == b


@settings(max_examples=300, deadline=None)
@given(trees)
def test_trees_survive_being_taken_apart(tree: Any) -> None:
    arrays, static = split(tree)
    hash(static)
    assert same(tree, join(arrays, static))
    assert same(tree, to_device(tree))
    words = [array.reshape(-1).view(np.int32) for array in arrays]
    packed = mx.array(np.concatenate([*words, np.zeros(1, np.int32)]))
    assert same(tree, join(unpack(packed, spans(arrays)), static))
    again, static_again = split(join(arrays, static))
    assert static_again == static
    assert all(a is b for a, b in zip(arrays, again, strict=True))


def test_an_array_that_stands_in_two_places_is_carried_once() -> None:
    shared = np.arange(3, dtype=np.int32)
    arrays, static = split({"a": shared, "b": Pair(shared, 1)})
    assert len(arrays) == 1
    joined = join(arrays, static)
    assert joined["a"] is joined["b"].left


def test_trees_of_other_static_parts_have_other_forms() -> None:
    array = np.arange(3, dtype=np.int32)
    trees = [Pair(array, 1), Pair(array, 2), Pair(array, None), Pair(1, array), Pair(array, array)]
    assert len({split(tree)[1] for tree in trees}) == len(trees)
