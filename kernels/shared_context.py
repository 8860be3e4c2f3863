"""Decodes whose contexts begin alike read what they have in common once.

The queries of all rows that share their first blocks attend to these as rows of matrix products,
and the decode kernel adds what is each row's own (Hydragen: Juravsky et al., 2024).
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from quire.kernels.decode_plan import DecodePlan, SharedPlan
from quire.kernels.heads import Scoring
from quire.kernels.page_arrays import PageArrays
from quire.kernels.paged_decode import Partials
from quire.kernels.paged_prompt import TileItems, attend_tiles, tile_rows
from quire.kernels.ragged import SharedRun

_WANTED_THREADGROUPS = 256
# A shared context is cut into as many parts as fill the device, of no fewer tokens than this.
_MIN_PART = 64
_ALIGNMENT = 32  # tokens of which the kernel takes so many at a time


def plan_shared(runs: Sequence[SharedRun], num_rows: int, heads: int, kv_heads: int) -> SharedPlan:
    """How the shared tokens of ``runs`` are cut into work items for ``num_rows`` rows."""
    tiles = [
        tile_rows(np.array([(*run, run.first_row, 0)], np.int32), heads // kv_heads) for run in runs
    ]
    room = _WANTED_THREADGROUPS // (kv_heads * sum(map(len, tiles)))
    # Powers of two, so that compiled steps recur.
    parts = [_power_of_two(min(room, run.num_tokens // _MIN_PART)) for run in runs]
    num_tokens, num_parts = np.zeros(num_rows, np.int32), np.zeros(num_rows, np.int32)
    items = []
    for run, of_run, count in zip(runs, tiles, parts, strict=True):
        rows = slice(run.first_row, run.first_row + run.num_rows)
        num_tokens[rows], num_parts[rows] = run.num_tokens, count
        pieces = -(-run.num_tokens // _ALIGNMENT)
        bounds = np.minimum(np.arange(count + 1) * pieces // count * _ALIGNMENT, run.num_tokens)
        cut = np.repeat(of_run, count, axis=0)
        part = np.tile(np.arange(count), len(of_run))
        cut[:, 4], cut[:, 5] = bounds[part], bounds[part + 1]
        # A row's results lie together; tokens of an item are rows.
        cut[:, 6] = cut[:, 0] * max(parts) + part
        cut[:, 7] = max(parts)
        items.append(cut)
    return SharedPlan(np.concatenate(items), num_tokens, num_parts)


def _power_of_two(count: int) -> int:
    """The largest one of at most ``count``, and at least one."""
    return 1 << max(1, count).bit_length() - 1


def attend_shared(
    queries: mx.array,
    pages: PageArrays,
    block_tables: mx.array,
    plan: DecodePlan,
    scoring: Scoring,
) -> Partials | None:
    """Attention to the shared parts of contexts; None if ``plan`` has none.

    Args:
        queries: (B or more, heads, 1, key_dim), float16 or bfloat16 as the pages are; what else is
            not said here is as in :func:`quire.kernels.paged_decode.paged_decode`.

    Returns:
        Results for ``plan.most_shared_parts`` parts of each row; those that a row does not have
        are not computed.
    """
    if plan.shared_items is None:
        return None
    num_results = block_tables.shape[0] * plan.most_shared_parts
    items = TileItems(plan.shared_items, num_results, is_whole=False)
    # Sinks take part once, where the parts are merged.
    return Partials(*attend_tiles(queries, pages, block_tables, items, Scoring(scoring.scale)))
