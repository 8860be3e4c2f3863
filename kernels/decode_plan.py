"""How the contexts of a step's decodes are cut into work items of about equal length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from quire.kernels.padding import round_up_to_power_of_two
from quire.kernels.tree import Array, to_device

Int32Array = npt.NDArray[np.int32]

# Two for each of an H200's processors; four times as many where contexts are uneven, or the long
# rows' items are still running when all others have ended.
_WANTED_THREADGROUPS = 256
_UNEVEN = 1.5  # longest context over the mean
_UNEVEN_FACTOR = 4
_MIN_SPLIT, _MAX_SPLIT = 128, 4096  # tokens
_ONE_ITEM = 1536  # tokens of a context that one or two rows leave uncut
# With so many rows times key heads none is cut, as long as contexts are much the same.
_FILLING_THREADGROUPS = 128
_EVEN = 1.25
_UNCUT = 1 << 30
# Work items without tokens end at once: so many that their number hardly varies cost nothing.
_LEAST_ITEMS, _LEAST_SHARED_ITEMS = 64, 32


class DecodeSettings(NamedTuple):
    """What may be tuned; any values give the same result but for rounding."""

    simdgroups: int = 4  # of a threadgroup
    unroll_keys: int = 4  # loads of keys under way in each lane, a power of two
    split: int = 512  # tokens of one work item


class SharedPlan(NamedTuple):
    """What several rows begin with, on the host.

    Attributes:
        items: (M, 8) int32, ``shared_items`` of :class:`DecodePlan`.
        num_tokens: (B,) int32, how many tokens at the beginning of its context each row shares.
        num_parts: (B,) int32, into how many parts they are cut.
    """

    items: Int32Array
    num_tokens: Int32Array
    num_parts: Int32Array


@dataclass(frozen=True)
class DecodePlan:
    """How the rows of a step are cut into work items; a node of a :mod:`quire.kernels.tree`.

    Attributes:
        items: (N, 4) int32: row, first token and end of each item, those of a row together; and in
            how many parts that row's tokens before the first item are computed for several rows.
        first_items: (B + 1,) int32, where each row's items begin; None if item i is row i.
        simdgroups, unroll_keys: as in :class:`DecodeSettings`.
        shared_items: (M, 8) int32, parts of contexts that several rows begin with, as
            :mod:`quire.kernels.shared_context` computes them; None: there are none.
        most_shared_parts: of a row.
    """

    items: Array
    first_items: Array | None
    simdgroups: int = 4
    unroll_keys: int = 4
    shared_items: Array | None = None
    most_shared_parts: int = 0


def default_settings(
    context_lengths: Int32Array, window: int | None, kv_heads: int, group: int
) -> DecodeSettings:
    """Settings that did well on an H200 over a wide range of shapes.

    Nothing is known of Metal yet: there fewer loads are under way, which takes fewer registers.

    Args:
        context_lengths: (B,) int32
        group: query heads per key head.
    """
    lengths = context_lengths if window is None else np.minimum(context_lengths, window)
    unroll = 8 if group <= 4 and not mx.metal.is_available() else 4
    if len(lengths) <= 2 and lengths.max() <= _ONE_ITEM:
        # The host is the limit: no second kernel, and all the simdgroups that find registers.
        return DecodeSettings(simdgroups=8, unroll_keys=unroll, split=_UNCUT)
    unevenness = lengths.max() / max(1.0, lengths.mean())
    threadgroups = len(lengths) * kv_heads
    if threadgroups >= _FILLING_THREADGROUPS and unevenness <= _EVEN:
        per_processor = threadgroups // _FILLING_THREADGROUPS
        simdgroups = 8 if per_processor < 2 else 4 if per_processor < 4 else 2
        return DecodeSettings(simdgroups, unroll, _UNCUT)
    wanted = _WANTED_THREADGROUPS * (_UNEVEN_FACTOR if unevenness > _UNEVEN else 1)
    tokens = max(1, int(lengths.sum()) * kv_heads // wanted)
    split = min(round_up_to_power_of_two(tokens, _MIN_SPLIT), _MAX_SPLIT)
    return DecodeSettings(4, unroll, split)


def plan_items(
    context_lengths: Int32Array,
    window: int | None,
    split: int,
    shared: SharedPlan | None = None,
) -> tuple[Int32Array, Int32Array]:
    """Cut contexts, or the ends of them that a window shows, into items of at most ``split``.

    Args:
        context_lengths: (B,) int32, 0 for padding rows.
        shared: says which first tokens of rows to leave out; not with a window.

    Returns:
        items (N, 4) and first_items (B + 1,), as in :class:`DecodePlan`.
    """
    is_whole = window is None and shared is None
    if is_whole and 0 < context_lengths.min() <= context_lengths.max() <= split:
        # As most steps are; of small arrays numpy's calls cost more than their numbers.
        rows = np.arange(len(context_lengths) + 1, dtype=np.int32)
        items = np.zeros((len(context_lengths), 4), np.int32)
        items[:, 0], items[:, 2] = rows[:-1], context_lengths
        return items, rows
    begin = np.zeros_like(context_lengths) if shared is None else shared.num_tokens
    if window is not None:
        begin = np.maximum(context_lengths - window, 0)
    counts = -(-(context_lengths - begin) // split)
    first_items = np.zeros(len(counts) + 1, np.int32)
    np.cumsum(counts, out=first_items[1:])
    rows = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    starts = begin[rows] + (np.arange(len(rows)) - first_items[rows]) * split
    ends = np.minimum(starts + split, context_lengths[rows])
    parts = np.zeros_like(starts) if shared is None else shared.num_parts[rows]
    items = np.stack([rows, starts, ends, parts], axis=1).astype(np.int32)
    return items, first_items


def is_one_per_row(items: Int32Array, first_items: Int32Array) -> bool:
    """Whether item i is all of row i, so that there is nothing to merge."""
    return len(items) == len(first_items) - 1 and bool((np.diff(first_items) == 1).all())


def plan_rows(
    context_lengths: Int32Array,
    window: int | None,
    settings: DecodeSettings,
    shared: SharedPlan | None = None,
) -> DecodePlan:
    """A plan on the host, whose arrays have sizes that recur.

    Args:
        context_lengths: (B,) int32, 0 for padding rows.
        shared: what some of the rows share; not with a window.
    """
    items, first_items = plan_items(context_lengths, window, settings.split, shared)
    is_merged = not is_one_per_row(items, first_items)
    if is_merged:
        items = _pad(items, max(_LEAST_ITEMS, 4 * len(context_lengths)))
    return DecodePlan(
        items,
        first_items if is_merged else None,
        settings.simdgroups,
        settings.unroll_keys,
        None if shared is None else _pad(shared.items, _LEAST_SHARED_ITEMS),
        0 if shared is None else int(shared.num_parts.max()),
    )


def plan_on_device(
    context_lengths: Int32Array,
    window: int | None,
    settings: DecodeSettings,
    shared: SharedPlan | None = None,
) -> DecodePlan:
    """What :func:`plan_rows` says, uploaded."""
    return to_device(plan_rows(context_lengths, window, settings, shared))


def _pad(items: Int32Array, least: int) -> Int32Array:
    """With items without tokens, of a result that no row takes."""
    return np.pad(items, ((0, round_up_to_power_of_two(len(items), least) - len(items)), (0, 0)))
