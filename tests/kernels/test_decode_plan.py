"""How contexts are cut into work items."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from quire.kernels.decode_plan import default_settings, is_one_per_row, plan_items
from quire.kernels.padding import pad_size

contexts = st.lists(st.integers(0, 5000), min_size=1, max_size=40)


@given(contexts, st.none() | st.integers(1, 600), st.sampled_from([128, 256, 1024]))
def test_items_cover_what_each_row_sees(lengths: list[int], window: int | None, split: int) -> None:
    items, first_items = plan_items(np.array(lengths, np.int32), window, split)
    assert first_items[0] == 0
    assert first_items[-1] == len(items)
    for row, length in enumerate(lengths):
        mine = items[first_items[row] : first_items[row + 1]]
        assert (mine[:, 0] == row).all()
        begin = 0 if window is None else max(0, length - window)
        seen = np.concatenate([np.arange(a, b) for _, a, b, _ in mine] or [[]])
        assert np.array_equal(seen, np.arange(begin, length))
        assert (mine[:, 2] - mine[:, 1] <= split).all()
    counts = np.diff(first_items)
    assert is_one_per_row(items, first_items) == bool((counts == 1).all())


@given(contexts, st.none() | st.integers(1, 600), st.sampled_from([1, 2, 8, 32]))
def test_default_settings_can_be_launched(
    lengths: list[int], window: int | None, kv_heads: int
) -> None:
    settings = default_settings(np.array(lengths, np.int32), window, kv_heads, group=4)
    for value in settings:
        assert value > 0
        assert value & (value - 1) == 0  # powers of two, so that few texts and shapes occur
    assert settings.simdgroups * 32 <= 256


def test_a_long_context_among_short_ones_is_cut_finer() -> None:
    even = default_settings(np.full(64, 1536, np.int32), None, 8, 4)
    uneven = default_settings(np.array([1024] * 63 + [33792], np.int32), None, 8, 4)
    assert uneven.split < even.split


def test_enough_rows_of_like_contexts_are_not_cut() -> None:
    lengths = np.array([2000, 2048] * 8, np.int32)
    settings = default_settings(lengths, None, 8, 4)
    assert is_one_per_row(*plan_items(lengths, None, settings.split))
    for few in (lengths[:4], np.array([100] * 15 + [2048], np.int32)):
        settings = default_settings(few, None, 8, 4)
        assert not is_one_per_row(*plan_items(few, None, settings.split))


@given(st.integers(1, 10_000))
def test_buckets_are_few_and_near(count: int) -> None:
    size = pad_size(count)
    assert count <= size <= count * 1.25
    assert pad_size(size) == size
    sizes = {pad_size(n) for n in range(count, 2 * count)}
    assert len(sizes) <= 5
